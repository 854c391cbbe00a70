"""Parts of commands: paths as users write them, text that a terminal shows as it is, a reader of
the output that leaves. Standard library only."""

import atexit
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from lmoe.files import in_one_line

LONGEST = 600  # characters of an error


def asks_for_help(words: Iterable[str]) -> bool:
    """Tell whether command-line words ask for help, wherever they do."""
    return any(word in ("-h", "--help") or word.startswith("--help=") for word in words)


def at_home(key: str, path: str) -> str:
    """Replace a leading `~`."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(f"{key}: no home folder is known for {path!r}; write it out, or ./{path}")
    return found


def given_path(name: str, path: str) -> Path:
    """Read a path among a command's words; ValueError where it is empty or has no home."""
    if not path:
        raise ValueError(f"{name} is empty: name a path, . for the folder at hand")
    return Path(at_home(name, path))


def printable(text: str) -> str:
    """Write what is not printable, and would be obeyed by a terminal, as its escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def reason(error: Exception) -> str:
    """Say what went wrong in one printable line: a ValueError, which is ours, in full, as far as
    it is not very long; of another's message the first line."""
    text = printable(str(error) if isinstance(error, ValueError) else in_one_line(error))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} .. {text[-LONGEST // 2 :]}"


def as_word(path: Path) -> str:
    """Write a path as a word of a shell's line that no command takes for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def end_with_reader() -> None:
    """Let a reader that leaves (`| head`) end this process without a word, as it ends others. For
    one that holds no sockets."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def leave(ended: SystemExit) -> None:
    """End the process as Python does, but for what comes last: there a thread that is inside C++,
    or an object of it, may abort the process and spoil the exit code."""
    threading._shutdown()  # waits for threads, such as one that writes a checkpoint
    atexit._run_exitfuncs()
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
