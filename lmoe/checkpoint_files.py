"""Checkpoints on disk: names, manifest, checksums, and the order of the steps that make one appear
and disappear.

    ckpt/step-200/          a whole checkpoint: it exists under this name only after every file in
                            it was flushed and hashed
        manifest.json       every other file with its size and sha256, and the sha256 of that table
        .metadata  __0_0.distcp ...   tensors (torch.distributed.checkpoint), rng-0.pt ...,
                   meta.json, config.toml, tokenizer files
    ckpt/step-300.tmp/      being written, or left by a run that died: removed by the next save
        .writing            shows, until the manifest does, that this program made the folder
    ckpt/step-200.old/      a checkpoint that step-200 has just replaced; it is whole, and counts
                            where step-200 does not stand

Where something else has such a name, a number goes in between (step-300.1.tmp), and it stays.
Standard library only: looking at a checkpoint needs no GPU, no process group and no torch.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from lmoe.checkpoint_metadata import META, METADATA, description_problems, is_healthy
from lmoe.files import is_plain, open_regular, read_regular

MANIFEST = "manifest.json"
WRITING = ".writing"
_STEP = re.compile(r"step-([0-9]+)((?:\.[0-9]+)?\.old)?")
_LEFT = re.compile(r"step-[0-9]+(?:(?:\.[0-9]+)?\.old)?(?:\.[0-9]+)?\.tmp")
_SHA256 = re.compile(r"[0-9a-f]{64}")
logger = logging.getLogger("lmoe.checkpoint")
_said: set[Path] = set()


class Gone(OSError):
    """A checkpoint that was removed or replaced before it was read to its end."""


# --------------------------------------------------------------------------------------------------
# looking


def checkpoint_folder(path: Path) -> Path:
    """Resolve a path that a user gave, a checkpoint, a folder of them or the folder of a job, which
    holds them in ckpt/, to one of the first two."""
    path = Path(path)
    inside = path / "ckpt"
    if os.path.lexists(path / MANIFEST) or not inside.is_dir() or checkpoints(path):
        return path
    return inside


def checkpoints(folder: Path) -> list[Path]:
    """List the folders named like checkpoints in a run's checkpoint folder, newest step first. A
    replaced one (.old) follows its successor. OSError where it is there and cannot be listed."""
    folder = Path(folder)
    if not os.path.lexists(folder):
        return []
    before = None
    while True:
        named = {path for path in folder.iterdir() if _STEP.fullmatch(path.name)}
        # A link may lead to a disk that is not there.
        found = [path for path in named if path.is_dir() or path.is_symlink()]
        # Else another has taken its place; and a listing beside a rename may hold neither name.
        if named == before and all(os.path.lexists(path) for path in named):
            break
        before = named
    return sorted(found, key=lambda path: (-_step(path), path.suffix == ".old", path.name))


def newest(folder: Path) -> Path | None:
    """Find the newest checkpoint in `folder` (or in that of a job) whose files are all there in
    full length; those passed over are named. Contents are hashed on load, not here."""
    while True:
        vanished = False
        for path in checkpoints(checkpoint_folder(folder)):
            problems = examine(path, contents=False)
            if problems == []:
                return path
            vanished = problems is None
            if vanished:
                break
            logger.warning(f"checkpoint {path} skipped: {some(problems)}")
        if not vanished:
            return None


def verify(path: Path, contents: bool = True) -> list[str]:
    """List what is wrong with a checkpoint, 'file: reason' each; empty if it is whole.
    contents=False looks at names and sizes only."""
    path = Path(path)
    files, problems = read_manifest(path)
    for name, entry in files.items():
        problems += check_file(path, name, entry, contents)
    if contents and files and not problems:
        problems += description_problems(path, files)
    return problems


def examine(path: Path, contents: bool = True) -> list[str] | None:
    """Verify beside a run that saves: None if the checkpoint has been removed meanwhile."""
    while True:
        try:
            with reading(path):
                return verify(path, contents)
        except Gone:
            if not path.exists():
                return None
        except OSError:  # no manifest to lock
            return verify(path, contents)


def read_manifest(path: Path) -> tuple[dict[str, dict], list[str]]:
    """Read (files, problems): name -> {"bytes", "sha256"} of a checkpoint; files is empty where the
    manifest itself cannot be trusted."""
    try:
        manifest = json.loads(read_regular(Path(path) / MANIFEST).decode())
        files = manifest["files"]
        if _digest(files) != manifest["sha256"]:
            return {}, [f"{MANIFEST}: its own sha256 differs"]
        for name, entry in files.items():
            if not _is_entry(name, entry):
                return {}, [f"{MANIFEST}: {ascii(name)[:80]} is no file of it with size and sha256"]
    except FileNotFoundError:
        return {}, [f"{MANIFEST}: missing: no checkpoint, or one that was never finished"]
    except OSError as error:
        return {}, [f"{MANIFEST}: unreadable ({error.strerror})"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError):
        return {}, [f"{MANIFEST}: unreadable"]
    if unlisted := [name for name in (METADATA, META) if name not in files]:
        return {}, [f"{name}: not listed in {MANIFEST}" for name in unlisted]
    return files, []


def _is_entry(name: str, entry: object) -> bool:
    """Tell whether it is a file inside the checkpoint, under a name that a terminal can show."""
    if not (is_plain(name) and name.isprintable() and isinstance(entry, dict)):
        return False
    size = entry.get("bytes")
    digest = entry.get("sha256")
    whole = type(size) is int and 0 <= size < 1 << 60
    return whole and isinstance(digest, str) and bool(_SHA256.fullmatch(digest))


def check_file(
    path: Path,
    name: str,
    entry: dict,
    contents: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> list[str]:
    """List problems of one file against its manifest entry: none or one 'file: reason'. advance():
    called as reading goes on."""
    try:
        with open_regular(path / name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["bytes"]:
                return [f"{name}: {size} bytes instead of {entry['bytes']}"]
            if contents and _sha256(file, advance) != entry["sha256"]:
                return [f"{name}: damaged (its sha256 differs from the manifest's)"]
    except FileNotFoundError:
        return [f"{name}: missing"]
    except OSError as error:  # a failing disk reports EIO here
        return [f"{name}: unreadable ({error.strerror})"]
    return []


def some(problems: list[str]) -> str:
    """Join problems into one line of bearable length."""
    more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return "; ".join(problems[:5] + more)


# --------------------------------------------------------------------------------------------------
# appearing


def begin(folder: Path, step: int) -> Path:
    """Make the folder in which a checkpoint is written, after what dead runs left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    for between in _numbers():
        tmp = folder / f"step-{step}{between}.tmp"
        with contextlib.suppress(FileExistsError):
            tmp.mkdir()
            (tmp / WRITING).touch()
            return tmp


