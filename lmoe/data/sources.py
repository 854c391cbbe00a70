"""Sources of samples, addressed by index.

A source has a name, by which people know it, `samples` (samples per epoch), a fingerprint of its
content, by which a run knows it again, about() for messages and row(epoch, i) -> Row, a pure
function. It pickles small: loader processes open the files themselves.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmoe.command import printable
from lmoe.data.corpus import contents, files_digest, hex_digest, read_contents
from lmoe.data.documents import CLOSED, ODD, stdlib_files, text_files, told
from lmoe.data.order import GOLDEN, below, key_of, mix, permute
from lmoe.data.packing import IGNORE, Row, stream_row
from lmoe.data.prepare import cores, prepare
from lmoe.data.shards import INDEX, Shards, identity
from lmoe.files import in_one_line

logger = logging.getLogger("lmoe")

SOURCES = ("stdlib", "text", "tokens", "mqar")
# Not the run's seed: every run over the same documents holds out the same ones.
SPLIT_KEY = key_of("validation split")
MQAR_SAMPLES = 1 << 24
SHARE = 4  # what whole documents hold out is used within this factor of what is asked for
PARALLEL_BYTES = 64 << 20  # text of this size is tokenised by all cores
SHORT = 16  # hex digits of a digest that name a thing
LONGEST_NAME = 200


def in_validation(documents, fraction):
    """Which documents (array of indices within their source) are held out: each by its own hash,
    about `fraction` of them."""
    return mix(np.asarray(documents, np.uint64) * GOLDEN + SPLIT_KEY) < below(fraction)


def whole_documents(folders, split, fraction):
    """Hold out whole documents: the runs (folder, shard, start, stop) of the split's tokens and its
    number of documents; None where that leaves one of the splits SHARE times too much or too
    little."""
    runs = []
    documents = 0
    first = 0
    for f, shards in enumerate(folders):
        for k in range(len(shards.shards)):
            ends = shards.document_ends(k)
            held_out = in_validation(np.arange(first, first + len(ends)), fraction)
            mine = held_out == (split == "validation")
            first += len(ends)
            documents += int(mine.sum())
            # Runs of neighbouring documents of this split: about 2 x fraction of the documents, not
            # all of them.
            edges = np.flatnonzero(np.diff(np.concatenate([[0], mine.astype(np.int8), [0]])))
            borders = np.concatenate([[0], ends])[edges].reshape(-1, 2)
            runs += [(f, k, a, b) for a, b in borders.tolist()]
    total = sum(shards.tokens for shards in folders)
    held = sum(b - a for *_, a, b in runs)
    held = held if split == "validation" else total - held
    shares = (fraction, held / total), (1 - fraction, 1 - held / total)
    if all(asked / SHARE <= found <= asked * SHARE for asked, found in shares):
        return runs, documents


def last_tokens(folders, split, held):
    """Hold out the last `held` tokens: runs and documents as of whole_documents, where a document
    that is cut counts in both splits."""
    runs = []
    documents = 0
    left = sum(shards.tokens for shards in folders) - held  # of the train split
    for f, shards in enumerate(folders):
        for k, shard in enumerate(shards.shards):
            cut = min(left, shard["tokens"])
            left -= cut
            a, b = (0, cut) if split == "train" else (cut, shard["tokens"])
            if a < b:
                ends = shards.document_ends(k)
                runs.append((f, k, a, b))
                documents += int(ends.searchsorted(b) + 1 - ends.searchsorted(a, side="right"))
    return runs, documents


def fingerprint_of(digests, split, fraction):
    """Compute what two splits of tokens have in common if and only if they are the same. digests:
    of the folders, of shards.identity."""
    return hex_digest(repr([*(digest[:SHORT] for digest in digests), split, fraction]))[:SHORT]


class TokenSource:
    """One split of tokenised text: its documents end to end, each with its eos, cut into samples of
    seq_len tokens. The tokens of a sample are labels; its inputs are the token before each.

    A document that does not end within a sample goes on in the next; the tail shorter than a sample
    is left out, but a validation split has at least one sample.
    """

    def __init__(self, name, folders, split, fraction, seq_len, start=None):
        """folders: list of Shards, one after the other; split: "train" or "validation"; start: the
        input before a document's first token (None: eos)."""
        self.name = name
        self.folders = folders
        self.seq_len = seq_len
        self.eos = folders[0].tokenizer["eos"]
        self.start = self.eos if start is None else start
        self.fraction = fraction
        self.fingerprint = fingerprint_of([f.digest for f in folders], split, fraction)
        total = sum(shards.tokens for shards in folders)
        if not total:
            raise ValueError(f"data.paths: {name} holds no documents")
        found = whole_documents(folders, split, fraction)
        if found is None:
            held = max(1, min(int(fraction * total), total - 1))
            found = last_tokens(folders, split, held)
            if split == "train":
                logger.info(
                    f"data: {name}: too few documents to hold out whole ones; its last {held:,} of"
                    f" {total:,} tokens are the validation split"
                )
        runs, self.documents = found
        self.runs = np.array(runs, np.int64).reshape(-1, 4)
        lengths = self.runs[:, 3] - self.runs[:, 2]
        self.begins = np.concatenate([[0], np.cumsum(lengths)])  # in the split's stream
        self.tokens = int(self.begins[-1])
        self.samples = self.tokens // seq_len
        if split == "validation":
            self.samples = max(self.samples, 1)
        elif not self.samples:
            other = "it" if self.tokens > 1 else "data.validation_fraction"
            raise ValueError(
                f"data.seq_len = {seq_len}: the train split of {name} has only {self.tokens}"
                f" tokens; lower {other} or add text"
            )

    def read(self, start, stop):
        """Tokens [start, stop) of the split's stream, int64, not beyond its end. -1 is the token
        before its first in the shard: eos, unless the split begins inside a document."""
        out = np.full(stop - start, self.eos, np.int64)
        if start < 0:
            folder, shard, a, _ = self.runs[0].tolist()
            if a:
                out[0] = self.folders[folder].read_tokens(shard, a - 1, a)[0]
        at = max(start, 0)
        run = int(np.searchsorted(self.begins, at, side="right")) - 1
        while at < stop:
            folder, shard, a, b = self.runs[run].tolist()
            a += at - int(self.begins[run])
            n = min(b - a, stop - at)
            out[at - start : at - start + n] = self.folders[folder].read_tokens(shard, a, a + n)
            at += n
            run += 1
        return out

    def about(self):
        """Describe what a run reads, for the day on which it is another."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "fraction": self.fraction,
            "folders": [os.path.abspath(shards.folder) for shards in self.folders],
        }

    def contents(self):
        """List (name, digest) of the files that it was made of, as far as the folders say."""
        return [file for shards in self.folders for file in read_contents(shards.folder)]

    def row(self, epoch, i):
        start = i * self.seq_len
        stream = self.read(start - 1, min(start + self.seq_len, self.tokens))
        return stream_row(stream, self.seq_len, self.eos, self.start)


class MqarSource:
    """Multi-query associative recall (arXiv 2312.04927): k1 v1 ... kP vP q1 a1 ... qQ aQ, where
    each q is one of the keys and a its value.

    Keys are distinct, from the lower half of the tokenizer's ordinary ids, values from the upper
    half. Only the answers are labels. A row holds as many such sequences as fit, each a document of
    its own, and ends in eos without labels.
    """

    samples = documents = MQAR_SAMPLES

    def __init__(self, name, tokenizer, pairs, queries, split, seq_len, seed):
        self.name = name
        self.pairs = pairs
        self.queries = queries
        self.seq_len = seq_len
        self.eos = tokenizer.eos
        self.half = tokenizer.ordinary_size // 2
        self.length = 2 * (pairs + queries)
        self.key = ("mqar", split, pairs, queries, seed if split == "train" else None)
        self.fingerprint = hex_digest(repr((self.key[:-1], self.half)))[:SHORT]
        if pairs > self.half:
            raise ValueError(
                f"data.mqar_pairs = {pairs}: the tokenizer has {self.half} keys to choose from; at"
                " most that many"
            )
        if self.length > seq_len:
            raise ValueError(
                f"data.seq_len = {seq_len}: {pairs} pairs and {queries} queries (data.mqar_*) take"
                f" {self.length} tokens"
            )

    def about(self):
        return {"pairs": self.pairs, "queries": self.queries}

    def row(self, epoch, i):
        n = self.seq_len // self.length
        half = np.uint64(self.half)
        numbers = np.arange(i * n, (i + 1) * n, dtype=np.uint64)
        documents = mix(numbers + key_of(*self.key, int(epoch)))[:, None]  # a key for each
        slots = np.arange(self.pairs, dtype=np.uint64)
        keys = permute(slots, self.half, documents)
        values = (half + mix(mix(documents) + slots) % half).astype(np.int64)
        asked = permute(np.arange(self.queries) % self.pairs, self.pairs, ~documents)
        told = np.stack([keys, values], 2)  # [n, pairs, 2]
        asks = np.take_along_axis(told, asked[:, :, None], 1)
        tokens = np.full(self.seq_len, self.eos, np.int64)
        labels = np.full(self.seq_len, IGNORE, np.int64)
        used = n * self.length
        tokens[:used] = np.concatenate([told, asks], 1).reshape(-1)
        table = labels[:used].reshape(n, self.length)
        table[:, 2 * self.pairs :: 2] = asks[:, :, 1]
        starts = np.arange(1, n + (used < self.seq_len)) * self.length
        return Row(tokens, labels, starts)


def parse_mixture(data):
    """[data] -> list of (weight, kind, paths): the mixture's entries "WEIGHT KIND" or "WEIGHT
    KIND:PATH", or the one source."""
    if not data.mixture:
        return [(1.0, data.source, data.paths)]
    if data.paths:
        raise ValueError(
            "data.paths: the entries of data.mixture name their own paths; leave it empty"
        )
    entries = []
    for text in data.mixture:
        number, _, spec = text.strip().partition(" ")
        kind, _, path = spec.strip().partition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not 0 < weight < float("inf") or not kind:
            raise ValueError(
                f'data.mixture: {text!r} is not "WEIGHT SOURCE" or "WEIGHT SOURCE:PATH" with a'
                " weight above 0"
            )
        entries.append((weight, kind, [os.path.expanduser(path)] if path else []))
    return entries


