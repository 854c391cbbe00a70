"""What a run says of itself: throughput, files of a resumed run, the console line."""

import functools
import json
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmoe import metrics
from lmoe.config import load_config, to_toml
from lmoe.metrics import (
    AHEAD,
    Metrics,
    StepLog,
    Throughput,
    Totals,
    console_line,
    duration,
    peak_flops,
    quiet_tensorboard,
    write_config,
)

ROOT = Path(__file__).resolve().parent.parent


class SlowDevice:
    """Stands in for metrics.Clock. A mark is the time when the device gets there: `busy` seconds of
    work are launched, then a mark. The host's time passes only where it waits."""

    def __init__(self, device=None):
        self.now = self.ends = 0.0
        self.waits = []

    def work(self, seconds):
        self.ends = max(self.ends, self.now) + seconds

    def mark(self):
        return max(self.ends, self.now)

    def reached(self, mark):
        return mark <= self.now

    def wait(self, mark):
        self.waits.append(mark)
        self.now = max(self.now, mark)

    def seconds(self, start, end):
        assert max(start, end) <= self.now
        return end - start


def test_throughput_leaves_out_pauses_and_starts_anew():
    device = SlowDevice()
    throughput = Throughput(device)
    for seconds in (1.0, 3.0):
        device.work(seconds)
        throughput.add(100, 1000.0)
    for seconds in (50.0, 7.0):
        with throughput.pause():
            device.now += seconds
    end = device.mark()
    assert throughput.read(end) == pytest.approx((200 / 4, 2000 / 4))
    device.work(2.0)
    throughput.add(100, 10.0)
    end = device.mark()
    device.work(9.0)  # of a step that the host has launched by now
    device.wait(end)
    assert throughput.read(end) == pytest.approx((50, 5))


def make_log(folder, *words, device="cpu", totals=None):
    """A StepLog of one rank's steps of 100 tokens."""
    common = [f"--job.folder={folder}", "--training.steps=9", "--metrics.tensorboard=false"]
    common += ["--data.seq_len=50", "--training.global_batch_size=2", "--training.batch_size=1"]
    dims = SimpleNamespace(device=torch.device(device), rank=0, world=1, data_world=1, ep=1)
    size = dict.fromkeys(("total", "active", "body", "active_body"), 0)
    return StepLog(load_config([*common, *words]), dims, size, 1.0, 0, totals or Totals())


@pytest.fixture
def step_log(tmp_path, monkeypatch):
    """make_log in tmp_path, on a slow device."""
    monkeypatch.setattr(metrics, "Clock", SlowDevice)
    return functools.partial(make_log, tmp_path)


def result(step, skipped=0.0, device="cpu"):
    """Make what train_step gives: one router, whose second expert has `step` times the first's."""
    losses = {"loss": torch.tensor(1 / step).double(), "z_loss": torch.tensor(0.25).double()}
    counts = {"0.ffn": torch.tensor([1.0, step]).double()}
    losses, counts = ({k: t.to(device) for k, t in x.items()} for x in (losses, counts))
    return losses, counts, *(torch.tensor(x, device=device) for x in (float(step), skipped))


def launch(log, step, skipped=0.0, logged=True, seconds=1.0):
    log.clock.work(seconds)
    log.add(step, 0.5, 10.0, result(step, skipped), logged)