def seal(
    path: Path, names: Iterable[str], advance: Callable[[], None] = lambda: None
) -> dict[str, dict]:
    """Flush files of a checkpoint to the disk and return their manifest entries. Each rank seals
    the files that it wrote. advance(): called as that goes on."""
    entries = {}
    for name in names:
        _fsync(path / name)
        with open_regular(path / name) as file:
            size = os.fstat(file.fileno()).st_size
            entries[name] = {"bytes": size, "sha256": _sha256(file, advance)}
    return entries


def publish(tmp: Path, final: Path, files: dict[str, dict]) -> None:
    """Make `tmp` the checkpoint `final`: manifest, flush, rename. Until the rename nothing that
    looks for checkpoints sees it."""
    for name, entry in files.items():
        if problems := check_file(
            tmp, name, entry, contents=False
        ):  # written by another rank: on another file system if this node does not see it
            raise OSError(
                f"{problems[0]} as seen by rank 0: the checkpoint folder must be one that all nodes"
                " share"
            )
    text = json.dumps({"files": files, "sha256": _digest(files)}, indent=1)
    (tmp / MANIFEST).write_text(text)
    _fsync(tmp / MANIFEST)
    (tmp / WRITING).unlink()
    for folder in {tmp, *(path for path in tmp.rglob("*") if path.is_dir())}:
        _fsync(folder)
    # the same step again: keep the old one under a name that loads too, for a kill between the two
    # renames
    aside = None
    if os.path.lexists(final):
        aside = _free(final, ".old")
        final.rename(aside)
    try:
        tmp.rename(final)
    except OSError:
        if aside:
            aside.rename(final)
        raise
    if aside and not _is_ours(aside):
        logger.warning(f"{final} was no checkpoint of this program: it is now {aside.name}")
    _fsync(final.parent)


# --------------------------------------------------------------------------------------------------
# disappearing


def prune(folder: Path, keep: int, known: Iterable[Path] = (), damaged: Iterable[Path] = ()):
    """Remove all but `keep` checkpoints (0: keep all) and those replaced. To be called just after
    one was published.

    known: those that this process wrote or hashed whole, in the order in which they are to stay;
    others fill up, newest first, where names and sizes are right. damaged: found so by this
    process; they never count. The first healthy one stays in any case. Nothing newer than the
    oldest kept is removed, nor what somebody is reading, nor what this program did not make.
    """
    found = checkpoints(folder)
    damaged = set(damaged)
    whole = {path for path in found if path not in damaged and not _sizes(path)}
    # an .old is replaced where its successor stands
    replaced = {path for path in found if path.suffix == ".old" and _successor(path) in whole}
    order = [path for path in known if path in whole - replaced]
    order += [path for path in found if path in whole - replaced and path not in order]
    kept = order[:keep] if keep else order
    healthy = next((path for path in order if is_healthy(path)), None)
    oldest = min((_step(path) for path in kept), default=0)
    for path in found:
        stays = path in kept or path == healthy or _step(path) >= oldest
        if path in replaced or not stays:
            _attempt(path, _retire)


