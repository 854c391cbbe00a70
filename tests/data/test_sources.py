import base64
import glob
import gzip
import hashlib
import json
import os
import pickle
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hash_chain import make_config

from lmoe.data import sources
from lmoe.data.documents import read_piece, split_pieces, stdlib_files, text_files
from lmoe.data.packing import IGNORE, pack
from lmoe.data.prepare import prepare
from lmoe.data.sources import (
    MqarSource,
    TokenSource,
    in_validation,
    last_tokens,
    open_sources,
    whole_documents,
)
from lmoe.data.tokenizer import load_tokenizer

BYTE = load_tokenizer("byte")


def open_data(folder, split="train", **data):
    options = {"share": data.pop("share")} if "share" in data else {}
    config = make_config(folder, **data)
    return open_sources(
        config.data, BYTE, split=split, seed=1, cache=Path(folder) / "cache", **options
    )


def one_line(key):
    return f"^{key}[^\n]*$"


# Documents


def test_stdlib_files():
    files = stdlib_files()
    root = sysconfig.get_paths()["stdlib"]
    assert len(files) > 500 and all(
        f.path.startswith(root) and f.path.endswith(".py") for f in files
    )
    assert not any("site-packages" in f.path or "dist-packages" in f.path for f in files)
    assert [f.name for f in files] == sorted((f.name for f in files), key=lambda s: s.split("/"))
    assert any(f.name == "typing.py" for f in files)


def test_text_files_are_found_once_and_in_order(corpus):
    folder, texts = corpus
    everything = text_files([str(folder)])
    assert len(everything) == 26
    assert [
        f.path for f in text_files([str(folder / "**" / "*"), str(folder), str(folder / "00.txt")])
    ] == [f.path for f in everything]
    first = text_files([str(folder / "lines.jsonl"), str(folder)])
    assert first[0].path.endswith("lines.jsonl") and len(first) == 26
    assert [t for piece in split_pieces(everything) for t in read_piece(piece, "text")] == texts


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 50, 1000, 10**9])
def test_pieces_cut_anywhere_give_the_same_documents(corpus, piece_bytes, tmp_path):
    folder, texts = corpus
    pieces = split_pieces(text_files([str(folder)]), piece_bytes)
    assert [t for piece in pieces for t in read_piece(piece, "text")] == texts


