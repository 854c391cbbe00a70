"""Tokenised text on disk: shards and the index that vouches for them.

    index.json         {format, plan, corpus, dtype, tokenizer: {name, vocab_size, eos, digest},
                       shards: [{name, tokens, documents, sha256, largest}]}
    NAME.tokens        little-endian uint16 or uint32 [tokens]: documents one after the other, each
                       ended by eos
    NAME.documents     little-endian int64 [documents]: where each document ends in NAME.tokens, its
                       eos included

A shard holds whole documents. sha256 is over the bytes of both files; largest, the highest id, is
not in folders written before there was such an entry. The index is written last, so a folder that
has one is complete.

A folder may be a stranger's: nothing in it is taken for granted, and what is not as above is a
ValueError of one line. Tokens are read, not memory-mapped: a file that is cut meanwhile is an error
then, and no bus error.
"""

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lmoe.files import in_one_line, is_plain, open_regular, read_regular, write_atomic

FORMAT = 1
INDEX = "index.json"
DTYPES = {"uint16": 1 << 16, "uint32": 1 << 32}  # name: ids that it holds
OPEN_FILES = 128  # of the 1,024 that a process usually may have
BLOCK = 1 << 20


def to_json(value):
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def read_json(path: Path) -> dict:
    """Read a JSON object of one of this folder's files; ValueError (one line, without the key) for
    anything else, FileNotFoundError where there is none."""
    try:
        value = json.loads(read_regular(path))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{str(path)!r} is damaged: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {in_one_line(error)}") from None


def _expect(right: object, what: str) -> None:
    if not right:
        raise ValueError(what)


def _count(value: object, least: int = 0, most: int = (1 << 60) - 1) -> bool:
    return type(value) is int and least <= value <= most


def check_shard(shard: object) -> None:
    """Refuse an entry of the index, or a note, that no writer wrote; ValueError says what."""
    _expect(isinstance(shard, dict), "a shard is not an object")
    name = shard.get("name")
    plain = is_plain(name) and "/" not in name and name.isascii()
    _expect(plain, f"{name!r:.80} is no name of a shard")
    _expect(_count(shard.get("documents"), 1), f"documents of {name!r}")
    _expect(_count(shard.get("tokens"), shard["documents"]), f"tokens of {name!r}")
    _expect(isinstance(shard.get("sha256"), str), f"sha256 of {name!r}")
    _expect(_count(shard.get("largest", 0)), f"largest of {name!r}")


def check_index(index: dict) -> None:
    """Refuse an index that no writer wrote; ValueError says what."""
    dtype = index.get("dtype")
    _expect(isinstance(dtype, str) and dtype in DTYPES, f"dtype is none of {', '.join(DTYPES)}")
    tokenizer = index.get("tokenizer")
    _expect(isinstance(tokenizer, dict), "tokenizer is not an object")
    for key in ("name", "digest"):
        text = tokenizer.get(key)
        _expect(isinstance(text, str) and text.isprintable(), f"tokenizer.{key} is no text")
    size = tokenizer.get("vocab_size")
    _expect(_count(size, 1, DTYPES[dtype]), f"tokenizer.vocab_size is not one of {dtype}")
    _expect(_count(tokenizer.get("eos"), 0, size - 1), "tokenizer.eos is beyond vocab_size")
    _expect(isinstance(index.get("corpus", ""), str), "corpus is no text")
    shards = index.get("shards")
    _expect(isinstance(shards, list), "shards is not a list")
    for shard in shards:
        check_shard(shard)
    _expect(len({shard["name"] for shard in shards}) == len(shards), "a shard is named twice")


def identity(corpus: str, tokenizer: str) -> str:
    """Compute a digest of the tokens of a corpus, however they are cut into shards, from those of
    the corpus and the tokenizer."""
    return hashlib.sha256(to_json([corpus, tokenizer])).hexdigest()


def _identity(index: dict) -> str:
    """Compute the identity() of a folder; of one that does not say what it was made of, as it
    lies."""
    if "corpus" in index:
        return identity(index["corpus"], index["tokenizer"]["digest"])
    return hashlib.sha256(to_json(index)).hexdigest()


