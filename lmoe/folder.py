"""The folder of a run: one owner at a time, and nothing of an earlier run erased.

.lock              who trains here: JSON of process and machine, its time the last sign of life
earlier-1/ ...     config.toml, metrics.jsonl, tb/ and profile/ of runs before this one that left no
                   checkpoint to go on from
"""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("lmoe")

ENTRIES = ("ckpt", "data", "tb", "profile", "metrics.jsonl", "config.toml")
REPORTS = ("tb", "profile", "metrics.jsonl", "config.toml")  # a folder may not be movable: first
SIGN_SECONDS = 10.0  # between the signs of life of an owner


def make_folder(folder: Path) -> None:
    """Make a run's folder; ValueError where it cannot be one, or where a link in it leads nowhere:
    a disk that is not mounted must not look like a run that has not begun."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"job.folder = {str(folder)!r} cannot be made: {error.strerror}") from None
    entries = [folder / name for name in ENTRIES]
    for path in [*entries, *_children(folder / "ckpt")]:
        if path.is_symlink() and not path.exists():
            raise ValueError(
                f"job.folder: {path} is a link to {os.readlink(path)}, which is not there: mount"
                " its disk, or remove the link to start anew"
            )
    for path in entries:
        right = path.is_file() if "." in path.name else path.is_dir()
        if path.exists() and not right:
            kind = "a folder" if path.is_dir() else "no file" if "." in path.name else "no folder"
            raise ValueError(f"job.folder: {path} is {kind}: move it away")


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def set_aside(folder: Path) -> None:
    """Move what an earlier run reported here to earlier-N/, all of it or nothing, and say so."""
    found = [folder / name for name in REPORTS if (folder / name).exists()]
    if any(_is_report(path) for path in found):
        aside = move_aside(found)
        logger.warning(
            f"{folder} holds reports of an earlier run but no checkpoint of it: starting at step 1,"
            f" those are now in {aside}"
        )


def _is_report(path: Path) -> bool:
    """Tell whether a run left it that did a step: each writes config.toml and begins the rest."""
    if path.is_dir():
        return any(path.iterdir())
    return path.name != "config.toml" and path.stat().st_size > 0


def move_aside(paths: list[Path]) -> Path:
    """Move entries of a run's folder to earlier-N/ in it, all of them or none; ValueError where one
    cannot be moved."""
    folder = paths[0].parent
    names = (folder / f"earlier-{number}" for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    aside.mkdir()
    moved = []
    try:
        for path in paths:
            path.rename(aside / path.name)
            moved.append(path)
    except OSError as error:
        for done in moved:
            (aside / done.name).rename(done)
        aside.rmdir()
        raise ValueError(
            f"job.folder: {path} of an earlier run cannot be moved to {aside} ({error.strerror}):"
            " empty or remove it, or choose another job.folder"
        ) from None
    return aside


class Lock:
    """Ownership of a run's folder, for as long as this object is open.

    The operating system gives the lock back when its process ends, however it does. It may not
    reach from node to node, or not exist on a file system: so the owner also touches the file, and
    one whose sign of life another machine sees change is alive.
    """

    def __init__(self, folder: Path, sign_seconds: float = SIGN_SECONDS):
        """ValueError where another process trains in `folder`, or where a .lock in it is not of
        this program."""
        self.path = folder / ".lock"
        self.sign_seconds = sign_seconds
        self._open()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._sign, name="folder lock", daemon=True)
        self.thread.start()

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self.file = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise ValueError(
                f"job.folder: {self.path} cannot be opened: {error.strerror}"
            ) from None
        try:
            self._take()
        except BaseException:
            os.close(self.file)
            raise

    def _take(self) -> None:
        here = {"process": os.getpid(), "host": socket.gethostname(), "machine": _machine()}
        try:
            held = not _locked(self.file)
            decisive = True  # of processes of one machine, at least
        except OSError:  # a file system without locks
            held = decisive = False
        owner = self._owner()
        if not held and owner and not (decisive and owner.get("machine") == here["machine"]):
            held = self._alive()
        if held:
            process = f"process {owner.get('process')} on {owner.get('host')}"
            raise ValueError(
                f"job.folder = {str(self.path.parent)!r} is being trained in by {process}: wait for"
                f" its end, or choose another job.folder ({self.path} says so)"
            )
        with contextlib.suppress(OSError):  # a full disk: the lock holds on this machine
            os.ftruncate(self.file, 0)
            os.pwrite(self.file, json.dumps(here).encode(), 0)

    def _owner(self) -> dict:
        """Read who owns the folder, or owned it when it was killed; empty after an orderly end."""
        text = os.pread(self.file, 4096, 0).strip(b"\0")  # as a crash of the machine may leave it
        if text and not text.startswith(b'{"process": '):
            raise ValueError(f"job.folder: {self.path} is not of this program: move it away")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):  # cut, or no work of ours
            return {}

    def _alive(self) -> bool:
        """Watch for a sign of life of an owner on another machine, unless the last is long ago."""
        last = os.stat(self.path).st_mtime_ns
        patience = 3 * self.sign_seconds
        if time.time() - last / 1e9 > 60 * patience:
            return False
        logger.info(f"{self.path} names another machine: waiting {patience:.0f} s for its owner")
        end = time.monotonic() + patience
        while time.monotonic() < end:
            time.sleep(self.sign_seconds / 10)
            if os.stat(self.path).st_mtime_ns != last:
                return True
        return False

    def _sign(self) -> None:
        while not self.stopped.wait(self.sign_seconds):
            with contextlib.suppress(OSError):  # the folder's disk may be gone for a while
                os.utime(self.file)
                self._stay()

    def _stay(self) -> None:
        """Take the folder again where somebody has removed the lock, or the folder."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self.file)):
                return
        before = self.file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open()
        except ValueError as error:
            logger.error(f"{self.path} was removed while this run trains here, and now: {error}")
            self.stopped.set()
            self.file = before
            return
        os.close(before)
        logger.warning(f"{self.path} was removed while this run trains here: made again")

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        """Give the folder back."""
        self.stopped.set()
        self.thread.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self.file, 0)
        os.close(self.file)


@contextlib.contextmanager
def saving_alone(checkpoints: Path) -> Iterator[None]:
    """Let no other process of this machine save into this folder of checkpoints, to which the
    folders of several runs may have links; ValueError where one does."""
    checkpoints.mkdir(exist_ok=True)
    folder = os.open(checkpoints, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            if not _locked(folder):
                raise ValueError(
                    f"job.folder: another run, in another folder, saves into {checkpoints}: wait"
                    " for its end, or choose another job.folder"
                )
        yield
    finally:
        os.close(folder)


def _locked(file: int) -> bool:
    """Try to lock. What a killed owner started may hold its lock for a moment longer."""
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1)
    return False


def _machine() -> str:
    """Name this machine as it runs now: names of hosts repeat."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