def test_compressed_lines(corpus, tmp_path):
    folder, _ = corpus
    lines = (folder / "lines.jsonl").read_bytes()
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(lines.rstrip())  # no line end at the end
    (piece,) = split_pieces(text_files([str(tmp_path)]))
    (plain,) = split_pieces(text_files([str(folder / "lines.jsonl")]))
    assert list(read_piece(piece, "text")) == list(read_piece(plain, "text"))
    (tmp_path / "a.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(ValueError, match=one_line("data.paths.*a.jsonl.gz")):
        list(read_piece(piece, "text"))


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xff\xfeb\r\n")
    (piece,) = split_pieces(text_files([str(tmp_path)]))
    assert list(read_piece(piece, "text")) == ["a\ufffd\ufffdb\r\n"]


@pytest.mark.parametrize(
    "line, key",
    [
        ("{broken", "data.paths.*byte 14"),
        ('{"body": "x", "n": 1}', "data.field = 'text'.*it has: body"),
        ('{"text": 3}', "data.field"),
        ("[1]", "data.field"),
        ("[" * 100_000, "data.paths.*byte 14"),
        ("1" + "0" * 5000, "data.paths.*byte 14"),
        ('{"a\\nb": "x"}', r"data.field.*a\\nb"),
    ],
)
def test_bad_lines(tmp_path, line, key):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    (piece,) = split_pieces(text_files([str(tmp_path)]))
    with pytest.raises(ValueError, match=one_line(key)):
        list(read_piece(piece, "text"))


def test_bad_paths(tmp_path):
    (tmp_path / "a.rst").write_text("x")
    for paths, key in [
        ([], "data.paths"),
        ([str(tmp_path / "none.txt")], "data.paths.*none.txt"),
        ([str(tmp_path / "*.md")], "data.paths.*md"),
        ([str(tmp_path / "a.rst")], "data.paths.*a.rst"),
        ([str(tmp_path)], "data.paths"),
    ]:
        with pytest.raises(ValueError, match=one_line(key)):
            text_files(paths)


PATTERNS = ["**/*.txt", "**", "a/**/*", "*/**/*.txt", "**/b/*.txt", "**/b/**/*.txt", "a/**.txt"]
PATTERNS += ["[[]x]/**/*.txt", "./**/*.txt", "a/**/", "**/.h*", "**/?.txt", ".hidden/**/*.txt"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absolute", [False, True])
def test_globs_are_those_of_python(pattern, absolute, tmp_path, monkeypatch):
    for name in ("1", "a/1", "a/b/2", "a/b/c/3", "b/4", "b/b/5", "[x]/6", ".hidden/7", "a/.h"):
        path = tmp_path / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "away").symlink_to(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    pattern = f"{tmp_path}/{pattern}" if absolute else pattern
    want = sorted(n for n in glob.glob(pattern, recursive=True) if n.endswith(".txt"))
    want = [n for i, n in enumerate(want) if not any(map(same(n), want[:i]))]
    if want:
        assert [f.path for f in text_files([pattern])] == want
    elif pattern.endswith("a/**/"):  # of Python folders only
        assert text_files([pattern]) == text_files([pattern + "*"])
    else:
        with pytest.raises(ValueError, match=one_line("data.paths")):
            text_files([pattern])


def same(name):
    return lambda other: Path(name).samefile(other)


def test_links_that_lead_round(tmp_path):
    """Two of them make 2^40 paths."""
    (tmp_path / "a.txt").write_text("x")
    for name in "bcd":
        (tmp_path / name).symlink_to(tmp_path)
    for entry in (tmp_path, tmp_path / "**" / "*.txt", tmp_path / "b" / "**"):
        assert len(text_files([str(entry)])) == 1


def test_only_regular_files_are_text(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    (tmp_path / "d.txt").symlink_to(tmp_path / "d.txt")
    (tmp_path / "e.txt").symlink_to(tmp_path / "none")
    (tmp_path / "f.txt").mkdir()
    for entry in (tmp_path, tmp_path / "*", tmp_path / "**"):
        assert [f.path for f in text_files([str(entry)])] == [str(tmp_path / "a.txt")]
    for name in "bcdef":
        with pytest.raises(ValueError, match=one_line("data.paths")):
            text_files([str(tmp_path / f"{name}.txt")])
    (piece,) = split_pieces(text_files([str(tmp_path / "a.txt")]))
    for suffix in (".txt", ".jsonl", ".jsonl.gz"):
        path = tmp_path / f"later{suffix}"
        os.mkfifo(path)
        with pytest.raises(ValueError, match=one_line("data.paths: cannot read .*not a regular")):
            list(read_piece(piece._replace(paths=[str(path)]), "text"))


def test_odd_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x" * 100)
    assert len(text_files(["~/a.txt"])) == len(text_files(["~"])) == len(text_files(["~/*"])) == 1
    (source,), _ = open_data(tmp_path, mixture=["1 text:~/*.txt"])
    assert source.samples == 1
    for path in ("", "x" * 5000, "a/" * 3000, str(tmp_path / "a.txt" / "x.txt"), "~nobody/x"):
        with pytest.raises(ValueError, match=one_line("data.paths")):
            text_files([path])
        with pytest.raises(ValueError, match=one_line("data.paths")):
            open_data(tmp_path, source="tokens", paths=[path])


def test_a_cache_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "cache").write_text("x")
    with pytest.raises(ValueError, match=one_line("data.cache = .* cannot be written: ")):
        open_data(tmp_path, source="text", paths=[str(corpus[0])])


# Token streams


@pytest.mark.parametrize("seq_len, start", [(1, None), (2, 258), (5, 258), (64, None), (333, 258)])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_streams_of_both_splits(corpus, tmp_path, seq_len, start, fraction):
    """Every token and eos is a label once an epoch, but for the tail; its input is the one before
    it, or `start`."""
    folder, texts = corpus
    shards = prepare(tmp_path / "out", text_files([str(folder)]), BYTE, shard_tokens=500)
    assert len(shards.shards) > 5
    held_out = in_validation(np.arange(len(texts)), fraction)
    assert 0 < held_out.sum() < len(texts) or not fraction
    for split in ("train", "validation") if fraction else ("train",):
        mine = [t for t, v in zip(texts, held_out) if v == (split == "validation")]
        stream = [token for t in mine for token in [*t.encode(), BYTE.eos]]
        source = TokenSource("x", [shards], split, fraction, seq_len, start)
        assert (source.documents, source.tokens, source.samples) == (
            len(mine),
            len(stream),
            len(stream) // seq_len,
        )
        start = BYTE.eos if start is None else start
        inputs = [token for t in mine for token in [start, *t.encode()]]
        begins = [p for p, token in enumerate(inputs) if token == start]
        for i in range(source.samples):
            row = source.row(0, i)
            a, b = i * seq_len, (i + 1) * seq_len
            assert row.tokens.tolist() == inputs[a:b]
            assert row.labels.tolist() == stream[a:b]
            assert row.starts.tolist() == [p - a for p in begins if a < p < b]


def test_several_folders_are_one_stream(corpus, tmp_path):
    folder, texts = corpus
    parts = [
        prepare(tmp_path / name, text_files([str(folder / p)]), BYTE)
        for name, p in (("a", "sub"), ("b", "*.*"))
    ]
    source = TokenSource("x", parts, "train", 0.0, 10)
    assert source.documents == 60 and source.tokens == sum(p.tokens for p in parts)
    assert source.read(0, source.tokens).tolist() == [
        *(token for part in parts for token in part.read_tokens(0, 0, part.tokens))
    ]


def test_share_of_validation():
    for fraction in (0.001, 0.01, 0.5):
        found = in_validation(np.arange(10**6), fraction).mean()
        assert abs(found - fraction) < 5 * (fraction / 10**6) ** 0.5
    assert not in_validation(np.arange(1000), 0.0).any()


def test_pickles_without_its_data(corpus, tmp_path):
    (source,), _ = open_data(tmp_path, source="text", paths=[str(corpus[0])])
    source.row(0, 0)
    data = pickle.dumps(source)
    assert len(data) < 4096 < source.tokens
    assert pickle.loads(data).row(0, 3).tokens.tolist() == source.row(0, 3).tokens.tolist()


def test_one_document(tmp_path, caplog):
    """It is cut: its last tokens are the validation split, also where that gives no whole row."""
    caplog.set_level("INFO", "lmoe")
    text = "".join(map(chr, range(32, 127))) * 10
    (tmp_path / "a.txt").write_text(text)
    data = {"source": "text", "paths": [str(tmp_path / "a.txt")], "validation_fraction": 0.01}
    (train,), _ = open_data(tmp_path, **data)
    (held_out,), _ = open_data(tmp_path, "validation", **data)
    (line,) = [line for line in caplog.messages if line.startswith("data: ")]
    assert line.endswith("its last 9 of 951 tokens are the validation split")
    ids = [*text.encode(), BYTE.eos]
    assert train.samples == 14 and train.read(0, train.tokens).tolist() == ids[:-9]
    row = held_out.row(0, 0)
    assert held_out.samples == held_out.documents == train.documents == 1
    assert row.labels.tolist() == ids[-9:] + [IGNORE] * 55 and row.starts.tolist() == [9]
    assert row.tokens.tolist() == ids[-10:-1] + [BYTE.start] * 55


def test_too_short(tmp_path):
    for text, tokens, seq_len, advice in [
        ("x" * 62, 57, 64, "lower it"),
        ("x", 1, 2, "lower data.validation_fraction"),
        ("", 0, 2, "lower data.validation_fraction"),
    ]:
        (tmp_path / "a.txt").write_text(text)
        key = f"data.seq_len = {seq_len}: the train split of text:.* has only {tokens} tokens"
        with pytest.raises(ValueError, match=one_line(f"{key}; {advice} or add text")):
            open_data(tmp_path, source="text", paths=[str(tmp_path / "a.txt")], seq_len=seq_len)


class Numbered:
    """Shards in memory, whose tokens are 1, 2, 3, .. and 0 for eos. lengths: of the documents of
    each shard, eos included."""

    tokenizer = {"eos": 0}
    digest = "x"

    def __init__(self, lengths, first=1):
        self.ends = [np.cumsum(each) for each in lengths]
        self.shards = [{"tokens": int(ends[-1]), "documents": len(ends)} for ends in self.ends]
        self.ids = []
        for ends in self.ends:
            self.ids.append(np.arange(first, first + ends[-1]))
            self.ids[-1][ends - 1] = 0
            first += int(ends[-1])
        self.tokens = sum(map(len, self.ids))

    def document_ends(self, k):
        return self.ends[k]

    def read_tokens(self, k, start, stop):
        assert 0 <= start < stop <= len(self.ids[k])
        return self.ids[k][start:stop]


def folders_of(rng, lengths):
    """The documents in folders of shards, cut anywhere."""
    cuts = np.unique(rng.integers(0, len(lengths) + 1, 4))
    shards = [each.tolist() for each in np.split(lengths, cuts) if len(each)]
    k = int(rng.integers(len(shards) + 1))
    first = Numbered(shards[:k])
    return [first, Numbered(shards[k:], 1 + first.tokens)]


def places_of(source):
    """Places in the whole corpus of a split's tokens."""
    sizes = [len(ids) for shards in source.folders for ids in shards.ids]
    shards = [(f, k) for f, s in enumerate(source.folders) for k in range(len(s.ids))]
    at = dict(zip(shards, np.cumsum([0, *sizes]).tolist()))
    return [at[f, k] + p for f, k, a, b in source.runs.tolist() for p in range(a, b)]


@pytest.mark.parametrize("seed", range(100))
def test_any_corpus_splits_in_two(seed):
    """No token is in both splits, none in neither, whatever the shards and the samples' length; the
    sizes are about those that were asked for."""
    rng = np.random.default_rng(seed)
    documents = int(rng.integers(1, rng.choice([2, 4, 30, 300])))
    lengths = rng.integers(1, rng.choice([2, 5, 40]), documents)
    if rng.random() < 0.3:
        lengths[rng.integers(documents)] += 2000  # it holds almost everything
    fraction = float(rng.choice([1e-12, 0.01, 0.1, 0.5, 0.9, 1 - 1e-12]))
    total, seen = int(lengths.sum()), []
    ids = np.concatenate(Numbered([lengths]).ids)
    for seq_len in (2, 7, 64):
        folders = folders_of(rng, lengths)
        held_out = TokenSource("x", folders, "validation", fraction, seq_len)
        assert held_out.samples == max(1, held_out.tokens // seq_len)
        try:
            train = TokenSource("x", folders, "train", fraction, seq_len)
        except ValueError as error:
            assert total - held_out.tokens < seq_len and "data.seq_len" in str(error)
            train = None
        kept = sorted(set(range(total)) - set(places_of(held_out)))
        seen.append(places_of(held_out))
        for split in filter(None, (train, held_out)):
            places = np.array(places_of(split))
            assert sorted(places) == (kept if split is train else seen[0])
            assert split.read(0, split.tokens).tolist() == ids[places].tolist()
            inputs = np.where(places, ids[places - 1], 0)  # here a start is eos
            rows = [split.row(0, i) for i in range(split.samples)]
            used = min(len(rows) * seq_len, split.tokens)
            labels = np.concatenate([row.labels for row in rows])
            assert labels[:used].tolist() == ids[places][:used].tolist()
            assert (labels[used:] == IGNORE).all()
            tokens = np.concatenate([row.tokens for row in rows])
            assert tokens[:used].tolist() == inputs[:used].tolist()
            begins = pack(rows).cu_seqlens.tolist()
            wanted = {p for p in range(used) if not inputs[p] or not p % seq_len}
            assert begins == sorted(wanted | {used, len(tokens)})
    assert seen[0] == seen[1] == seen[2] and 1 <= len(seen[0]) <= max(1, total - 1)
    exact = max(1, min(int(fraction * total), total - 1))
    share = len(seen[0]) / total
    near = fraction / 4 <= share <= 4 * fraction and 1 - share <= 4 * (1 - fraction)
    if not near:
        assert seen[0] == list(range(total - exact, total))


@pytest.mark.parametrize("lengths", [[[6]], [[1, 3], [2]], [[1], [1], [1], [1], [1], [1]]])
@pytest.mark.parametrize("cut", range(1, 6))
def test_documents_are_counted_where_they_have_tokens(lengths, cut):
    """One that is cut counts in both splits."""
    owners = np.repeat(range(len(sum(lengths, []))), sum(lengths, []))
    for split, mine in (("train", owners[:cut]), ("validation", owners[cut:])):
        runs, documents = last_tokens([Numbered(lengths)], split, 6 - cut)
        assert documents == len(set(mine)) and sum(b - a for *_, a, b in runs) == len(mine)


def test_cache(corpus, tmp_path):
    folder, _ = corpus
    data = {"source": "text", "paths": [str(folder)]}
    with pytest.raises(ValueError, match=one_line("data.cache.*does not see what rank 0 wrote")):
        open_data(tmp_path, share=lambda make: "text-0", **data)
    open_data(tmp_path, **data)
    (entry,) = (tmp_path / "cache").iterdir()
    before = (entry / "index.json").stat().st_mtime_ns
    open_data(tmp_path, "validation", share=lambda make: entry.name, **data)
    open_data(tmp_path, "validation", **data)
    assert (entry / "index.json").stat().st_mtime_ns == before
    assert sorted(p.name for p in entry.iterdir()) == [
        ".lock",
        "files.json",
        "index.json",
        "shard-00000.documents",
        "shard-00000.tokens",
    ]


def test_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=one_line("data.paths: text:.*a.jsonl holds no documents")):
        open_data(tmp_path, source="text", paths=[str(tmp_path / "a.jsonl")])


def test_ranks_wait_for_the_one_that_tokenises(corpus, tmp_path):
    """Four ranks as threads; rank 0, the only one that sees the text, comes last."""
    barrier, found, name = threading.Barrier(4), {}, []

    def rank(r):
        def share(make):
            time.sleep(0.2 * (r == 0))
            name.extend([make()] if r == 0 else [])
            barrier.wait()
            return name[0]

        paths = [str(corpus[0] if r == 0 else tmp_path / "none")]
        (source,), _ = open_data(tmp_path, source="text", paths=paths, share=share)
        found[r] = source.fingerprint, source.tokens, source.row(0, 5).tokens.tolist()

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(value == found[0] for value in found.values())


def test_much_text_is_tokenised_by_all_cores(corpus, tmp_path, monkeypatch):
    (alone,), _ = open_data(tmp_path / "a", source="text", paths=[str(corpus[0])])
    monkeypatch.setattr(sources, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(sources, "cores", lambda: 2)
    (parallel,), _ = open_data(tmp_path / "b", source="text", paths=[str(corpus[0])])
    assert parallel.fingerprint == alone.fingerprint


def test_large_vocabulary(tmp_path):
    """More than 65,536 ids are stored in four bytes: a rank file of all single bytes and all
    pairs."""
    tokens = [bytes([i]) for i in range(256)] + [
        bytes([i, j]) for i in range(256) for j in range(256)
    ]
    (tmp_path / "pairs.tiktoken").write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))
    )
    tokenizer = load_tokenizer(tmp_path / "pairs.tiktoken")
    text = "".join(map(chr, range(3000)))
    (tmp_path / "a.txt").write_bytes(text.encode())
    shards = prepare(tmp_path / "out", text_files([str(tmp_path / "a.txt")]), tokenizer)
    source = TokenSource("x", [shards], "train", 0.0, 64)
    ids = source.read(0, source.tokens)
    assert shards.dtype == np.uint32 and ids.max() > 65535 and ids[-1] == tokenizer.eos == 65792
    assert tokenizer.decode(ids[:-1]) == text


