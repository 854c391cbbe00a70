"""A folder of shards as a stranger may have made it: one line, or the same tokens as before."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hash_chain import make_config

from lmoe.data.documents import text_files
from lmoe.data.loader import build_loader
from lmoe.data.prepare import prepare
from lmoe.data.shards import Shards, ShardWriter, checksum, read_json, to_json
from lmoe.data.sources import open_sources
from lmoe.data.tokenizer import load_tokenizer

BYTE = load_tokenizer("byte")
ROOT = Path(__file__).parents[2]
LINE = r"^data\.paths: [^\n]{1,500}$"


@pytest.fixture
def folder(corpus, tmp_path):
    prepare(tmp_path / "shards", text_files([str(corpus[0])]), BYTE, shard_tokens=700)
    return tmp_path / "shards"


def source_of(folder):
    data = make_config(folder, source="tokens", paths=[str(folder)]).data
    return open_sources(data, BYTE, split="train", seed=1, cache=folder)[0][0]


def read_all(folder):
    source = source_of(folder)
    for i in range(source.samples):
        source.row(0, i)


def change(folder, **values):
    """Set values of the index; `shard` those of the first shard, `tokenizer` those of it."""
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][0] |= values.pop("shard", {})
    index["tokenizer"] |= values.pop("tokenizer", {})
    (folder / "index.json").write_text(json.dumps(index | values))


ODD = [None, True, -1, 0.5, 1 << 70, "", "x", "O", [], {}, ["uint16"], "..", "/etc/passwd", "a/b"]


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_any_field_of_the_index_may_be_anything(folder, value):
    before = (folder / "index.json").read_bytes()
    fields = ["format", "dtype", "tokenizer", "shards"]
    nested = {"shard": ["name", "tokens", "documents", "sha256", "largest"]}
    nested["tokenizer"] = ["name", "vocab_size", "eos", "digest"]
    cases = [{key: value} for key in fields if key != "tokenizer"]
    cases += [{group: {key: value}} for group in nested for key in nested[group]]
    for case in cases:
        change(folder, **case)
        if case not in ({"shard": {"sha256": value}}, {"tokenizer": {"name": value}}):
            with pytest.raises(ValueError, match=r"^data\.(paths|tokenizer)[^\n]{1,500}$"):
                read_all(folder)
        elif isinstance(value, str):
            read_all(folder)
        (folder / "index.json").write_bytes(before)
    (folder / "index.json").write_text(json.dumps(json.loads(before) | {"tokenizer": value}))
    with pytest.raises(ValueError, match=LINE):
        Shards(folder)


@pytest.mark.parametrize("dtype", ["O", "object", "uint8", "int64", "float32", "V2", "<u2", "S2"])
def test_other_dtypes_are_refused(folder, dtype):
    change(folder, dtype=dtype)
    with pytest.raises(ValueError, match=r"damaged: dtype is none of uint16, uint32"):
        Shards(folder)


def test_no_memory_is_touched_by_a_dtype_of_objects(folder):
    """In a process of its own, as it could end by a signal."""
    (folder / "shard-00000.tokens").write_bytes(b"A" * 80_000)
    np.array([10_000], "<i8").tofile(folder / "shard-00000.documents")
    shard = {"name": "shard-00000", "tokens": 10_000, "documents": 1, "sha256": ""}
    change(folder, dtype="O", shards=[shard])
    words = ["--data.source=tokens", f"--data.paths={folder}", f"--job.folder={folder}/run"]
    words += [
        "--data.workers=0",
        "--model.layers=1",
        "--model.pattern=L",
        "--schedule.warmup_steps=0",
    ]
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: data.paths: ")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 1' + b"0" * 5000 + b"}",
        b"null",
        b'{"a":' * 50_000,
        b"{}",
        b'{"format": 1, "x": NaN}',
    ],
    ids=lambda data: str(data[:12]),
)
def test_an_index_that_is_none(folder, data):
    (folder / "index.json").write_bytes(data)
    with pytest.raises(ValueError, match=LINE):
        Shards(folder)


@pytest.mark.parametrize("name", ["index.json", "shard-00000.tokens", "shard-00001.documents"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop", "dangling", "missing"])
def test_only_regular_files_are_read(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to({"device": "/dev/zero", "loop": path, "dangling": folder / "none"}[kind])
    start = time.monotonic()
    with pytest.raises(ValueError, match=LINE):
        Shards(folder)
    assert time.monotonic() - start < 5


def test_ends_of_documents_are_checked(folder):
    path = folder / "shard-00000.documents"
    ends = np.fromfile(path, "<i8")
    for wrong in (
        ends[::-1],
        ends - ends[0],
        ends + 1,
        np.full_like(ends, ends[-1]),
        -ends,
        np.full_like(ends, np.iinfo(np.int64).max),
    ):
        np.ascontiguousarray(wrong).tofile(path)
        with pytest.raises(ValueError, match="ends of documents that do not ascend"):
            source_of(folder)
    with pytest.raises(ValueError, match="checksum"):
        Shards(folder).verify()
    change(folder, shard={"sha256": checksum(folder, "shard-00000")})
    with pytest.raises(ValueError, match="ends of documents"):
        Shards(folder).verify()


def test_tokens_beyond_the_vocabulary_are_refused(folder):
    path = folder / "shard-00000.tokens"
    tokens = np.fromfile(path, "<u2")
    tokens[3] = BYTE.vocab_size
    tokens.tofile(path)
    with pytest.raises(ValueError, match=r"^data.paths: .*token 259 is beyond the 259 of its"):
        read_all(folder)
    config = make_config(folder, source="tokens", paths=[str(folder)], workers=1)
    with pytest.raises(ValueError, match=r"^data.paths: [^\n]*token 259"):
        for _ in zip(range(1000), build_loader(config, BYTE)):
            pass
    change(folder, shard={"sha256": checksum(folder, "shard-00000")})
    with pytest.raises(ValueError, match="token 259"):
        Shards(folder).verify()
    change(folder, tokenizer={"vocab_size": 260})  # that is not what the digest stands for
    with pytest.raises(ValueError, match="vocab_size and eos are not those of 'byte'"):
        source_of(folder)


def test_shards_state_their_largest_id(folder):
    """Beyond the vocabulary: refused as the folder is opened; too low: as it is read; too high: by
    verify()."""
    for k, shard in enumerate(Shards(folder).shards):
        assert shard["largest"] == Shards(folder).read_tokens(k, 0, shard["tokens"]).max()
    for largest, why in ((259, "token 259 is beyond the 259 of its"), (255, "")):
        change(folder, shard={"largest": largest})
        with pytest.raises(ValueError, match=rf"{LINE[:-1]}(?<=again)$") as error:
            read_all(folder) if why else Shards(folder).verify()
        assert "shard-00000" in str(error.value) and why in str(error.value)
    with pytest.raises(ValueError, match="token 256 is beyond 255, the index's largest"):
        read_all(folder)
    change(folder, shard={"largest": 257})
    read_all(folder)
    with pytest.raises(ValueError, match="its largest token is 256, not the index's 257"):
        Shards(folder).verify()


def test_folders_without_largest_ids_stay_what_they_are(folder):
    """As they were written before: the same digest, and read as before; and those that do not say
    what they were made of."""
    digest = Shards(folder).digest
    index = json.loads((folder / "index.json").read_bytes())
    for shard in index["shards"]:
        del shard["largest"]
    (folder / "index.json").write_text(json.dumps(index))
    assert Shards(folder).digest == digest
    del index["corpus"]
    (folder / "index.json").write_text(json.dumps(index))
    assert Shards(folder).digest == hashlib.sha256(to_json(index)).hexdigest()
    Shards(folder).verify()
    read_all(folder)


def test_documents_end_in_eos(folder):
    """verify() compares the two files of a shard, too."""
    tokens = np.fromfile(folder / "shard-00000.tokens", "<u2")
    for place, token in ((-1, 0), (0, BYTE.eos)):
        wrong = tokens.copy()
        assert wrong[place] != token
        wrong[place] = token
        wrong.tofile(folder / "shard-00000.tokens")
        change(folder, shard={"sha256": checksum(folder, "shard-00000")})
        with pytest.raises(ValueError, match=f"{LINE[:-1]}"):
            Shards(folder).verify()


def test_a_shard_cut_while_it_is_read(folder):
    source = source_of(folder)
    source.row(0, 0)
    for path in folder.glob("*.tokens"):
        os.truncate(path, 10)
    with pytest.raises(ValueError, match=r"^data.paths: [^\n]* damaged: it was cut while"):
        source.row(0, 1)


def test_many_shards_need_few_open_files(folder, monkeypatch):
    want = [Shards(folder).read_tokens(k, 0, 5).tolist() for k in range(5)]
    monkeypatch.setattr("lmoe.data.shards.OPEN_FILES", 2)
    shards = Shards(folder)
    for _ in range(2):
        assert [shards.read_tokens(k, 0, 5).tolist() for k in range(5)] == want
    assert len(shards._open) == 2


NOTES = [b"", b"{}", b"[" * 100_000, b'{"resume": [0, 0]}', b"fifo"]


@pytest.mark.parametrize("note", [*NOTES, *ODD], ids=lambda note: repr(note)[:20])
def test_notes_of_a_writer_are_checked(corpus, tmp_path, note):
    """Any fault of a note means that its shard is written again, to the same bytes."""
    files = text_files([str(corpus[0])])
    whole = prepare(tmp_path / "whole", files, BYTE, shard_tokens=700)
    plan = read_json(tmp_path / "whole" / "index.json")["plan"]
    shard = whole.shards[0] | {"resume": [0, 1]}
    cases = [note] if isinstance(note, bytes) else [shard | {key: note} for key in shard]
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps({"plan": plan}))
        for name in ("shard-00000.tokens", "shard-00000.documents"):
            (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        data = case if isinstance(case, bytes) else json.dumps(case).encode()
        path = folder / "shard-00000.json"
        os.mkfifo(path) if data == b"fifo" else path.write_bytes(data)
        writer = ShardWriter(folder, BYTE.dtype, 700)
        assert writer.resume == (0, 0) and not writer.shards


def test_nothing_is_written_through_a_link(tmp_path):
    """Links under the names of files to come are replaced, not followed."""
    (tmp_path / "precious").write_text("precious")
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("shard.tmp", "index.json.tmp", "shard-00000.json.tmp"):
        (folder / name).symlink_to(tmp_path / "precious")
    writer = ShardWriter(folder, BYTE.dtype, 700)
    writer.add(np.array([1, BYTE.eos]), np.array([2]))
    writer.close("plan", "corpus", BYTE, (1, 0))
    assert (tmp_path / "precious").read_text() == "precious"
    assert Shards(folder).read_tokens(0, 0, 2).tolist() == [1, BYTE.eos]
