"""Reports of a run: a console line per log step, metrics.jsonl, TensorBoard."""

import contextlib
import json
import logging
import math
import os
import re
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lmoe.config import Config, to_toml
from lmoe.files import in_one_line, read_regular, write_atomic
from lmoe.folder import move_aside, set_aside
from lmoe.parallel.dims import Dims
from lmoe.parallel.stats import OnTheWay, loads

logger = logging.getLogger("lmoe")

# Steps that the host may launch before it waits for the end of the one before them: step k begins
# when step k - 2 has ended.
AHEAD = 1
PATIENCE = 5.0  # seconds for the device's last steps, where a run fails

# Dense bf16 peak, FLOP/s, by a part of the device's name (vendors' datasheets, SXM where there are
# several).
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}


def setup_logging(rank):
    """Rank 0 speaks; of the others only warnings are heard."""
    handler = logging.StreamHandler(sys.stdout)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    logging.raiseExceptions = False  # a console that is gone ends no run


def peak_flops(device):
    """Dense bf16 peak of the device, FLOP/s; None where it is not known (then no MFU is given)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def memory_gib(device):
    """Peak memory of this process: allocated on the GPU since the last call, or resident on the
    host."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Clock:
    """Marks a place in the device's work and tells when the device got there, which is later than
    the host has launched it. On the CPU that is at once."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def mark(self) -> torch.cuda.Event | float:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

    def reached(self, mark) -> bool:
        return not self.on_gpu or mark.query()

    def wait(self, mark) -> None:
        """Wait until the device is there; where it is already, nothing is asked of the driver but
        that."""
        if not self.reached(mark):
            mark.synchronize()

    def seconds(self, start, end) -> float:
        """The time between two marks that the device has reached."""
        return start.elapsed_time(end) / 1000 if self.on_gpu else end - start


class Throughput:
    """Tokens and FLOPs per second of the device's steps since the last reading; time spent in
    `pause` (validation, checkpoints) does not count."""

    def __init__(self, clock):
        self.clock = clock
        self._begin(clock.mark())

    def _begin(self, start):
        self.start = start
        self.seconds = 0.0  # before the last pause
        self.tokens = 0
        self.flops = 0.0

    def add(self, tokens, flops):
        self.tokens += tokens
        self.flops += flops

    @contextlib.contextmanager
    def pause(self):
        """Between steps: all those before it have been added."""
        now = self.clock.mark()
        self.clock.wait(now)
        self.seconds += self.clock.seconds(self.start, now)
        yield
        self.start = self.clock.mark()

    def read(self, end):
        """Return (tokens, FLOPs) per second up to the mark `end`."""
        seconds = max(self.seconds + self.clock.seconds(self.start, end), 1e-9)
        rates = self.tokens / seconds, self.flops / seconds
        self._begin(end)
        return rates


class Metrics:
    """Writes of rank 0. A resumed run drops the entries of steps that it is about to repeat, so
    every step stands there once; one that starts moves what an earlier run left aside.

    A write that fails is said once, and training goes on.
    """

    def __init__(self, folder, rank, *, tensorboard, resumed_step):
        self.file = self.writer = self.path = None
        if rank != 0:
            return
        self.path = Path(folder) / "metrics.jsonl"
        self.tensorboard = f"{folder}/tb" if tensorboard else None
        self.events = None  # the file of TensorBoard's writer
        self.purge_step = resumed_step + 1 if resumed_step else 0
        self.silent = set()  # what has failed and been said
        with self._going_on(self.path):
            if resumed_step:
                drop_repeated(self.path, resumed_step)
        if not resumed_step:
            set_aside(Path(folder))
        with self._going_on(self.path):
            self._open()

    def _open(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        self.file = os.open(self.path, flags, 0o644)

    def write(self, step, values):
        """values: name -> number, or a list for per-layer values (TensorBoard gets one curve
        each)."""
        if self.path is None:
            return
        # JSON has no number for a loss that is not finite: null
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        with self._going_on(self.path):
            if self.file is None:
                self._open()
            elif not os.fstat(self.file).st_nlink:
                os.close(self.file)
                self.file = None
                logger.warning(f"{self.path} was removed: made again")
                self._open()
            append_whole(self.file, (json.dumps({"step": step, **finite}) + "\n").encode())
        if self.tensorboard is not None:
            with self._going_on(self.tensorboard):
                self._write_curves(step, values)

    def _write_curves(self, step, values):
        if self.events is not None and not self.events.exists():
            # The writer's thread would end with a traceback.
            self.writer = self.events = None
            logger.warning(f"{self.tensorboard} was removed: made again")
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            quiet_tensorboard()
            self.writer = SummaryWriter(self.tensorboard, purge_step=self.purge_step)
            self.purge_step = None  # one made again, after its folder was removed, hides nothing
            files = Path(self.tensorboard).iterdir()
            self.events = max(files, key=lambda path: path.stat().st_mtime_ns)
        for name, value in values.items():
            if isinstance(value, list):
                for index, number in enumerate(value):
                    self.writer.add_scalar(f"{name}/layer{index}", number, step)
            elif value is not None:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    @contextlib.contextmanager
    def _going_on(self, path):
        try:
            yield
        except Exception as error:  # TensorBoard's thread raises what it likes
            if path == self.tensorboard:
                # Made again once: each writer leaves a thread behind.
                self.tensorboard = None if path in self.silent else path
                self.writer = self.events = None
            if path not in self.silent:
                logger.warning(
                    f"cannot write {path} ({in_one_line(error)}): training goes on without"
                )
            self.silent.add(path)

    def close(self):
        if self.file is not None:
            os.close(self.file)
            self.file = None
        if self.writer is not None:
            with self._going_on(self.tensorboard):
                self.writer.close()


def quiet_tensorboard():
    """Let its threads end without a traceback: what ended them is raised by the next write."""
    before = threading.excepthook

    def hook(end):
        if not type(end.thread).__module__.startswith("tensorboard."):
            before(end)

    hook.quiets = True
    if not hasattr(before, "quiets"):
        threading.excepthook = hook


def append_whole(file, data):
    """Append bytes to a file descriptor, or nothing of them where they do not all fit."""
    before = os.fstat(file).st_size
    try:
        written = os.write(file, data)
        while written < len(data):
            written += os.write(file, data[written:])
    except OSError:
        os.ftruncate(file, before)
        raise


def drop_repeated(path, last_step):
    """Leave the entries of steps up to last_step in metrics.jsonl; replaced whole, and only where
    there are others."""
    data = read_regular(path, None) if path.exists() else b""
    kept = []
    repeated = bad = 0
    first_bad = None
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)["step"]
            if type(step) is not int:
                raise TypeError
            later = step > last_step
        except (ValueError, TypeError, KeyError, RecursionError):
            # The last may have been cut off by the kill that this run resumes from.
            if number < len(lines) or line.endswith(b"\n"):
                bad += 1
                first_bad = first_bad or number
            continue
        repeated += later
        if not later:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
    if bad:
        logger.warning(
            f"{path}: {bad} lines are no entries and were dropped, the first {first_bad}"
        )
    if repeated:
        logger.info(f"{path}: dropped {repeated} entries after step {last_step}, which come again")
    if b"".join(kept) != data:
        write_atomic(path.resolve(), b"".join(kept))


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def console_line(step, steps, values, eta):
    """One line: progress, ETA and the values that people watch."""
    mfu = "-" if values["mfu"] is None else f"{100 * values['mfu']:.1f}%"
    text = (
        f"step {step}/{steps} ({100 * step / steps:.0f}%)  eta {duration(eta)}  loss"
        f" {values['loss']:.4f}  grad {values['grad_norm']:.3f}  lr {values['lr']:.2e} "
        f" {values['tokens_per_second']:,.0f} tok/s  mfu {mfu}  mem {values['memory_gib']:.2f} GiB"
    )
    if values.get("expert_load"):
        text += f"  load max/mean {max(values['expert_load']):.2f}"
    if values.get("rank_load"):
        text += f" of ranks {max(values['rank_load']):.2f}"
    if values["skipped_steps"]:
        text += f"  skipped {values['skipped_steps']:.0f}"
    return text


class Totals(NamedTuple):
    """The work of a run up to a step, over all of its resumptions; a checkpoint holds it.

    skipped_steps, skipped_in_a_row: steps that changed nothing, in all and up to now.
    """

    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    skipped_steps: float = 0.0
    skipped_in_a_row: float = 0.0

    @classmethod
    def of_checkpoint(cls, extra: dict) -> "Totals":
        """Read them from a checkpoint; one of an earlier version tells samples and tokens.
        ValueError where they are none."""
        if "totals" not in extra:
            samples = extra["data"]["position"]
            return cls(samples, samples * extra["data"]["seq_len"])
        given = extra["totals"]
        if not isinstance(given, dict) or not given.keys() <= set(cls._fields):
            raise ValueError("totals are no table of " + ", ".join(cls._fields))
        for name, value in given.items():
            kinds = (int,) if type(cls._field_defaults[name]) is int else (int, float)
            if type(value) not in kinds or not 0 <= value < 1e40:
                raise ValueError(f"totals.{name} is no count")
        return cls(**given)


def write_config(path: Path, config: Config) -> None:
    """Write the configuration of a run, beside which one that a user wrote is set aside."""
    try:
        if path.exists() and not _is_written(path):
            aside = move_aside([path])
            logger.warning(f"{path} was not written by a run: it is now in {aside}")
        write_atomic(path.resolve(), to_toml(config).encode())
        logger.info(f"its configuration: {path}")
    except OSError as error:
        logger.warning(f"cannot write {path} ({in_one_line(error)}): training goes on without")


def _is_written(path: Path) -> bool:
    """Tell whether a run, maybe of an earlier version, wrote a config.toml: without comments."""
    text = read_regular(path)
    return text.startswith(b"[job]\n") and b"#" not in re.sub(rb'"[^"\n]*"', b"", text)


class Sent(NamedTuple):
    """A step that the host has launched. values: of add(), which are there once the device has
    reached `end`; logged: an entry is wanted; memory: GiB at the most since the last such step."""

    step: int
    lr: float
    flops: float
    values: OnTheWay
    routers: list[str]
    end: torch.cuda.Event | float
    logged: bool
    memory: float | None


class StepLog:
    """Say what runs and what its steps give: config.toml, metrics.jsonl, TensorBoard, the console.

    The host launches steps ahead of the device. What a step gives travels behind it and is written
    while the next one runs: add() each step, then catch_up().

    size: count_parameters of the whole model; flops: of a token of a full row, forward and
    backward; start: the step that the run goes on from, totals: up to it.
    """

    def __init__(
        self,
        config: Config,
        dims: Dims,
        size: dict[str, int],
        flops: float,
        start: int,
        totals: Totals,
    ):
        folder = Path(config.job.folder)
        self.steps = config.training.steps
        self.device = dims.device
        self.ep = dims.ep
        self.samples = config.training.global_batch_size  # of a step
        self.tokens = self.samples * config.data.seq_len
        peak = peak_flops(dims.device)
        self.peak = peak and peak * dims.world
        self.totals = totals  # up to the last step that was caught up with
        self.limit = config.training.max_skipped_steps
        self.skipped = [
            torch.tensor(float(n), dtype=torch.float64, device=dims.device)
            for n in (totals.skipped_steps, totals.skipped_in_a_row)
        ]
        self.sent = deque()
        microbatches = self.samples // (config.training.batch_size * dims.data_world)
        logger.info(
            f"{size['total']:,} parameters, {size['active']:,} active (body {size['body']:,},"
            f" active {size['active_body']:,}); {dims.world} ranks; {self.tokens:,} tokens a step"
            f" in {microbatches} microbatches; {flops / 1e9:.4f} GFLOP a token"
        )
        tensorboard = config.metrics.tensorboard
        self.metrics = Metrics(folder, dims.rank, tensorboard=tensorboard, resumed_step=start)
        if dims.rank == 0:
            write_config(folder / "config.toml", config)
        self.clock = Clock(dims.device)
        self.throughput = Throughput(self.clock)

    def add(self, step: int, lr: float, flops: float, result: tuple, logged: bool) -> None:
        """Count a step of `flops` in all and send its `result`, of train_step, on its way; logged:
        it gets an entry. The host does not wait."""
        losses, counts, norm, skipped = result
        total, in_a_row = self.skipped
        self.skipped = [total + skipped, (in_a_row + 1) * skipped]
        values = {"skipped": torch.stack(self.skipped), "grad_norm": norm, **losses, **counts}
        values = OnTheWay(values)
        memory = memory_gib(self.device) if logged else None
        mark = self.clock.mark()
        self.sent.append(Sent(step, lr, flops, values, list(counts), mark, logged, memory))

    def catch_up(self, ahead: int = AHEAD, measure: Callable[[], dict] | None = None) -> int | None:
        """Write the entries of all steps but the last `ahead`, until the device has ended which the
        host waits: so far it may be ahead. measure(): a validation after the last step, whose
        values go into its entry.

        Returns the step at which training.max_skipped_steps were skipped in a row, on every rank in
        the same call, or None. Then nothing follows: all is written, and nothing measured.
        """
        lost = None
        while len(self.sent) > (0 if lost else ahead):
            self.clock.wait(self.sent[0].end)
            sent, values = self._receive()
            if self.limit and self.totals.skipped_in_a_row >= self.limit:
                lost = lost or sent.step
            measured = {}
            try:
                if measure and not self.sent and not lost:
                    measured = measure()
            finally:
                if sent.logged:
                    self.write(sent.step, values, measured)
        return lost

    def flush(self) -> None:
        """Write, where a run fails, the entries of the steps that the device still ends, for which
        this waits a few seconds at most: those of a rank that is gone never end."""
        end = time.monotonic() + PATIENCE
        with contextlib.suppress(Exception):  # of a device that has failed
            while self.sent:
                while not self.clock.reached(self.sent[0].end):
                    if time.monotonic() > end:
                        return
                    time.sleep(0.01)
                sent, values = self._receive()
                if sent.logged:
                    self.write(sent.step, values, {})

    def _receive(self) -> tuple[Sent, dict]:
        """(the first step on its way, its values where it is logged)."""
        sent = self.sent.popleft()
        given = sent.values.read()
        counts = {name: given.pop(name) for name in sent.routers}
        total, in_a_row = given.pop("skipped").tolist()
        norm = given.pop("grad_norm").item()
        self.throughput.add(self.tokens, sent.flops)
        self.totals = Totals(
            self.totals.samples + self.samples,
            self.totals.tokens + self.tokens,
            self.totals.flops + sent.flops,
            total,
            in_a_row,
        )
        if not sent.logged:
            return sent, {}
        values = {name: loss.item() for name, loss in given.items()}
        values |= {"grad_norm": norm, "lr": sent.lr}
        values["tokens_per_second"], flops = self.throughput.read(sent.end)
        values["mfu"] = flops / self.peak if self.peak else None
        values["memory_gib"] = sent.memory
        return sent, values | self.totals._asdict() | loads(counts, self.ep)

    def write(self, step: int, values: dict, measured: dict) -> None:
        """Write the values of a step and of a validation after it (either may be empty)."""
        self.metrics.write(step, values | measured)
        line = f"step {step}"
        if values:
            eta = (self.steps - step) * self.tokens / values["tokens_per_second"]
            line = console_line(step, self.steps, values, eta)
        logger.info(line + "".join(f"  {name} {value:.4f}" for name, value in measured.items()))

    def close(self) -> None:
        self.metrics.close()