class Shards:
    """A folder of tokenised text, opened for reading. The index and sizes are checked here, ends of
    documents and ids as they are read, checksums by verify().

    Pickles as its paths: loader processes open the files themselves.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / INDEX
        try:
            index = read_json(path)
        except FileNotFoundError:
            raise ValueError(
                f"data.paths: {str(self.folder)!r} has no {INDEX}: not a finished folder of"
                " lmoe.data.prepare"
            ) from None
        except ValueError as error:
            raise ValueError(f"data.paths: {error}") from None
        if not _count(index.get("format"), FORMAT, FORMAT):
            raise ValueError(
                f"data.paths: {str(path)!r} is not an index of format {FORMAT}: prepare the folder"
                " again"
            )
        try:
            check_index(index)
            self.digest = _identity(index)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"data.paths: {str(path)!r} is damaged: {error}") from None
        self.tokenizer = index["tokenizer"]
        self.dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self.shards = index["shards"]
        self.tokens = sum(s["tokens"] for s in self.shards)
        self.documents = sum(s["documents"] for s in self.shards)
        self._open = OrderedDict()
        for k, shard in enumerate(self.shards):
            check_size(self.folder, shard, self.dtype)
            self._check_largest(k, shard.get("largest", 0))

    def __getstate__(self):
        return {**self.__dict__, "_open": OrderedDict()}

    def _file(self, k: int) -> BinaryIO:
        """Open the tokens of shard k, or take them from those read last."""
        file = self._open.pop(k, None) or open_regular(self._path(k))
        self._open[k] = file
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return file

    def _path(self, k: int) -> Path:
        return shard_files(self.folder, self.shards[k]["name"])[0]

    def read_tokens(self, k: int, start: int, stop: int) -> np.ndarray:
        """Read tokens [start, stop) of shard k, each below the vocabulary's size."""
        size = self.dtype.itemsize
        try:
            data = _pread(self._file(k), start * size, (stop - start) * size)
        except OSError as error:
            raise _unreadable(self._path(k), error) from None
        if len(data) != (stop - start) * size:
            raise _damaged(self._path(k), "it was cut while it was read")
        tokens = np.frombuffer(data, self.dtype)
        self._check_largest(k, int(tokens.max(initial=0)))
        return tokens

    def _check_largest(self, k: int, most: int) -> None:
        """Refuse shard k where an id is none of the tokenizer's, or higher than the shard says."""
        vocab_size = self.tokenizer["vocab_size"]
        if most >= vocab_size:
            why = f"token {most} is beyond the {vocab_size} of its tokenizer"
            raise _damaged(self._path(k), why)
        if most > (largest := self.shards[k].get("largest", most)):
            raise _damaged(self._path(k), f"token {most} is beyond {largest}, the index's largest")

    def document_ends(self, k):
        """Ends of the documents of shard k [documents], int64, ascending."""
        shard = self.shards[k]
        _, path = shard_files(self.folder, shard["name"])
        try:
            with open_regular(path) as file:
                data = file.read(shard["documents"] * 8)
        except OSError as error:
            raise _unreadable(path, error) from None
        if len(data) != shard["documents"] * 8:
            raise _damaged(path, "it was cut while it was read")
        ends = np.frombuffer(data, "<i8")
        if not (ends[0] > 0 and ends[-1] == shard["tokens"] and (ends[1:] > ends[:-1]).all()):
            raise _damaged(path, "ends of documents that do not ascend to the shard's tokens")
        return ends

    def verify(self):
        """Compare every shard with its checksum, and what it holds with the index; ValueError names
        the first that differs."""
        for k, shard in enumerate(self.shards):
            if checksum(self.folder, shard["name"]) != shard["sha256"]:
                raise _damaged(self.folder / shard["name"], "its checksum is not the index's")
            ends = self.document_ends(k)
            most = 0
            for start in range(0, shard["tokens"], BLOCK):
                stop = min(start + BLOCK, shard["tokens"])
                tokens = self.read_tokens(k, start, stop)
                most = max(most, int(tokens.max()))
                at = np.flatnonzero(tokens == self.tokenizer["eos"]) + start + 1
                first, last = np.searchsorted(ends, [start, stop], side="right")
                if not np.array_equal(at, ends[first:last]):
                    raise _damaged(self._path(k), "its documents do not each end in eos")
            if most != shard.get("largest", most):
                why = f"its largest token is {most}, not the index's {shard['largest']}"
                raise _damaged(self._path(k), why)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"data.paths: shard {str(path)!r} is damaged: {why}; remove the folder and prepare it again"
    )


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"data.paths: shard {str(path)!r} cannot be read: {error.strerror}")


