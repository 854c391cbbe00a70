"""End a run early: on signals, with the process that started it, and on mistakes in its
configuration."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from lmoe.files import in_one_line

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAUNCHER = "LMOE_LAUNCHER"  # in the environment of ranks: the pid of lmoe.launch


def before_first_step(name: str) -> str:
    """Say that a signal has ended a run that was not training yet."""
    return f"stopped by {name} before the first step: nothing to save"


class StopRequest:
    """Note SIGTERM, SIGUSR1 or SIGINT in `received`: after the step under way all ranks agree to
    save and to end well. Before `training` there is nothing to save, and the process ends."""

    def __init__(self):
        self.received = None
        self.agreed = False
        self.training = False
        for number in STOPS:
            signal.signal(number, self._note)
        end_with_launcher()

    def _note(self, number, frame):
        name = signal.Signals(number).name
        if not self.training:
            for again in STOPS:
                signal.signal(again, signal.SIG_IGN)
            if LAUNCHER not in os.environ and os.environ.get("RANK", "0") == "0":
                os.write(2, f"{before_first_step(name)}\n".encode())
            raise SystemExit(128 + number)
        self.received = name


def _end_with(alive: Callable[[], bool]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if not alive():  # it ended before that
        os._exit(1)


def end_with_launcher() -> None:
    """Have the kernel kill this process when lmoe.launch, where that has started it, ends in
    whatever way (Linux)."""

    def alive():
        try:
            os.kill(int(os.environ[LAUNCHER]), 0)
        except ProcessLookupError:
            return False
        return True

    if LAUNCHER in os.environ:
        _end_with(alive)


def end_with_parent() -> None:
    """Have this process of multiprocessing end with its parent, in whatever way that ends; on Linux
    with the thread that started it."""
    parent = multiprocessing.parent_process()
    _end_with(parent.is_alive)
    if sys.platform != "linux":

        def watch():
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def one_line_errors(refuse: Callable[[str], None], *kinds: type[Exception]) -> Iterator[None]:
    """Take a ValueError for a user's mistake and an OSError for the machine's, and others of
    `kinds`: refuse(message) says it in one line, and the exit code is 1."""
    try:
        yield
    except (ValueError, OSError, *kinds) as error:
        refuse(in_one_line(error))
        raise SystemExit(1) from None
