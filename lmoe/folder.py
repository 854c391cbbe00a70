"""The folder of a run: one owner at a time, and nothing of an earlier run erased.

.lock              who trains here: JSON of process and machine, its time the last sign of life
earlier-1/ ...     config.toml, metrics.jsonl and tb/ of runs before this one that left no
                   checkpoint to go on from
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

logger = logging.getLogger("lmoe")

ENTRIES = ("ckpt", "data", "tb", "metrics.jsonl", "config.toml")
REPORTS = ("config.toml", "metrics.jsonl", "tb")
SIGN_SECONDS = 10.0  # between the signs of life of an owner


def make_folder(folder: Path) -> None:
    """Make a run's folder; ValueError where it cannot be one, or where a link in it leads nowhere:
    a disk that is not mounted must not look like a run that has not begun."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"job.folder = {str(folder)!r} cannot be made: {error.strerror}") from None
    for path in (folder / name for name in ENTRIES):
        if path.is_symlink() and not path.exists():
            raise ValueError(
                f"job.folder: {path} is a link to {os.readlink(path)}, which is not there: mount"
                " its disk, or remove the link to start anew"
            )
        if path.exists() and path.is_dir() == ("." in path.name):
            kind = "a folder" if path.is_dir() else "no folder"
            raise ValueError(f"job.folder: {path} is {kind}: move it away")


def set_aside(folder: Path) -> None:
    """Move what an earlier run reported here to earlier-N/, and say so."""
    found = [folder / name for name in REPORTS if (folder / name).exists()]
    metrics = folder / "metrics.jsonl"
    if not metrics.exists() or not metrics.stat().st_size:
        return
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    logger.warning(
        f"{folder} holds metrics of an earlier run but no checkpoint of it: starting at step 1,"
        f" those are now in {aside}"
    )


class Lock:
    """Ownership of a run's folder, for as long as this object is open.

    The operating system gives the lock back when its process ends, however it does. It may not
    reach from node to node, or not exist on a file system: so the owner also touches the file, and
    one whose sign of life another machine sees change is alive.
    """

    def __init__(self, folder: Path, sign_seconds: float = SIGN_SECONDS):
        """ValueError where another process trains in `folder`."""
        self.path = folder / ".lock"
        self.sign_seconds = sign_seconds
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self.file)
            raise
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._sign, name="folder lock", daemon=True)
        self.thread.start()

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
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps(here).encode(), 0)

    def _owner(self) -> dict:
        """Read who owns the folder, or owned it when it was killed; empty after an orderly end."""
        try:
            owner = json.loads(os.pread(self.file, 4096, 0))
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

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

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        """Give the folder back."""
        self.stopped.set()
        self.thread.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self.file, 0)
        os.close(self.file)


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
