"""What a corpus is: what its files hold and how they are named, in their order; not where it lies,
how its path is spelt or when a file was touched.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lmoe.data.documents import LINES, File
from lmoe.files import open_regular

logger = logging.getLogger("lmoe")

FILES = "files.json"  # contents() of a folder of tokens, to say some day what changed
BLOCK = 1 << 22
THREADS = 8  # they wait for the disk, and hashing lets others run
# Training and validation ask for the same files: within a process their times are believed.
_known: dict[tuple, str] = {}


def hex_digest(text: str) -> str:
    """Compute the sha256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _content(file: File, advance: Callable[[], None]) -> str:
    """Compute the sha256 of what a file holds."""
    place = os.stat(file.path)
    key = place.st_dev, place.st_ino, place.st_size, place.st_mtime_ns, place.st_ctime_ns
    if key not in _known:
        digest = hashlib.sha256()
        with open_regular(file.path) as opened:
            while block := opened.read(BLOCK):
                digest.update(block)
                advance()
        _known[key] = digest.hexdigest()
    return _known[key]


def contents(
    files: list[File], advance: Callable[[], None] = lambda: None
) -> list[tuple[str, str]]:
    """Read files whole: (name, sha256 of what it holds) of each.

    advance() is called as that gets on. ValueError names a file that cannot be read.
    """
    found = []
    total = max(1, sum(file.size for file in files))
    read = 0
    shown = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for file, digest in zip(files, pool.map(lambda file: _content(file, advance), files)):
                found.append((file.name, digest))
                read += file.size
                if time.monotonic() - shown > 10:
                    shown = time.monotonic()
                    logger.info(f"reading the text, to know it again: {read / total:.1%}")
        except OSError as error:
            path = files[len(found)].path
            raise ValueError(f"data.paths: cannot read {path!r}: {error.strerror}") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def files_digest(files: list[File], field: str, advance: Callable[[], None] = lambda: None) -> str:
    """Compute what two corpora have in common if and only if they give the same documents from
    files of the same names. field: of .jsonl lines, without which it does not count."""
    lines = any(file.path.endswith(LINES) for file in files)
    return hex_digest(json.dumps([field if lines else "", contents(files, advance)]))


def changes(before: list, after: list) -> str:
    """Say how a corpus became another. before, after: lists of (name, digest of its content)."""
    old, new = (dict(map(tuple, files)) for files in (before, after))
    gone = {name: digest for name, digest in old.items() if name not in new}
    come = {digest: name for name, digest in new.items() if name not in old}
    renamed = [
        f"{name!r} is {come.pop(digest)!r}" for name, digest in gone.items() if digest in come
    ]
    moved = {part.partition(" is ")[0] for part in renamed}
    kinds = {
        "renamed": renamed,
        "new": [repr(name) for name in come.values()],
        "gone": [repr(name) for name in gone if repr(name) not in moved],
        "changed": [repr(name) for name in old if name in new and old[name] != new[name]],
    }
    parts = [f"{len(of)} {kind} ({of[0]:.200})" for kind, of in kinds.items() if of]
    return f"of {len(new)} files {', '.join(parts)}" if parts else "its files are in another order"