@dataclass
class Text:
    """Text that is not tokenised yet: what is known of its source before. files: only in the
    process that tokenises."""

    name: str
    fingerprint: str
    fraction: float
    folder: Path
    files: list
    make: Callable  # tokenises into the folder

    def about(self):
        return {"fraction": self.fraction, "folders": [os.path.abspath(self.folder)]}

    def contents(self):
        return contents(self.files)


def open_sources(
    data,
    tokenizer,
    *,
    split,
    seed,
    cache,
    share=lambda make: make(),
    advance=lambda: None,
    check=lambda sources: None,
):
    """The sources of [data] and their weights.

    Text is tokenised into `cache` by one process: share(make) calls make() there, which may take
    long, and gives its text to all. advance() is called as that gets on. check(sources): called
    there before anything is written, text still as Text.
    """
    assert split in ("train", "validation")

    def open_(kind, paths):
        spelt = ",".join(map(os.path.normpath, paths))
        name = printable(f"{kind}:{spelt}" if paths else kind)
        name = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]} .."
        if kind not in SOURCES:
            raise ValueError(f"data.mixture: {kind!r} is no source; one of: {', '.join(SOURCES)}")
        if kind in ("stdlib", "mqar") and paths:
            raise ValueError(
                f"data.paths: the source {kind} takes none; for files use the source text"
            )
        if kind == "mqar":
            shape = (data.mqar_pairs, data.mqar_queries, split, data.seq_len)
            return MqarSource(name, tokenizer, *shape, seed)
        if kind == "tokens":
            return tokens_of(name, _prepared(paths, tokenizer))
        files = []

        def look():
            files[:] = stdlib_files() if kind == "stdlib" else _found(name, paths, split)
            digest = identity(files_digest(files, data.field, advance), tokenizer.digest)
            return f"{kind}-{digest[:SHORT]}"

        def make():
            _tokenise(folder, files, data.field, tokenizer, advance)
            return ""

        folder = Path(cache) / share(look)
        digest = folder.name.removeprefix(f"{kind}-")
        fingerprint = fingerprint_of([digest], split, data.validation_fraction)
        return Text(name, fingerprint, data.validation_fraction, folder, files, make)

    def tokens_of(name, folders):
        shape = (split, data.validation_fraction, data.seq_len, tokenizer.start)
        return TokenSource(name, folders, *shape)

    entries = parse_mixture(data)
    sources = [open_(kind, paths) for _, kind, paths in entries]
    first = {}
    for source in sources:
        if (same := first.setdefault(source.fingerprint, source)) is not source:
            twice = f"and {source.name!r} hold the same text"
            twice = "is named twice" if same.name == source.name else twice
            raise ValueError(f"data.mixture: {same.name!r} {twice}; give it one weight")
    share(lambda: _refuse_overlap(sources) or check(sources) or "")
    for place, source in enumerate(sources):
        if isinstance(source, Text):
            share(source.make)
            sources[place] = tokens_of(source.name, [_cached(source.folder, tokenizer)])
    return sources, [weight for weight, _, _ in entries]


