"""A ShardWriter that a kill costs little: of the shard in work it keeps what was last called kept.

partial.tmp    {name, tokens, documents, sha256, largest, resume} of the shard in work, as NAME.json
               will be of the finished one; what follows in shard.tmp is written again
ends.tmp       its NAME.documents so far
"""

import contextlib
import hashlib
import os

import numpy as np

from lmoe.data.shards import ShardWriter, to_json
from lmoe.files import open_regular, read_regular, write_atomic
from lmoe.messages import parse

KEEP_TOKENS = 1 << 23  # written since, before they are worth a flush to the disk


class PartialWriter(ShardWriter):
    """Writes the same bytes, whether and wherever it is interrupted. advance(): called before a
    finished shard is read again to compare its checksum."""

    def __init__(self, folder, dtype, shard_tokens, advance):
        self._advance = advance
        super().__init__(folder, dtype, shard_tokens)

    def _note(self):
        self._advance()
        return super()._note()

    def _open(self):
        self._kept = 0
        if not self._go_on():
            super()._open()

    @property
    def tokens(self):
        """Count the tokens of the shard in work."""
        return self._tokens

    def keep(self, resume):
        """Keep the shard in work, where it has grown; it goes on at `resume` in the input."""
        if self._tokens - self._kept < KEEP_TOKENS:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        ends = np.concatenate(self._ends)
        digest = self._digest.copy()
        digest.update(ends.tobytes())
        note = {"name": self._name(), "tokens": self._tokens, "documents": len(ends)}
        write_atomic(self.folder / "ends.tmp", ends.tobytes())
        note |= {"sha256": digest.hexdigest(), "largest": self._largest, "resume": resume}
        write_atomic(self.folder / "partial.tmp", to_json(note))
        self._kept = self._tokens

    def _go_on(self):
        """Tell whether the shard in work could be opened as it was kept."""
        aside = self.folder / "shard.tmp"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            note = parse(read_regular(self.folder / "partial.tmp"))
            if note["name"] != self._name() or aside.is_symlink():
                return False
            ends = np.frombuffer(read_regular(self.folder / "ends.tmp", None), "<i8")
            ends = ends[: note["documents"]]
            piece, document = note["resume"]
            largest = note["largest"]
            counts = piece, document, note["tokens"], largest
            if not all(type(n) is int and n >= 0 for n in counts):
                return False
            size = note["tokens"] * self.dtype.itemsize
            digest = hashlib.sha256()
            with open_regular(aside) as file:
                while block := file.read(min(1 << 20, size - file.tell())):
                    digest.update(block)
            whole = digest.copy()
            whole.update(ends.tobytes())
            if whole.hexdigest() != note["sha256"]:
                return False
            self._file = open(aside, "r+b")
            self._file.truncate(size)
            self._file.seek(size)
            self._digest = digest
            self._ends = [ends]
            self._tokens = self._kept = note["tokens"]
            self._largest = largest
            self.resume = (piece, document)
            return True
        return False