def test_a_step_is_written_while_the_next_one_runs(step_log, tmp_path, caplog):
    """In order, once and whole; the host waits for no step but the one before the last."""
    caplog.set_level("INFO", "lmoe")
    log = step_log()
    for step in range(1, 6):
        launch(log, step, logged=step != 4)
        assert log.catch_up() is None
        assert len(entries(tmp_path)) == min(step - 1, 3) and log.clock.now == step - 1
    measured = log.catch_up(0, lambda: {"validation_loss": float(len(log.sent))})
    assert measured is None and log.catch_up(0) is None and log.clock.now == 5
    written = entries(tmp_path)
    assert [e["step"] for e in written] == [1, 2, 3, 5]
    for e in written:
        step = e["step"]
        lost = {"skipped_steps": 0.0, "skipped_in_a_row": 0.0}
        sums = {"samples": 2 * step, "tokens": 100 * step, "flops": 10.0 * step}
        load = {"expert_load": [pytest.approx(2 * step / (1 + step))]}
        given = {"loss": pytest.approx(1 / step), "z_loss": 0.25, "grad_norm": step, "lr": 0.5}
        given |= {"mfu": None, "tokens_per_second": 100.0, "memory_gib": e["memory_gib"]}
        extra = {"validation_loss": 0.0} if step == 5 else {}
        assert e == {"step": step} | given | lost | sums | load | extra
    said = [m for m in caplog.messages if m.startswith("step ")]
    assert [m.split("/")[0] for m in said] == [f"step {step}" for step in (1, 2, 3, 5)]


def test_rates_are_the_device_s(step_log, tmp_path):
    """Rates are of the steps up to the one that is written, not of those launched since; a pause
    counts for none."""
    log = step_log()
    launch(log, 1, seconds=4.0)
    launch(log, 2, seconds=1.0, logged=False)
    log.catch_up(0)
    with log.throughput.pause():
        log.clock.now += 1000.0
    launch(log, 3, seconds=1.0)
    launch(log, 4, seconds=64.0)
    log.catch_up()
    log.catch_up(0)
    rates = [e["tokens_per_second"] for e in entries(tmp_path)]
    assert rates == pytest.approx([25, 100, 100 / 64])


def test_skipped_steps_are_counted_where_the_device_finds_them(step_log, tmp_path):
    skips = [1, 1, 0, 1, 1, 1, 0, 1]

    def first_over(limit, skips, ahead=AHEAD, **start):
        log = step_log(f"--training.max_skipped_steps={limit}", totals=Totals(**start))
        measured = []
        for step, skip in enumerate(skips, 1):
            launch(log, step, float(skip))
            lost = log.catch_up(ahead, lambda: measured.append(0) or {})
            if lost is not None:
                assert not log.sent and entries(tmp_path)[-1]["step"] == step  # all is written
                assert len(measured) == (0 if ahead else step - 1)  # but not of a lost run
                return step, lost, log
        log.catch_up(0)
        return None, None, log

    assert first_over(3, skips)[:2] == (6 + AHEAD, 6)
    assert first_over(3, skips, 0)[:2] == (6, 6)
    _, _, log = first_over(4, skips)
    assert log.totals.skipped_steps == 6 and log.totals.skipped_in_a_row == 1
    assert first_over(0, [1] * 50)[1] is None
    _, lost, log = first_over(3, [1, 1, 1], skipped_steps=9.0, skipped_in_a_row=2.0)
    assert lost == 1 and log.totals.skipped_steps == 11  # with the one launched after it


def test_a_validation_that_fails_costs_no_entry(step_log, tmp_path):
    log = step_log()
    launch(log, 1)
    with pytest.raises(KeyError):
        log.catch_up(0, lambda: {}["nothing"])
    assert [e["step"] for e in entries(tmp_path)] == [1]


def test_a_run_that_fails_writes_what_its_device_ends(step_log, tmp_path, monkeypatch):
    log = step_log()
    monkeypatch.setattr(metrics, "PATIENCE", 0.05)
    for step in (1, 2, 3):
        launch(log, step)
    log.clock.now = 2.0  # the third never ends: a rank is gone
    log.flush()
    assert [e["step"] for e in entries(tmp_path)] == [1, 2]
    log.clock.reached = lambda mark: 1 / 0  # as an error of the device
    log.flush()
    del log.clock.reached
    log.clock.now = 3.0
    log.flush()
    log.flush()
    assert [e["step"] for e in entries(tmp_path)] == [1, 2, 3]


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder, name):
    events = EventAccumulator(str(folder / "tb")).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def write(folder, steps, value, resumed_step):
    writer = Metrics(folder, 0, tensorboard=True, resumed_step=resumed_step)
    for step in steps:
        writer.write(step, {"loss": value, "expert_load": [1.0, value], "mfu": None})
    writer.close()


