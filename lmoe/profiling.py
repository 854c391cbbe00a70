"""A profiler trace of a few steps and a snapshot of CUDA allocations, both by flag."""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from lmoe.files import in_one_line
from lmoe.parallel.compat import dump_cuda_memory, record_cuda_memory

logger = logging.getLogger("lmoe")


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file of profile/, or say why not: a full disk or a folder that is gone costs the
    file, not the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except Exception as error:
        logger.warning(f"{path} was not written: {in_one_line(error)}")
    else:
        logger.info(f"wrote {path}")


class Tracer:
    """Traces steps trace_step to trace_step + 2 into folder/profile/trace-rankN.json (Perfetto,
    chrome://tracing)."""

    def __init__(self, folder, rank, trace_step):
        self.path = folder / "profile" / f"trace-rank{rank}.json"
        self.first = trace_step
        self.profiler = None

    def before(self, step):
        if self.first and step == self.first:
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.start()

    def after(self, step):
        if self.profiler is not None and step >= self.first + 2:
            self.stop()

    def stop(self):
        """Write the trace, of fewer steps where the run ends early."""
        if self.profiler is not None:
            self.profiler.stop()
            _write(self.path, self._export)
            self.profiler = None

    def _export(self, path):
        path.unlink(missing_ok=True)
        self.profiler.export_chrome_trace(str(path))
        if not _ends_well(path):  # about which the exporter says nothing
            path.unlink(missing_ok=True)
            raise OSError("there was no room for all of it")


def _ends_well(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - 16, 0))
        return file.read().rstrip().endswith(b"}")


@contextlib.contextmanager
def memory_snapshot(folder, rank, enabled):
    """Record CUDA allocations and write them at the end or on an error
    (https://pytorch.org/memory_viz reads them)."""
    if not enabled:
        yield
        return
    record_cuda_memory(True)
    try:
        yield
    finally:
        _write(folder / "profile" / f"memory-rank{rank}.pickle", dump_cuda_memory)
        record_cuda_memory(False)
