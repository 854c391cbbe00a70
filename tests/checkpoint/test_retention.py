"""Which checkpoints stay, and what is never removed: whole ones, healthy ones, and what this
program did not make."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from lmoe import checkpoint_files
from lmoe.checkpoint import Checkpointer, load_model, newest, read_extra, verify
from tests.checkpoint.test_folders import flip, steps
from tests.checkpoint.toy import Toy, adamw


@pytest.fixture(autouse=True)
def said():
    checkpoint_files._said.clear()


def save(checkpointer, step, **options):
    checkpointer.save(step, Toy(), [], {"step": step}, sync=True, **options)


@pytest.fixture
def unlike(tmp_path):
    """A folder with steps 8 and 12, of which 12 has a byte flipped: sizes do not show it."""
    for step in (8, 12):
        save(Checkpointer(tmp_path), step)
    flip(tmp_path / "step-12" / "__0_0.distcp")
    return tmp_path


@pytest.mark.parametrize("keep, left", [(1, ["step-10"]), (2, ["step-10", "step-8"])])
def test_a_damaged_one_with_a_greater_step_does_not_count(unlike, keep, left):
    checkpointer = Checkpointer(unlike, keep=keep)
    assert checkpointer.load(Toy(), []) == {"step": 8}
    save(checkpointer, 10)
    assert steps(unlike) == sorted([*left, "step-12"])
    assert Checkpointer(unlike).load(Toy(), []) == {"step": 10}


def test_what_this_run_wrote_stays_for_what_it_did_not_verify(unlike):
    """Nothing was hashed: nobody knows that step 12 is damaged."""
    checkpointer = Checkpointer(unlike, keep=1)
    save(checkpointer, 9)
    save(checkpointer, 10)
    assert steps(unlike) == ["step-10", "step-12"]


def test_a_verified_one_stays_for_an_unverified_one(unlike):
    save(Checkpointer(unlike, keep=0), 5)
    checkpointer = Checkpointer(unlike, keep=2)
    checkpointer.load(Toy(), [], unlike / "step-5")
    save(checkpointer, 20)
    assert steps(unlike) == ["step-12", "step-20", "step-5", "step-8"]
    save(checkpointer, 21)
    assert steps(unlike) == ["step-20", "step-21"]


def test_the_newest_healthy_one_is_never_removed(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    for step, healthy in ((1, True), (2, True), (3, False), (4, False)):
        save(checkpointer, step, healthy=healthy)
    assert steps(tmp_path) == ["step-2", "step-4"]
    again = Checkpointer(tmp_path, keep=1)  # which has hashed the newest only
    assert again.load(Toy(), []) == {"step": 4}
    save(again, 5, healthy=False)
    assert steps(tmp_path) == ["step-2", "step-5"]
    save(again, 6)
    assert steps(tmp_path) == ["step-6"]


# --------------------------------------------------------------------------------------------------
# a newest one that cannot be read


def not_utf8(file):
    file.write_bytes(b"\xff\xfe{}")


def nested(file):
    file.write_text("[" * 100_000)


def a_list(file):
    file.write_text(json.dumps({"files": [1], "sha256": checkpoint_files._digest([1])}))


def a_number(file):
    file.write_text("1")


def a_folder(file):
    file.unlink()
    file.mkdir()


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def a_device(file):
    file.unlink()
    file.symlink_to("/dev/zero")


def a_loop(file):
    file.unlink()
    file.symlink_to(file.name)


ODD = [not_utf8, nested, a_list, a_number, a_folder, a_pipe, a_device, a_loop]


@pytest.mark.parametrize("make", ODD)
def test_a_manifest_that_cannot_be_read_is_passed_over_by_name(run, make, caplog):
    folder, _ = run
    make(folder / "step-3" / "manifest.json")
    model = Toy()
    for look in (
        lambda: newest(folder),
        lambda: Checkpointer(folder).find(),
        lambda: load_model(model, folder) and folder / "step-2",
    ):
        caplog.clear()
        assert look() == folder / "step-2"
        ours = [record for record in caplog.records if record.name == "lmoe.checkpoint"]
        (line,) = [r.getMessage() for r in ours if r.levelno >= logging.WARNING]
        assert "step-3 skipped: manifest.json: " in line and "\n" not in line
    (problem,) = verify(folder / "step-3")
    assert problem.startswith("manifest.json: ")
    checkpointer = Checkpointer(folder, keep=1)
    assert checkpointer.load(model, adamw(model)) == {"step": 2}
    save(checkpointer, 4)
    save(checkpointer, 5)
    assert steps(folder) == ["step-3", "step-5"]


# --------------------------------------------------------------------------------------------------
# what cannot or must not be removed


def test_one_that_cannot_be_removed_does_not_stop_saving_and_is_named_once(
    run, monkeypatch, caplog
):
    folder, _ = run
    unlink = Path.unlink

    def refuse(self, *arguments):
        if self.name == "__0_0.distcp" and ("step-1" in str(self) or "step-2" in str(self)):
            raise PermissionError(1, "Operation not permitted", str(self))
        unlink(self, *arguments)

    monkeypatch.setattr(Path, "unlink", refuse)
    checkpointer = Checkpointer(folder, keep=1)
    with caplog.at_level(logging.WARNING):
        for step in (4, 5, 6):
            save(checkpointer, step)
    left = [name for name in steps(folder) if name != "step-6"]
    assert left == ["step-1.tmp", "step-2.tmp"]  # not whole, and not taken for it
    for name in left:
        assert not (folder / name / "meta.json").exists()
    named = [message for message in caplog.messages if "step-1" in message]
    assert 1 <= len(named) <= 2 and all("not permitted" in message for message in named)
    monkeypatch.undo()
    save(Checkpointer(folder, keep=1), 7)
    assert steps(folder) == ["step-7"]


def file(path):
    path.write_text("mine")


def folder_of_files(path):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def link(path):
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("mine")
    path.symlink_to(elsewhere)


def dangling(path):
    path.symlink_to("/nowhere")


@pytest.mark.parametrize("make", [file, folder_of_files, link, dangling])
@pytest.mark.parametrize("name", ["step-9.tmp", "step-9.old", "step-9", "step-best.tmp", "step-1"])
def test_what_this_program_did_not_make_stays_and_does_not_stop_a_save(tmp_path, make, name):
    folder = tmp_path / "ckpt"
    folder.mkdir()
    make(folder / name)
    kind = os.lstat(folder / name).st_ino
    checkpointer = Checkpointer(folder, keep=1)
    for step in (8, 9, 9, 10):
        save(checkpointer, step)
        assert newest(folder) == folder / f"step-{step}"
    assert [path for path in folder.iterdir() if path.lstat().st_ino == kind]
    assert sum(path.lstat().st_ino != kind for path in folder.iterdir()) == 1
    texts = [*tmp_path.rglob("thesis.txt"), *(p for p in folder.iterdir() if p.is_file())]
    assert make is dangling or [text.read_text() for text in texts] == ["mine"]


def test_a_checkpoint_on_another_disk_is_read_and_not_removed(run, tmp_path):
    folder, _ = run
    shutil.move(folder / "step-3", tmp_path / "disk")
    (folder / "step-3").symlink_to(tmp_path / "disk")
    model = Toy()
    checkpointer = Checkpointer(folder, keep=1)
    assert checkpointer.load(model, adamw(model)) == {"step": 3}
    save(checkpointer, 4)
    assert steps(folder) == ["step-3", "step-4"] and not verify(tmp_path / "disk")


def test_a_leftover_of_a_dead_run_is_known_by_its_mark(tmp_path):
    (tmp_path / "step-5.tmp").mkdir()
    (tmp_path / "step-5.tmp" / ".writing").touch()
    (tmp_path / "step-5.tmp" / "__0_0.distcp").touch()
    save(Checkpointer(tmp_path), 6)
    assert steps(tmp_path) == ["step-6"]
    assert not (tmp_path / "step-6" / ".writing").exists()


def test_health_is_told_and_old_ones_had_it(tmp_path):
    save(Checkpointer(tmp_path), 1, healthy=False)
    file = tmp_path / "step-1" / "meta.json"
    meta = json.loads(file.read_text())
    assert meta.pop("healthy") is False and not checkpoint_files.is_healthy(tmp_path / "step-1")
    file.write_text(json.dumps(meta))
    assert checkpoint_files.is_healthy(tmp_path / "step-1")
    assert read_extra(tmp_path / "step-1") == {"step": 1}


def test_a_save_in_the_background_is_told_once_when_it_stands(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, Toy(), [], {})
    checkpointer._thread.join()
    for _ in range(2):
        checkpointer.poll()
    checkpointer.wait()
    (line,) = [message for message in caplog.messages if message.startswith("saved")]
    assert line.startswith("saved step-3 (0.0 MiB) to ") and line.endswith("step-3")