def test_a_resumed_run_has_every_step_once(tmp_path):
    write(tmp_path, range(1, 6), 2.0, 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed here
    write(tmp_path, range(4, 7), 3.0, 3)
    assert [(e["step"], e["loss"]) for e in entries(tmp_path)] == [
        (s, 2.0 if s <= 3 else 3.0) for s in range(1, 7)
    ]
    assert curve(tmp_path, "loss") == {s: 2.0 if s <= 3 else 3.0 for s in range(1, 7)}
    assert curve(tmp_path, "expert_load/layer1")[6] == 3.0


def test_a_run_without_a_checkpoint_sets_the_earlier_one_aside(tmp_path):
    write(tmp_path, range(1, 6), 2.0, 0)
    write(tmp_path, range(1, 3), 3.0, 0)
    assert [(e["step"], e["loss"]) for e in entries(tmp_path)] == [(1, 3.0), (2, 3.0)]
    assert curve(tmp_path, "loss") == {1: 3.0, 2: 3.0}
    assert len(entries(tmp_path / "earlier-1")) == 5
    assert len(curve(tmp_path / "earlier-1", "loss")) == 5


BAD = [
    '{"step": 2, "lo',
    "null",
    "[1]",
    '{"loss": 1}',
    '{"step": "2"}',
    '{"step": NaN}',
    '{"step": true}',
    "\x80\udc80",
    "[" * 9999,
    "",
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_reported_and_no_refusal(tmp_path, caplog, bad):
    path = tmp_path / "metrics.jsonl"
    good = [f'{{"step": {step}}}\n'.encode() for step in range(1, 5)]
    line = bad.encode("utf-8", "surrogateescape") + b"\n"
    path.write_bytes(b"".join([*good[:2], line, *good[2:]]))
    Metrics(tmp_path, 0, tensorboard=False, resumed_step=3).close()
    assert path.read_bytes() == b"".join(good[:3])
    assert f"{path}: 1 lines are no entries and were dropped, the first 3" in caplog.text
    before = path.stat().st_ino
    Metrics(tmp_path, 0, tensorboard=False, resumed_step=3).close()
    assert path.stat().st_ino == before  # nothing to drop, nothing rewritten


def test_a_kill_while_metrics_are_rewritten_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path, range(1, 6), 2.0, 0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Metrics(tmp_path, 0, tensorboard=False, resumed_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_threads_of_tensorboard_end_without_a_traceback(capfd):
    class Worker(threading.Thread):
        def run(self):
            raise OSError("no room")

    before = threading.excepthook
    try:
        threading.excepthook = threading.__excepthook__
        for module in ("tensorboard.summary.writer", "elsewhere"):
            quiet_tensorboard()
            Worker.__module__ = module
            thread = Worker()
            thread.start()
            thread.join()
            assert ("no room" in capfd.readouterr().err) == (module == "elsewhere")
    finally:
        threading.excepthook = before


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, caplog):
    metrics = Metrics(tmp_path, 0, tensorboard=True, resumed_step=0)
    metrics.write(1, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
    try:
        for step in (2, 3, 4):
            metrics.write(step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    metrics.write(5, {"loss": 1.0})
    metrics.close()
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 5]  # and no half of a line
    assert len([m for m in caplog.messages if "metrics.jsonl" in m]) == 1


def test_curves_go_on_where_their_folder_was_removed(tmp_path, caplog):
    metrics = Metrics(tmp_path, 0, tensorboard=True, resumed_step=0)
    metrics.write(1, {"loss": 1.0})
    shutil.rmtree(tmp_path / "tb")
    for step in (2, 3, 4):
        metrics.write(step, {"loss": 1.0})
    (tmp_path / "tb").rename(tmp_path / "other")
    (tmp_path / "tb").touch()  # nothing can be written any more
    for step in (5, 6):
        metrics.write(step, {"loss": 1.0})
    metrics.close()
    assert len(entries(tmp_path)) == 6
    (tmp_path / "tb").unlink()
    (tmp_path / "other").rename(tmp_path / "tb")
    assert 4 in curve(tmp_path, "loss")
    said = [m for m in caplog.messages if "tb" in m]
    assert ["made again" in m for m in said] == [True, True, False]  # twice removed
    assert "cannot write" in said[2]


def test_metrics_go_on_where_they_were_removed(tmp_path, caplog, capfd):
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = Metrics(folder, 0, tensorboard=True, resumed_step=0)
    metrics.write(1, {"loss": 1.0})
    shutil.rmtree(folder)
    for step in (2, 3):
        metrics.write(step, {"loss": 1.0})
    metrics.close()
    assert [entry["step"] for entry in entries(folder)] == [2, 3]
    assert set(curve(folder, "loss")) == {2, 3}
    assert [m for m in caplog.messages] == [
        f"{folder}/{name} was removed: made again" for name in ("metrics.jsonl", "tb")
    ]
    assert "Traceback" not in capfd.readouterr().err


def test_what_metrics_are_a_link_to_is_what_is_rewritten(tmp_path):
    write(tmp_path, range(1, 6), 2.0, 0)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "elsewhere")
    (tmp_path / "metrics.jsonl").symlink_to("elsewhere")
    write(tmp_path, range(4, 5), 3.0, 3)
    assert (tmp_path / "metrics.jsonl").is_symlink() and len(entries(tmp_path)) == 4


def test_a_configuration_that_a_user_wrote_is_set_aside(tmp_path, caplog):
    config = load_config(["--config=train_configs/debug.toml", "--job.folder=a#b"])
    path = tmp_path / "config.toml"
    for text in ("# mine\n[job]\n", "[model]\n", to_toml(config).replace("1\n", "1 # mine\n", 1)):
        path.write_text(text)
        write_config(path, config)
        write_config(path, config)
        assert path.read_text() == to_toml(config)
    aside = sorted(tmp_path.glob("earlier-*/config.toml"))
    assert len(aside) == 3 and aside[0].read_text() == "# mine\n[job]\n"


def test_a_console_that_is_gone_ends_no_run(tmp_path):
    code = (
        "import os, sys; from lmoe.metrics import logger, setup_logging; setup_logging(0)\n"
        "for _ in range(3): logger.info('x' * 100000)\nprint('went on', file=sys.stderr)"
    )
    command = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "went on\n" and done.returncode == 0, done.stderr


def test_totals_of_a_checkpoint_and_of_one_of_an_earlier_version():
    totals = Totals(8, 512, 1e9, 3.0, 1.0)
    assert Totals.of_checkpoint({"totals": totals._asdict()}) == totals
    old = {"data": {"position": 8, "seq_len": 64}}
    assert Totals.of_checkpoint(old) == Totals(8, 512)


def test_only_rank_0_writes(tmp_path):
    writer = Metrics(tmp_path, 1, tensorboard=True, resumed_step=0)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_the_console_line():
    values = {
        "loss": 1.23456,
        "grad_norm": 0.5,
        "lr": 3e-4,
        "tokens_per_second": 12345.6,
        "mfu": 0.4321,
        "memory_gib": 1.5,
    }
    line = console_line(
        50, 200, values | {"expert_load": [1.25, 2.5], "skipped_steps": 2.0}, eta=3725
    )
    for part in (
        "step 50/200 (25%)",
        "eta 1h02m",
        "loss 1.2346",
        "grad 0.500",
        "lr 3.00e-04",
        "12,346 tok/s",
        "mfu 43.2%",
        "mem 1.50 GiB",
    ):
        assert part in line, part
    assert "load max/mean 2.50" in line and "skipped 2" in line
    line = console_line(50, 200, values | {"mfu": None, "skipped_steps": 0.0}, eta=59)
    assert "mfu -" in line and "eta 0m59s" in line and "load" not in line and "skipped" not in line


def test_durations():
    assert [duration(s) for s in (0, 61.9, 3599, 3600)] == ["0m00s", "1m01s", "59m59s", "1h00m"]


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Some GPU", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    metrics = Metrics(tmp_path, 0, tensorboard=False, resumed_step=0)
    metrics.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": 0.5,
    }
