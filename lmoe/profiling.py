"""A profiler trace of a few steps and a snapshot of CUDA allocations, both by flag."""

import contextlib
import logging

import torch

from lmoe.parallel.compat import dump_cuda_memory, record_cuda_memory

logger = logging.getLogger("lmoe")


class Tracer:
    """Traces steps trace_step to trace_step + 2 into folder/profile/trace-rankN.json (Perfetto,
    chrome://tracing)."""

    def __init__(self, folder, rank, trace_step):
        self.path = folder / "profile" / f"trace-rank{rank}.json"
        self.first = trace_step
        self.profiler = None

    def before(self, step):
        if self.first and step == self.first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.start()

    def after(self, step):
        if self.profiler is not None and step >= self.first + 2:
            self.stop()

    def stop(self):
        """Write the trace, of fewer steps where the run ends early."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.path))
            logger.info(f"wrote {self.path}")
            self.profiler = None


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
        path = folder / "profile" / f"memory-rank{rank}.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        dump_cuda_memory(path)
        record_cuda_memory(False)
        logger.info(f"wrote {path}")
