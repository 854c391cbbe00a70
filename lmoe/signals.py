"""End a run early: on signals, and on mistakes in its configuration."""

import contextlib
import signal
from collections.abc import Callable, Iterator

from lmoe.files import in_one_line


class StopRequest:
    """Note SIGTERM, SIGUSR1 or SIGINT in `received`: after the step under way all ranks agree to
    save and to end well."""

    def __init__(self):
        self.received = None
        self.agreed = False
        self.training = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if number == signal.SIGINT and not self.training:
            raise SystemExit(130)  # nothing to save yet
        self.received = signal.Signals(number).name


@contextlib.contextmanager
def one_line_errors(refuse: Callable[[str], None], *kinds: type[Exception]) -> Iterator[None]:
    """Take a ValueError for a user's mistake and an OSError for the machine's, and others of
    `kinds`: refuse(message) says it in one line, and the exit code is 1."""
    try:
        yield
    except (ValueError, OSError, *kinds) as error:
        refuse(in_one_line(error))
        raise SystemExit(1) from None