def test_stdlib_source(tmp_path):
    (train,), weights = open_data(tmp_path, source="stdlib", validation_fraction=0.01)
    (held_out,), _ = open_data(tmp_path, "validation", source="stdlib", validation_fraction=0.01)
    assert whole_documents(train.folders, "train", 0.01) is not None
    assert (
        weights == [1.0]
        and train.documents + held_out.documents == len(stdlib_files())
        and held_out.samples > 100
    )
    text = b"".join(bytes(t for t in train.row(0, i).tokens.tolist() if t < 256) for i in range(50))
    assert b"import " in text


def test_tokens_source(corpus, tmp_path):
    prepare(tmp_path / "shards", text_files([str(corpus[0])]), BYTE)
    (source,), _ = open_data(tmp_path, source="tokens", paths=[str(tmp_path / "shards")])
    (text,), _ = open_data(tmp_path, source="text", paths=[str(corpus[0])])
    assert source.read(0, 1000).tolist() == text.read(0, 1000).tolist()
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    index["tokenizer"] |= {"digest": "0", "name": "other"}
    (tmp_path / "shards" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=one_line("data.tokenizer = 'byte'.*'other'")):
        open_data(tmp_path, source="tokens", paths=[str(tmp_path / "shards")])
    with pytest.raises(ValueError, match=one_line("data.paths.*index.json")):
        open_data(tmp_path, source="tokens", paths=[str(tmp_path)])


