"""What a run says of itself: throughput, files of a resumed run, the console line."""

import json
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmoe import metrics
from lmoe.config import load_config, to_toml
from lmoe.metrics import (
    Metrics,
    Throughput,
    Totals,
    console_line,
    duration,
    peak_flops,
    quiet_tensorboard,
    write_config,
)

ROOT = Path(__file__).resolve().parent.parent


def test_throughput_leaves_out_pauses_and_starts_anew(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    throughput = Throughput()
    for seconds in (1.0, 3.0):
        now[0] += seconds
        throughput.add(100, 1000.0)
    with throughput.pause():
        now[0] += 50.0
    assert throughput.read() == pytest.approx((200 / 4, 2000 / 4))
    now[0] += 2.0
    throughput.add(100, 10.0)
    assert throughput.read() == pytest.approx((50, 5))


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
