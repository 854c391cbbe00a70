"""Files that a kill, a full disk or a stranger may have touched: written whole or not at all, read
only where they are regular files. Standard library only."""

import errno
import os
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

MOST_BYTES = 1 << 28  # of a file that is read whole


def write_atomic(path: Path, data: bytes) -> None:
    """Write bytes so that `path` either holds all of them or does not change."""
    aside = path.with_name(path.name + ".tmp")
    aside.unlink(missing_ok=True)  # it may be a link that leads elsewhere
    with open(aside, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read, or a link to one; OSError for anything else. A pipe would keep
    its reader for ever, a device has no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def read_regular(path: Path, most: int | None = MOST_BYTES) -> bytes:
    """Read a regular file; OSError for anything else, and for one of more than `most` bytes (None:
    any number)."""
    with open_regular(path) as file:
        data = file.read(-1 if most is None else most + 1)
    if most is not None and len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return data


def is_plain(name: object) -> bool:
    """Tell whether a name found in a file stays inside its folder: a relative path without `..`."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name != "."


def in_one_line(error: BaseException) -> str:
    """Say what went wrong: an OSError as reason and path, else the first line of the message."""
    if isinstance(error, OSError) and error.strerror:
        path = "" if error.filename is None else f": {error.filename}"
        return f"{error.strerror}{path}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