@pytest.mark.parametrize(
    "data, key",
    [
        ({"source": "stdlib", "paths": ["x"]}, "data.paths"),
        ({"source": "tokens"}, "data.paths"),
        ({"mixture": ["0.7 mqar"], "paths": ["x"]}, "data.paths"),
        ({"mixture": ["mqar"]}, "data.mixture: 'mqar'"),
        ({"mixture": ["0 mqar"]}, "data.mixture"),
        ({"mixture": ["1 stdlb"]}, "data.mixture: 'stdlb' is no source"),
        ({"mixture": ["nan mqar"]}, "data.mixture"),
        ({"mixture": ["0.5 mqar", "0.5 mqar"]}, "data.mixture: 'mqar' is named twice"),
        ({"source": "mqar", "seq_len": 15}, "data.seq_len = 15"),
        ({"source": "mqar", "mqar_pairs": 129, "seq_len": 1000}, "data.mqar_pairs = 129"),
    ],
)
def test_refusals(data, key, tmp_path):
    with pytest.raises(ValueError, match=one_line(key)):
        open_data(tmp_path, **data)


def test_mixture_entries(corpus, tmp_path):
    found, weights = open_data(tmp_path, mixture=["3 mqar", f"1 text:{corpus[0]}/*.md"])
    assert weights == [3.0, 1.0] and [s.name for s in found] == ["mqar", f"text:{corpus[0]}/*.md"]