def clean(folder: Path) -> None:
    """Remove what saves and removals that died have left."""
    for path in folder.iterdir():
        if _LEFT.fullmatch(path.name):
            _attempt(path, _remove)


def _sizes(path: Path) -> list[str]:
    problems = verify(path, contents=False)
    if problems:
        _say_once(path, f"checkpoint {path} does not count: {some(problems)}")
    return problems


def _attempt(path: Path, work) -> None:
    """work(path) if this program made that folder. Nothing that goes wrong stops a save."""
    try:
        if _is_ours(path):
            work(path)
        elif not path.is_symlink() and path.is_dir() and not os.listdir(path):
            path.rmdir()
        else:
            _say_once(path, f"{path} stays: nothing shows that this program made it")
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        _say_once(path, f"{path} cannot be removed ({reason}); saving goes on")


def _say_once(path: Path, message: str) -> None:
    if path not in _said:
        _said.add(path)
        logger.warning(message)


def _is_ours(path: Path) -> bool:
    """Tell by its mark whether this program made a folder: the manifest, or what is there until
    then. A link is somebody's wish to keep things elsewhere."""
    if path.is_symlink() or not path.is_dir():
        return False
    return os.path.lexists(path / WRITING) or not read_manifest(path)[1]


def _retire(path: Path) -> None:
    files, _ = read_manifest(path)
    inside = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
    if foreign := sorted(inside - {*files, MANIFEST, WRITING}):
        _say_once(path, f"{path} stays: {foreign[0]} in it is not of this program")
        return
    with _alone(path) as alone:
        if not alone:
            return
        doomed = _free(path, ".tmp")  # half a removal must not look like a checkpoint
        path.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Remove a folder of ours, the mark last: what is left if that fails is known for ours."""
    failed = None
    for inside in sorted(path.iterdir(), key=lambda inside: inside.name in (MANIFEST, WRITING)):
        if failed and inside.name in (MANIFEST, WRITING):
            break
        try:
            if inside.is_dir() and not inside.is_symlink():
                shutil.rmtree(inside)
            else:
                inside.unlink()
        except OSError as error:
            failed = error
    if failed:
        raise failed
    path.rmdir()


# --------------------------------------------------------------------------------------------------
# reading


def lock(path: Path) -> BinaryIO:
    """Keep every process from removing a checkpoint (where the file system knows locks) until
    unlock(). Gone if it was removed or replaced meanwhile, OSError if it has no manifest."""
    before = _identity(path)
    try:
        file = open_regular(path / MANIFEST)
    except FileNotFoundError:
        if before is not None and before == _identity(path):
            raise
        raise Gone(errno.ENOENT, "removed or replaced", str(path)) from None
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)
    if is_there(file, path):
        return file
    unlock(file)
    raise Gone(errno.ENOENT, "removed or replaced", str(path))


def _identity(path: Path) -> tuple | None:
    """Tell a folder from another one of the same name, which may have its inode."""
    with contextlib.suppress(OSError):
        status = os.lstat(path)
        return status.st_dev, status.st_ino, status.st_ctime_ns
    return None


def is_there(file: BinaryIO, path: Path) -> bool:
    """Tell whether the checkpoint at `path` is still the one whose lock is `file`."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path / MANIFEST), os.fstat(file.fileno()))
    return False


def unlock(file: BinaryIO) -> None:
    with contextlib.suppress(OSError):  # closing is not enough where a fork holds it too
        fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """While inside, no process removes this checkpoint. Gone, whatever else went wrong, if it was
    removed or replaced (the same step saved again) before the end."""
    file = lock(path)
    try:
        yield
    finally:
        there = is_there(file, path)
        unlock(file)
        if not there:
            raise Gone(errno.ENOENT, "removed or replaced while it was read", str(path)) from None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Tell whether nobody reads this checkpoint; inside, nobody begins to."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_regular(path / MANIFEST))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        except OSError:  # no manifest, or a file system without locks
            alone = True
        yield alone


def _numbers() -> Iterator[str]:
    return itertools.chain([""], (f".{number}" for number in itertools.count(1)))


def _free(path: Path, suffix: str) -> Path:
    """The first of path + suffix, path.1 + suffix ... where nothing stands."""
    names = (path.with_name(f"{path.name}{between}{suffix}") for between in _numbers())
    return next(name for name in names if not os.path.lexists(name))


def _successor(path: Path) -> Path:
    return path.with_name(f"step-{_STEP.fullmatch(path.name)[1]}")


def _step(path: Path) -> int:
    return int(_STEP.fullmatch(path.name)[1])


def _digest(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sha256(file: BinaryIO, advance: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
        advance()
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