def _pread(file: BinaryIO, start: int, size: int) -> bytes:
    """Read size bytes at `start`, less where the file ends before."""
    data = os.pread(file.fileno(), size, start)
    while 0 < len(data) < size:  # at most 2 GiB come at once
        more = os.pread(file.fileno(), size - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def shard_files(folder, name):
    """Paths of a shard's tokens and documents. folder: a Path."""
    return folder / f"{name}.tokens", folder / f"{name}.documents"


def check_size(folder, shard, dtype):
    """Paths of a shard's two files; ValueError where one is not there in full length."""
    sizes = (shard["tokens"] * dtype.itemsize, shard["documents"] * 8)
    paths = shard_files(folder, shard["name"])
    for path, size in zip(paths, sizes):
        try:
            with open_regular(path) as file:
                found = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise ValueError(
                f"data.paths: shard {str(path)!r} is missing; remove the folder and prepare it"
                " again"
            ) from None
        except OSError as error:
            raise _unreadable(path, error) from None
        if found != size:
            raise _damaged(path, f"{found} bytes, not {size}")
    return paths


def checksum(folder, name):
    """sha256 over the bytes of a shard's two files."""
    digest = hashlib.sha256()
    for path in shard_files(folder, name):
        with open_regular(path) as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """Writes documents in order into shards of at least shard_tokens tokens (the last one less),
    aside and renamed when whole.

    Each finished shard leaves NAME.json with what the index will say of it and `resume`, the point
    in the input where the next shard begins. A new writer takes over what is finished and intact;
    `resume` is then where its caller continues.
    """

    def __init__(self, folder, dtype, shard_tokens):
        self.folder = folder
        self.shard_tokens = shard_tokens
        self.dtype = dtype.newbyteorder("<")
        self.shards = []
        self.resume = (0, 0)
        while (note := self._note()) is not None:
            self.resume = note.pop("resume")
            self.shards.append(note)
        self._open()

    def _name(self):
        return f"shard-{len(self.shards):05d}"

    def _note(self):
        """The next shard's note where the shard is finished and intact, else None."""
        with contextlib.suppress(ValueError, OSError):
            note = read_json(self.folder / f"{self._name()}.json")
            check_shard(note)
            resume = note.get("resume")
            _expect(isinstance(resume, list) and len(resume) == 2, "resume")
            _expect(all(map(_count, resume)) and note["name"] == self._name(), "note")
            check_size(self.folder, note, self.dtype)
            if checksum(self.folder, note["name"]) == note["sha256"]:
                return note
        return None

    def _open(self):
        aside = self.folder / "shard.tmp"
        aside.unlink(missing_ok=True)  # it may be a link that leads elsewhere
        self._file = open(aside, "xb")
        self._digest = hashlib.sha256()
        self._ends = []
        self._tokens = 0
        self._largest = 0

    def add(self, tokens, ends):
        """Append whole documents: tokens [n] and where each ends in them [documents], at most what
        one shard still takes."""
        data = np.ascontiguousarray(tokens, self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._ends.append(np.asarray(ends, "<i8") + self._tokens)
        self._tokens += len(tokens)
        self._largest = max(self._largest, int(np.max(tokens, initial=0)))

    @property
    def room(self):
        return self.shard_tokens - self._tokens

    def finish_shard(self, resume):
        """Close the shard in work; the next begins at `resume`."""
        name = self._name()
        tokens, documents = shard_files(self.folder, name)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        (self.folder / "shard.tmp").rename(tokens)
        ends = np.concatenate(self._ends).tobytes()
        write_atomic(documents, ends)
        self._digest.update(ends)
        shard = {
            "name": name,
            "tokens": self._tokens,
            "documents": len(ends) // 8,
            "sha256": self._digest.hexdigest(),
            "largest": self._largest,
        }
        write_atomic(self.folder / f"{name}.json", to_json({**shard, "resume": resume}))
        self.shards.append(shard)
        self._open()

    def close(self, plan, corpus, tokenizer, resume):
        """Finish the last shard and write the index. plan, corpus: hex digests of what was made of
        what."""
        if self._tokens:
            self.finish_shard(resume)
        self._file.close()
        described = ("name", "vocab_size", "eos", "digest")
        index = {
            "format": FORMAT,
            "plan": plan,
            "corpus": corpus,
            "dtype": self.dtype.name,
            "tokenizer": {key: getattr(tokenizer, key) for key in described},
            "shards": self.shards,
        }
        write_atomic(self.folder / INDEX, to_json(index))