# Associative recall


@pytest.mark.parametrize(
    "pairs, queries, seq_len", [(1, 1, 4), (4, 4, 64), (3, 7, 50), (8, 2, 41), (128, 5, 266)]
)
def test_mqar(pairs, queries, seq_len):
    source = MqarSource("mqar", BYTE, pairs, queries, "train", seq_len, seed=1)
    length = 2 * (pairs + queries)
    for i in (0, 1, 2**24 - 1):
        row = source.row(0, i)
        n = seq_len // length
        assert row.starts.tolist() == [k * length for k in range(1, n + 1) if k * length < seq_len]
        for d in range(n):
            tokens, labels = (
                x[d * length : (d + 1) * length].tolist() for x in (row.tokens, row.labels)
            )
            keys, values = tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
            assert len(set(keys)) == pairs and max(keys) < 128 <= min(values) and max(values) < 256
            asked, answers = tokens[2 * pairs :: 2], tokens[2 * pairs + 1 :: 2]
            assert answers == [dict(zip(keys, values))[q] for q in asked]
            assert len(set(asked)) == min(pairs, queries)
            assert labels == [IGNORE] * (2 * pairs) + [x for a in answers for x in (a, IGNORE)]
        assert (row.tokens[n * length :] == BYTE.eos).all() and (
            row.labels[n * length :] == IGNORE
        ).all()


