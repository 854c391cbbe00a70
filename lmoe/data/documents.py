"""Where documents come from: this Python's library source, and files, folders and globs of text.

A file is one document (.txt .md .py), or one document per line (.jsonl .jsonl.gz, the field that
`field` names). Bytes that are not UTF-8 become U+FFFD; line ends are kept as they are.
"""

import glob
import gzip
import hashlib
import json
import math
import os
import sysconfig
import textwrap
import zlib
from pathlib import Path
from typing import NamedTuple

from lmoe.files import in_one_line, open_regular

WHOLE = (".txt", ".md", ".py")
LINES = (".jsonl", ".jsonl.gz")
PIECE_BYTES = 4 << 20


class File(NamedTuple):
    path: str
    size: int
    stamp: str  # what the cache's key takes for its content


class Piece(NamedTuple):
    """A unit of work: whole files, or the lines of one .jsonl that begin in [start, stop)."""

    paths: list
    start: int
    stop: int
    size: int


def stdlib_files():
    """The .py files of this Python's standard library without site-packages, sorted: about 1,800
    files, 30 MB.

    Stamped by size and not by time, so that machines with the same Python agree.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "__pycache__"}
    paths = (p for p in root.rglob("*.py") if not skip.intersection(p.relative_to(root).parts))
    # Sorted by their parts below the root: the same order wherever Python is installed.
    paths = sorted(paths, key=lambda p: p.relative_to(root).parts)
    if not paths:
        raise ValueError(
            f"data.source = 'stdlib': {root} holds no .py files (a stripped Python); set"
            " data.source = text and data.paths"
        )
    return [File(str(p), p.stat().st_size, p.relative_to(root).as_posix()) for p in paths]


def text_files(paths):
    """Files that `paths` (files, folders, globs with **) name, each once: in the order of `paths`,
    sorted within each.

    Folders and globs give the regular files that end in .txt .md .py .jsonl .jsonl.gz. ValueError
    names data.paths and the entry at fault.
    """
    if not paths:
        raise ValueError("data.paths: the source text needs at least one file, folder or glob")
    found = {}
    try:
        for entry in map(os.path.expanduser, paths):
            for name in _files_of(entry):
                found.setdefault(os.path.realpath(name), name)
        stats = [os.stat(name) for name in found.values()]
    except OSError as error:  # gone since
        raise ValueError(f"data.paths: {in_one_line(error)}") from None
    return [
        File(name, stat.st_size, f"{os.path.abspath(name)} {stat.st_mtime_ns}")
        for name, stat in zip(found.values(), stats)
    ]


def _files_of(entry):
    """Sorted names of the files of an entry of data.paths."""
    if os.path.isfile(entry):
        if not entry.endswith(WHOLE + LINES):
            raise ValueError(
                f"data.paths: {entry!r} does not end in one of {' '.join(WHOLE + LINES)}"
            )
        return [entry]
    if os.path.isdir(entry):
        names = (str(p) for p in Path(entry).rglob("*"))
    elif os.path.exists(entry):
        raise ValueError(f"data.paths: {entry!r} is a pipe or a device, no file or folder")
    else:
        names = _matches(entry)
        if not names:
            raise ValueError(f"data.paths: {entry!r} is no file or folder and matches none")
    names = sorted(n for n in names if n.endswith(WHOLE + LINES) and os.path.isfile(n))
    if not names:
        raise ValueError(
            f"data.paths: {entry!r} holds no file that ends in one of {' '.join(WHOLE + LINES)}"
        )
    return names


def _matches(pattern):
    """Paths that a glob matches; `**` goes into each folder once, wherever links lead."""
    parts = pattern.split("/")
    if "**" not in parts:
        return glob.glob(pattern)
    at = parts.index("**")
    before = "/".join([*parts[:at], ""])
    after = "/".join(parts[at + 1 :]) or "*"
    found = []
    for root in glob.glob(before) if before else ["."]:
        seen = set()
        for folder, names, _ in os.walk(root, followlinks=True):
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:
                names.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            names[:] = sorted(name for name in names if not name.startswith("."))
            lead = os.path.join(folder, "")
            found += _matches(glob.escape(lead if before else lead.removeprefix("./")) + after)
    return found


def hex_digest(text):
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def files_digest(files, field):
    """Hex digest of a list of files: names, sizes and stamps."""
    return hex_digest(json.dumps([field, [(f.size, f.stamp) for f in files]]))


def split_pieces(files, piece_bytes=PIECE_BYTES):
    """Cut files into pieces of about piece_bytes, in order and independent of who works on them.

    Small files share a piece, a large .jsonl is cut at byte positions; a .jsonl.gz, which can only
    be read from its start, is not.
    """
    pieces, group = [], None  # the piece that takes more small files
    for path, size, _ in files:
        if path.endswith(LINES[0]):
            cuts = [*range(0, size, piece_bytes), size]
            pieces += [Piece([path], a, b, b - a) for a, b in zip(cuts, cuts[1:])]
            group = None
        elif group is None or group.size + size > piece_bytes:
            group = Piece([path], 0, 0, size)
            pieces.append(group)
        else:
            group.paths.append(path)
            group = pieces[-1] = group._replace(size=group.size + size)
    return pieces


def read_piece(piece, field):
    """The documents (str) of a piece, in order. ValueError names the file and, for a line,
    data.field."""
    for path in piece.paths:
        try:
            with open_regular(path) as file:
                if path.endswith(WHOLE):
                    yield file.read().decode("utf-8", errors="replace")
                elif path.endswith(".gz"):
                    with gzip.open(file) as lines:
                        yield from _lines(lines, path, field, 0, math.inf)
                else:
                    yield from _lines(file, path, field, piece.start, piece.stop)
        except (OSError, EOFError, zlib.error) as error:
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"data.paths: cannot read {path!r}: {why}") from None


def _lines(file, path, field, start, stop):
    """Documents of the lines that begin in [start, stop): a line belongs to the piece that holds
    its first byte."""
    position = start
    if start:
        file.seek(start - 1)
        position += len(file.readline()) - 1
    for line in file:
        if position >= stop:
            return
        if line.strip():
            yield _document(line, path, position, field)
        position += len(line)


def _document(line, path, position, field):
    try:
        value = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"data.paths: {path!r}, the line at byte {position}, is not JSON: {error}"
        ) from None
    if not isinstance(value, dict):
        has = "no fields"
    elif isinstance(value.get(field), str):
        return value[field]
    else:
        has = ", ".join(repr(k)[1:-1] for k, v in value.items() if isinstance(v, str)) or "none"
        has = textwrap.shorten(has, 200, placeholder=" ..")
    raise ValueError(
        f"data.field = {field!r}: {path!r}, the line at byte {position}, has no such text (it has:"
        f" {has})"
    )
