"""Identity of a corpus: what its files hold and how they are named, in their order; not where it
lies, how its path is spelt or when a file was touched.
"""

import contextlib
import gzip
import hashlib
import json
import logging
import os
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lmoe.data.documents import LINES, File
from lmoe.files import open_regular, read_regular

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
    """Compute the sha256 of what a file holds; of a .gz, of what it unpacks to."""
    place = os.stat(file.path)
    packed = file.path.endswith(".gz")
    key = place.st_dev, place.st_ino, place.st_size, place.st_mtime_ns, place.st_ctime_ns, packed
    if key not in _known:
        digest = hashlib.sha256()
        with open_regular(file.path) as opened:
            unpacked = gzip.open(opened) if packed else opened
            while block := unpacked.read(BLOCK):
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
        except (OSError, EOFError, zlib.error) as error:
            path = files[len(found)].path
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"data.paths: cannot read {path!r}: {why}") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def files_digest(files: list[File], field: str, advance: Callable[[], None] = lambda: None) -> str:
    """Compute what two corpora have in common if and only if they give the same documents from
    files of the same names. field: of .jsonl lines, without which it does not count."""
    lines = any(file.path.endswith(LINES) for file in files)
    return hex_digest(json.dumps([field if lines else "", contents(files, advance)]))


def read_contents(folder: Path) -> list[tuple[str, str]]:
    """Read the contents() of which a folder of tokens was made; empty where it does not say."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        files = json.loads(read_regular(folder / FILES))
        return [(str(name), str(digest)) for name, digest in files]
    return []


def changes(before: list, after: list) -> str:
    """Say how a corpus became another. before, after: lists of (name, digest of its content), of
    which several may have one name."""
    old, new = (Counter(map(tuple, files)) for files in (before, after))
    gone, come = old - new, new - old
    pairs = {}
    for kind, part in (("changed", 0), ("renamed", 1)):
        alike = defaultdict(list)
        for file in come.elements():
            alike[file[part]].append(file)
        found = [(file, alike[file[part]].pop(0)) for file in gone.elements() if alike[file[part]]]
        gone -= Counter(was for was, _ in found)
        come -= Counter(now for _, now in found)
        pairs[kind] = found
    kinds = {
        "renamed": [f"{was!r} is {name!r}" for (was, _), (name, _) in pairs["renamed"]],
        "new": [repr(name) for name, _ in come.elements()],
        "gone": [repr(name) for name, _ in gone.elements()],
        "changed": [repr(name) for (name, _), _ in pairs["changed"]],
    }
    parts = [f"{len(of)} {kind} ({of[0]:.200})" for kind, of in kinds.items() if of]
    if not parts:
        return "its files are in another order"
    return f"of {len(after)} files {', '.join(parts)}"