def test_mqar_is_a_function_of_seed_split_epoch_and_index():
    def row(i=5, epoch=0, split="train", seed=1):
        return tuple(MqarSource("mqar", BYTE, 4, 4, split, 64, seed).row(epoch, i).tokens.tolist())

    assert row() == row()
    assert len({row(), row(i=6), row(epoch=1), row(split="validation"), row(seed=2)}) == 5
    assert row(split="validation", seed=1) == row(split="validation", seed=2)
    assert row()[:8] == (
        122,
        240,
        37,
        183,
        72,
        184,
        14,
        203,
    )  # what a checkpoint's data order rests on


def test_mqar_keeps_its_bits():
    digest = hashlib.sha256()
    for pairs, queries, seq_len in ((4, 4, 64), (3, 7, 50), (8, 2, 41)):
        for split in ("train", "validation"):
            source = MqarSource("mqar", BYTE, pairs, queries, split, seq_len, 1)
            rows = [source.row(epoch, i) for epoch in (0, 1) for i in (0, 1, 2**24 - 1)]
            for tensor in pack(rows)[:3]:
                digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest()[:16] == "3b9a9d5ebd0cac5b"


def test_mqar_values_cannot_be_guessed():
    source = MqarSource("mqar", BYTE, 4, 4, "train", 16, seed=1)
    rows = np.array([source.row(0, i).tokens for i in range(3000)])
    for column in range(16):  # every position is about uniform over its half
        counts = np.bincount(rows[:, column] % 128, minlength=128)
        assert abs(counts - 3000 / 128).max() < 6 * (3000 / 128) ** 0.5
    assert (
        abs(np.mean(rows[:, 8] == rows[:, 0]) - 0.25) < 0.05
    )  # the first query asks for any of the pairs
