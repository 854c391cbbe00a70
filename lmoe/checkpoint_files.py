"""Checkpoints on disk: names, manifest, checksums, and the order of the steps that make one appear
and disappear.

    ckpt/step-200/          a whole checkpoint: it exists under this name only after every file in
                            it was flushed and hashed
        manifest.json       every other file with its size and sha256, and the sha256 of that table
        .metadata  __0_0.distcp ...   tensors (torch.distributed.checkpoint), rng-0.pt ...,
                   meta.json, config.toml, tokenizer files
    ckpt/step-300.tmp/      being written, or left by a run that died: removed by the next save
    ckpt/step-200.old/      a checkpoint that step-200 has just replaced (it is whole); removed by
                            the next save

Standard library only: looking at a checkpoint needs no GPU, no process group and no torch.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)(\.old)?")


def checkpoints(folder):
    """Folders named like checkpoints in a run's checkpoint folder, newest step first. A replaced
    one (.old) follows its successor."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (-_step(path), path.suffix))


def newest(folder):
    """The newest checkpoint in `folder` whose files are all there in full length, or None. Contents
    are hashed on load, not here."""
    return next((path for path in checkpoints(folder) if not verify(path, contents=False)), None)


def verify(path, contents=True):
    """List what is wrong with a checkpoint, 'file: reason' each; empty if it is whole.
    contents=False looks at names and sizes only."""
    path = Path(path)
    files, problems = read_manifest(path)
    for name, entry in files.items():
        problems += check_file(path, name, entry, contents)
    return problems


def read_manifest(path):
    """(files, problems): name -> {"bytes", "sha256"} of a checkpoint; files is empty where the
    manifest itself cannot be trusted."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if _digest(manifest["files"]) == manifest["sha256"]:
            return manifest["files"], []
        return {}, [f"{MANIFEST}: its own sha256 differs"]
    except FileNotFoundError:
        return {}, [f"{MANIFEST}: missing: no checkpoint, or one that was never finished"]
    except (ValueError, KeyError, TypeError):
        return {}, [f"{MANIFEST}: unreadable"]


def check_file(path, name, entry, contents=True):
    """Problems of one file against its manifest entry: none or one 'file: reason'."""
    file = path / name
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return [f"{name}: {size} bytes instead of {entry['bytes']}"]
        if contents and _sha256(file) != entry["sha256"]:
            return [f"{name}: damaged (its sha256 differs from the manifest's)"]
    except FileNotFoundError:
        return [f"{name}: missing"]
    except OSError as error:  # a failing disk reports EIO here
        return [f"{name}: unreadable ({error.strerror})"]
    return []


def seal(path, names):
    """Flush files of a checkpoint to the disk and return their manifest entries. Each rank seals
    the files that it wrote."""
    entries = {}
    for name in names:
        file = path / name
        _fsync(file)
        entries[name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return entries


def publish(tmp, final, files):
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
    for folder in {tmp, *(path for path in tmp.rglob("*") if path.is_dir())}:
        _fsync(folder)
    # the same step again: keep the old one under a name that loads too, for a kill between the two
    # renames
    if final.exists():
        old = final.with_name(f"{final.name}.old")
        if old.exists():
            shutil.rmtree(old)
        final.rename(old)
    tmp.rename(final)
    _fsync(final.parent)


def prune(folder, keep):
    """Remove all but the `keep` newest checkpoints (0: keep all) and those replaced. To be called
    just after one was published.

    One that somebody is reading stays until the next time. Damaged ones newer than the oldest kept
    stay as they are.
    """
    found = checkpoints(folder)
    kept = [path for path in found if path.suffix != ".old" and not verify(path, contents=False)]
    kept = kept[:keep] if keep else []
    for path in found:
        old = path.suffix == ".old" or kept and _step(path) < _step(kept[-1])
        if old and not _being_read(path):
            # half a removal must not look like a checkpoint
            doomed = path.with_name(f"{path.name}.tmp")
            path.rename(doomed)
            shutil.rmtree(doomed)


def clean(folder):
    """Remove what saves and removals that died have left."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)


@contextlib.contextmanager
def reading(path):
    """While inside, no process removes this checkpoint (where the file system knows locks)."""
    with open(path / MANIFEST, "rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _being_read(path):
    try:
        with open(path / MANIFEST, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no manifest, or a file system without locks
        pass
    return False


def _step(path):
    return int(_STEP.fullmatch(path.name)[1])


def _digest(files):
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sha256(file):
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