def _refuse_overlap(sources):
    """Refuse a file in two sources, of which one could train on what the other holds out."""
    owners = {}
    for source in sources:
        for file in source.files if isinstance(source, Text) else ():
            other = owners.setdefault(os.path.realpath(file.path), source)
            if other is not source:
                raise ValueError(
                    f"data.mixture: {file.path!r} is in {other.name!r} and in {source.name!r}; one"
                    " would train on what the other holds out: name it once"
                )


def _found(name, paths, split):
    """List files of text, and say once what was left out."""
    left_out = Counter()
    files = text_files(paths, left_out)
    if split == "train" and (rest := told(left_out)):
        odd = left_out[CLOSED] or left_out[ODD]
        level = logging.WARNING if odd else logging.INFO
        logger.log(level, f"data: {name}: {len(files):,} files; {rest}")
    return files


def _prepared(paths, tokenizer):
    """Shards of folders of lmoe.data.prepare, all made with this tokenizer."""
    if not paths:
        raise ValueError(
            "data.paths: the source tokens needs at least one folder of lmoe.data.prepare"
        )
    once = {os.path.realpath(path): path for path in paths}
    return [_open_shards(path, tokenizer) for path in once.values()]


def _open_shards(folder, tokenizer):
    """Shards of a folder, made with this tokenizer."""
    shards = Shards(folder)
    made = shards.tokenizer
    if made["digest"] != tokenizer.digest:
        raise ValueError(
            f"data.tokenizer = {tokenizer.name!r}: {str(shards.folder)!r} was made with"
            f" another, {made['name']!r}; use that"
        )
    if (made["vocab_size"], made["eos"]) != (tokenizer.vocab_size, tokenizer.eos):
        raise ValueError(
            f"data.paths: {str(shards.folder / INDEX)!r} is damaged: vocab_size and eos are not"
            f" those of {tokenizer.name!r}"
        )
    return shards


def _tokenise(folder, files, field, tokenizer, advance):
    """Tokenise text into a folder of the cache, where it is not there already."""
    workers = cores() if sum(f.size for f in files) > PARALLEL_BYTES else 0
    try:
        prepare(folder, files, tokenizer, field=field, workers=workers, advance=advance)
    except OSError as error:
        raise ValueError(
            f"data.cache = {str(folder.parent)!r} cannot be written: {in_one_line(error)}"
        ) from None


def _cached(folder, tokenizer):
    """Shards of text in the cache."""
    if not os.path.exists(folder / INDEX):
        raise ValueError(
            f"data.cache = {str(folder.parent)!r}: this process does not see what rank 0 wrote; it"
            " must lie where all nodes see it"
        )
    return _open_shards(folder, tokenizer)
