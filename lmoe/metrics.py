"""Reports of a run: a console line per log step, metrics.jsonl, TensorBoard."""

import contextlib
import json
import logging
import math
import resource
import sys
import time
from pathlib import Path

import torch

from lmoe.config import Config, to_toml
from lmoe.parallel.dims import Dims
from lmoe.parallel.stats import loads

logger = logging.getLogger("lmoe")

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


class Throughput:
    """Tokens per second over the steps since the last reading; time spent in `pause` (validation,
    checkpoints) does not count."""

    def __init__(self):
        self.start = time.perf_counter()
        self.tokens = 0

    def add(self, tokens):
        self.tokens += tokens

    @contextlib.contextmanager
    def pause(self):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # steps still under way on the GPU are no part of the pause
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began

    def read(self):
        now = time.perf_counter()
        rate = self.tokens / max(now - self.start, 1e-9)
        self.start = now
        self.tokens = 0
        return rate


class Metrics:
    """Writes of rank 0. A resumed run drops the entries of steps that it is about to repeat, so
    every step stands there once."""

    def __init__(self, folder, rank, *, tensorboard, resumed_step):
        self.file = self.writer = None
        if rank != 0:
            return
        path = Path(folder) / "metrics.jsonl"
        kept = []
        if path.exists() and resumed_step:
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # cut off by the kill that this run resumes from
                if entry["step"] <= resumed_step:
                    kept.append(line + "\n")
        path.write_text("".join(kept))
        self.file = path.open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = resumed_step + 1 if resumed_step else 0
            self.writer = SummaryWriter(f"{folder}/tb", purge_step=purge_step)

    def write(self, step, values):
        """values: name -> number, or a list for per-layer values (TensorBoard gets one curve
        each)."""
        if self.file is None:
            return
        # JSON has no number for a loss that is not finite: null
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, list):
                    for index, number in enumerate(value):
                        self.writer.add_scalar(f"{name}/layer{index}", number, step)
                elif value is not None:
                    self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def close(self):
        for file in (self.file, self.writer):
            if file is not None:
                file.close()


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
    if values["skipped_steps"]:
        text += f"  skipped {values['skipped_steps']:.0f}"
    return text


class StepLog:
    """Say what runs and what its steps give: config.toml, metrics.jsonl, TensorBoard, the console.

    size: count_parameters of the whole model; flops: of a token, forward and backward; start: the
    step that the run goes on from.
    """

    def __init__(self, config: Config, dims: Dims, size: dict[str, int], flops: int, start: int):
        folder = config.job.folder
        self.steps = config.training.steps
        self.device = dims.device
        rows = config.training.global_batch_size
        self.tokens = rows * config.data.seq_len  # of a step
        peak = peak_flops(dims.device)
        self.peak = peak and peak * dims.world / flops  # tokens per second
        self.skipped = torch.zeros((), dtype=torch.float64, device=dims.device)
        if dims.rank == 0:
            (Path(folder) / "config.toml").write_text(to_toml(config))
            print(to_toml(config), flush=True)
        microbatches = rows // (config.training.batch_size * dims.data_world)
        logger.info(
            f"{size['total']:,} parameters, {size['active']:,} active (body {size['body']:,},"
            f" active {size['active_body']:,}); {dims.world} ranks; {self.tokens:,} tokens a step"
            f" in {microbatches} microbatches; {flops / 1e9:.4f} GFLOP a token"
        )
        tensorboard = config.metrics.tensorboard
        self.metrics = Metrics(folder, dims.rank, tensorboard=tensorboard, resumed_step=start)
        self.throughput = Throughput()

    def add(self, skipped: torch.Tensor) -> None:
        """Count a step; skipped: 1.0 where it changed nothing, on the device."""
        self.skipped += skipped
        self.throughput.add(self.tokens)

    def read(self, step: int, lr: float, losses: dict, counts: dict, norm: torch.Tensor) -> dict:
        """Fetch what train_step returned of step `step` from the device."""
        values = {name: loss.item() for name, loss in losses.items()}
        values |= {"grad_norm": norm.item(), "lr": lr, "tokens": step * self.tokens}
        rate = values["tokens_per_second"] = self.throughput.read()
        values["mfu"] = rate / self.peak if self.peak else None
        values["memory_gib"] = memory_gib(self.device)
        return values | {"skipped_steps": self.skipped.item()} | loads(counts)

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
