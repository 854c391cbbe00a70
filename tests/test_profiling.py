"""A trace and a snapshot that can't be written cost a warning, not the run."""

import logging
import resource
import shutil
import signal

import pytest
import torch

from lmoe import profiling
from lmoe.profiling import Tracer, memory_snapshot


@pytest.fixture
def small_files():
    """No file may grow beyond 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def trace(folder, caplog):
    caplog.set_level(logging.INFO, "lmoe")
    tracer = Tracer(folder, 0, 1)
    for step in (1, 2, 3):
        tracer.before(step)
        torch.randn(8).sum()
        tracer.after(step)
    (record,) = caplog.records
    return record


def test_a_trace_is_written(tmp_path, caplog):
    assert trace(tmp_path, caplog).getMessage() == f"wrote {tmp_path}/profile/trace-rank0.json"
    shutil.rmtree(tmp_path)  # as a run's folder may go
    caplog.clear()
    assert trace(tmp_path, caplog).levelname == "INFO"


@pytest.mark.parametrize("there", ["file", "folder"])
def test_no_place_for_a_trace(there, tmp_path, caplog):
    if there == "file":
        (tmp_path / "profile").write_text("x")
    else:
        (tmp_path / "profile" / "trace-rank0.json").mkdir(parents=True)
    record = trace(tmp_path, caplog)
    assert record.levelname == "WARNING" and "trace-rank0.json was not written: " in record.message
    assert "\n" not in record.message


def test_a_full_disk(tmp_path, caplog, small_files):
    record = trace(tmp_path, caplog)
    assert record.levelname == "WARNING" and "no room" in record.message


def test_the_snapshot_hides_no_error(tmp_path, caplog, monkeypatch):
    """The error of the run goes on, and recording ends."""
    on = []
    monkeypatch.setattr(profiling, "record_cuda_memory", on.append)
    monkeypatch.setattr(profiling, "dump_cuda_memory", lambda path: path.write_bytes(b"x"))
    (tmp_path / "profile").write_text("x")
    with pytest.raises(KeyError), memory_snapshot(tmp_path, 0, True):
        raise KeyError
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "memory-rank0.pickle was not" in record.message
    assert on == [True, False]
