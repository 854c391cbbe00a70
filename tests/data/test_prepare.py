import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

import lmoe.data.partial
import lmoe.data.shards
from lmoe.data import prepare as prepare_module
from lmoe.data.documents import text_files
from lmoe.data.prepare import main, prepare
from lmoe.data.shards import Shards
from lmoe.data.tokenizer import load_tokenizer
from tests.harness.runs import children_of, parent_of

BYTE = load_tokenizer("byte")
ROOT = Path(prepare_module.__file__).parents[2]


def content(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != ".lock"}


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 400 bytes, so that a small corpus has dozens."""
    split = prepare_module.split_pieces
    monkeypatch.setattr(prepare_module, "split_pieces", lambda files: split(files, 400))


@pytest.mark.parametrize("shard_tokens", [1, 100, 3000, 10**6])
def test_equals_tokenisation_in_memory(corpus, tmp_path, shard_tokens, small_pieces):
    folder, texts = corpus
    shards = prepare(tmp_path, text_files([str(folder)]), BYTE, shard_tokens=shard_tokens)
    stream = np.concatenate(
        [shards.read_tokens(k, 0, shard["tokens"]) for k, shard in enumerate(shards.shards)]
    )
    assert stream.tolist() == [token for t in texts for token in [*t.encode(), BYTE.eos]]
    lengths = np.concatenate(
        [np.diff(shards.document_ends(k), prepend=0) for k in range(len(shards.shards))]
    )
    assert lengths.tolist() == [len(t.encode()) + 1 for t in texts]
    assert (
        shards.dtype == np.uint16
        and shards.tokens == len(stream)
        and shards.documents == len(texts)
    )
    for k, shard in enumerate(shards.shards[:-1]):  # closed by the document that fills it
        assert (
            shard["tokens"]
            >= shard_tokens
            > shard["tokens"] - np.diff(shards.document_ends(k), prepend=0)[-1]
        )
    shards.verify()


def test_pieces_do_not_show(corpus, tmp_path, small_pieces, monkeypatch):
    files = text_files([str(corpus[0])])
    prepare(tmp_path / "a", files, BYTE, shard_tokens=700)
    monkeypatch.undo()
    prepare(tmp_path / "b", files, BYTE, shard_tokens=700)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_workers_do_not_show(corpus, tmp_path, small_pieces):
    files = text_files([str(corpus[0])])
    for workers in (0, 2):
        prepare(tmp_path / str(workers), files, BYTE, workers=workers, shard_tokens=700)
    assert content(tmp_path / "0") == content(tmp_path / "2")


def test_an_error_in_a_worker_is_one_line(corpus, tmp_path):
    with pytest.raises(ValueError, match="^data.field = 'body': [^\n]*$"):
        prepare(tmp_path, text_files([str(corpus[0])]), BYTE, field="body", workers=1)


def kill_at(n, where, folder, files):
    """In a child: prepare, and SIGKILL this process at the n-th atomic write: before it, within it,
    or after it."""
    write, count = lmoe.data.shards.write_atomic, 0

    def write_and_die(path, data):
        nonlocal count
        count += 1
        if count == n and where == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if count == n and where == "within":
            Path(str(path) + ".tmp").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)

    lmoe.data.shards.write_atomic = prepare_module.write_atomic = write_and_die
    prepare(folder, files, BYTE, shard_tokens=700)


def test_resumed_after_kills_equals_uninterrupted(corpus, tmp_path, small_pieces):
    files = text_files([str(corpus[0])])
    whole = prepare(tmp_path / "whole", files, BYTE, shard_tokens=700)
    writes = 2 * len(whole.shards) + 2  # plan, two a shard, index
    assert len(whole.shards) > 8
    for where in ("before", "within", "after"):
        for kills in (
            (1, 2, 3, 4, 7, 1),
            (writes,),
        ):  # each run goes on where the last was killed; the last write is the index
            folder = tmp_path / f"{where}-{len(kills)}"
            for n in kills:
                child = multiprocessing.get_context("fork").Process(
                    target=kill_at, args=(n, where, folder, files)
                )
                child.start()
                child.join()
                assert child.exitcode == -signal.SIGKILL
            assert len(list(folder.glob("shard-*.json"))) >= 3
            prepare(folder, files, BYTE, shard_tokens=700)
            assert content(folder) == content(tmp_path / "whole")


def test_resume_keeps_finished_shards_and_redoes_damaged_ones(
    corpus, tmp_path, small_pieces, monkeypatch
):
    files = text_files([str(corpus[0])])
    prepare(tmp_path / "whole", files, BYTE, shard_tokens=700)
    child = multiprocessing.get_context("fork").Process(
        target=kill_at, args=(12, "after", tmp_path / "cut", files)
    )
    child.start()
    child.join()
    done = sorted(p.name for p in (tmp_path / "cut").glob("shard-*.json"))
    assert len(done) == 5
    kept, damaged = tmp_path / "cut" / "shard-00001.tokens", tmp_path / "cut" / "shard-00003.tokens"
    stamp = kept.stat().st_mtime_ns
    data = bytearray(damaged.read_bytes())
    data[5] ^= 1
    damaged.write_bytes(data)
    prepare(tmp_path / "cut", files, BYTE, shard_tokens=700)
    assert (
        content(tmp_path / "cut") == content(tmp_path / "whole")
        and kept.stat().st_mtime_ns == stamp
    )


def test_command_line_killed_and_resumed(tmp_path):
    """The real command with workers, killed with SIGKILL; its workers must not outlive it."""
    rng = np.random.default_rng(1)
    lines = (
        json.dumps({"text": "".join(map(chr, rng.integers(32, 900, 2000)))}) for _ in range(1500)
    )
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    command = [
        sys.executable,
        "-m",
        "lmoe.data.prepare",
        "--paths",
        str(tmp_path / "a.jsonl"),
        "--shard-tokens",
        "100000",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [*command, str(tmp_path / "cut"), "--workers", "2"], env=env, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "cut" / "shard-00001.json").exists():
        assert run.poll() is None
        time.sleep(0.001)
    children = children_of(run.pid)
    run.kill()
    assert run.wait() == -signal.SIGKILL and len(children) >= 2
    assert not (tmp_path / "cut" / "index.json").exists()
    deadline = time.monotonic() + 60
    while any(parent_of(path) is not None for path in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(
        [*command, str(tmp_path / "cut"), "--workers", "1"],
        env=env,
        check=True,
        capture_output=True,
    )
    prepare(tmp_path / "whole", text_files([str(tmp_path / "a.jsonl")]), BYTE, shard_tokens=100_000)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_command_line(corpus, tmp_path, capsys):
    main([str(tmp_path / "out"), "--paths", str(corpus[0]), "--workers", "0"])
    assert "60 documents" in capsys.readouterr().out
    main([str(tmp_path / "out"), "--verify"])
    assert "checksums right" in capsys.readouterr().out
    main([str(tmp_path / "out"), "--paths", str(corpus[0]), "--workers", "0"])  # done already
    for argv, reason in [
        (["--paths", str(corpus[0] / "*.md")], "OUT = .* other files or options"),
        (["--paths", str(tmp_path / "no")], "data.paths"),
        (["--paths", str(corpus[0]), "--tokenizer", "no"], "data.tokenizer"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: {reason}[^\n]*$"):
            main([str(tmp_path / "out"), *argv])


FOREIGN = {
    "draft.tmp": "mine",
    "shard-list.json": "[]",
    "plan.json": '{"plan": "of the weekend"}',
    "index.json": "[]",
    "shard-00000.json": "{}",
    ".hidden": "",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_other_files_is_refused_and_stays_as_it_is(corpus, tmp_path, name):
    (tmp_path / name).write_text(FOREIGN[name])
    with pytest.raises(ValueError, match="^OUT = .*other files|^OUT = .*or of something") as caught:
        prepare(tmp_path, text_files([str(corpus[0])]), BYTE)
    assert "remove" not in str(caught.value) and name in str(caught.value)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == FOREIGN[name]


def test_files_beside_a_preparation_stay(corpus, tmp_path):
    files = text_files([str(corpus[0])])
    prepare(tmp_path, files, BYTE)
    names = ("draft.tmp", "shard-list.json", "shard-1.json", "my-plan.json")
    for name in names:
        (tmp_path / name).write_text("mine")
    prepare(tmp_path, files, BYTE)
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_damaged_shards_are_refused_by_name(corpus, tmp_path):
    prepare(tmp_path, text_files([str(corpus[0])]), BYTE, shard_tokens=700)
    victim = tmp_path / "shard-00002.tokens"
    data = victim.read_bytes()
    victim.write_bytes(data[:-2])
    with pytest.raises(
        ValueError, match="^data.paths: shard '.*shard-00002.tokens' is damaged: [^\n]*$"
    ):
        Shards(tmp_path)
    victim.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    shards = Shards(tmp_path)  # the size is right: only the checksum can tell
    with pytest.raises(ValueError, match="^data.paths: shard '.*shard-00002' is damaged: [^\n]*$"):
        shards.verify()
    victim.unlink()
    with pytest.raises(
        ValueError, match="^data.paths: shard '.*shard-00002.tokens' is missing[^\n]*$"
    ):
        Shards(tmp_path)
    (tmp_path / "index.json").write_bytes((tmp_path / "index.json").read_bytes()[:-9])
    with pytest.raises(ValueError, match="^data.paths: '.*index.json' is damaged[^\n]*$"):
        Shards(tmp_path)


def test_two_at_once_share_a_folder(corpus, tmp_path, small_pieces):
    files = text_files([str(corpus[0])])
    children = [
        multiprocessing.get_context("fork").Process(
            target=prepare, args=(tmp_path / "x", files, BYTE), kwargs={"shard_tokens": 50}
        )
        for _ in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    prepare(tmp_path / "y", files, BYTE, shard_tokens=50)
    assert content(tmp_path / "x") == content(tmp_path / "y")


@pytest.fixture
def keeps_often(monkeypatch, small_pieces):
    monkeypatch.setattr(lmoe.data.partial, "KEEP_TOKENS", 500)


def kill_after(n, folder, files):
    """In a child: prepare into one shard, and SIGKILL this process as it has read n documents."""
    count = 0

    def advance():
        nonlocal count
        count += 1
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(folder, files, BYTE, advance=advance)


def killed_after(n, folder, files):
    child = multiprocessing.get_context("fork").Process(target=kill_after, args=(n, folder, files))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("damage", [None, "shard.tmp", "ends.tmp", "partial.tmp", "hostile"])
def test_a_kill_costs_little_of_the_shard_in_work(
    corpus, tmp_path, keeps_often, monkeypatch, damage
):
    files = text_files([str(corpus[0])])
    prepare(tmp_path / "whole", files, BYTE)
    folder = tmp_path / "cut"
    for n in (50, 30):  # the second goes on from where the first was kept
        killed_after(n, folder, files)
    if damage == "hostile":
        note = {"name": "shard-00000", "tokens": -5, "documents": 1e9, "resume": "x", "sha256": 7}
        (folder / "partial.tmp").write_text(json.dumps(note))
    elif damage:
        data = bytearray((folder / damage).read_bytes())
        data[3] ^= 1
        (folder / damage).write_bytes(data)
    tokenise, pieces = prepare_module.tokenise, []

    def counting(piece, *rest):
        pieces.append(piece)
        return tokenise(piece, *rest)

    monkeypatch.setattr(prepare_module, "tokenise", counting)
    prepare(folder, files, BYTE)
    assert content(folder) == content(tmp_path / "whole")
    every = len(prepare_module.split_pieces(files))
    assert len(pieces) == every if damage else len(pieces) < every * 2 / 3, (len(pieces), every)


@pytest.mark.parametrize("workers", [0, 1])
def test_progress_is_told(corpus, tmp_path, small_pieces, workers):
    calls = []
    files = text_files([str(corpus[0])])
    prepare(tmp_path, files, BYTE, workers=workers, advance=lambda: calls.append(1))
    assert len(calls) >= len(prepare_module.split_pieces(files))


def test_a_long_document_is_progress(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 1000)
    calls = []

    class Slow:
        eos, dtype = BYTE.eos, BYTE.dtype

        def encode_array(self, text):
            time.sleep(0.3)
            return BYTE.encode_array(text)

    monkeypatch.setattr(prepare_module, "TICK", 0.05)
    (piece,) = prepare_module.split_pieces(text_files([str(tmp_path)]))
    for longest, least in ((1000, 1), (999, 4)):
        monkeypatch.setattr(prepare_module, "LONG", longest)
        calls.clear()
        prepare_module.tokenise(piece, "text", Slow(), lambda: calls.append(1))
        assert len(calls) >= least
    told = len(calls)
    time.sleep(0.1)
    assert len(calls) == told


def test_progress_within_a_piece_is_told():
    """A .jsonl.gz of any size is one piece."""
    future, calls = Future(), []
    counter = multiprocessing.RawValue("Q", 0)

    def work():
        for _ in range(22):
            time.sleep(0.1)
            counter.value += 1
        future.set_result(7)

    threading.Thread(target=work).start()
    assert prepare_module._result(future, counter, lambda: calls.append(1)) == 7
    assert len(calls) == 2


def test_waiting_for_another_that_prepares_is_progress_while_that_gets_on(corpus, tmp_path):
    files = text_files([str(corpus[0])])
    calls = []
    lock = open(tmp_path / ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    waits = threading.Thread(
        target=prepare, args=(tmp_path, files, BYTE), kwargs={"advance": lambda: calls.append(1)}
    )
    waits.start()
    for k in range(4):
        time.sleep(0.3)
        with open(tmp_path / "shard.tmp", "ab") as file:
            file.write(b"x" * (k + 1))
    time.sleep(0.5)
    got_on = len(calls)
    time.sleep(0.6)
    assert 3 <= got_on == len(calls)
    lock.close()
    waits.join()
    assert Shards(tmp_path).documents == 60
