"""Where documents come from: this Python's library source, and files, folders and globs of text.

A file is one document (.txt .md .py), or one document per line (.jsonl .jsonl.gz, the field that
`field` names). Bytes that are not UTF-8 become U+FFFD; line ends are kept as they are.

A folder means its files at any depth: `folder` is `folder/**`. What begins with a dot is left out
unless the pattern says so, links are followed, and each file and folder counts once.
"""

import fnmatch
import glob
import gzip
import json
import math
import os
import stat
import sysconfig
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lmoe.files import in_one_line, open_regular

WHOLE = (".txt", ".md", ".py")
LINES = (".jsonl", ".jsonl.gz")
PIECE_BYTES = 4 << 20


class File(NamedTuple):
    path: str
    size: int
    name: str  # its path below the folder, or the root of the glob, that was given


class Piece(NamedTuple):
    """A unit of work: whole files, or the lines of one .jsonl that begin in [start, stop)."""

    paths: list
    start: int
    stop: int
    size: int


def stdlib_files() -> list[File]:
    """List the .py files of this Python's standard library without site-packages: about 1,800
    files, 30 MB."""
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


# What a folder or a glob may hold besides the files that it gives, in the order of the report.
HIDDEN = "hidden"
OTHER = "with other endings"
FOLDERS = "folders that the pattern does not enter"
AGAIN = "there already under another name"
ODD = "pipes, devices or links that lead nowhere"
CLOSED = "folders that may not be read"


def text_files(paths: list[str], left_out: Counter | None = None) -> list[File]:
    """List the files that `paths` (files, folders, globs with **) name, each once: in the order of
    `paths`, within each sorted by the parts of their names below the folder, or the root of the
    glob, that was given.

    Folders and globs give the regular files that end in .txt .md .py .jsonl .jsonl.gz; left_out
    counts what else is there, by kind. ValueError names data.paths and the entry at fault.
    """
    if not paths:
        raise ValueError("data.paths: the source text needs at least one file, folder or glob")
    left_out = Counter() if left_out is None else left_out
    found = {}
    try:
        for entry in map(os.path.expanduser, paths):
            for path, name in _files_of(entry, left_out):
                real = os.path.realpath(path)
                left_out[AGAIN] += real in found
                found.setdefault(real, File(path, os.stat(path).st_size, name))
    except OSError as error:  # gone since
        raise ValueError(f"data.paths: {in_one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"data.paths: {entry!r} is nested too deep") from None
    return [*found.values()]


def told(left_out: Counter) -> str:
    """Say what was left out, or nothing."""
    kinds = (HIDDEN, OTHER, FOLDERS, AGAIN, ODD, CLOSED)
    parts = [f"{left_out[kind]:,} {kind}" for kind in kinds if left_out[kind]]
    return f"left out: {', '.join(parts)}" if parts else ""


def _files_of(entry: str, left_out: Counter) -> list[tuple[str, str]]:
    """(path, name below the root) of the files of an entry of data.paths, sorted by name."""
    if os.path.isfile(entry):
        if not entry.endswith(WHOLE + LINES):
            raise ValueError(
                f"data.paths: {entry!r} does not end in one of {' '.join(WHOLE + LINES)}"
            )
        return [(entry, os.path.basename(entry))]
    here = Counter()
    if os.path.isdir(entry):
        found = _walk(entry, ["**"], (), here, set())
    elif os.path.exists(entry):
        raise ValueError(f"data.paths: {entry!r} is a pipe or a device, no file or folder")
    elif glob.has_magic(entry):
        root, parts = _split_glob(entry)
        found = _walk(root, parts, (), here, set())
    else:
        raise ValueError(f"data.paths: {entry!r} is no file or folder")
    found = sorted(found)
    left_out.update(here)
    if not found:
        rest = told(here)
        raise ValueError(
            f"data.paths: {entry!r} gives no file that ends in one of {' '.join(WHOLE + LINES)}"
            f"{rest and f' ({rest})'}"
        )
    return [(path, "/".join(name)) for name, path in found]


def _split_glob(pattern: str) -> tuple[str, list[str]]:
    """Split a glob into the folder before its first wildcard, "" for this one, and the rest."""
    parts = pattern.split("/")
    first = next(at for at, part in enumerate(parts) if glob.has_magic(part))
    return "/".join([*parts[:first], ""]), [part for part in parts[first:] if part not in ("", ".")]


def _walk(
    folder: str,
    parts: list[str],
    name: tuple[str, ...],
    left_out: Counter,
    seen: set,
    entered: bool = False,
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Find what the parts of a glob match in a folder whose name below the root is `name`: (parts
    of a file's name, its path). seen: the folders that a `**` has entered; entered: whether it
    enters those in this folder, too."""
    part, *rest = parts
    deep = part == "**"
    try:
        place = os.stat(folder or ".")
        with os.scandir(folder or ".") as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError:
        left_out[CLOSED] += 1
        return
    if deep:
        key = place.st_dev, place.st_ino, len(parts)
        if key in seen:
            return
        seen.add(key)
        yield from _walk(folder, rest or ["*"], name, left_out, seen, True)
    sealed = False  # a folder that may be listed, but no more
    for entry in entries:
        if not deep and not fnmatch.fnmatchcase(entry.name, part):
            continue
        path = os.path.join(folder, entry.name)
        below = (*name, entry.name)
        hidden = entry.name.startswith(".") and not part.startswith(".")
        try:
            mode = entry.stat().st_mode
        except PermissionError:
            sealed = True
            continue
        except OSError:
            mode = 0
        is_folder = stat.S_ISDIR(mode)
        if deep or rest:
            if is_folder and not hidden:
                yield from _walk(path, parts if deep else rest, below, left_out, seen)
        elif hidden:
            left_out[HIDDEN] += 1
        elif is_folder:
            left_out[FOLDERS] += not entered
        elif not stat.S_ISREG(mode):
            left_out[ODD] += 1
        elif not entry.name.endswith(WHOLE + LINES):
            left_out[OTHER] += 1
        else:
            yield below, path
    left_out[CLOSED] += sealed and not deep


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
