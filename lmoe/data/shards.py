"""Tokenised text on disk: memory-mapped shards and the index that vouches for them.

    index.json         {format, plan, dtype, tokenizer: {name, vocab_size, eos, digest}, shards:
                       [{name, tokens, documents, sha256}]}
    NAME.tokens        little-endian uint16 or uint32 [tokens]: documents one after the other, each
                       ended by eos
    NAME.documents     little-endian int64 [documents]: where each document ends in NAME.tokens, its
                       eos included

A shard holds whole documents. sha256 is over the bytes of both files. The index is written last, so
a folder that has one is complete.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from lmoe.files import write_atomic

FORMAT = 1
INDEX = "index.json"


def to_json(value):
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


class Shards:
    """A folder of tokenised text, opened for reading. Sizes are checked here, checksums by
    verify().

    Pickles as its paths: loader processes map the files themselves.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(
                f"data.paths: {str(self.folder)!r} has no {INDEX}: not a finished folder of"
                " lmoe.data.prepare"
            ) from None
        except (ValueError, NotADirectoryError) as error:
            raise ValueError(f"data.paths: {str(path)!r} is damaged: {error}") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise ValueError(
                f"data.paths: {str(path)!r} is not an index of format {FORMAT}: prepare the folder"
                " again"
            )
        self.digest = hashlib.sha256(to_json(index)).hexdigest()
        self.tokenizer = index["tokenizer"]
        self.dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self.shards = index["shards"]
        self.tokens = sum(s["tokens"] for s in self.shards)
        self.documents = sum(s["documents"] for s in self.shards)
        self._maps = {}
        for shard in self.shards:
            check_size(self.folder, shard, self.dtype)

    def __getstate__(self):
        return {**self.__dict__, "_maps": {}}

    def shard_tokens(self, k):
        """Tokens of shard k, a read-only memory map [tokens]."""
        if k not in self._maps:
            # Again: a file cut since then would be a bus error, not an exception.
            path, _ = check_size(self.folder, self.shards[k], self.dtype)
            self._maps[k] = np.memmap(path, self.dtype, "r")
        return self._maps[k]

    def document_ends(self, k):
        """Ends of the documents of shard k [documents], int64."""
        return np.fromfile(shard_files(self.folder, self.shards[k]["name"])[1], "<i8")

    def verify(self):
        """Compare every shard with its checksum; ValueError names the first that differs."""
        for shard in self.shards:
            if checksum(self.folder, shard["name"]) != shard["sha256"]:
                raise ValueError(
                    f"data.paths: shard {str(self.folder / shard['name'])!r} is damaged: its"
                    " checksum is not the index's"
                )


def shard_files(folder, name):
    """Paths of a shard's tokens and documents. folder: a Path."""
    return folder / f"{name}.tokens", folder / f"{name}.documents"


def check_size(folder, shard, dtype):
    """Return the paths of a shard's two files; ValueError where one is not there in full length."""
    sizes = (shard["tokens"] * dtype.itemsize, shard["documents"] * 8)
    paths = shard_files(folder, shard["name"])
    for path, size in zip(paths, sizes):
        found = path.stat().st_size if path.exists() else None
        if found != size:
            fault = "is missing" if found is None else f"is damaged: {found} bytes, not {size}"
            raise ValueError(
                f"data.paths: shard {str(path)!r} {fault}; remove the folder and prepare it again"
            )
    return paths


def checksum(folder, name):
    """sha256 over the bytes of a shard's two files."""
    digest = hashlib.sha256()
    for path in shard_files(folder, name):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
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
        path = self.folder / f"{self._name()}.json"
        if not path.exists():
            return None
        note = json.loads(path.read_bytes())
        with contextlib.suppress(ValueError):
            check_size(self.folder, note, self.dtype)
            if checksum(self.folder, note["name"]) == note["sha256"]:
                return note
        return None

    def _open(self):
        self._file = open(self.folder / "shard.tmp", "wb")
        self._digest = hashlib.sha256()
        self._ends = []
        self._tokens = 0

    def add(self, tokens, ends):
        """Append whole documents: tokens [n] and where each ends in them [documents], at most what
        one shard still takes."""
        data = np.ascontiguousarray(tokens, self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._ends.append(np.asarray(ends, "<i8") + self._tokens)
        self._tokens += len(tokens)

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
        }
        write_atomic(self.folder / f"{name}.json", to_json({**shard, "resume": resume}))
        self.shards.append(shard)
        self._open()

    def close(self, plan, tokenizer, resume):
        """Finish the last shard and write the index."""
        if self._tokens:
            self.finish_shard(resume)
        self._file.close()
        described = ("name", "vocab_size", "eos", "digest")
        index = {
            "format": FORMAT,
            "plan": plan,
            "dtype": self.dtype.name,
            "tokenizer": {key: getattr(tokenizer, key) for key in described},
            "shards": self.shards,
        }
        write_atomic(self.folder / INDEX, to_json(index))
