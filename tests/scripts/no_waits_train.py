"""train.py whose steady steps are looked at, for tests/test_no_waits.py: every rank leaves a trace
of two of them in the folder WAITS, and what torch knows to wait for the device is an error there.

The steps lie in the range `steady` of the trace; what is outside belongs to the profiler.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())

import torch  # noqa: E402

import train  # noqa: E402

FIRST, LAST = 6, 7  # compiled and warm


class Sieve:
    """In place of lmoe.profiling.Tracer."""

    def __init__(self, folder, rank, trace_step):
        self.path = Path(os.environ["WAITS"]) / f"rank{rank}.json"
        self.on_gpu = torch.cuda.is_available()

    def before(self, step):
        if step == FIRST:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
            if self.on_gpu:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            self.window = torch.profiler.record_function("steady")
            self.window.__enter__()

    def after(self, step):
        if step == LAST:
            self.window.__exit__(None, None, None)
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.path))

    def stop(self):
        pass


train.Tracer = Sieve
train.main(sys.argv[1:])
