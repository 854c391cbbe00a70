"""Where the threads of this process are, and what an exception was: for the lines of the
watchdog."""

import os
import re
import sys
import threading
import traceback

import torch.distributed as dist


def place():
    """(whether the main thread is inside torch.distributed, where it is: its innermost line outside
    of torch)."""
    innermost = sys._current_frames()[threading.main_thread().ident]
    collective = False
    for frame, _ in traceback.walk_stack(innermost):
        file = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in file:
            break
        collective |= f"{os.sep}torch{os.sep}distributed{os.sep}" in file
        # lmoe's own are ops, of which Python sees the call alone: lmoe/parallel/compat.py, and code
        # that torch.compile wrote.
        if file.endswith(f"{os.sep}_ops.py"):
            collective |= "c10d_functional" in str(frame.f_locals.get("self"))
    place = f"at {os.path.basename(file)}:{frame.f_lineno}"
    return collective, f"{place} ({innermost.f_code.co_name})"


def stacks():
    """Every thread's stack, innermost line first. Reads no source files: a file system that hangs
    may be why we are here."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, innermost in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        lines.append(f"  thread {names.get(ident, ident)}:")
        for frame, line in traceback.walk_stack(innermost):
            lines.append(
                f'    File "{frame.f_code.co_filename}", line {line} in {frame.f_code.co_name}'
            )
    return "\n".join(lines)


def origin(exception):
    """The exception itself: torch's pipelining wraps what a stage raises in a RuntimeError that
    tells the shapes of its tensors."""
    pipelining = f"{os.sep}pipelining{os.sep}"
    while exception.__cause__ is not None and pipelining in _raised_at(exception).filename:
        exception = exception.__cause__
    return exception


def in_one_line(exception):
    """Type and message, or what stands in for one: the line that raised it."""
    lines = [line.strip() for line in str(exception).splitlines() if line.strip()]
    if not lines:
        at = _raised_at(exception)
        lines = [f"no message, at {os.path.basename(at.filename)}:{at.lineno} ({at.name})"]
    return f"{type(exception).__name__}: {lines[0]}"


def _raised_at(exception):
    return traceback.extract_tb(exception.__traceback__)[-1]


def is_communication(exception):
    named = re.search("gloo|nccl|connection", str(exception).lower())
    return isinstance(exception, dist.DistError) or named is not None
