"""The folder of a run: one owner, whatever happens to it, and nothing of an earlier run erased."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lmoe import folder as module
from lmoe.folder import ENTRIES, Lock, make_folder, saving_alone, set_aside

ROOT = Path(__file__).resolve().parent.parent
OWNER = (
    "import os, sys, time; from pathlib import Path; from lmoe.folder import Lock\n"
    "with Lock(Path(sys.argv[1])):\n"
    "    print('owned', flush=True); time.sleep(600)"
)


@pytest.fixture
def owner(tmp_path):
    """Another process that trains in the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "owned\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_owner_is_refused_and_a_killed_one_forgotten(tmp_path, owner):
    message = f"job.folder = .* is being trained in by process {owner.pid} on "
    with pytest.raises(ValueError, match=message):
        Lock(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with Lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == ""  # an orderly end


def left_by_another_machine(folder):
    lock = folder / ".lock"
    lock.write_text(json.dumps({"process": 7, "host": "elsewhere", "machine": "another"}))
    return lock


@pytest.fixture(params=["locks of one machine", "no locks"])
def file_system(request, monkeypatch):
    """A file system whose locks do not reach another machine."""

    def locked(file):
        if request.param == "no locks":
            raise OSError(95, "Operation not supported")
        return True

    monkeypatch.setattr(module, "_locked", locked)


def test_an_owner_on_another_machine_lives_while_it_signs(tmp_path, file_system):
    lock = left_by_another_machine(tmp_path)
    ended = threading.Event()

    def sign():
        while not ended.wait(0.02):
            os.utime(lock)

    thread = threading.Thread(target=sign)
    thread.start()
    try:
        with pytest.raises(ValueError, match="process 7 on elsewhere"):
            Lock(tmp_path, sign_seconds=0.2)
    finally:
        ended.set()
        thread.join()
    with Lock(tmp_path, sign_seconds=0.05):  # it has died: no more signs
        pass


def test_the_owner_signs(tmp_path):
    with Lock(tmp_path, sign_seconds=0.02) as lock:
        os.utime(lock.path, (1, 1))
        for _ in range(100):
            if lock.path.stat().st_mtime > 1:
                return
            threading.Event().wait(0.02)
    raise AssertionError("no sign of life")


@pytest.mark.parametrize(
    "text", ["", "\0" * 10, '{"process": 3, "mach', '{"process": ' + "[" * 4090]
)
def test_a_lock_that_was_cut_is_free(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with Lock(tmp_path, sign_seconds=0.01):
        pass


@pytest.mark.parametrize("text", ["[]", "9" * 5000, '{"machine": 3}', "poetry"])
def test_a_lock_of_another_program_is_left_alone(tmp_path, text):
    (tmp_path / "other").write_text(text)
    for make in (Path.hardlink_to, Path.symlink_to):
        make(tmp_path / ".lock", tmp_path / "other")
        with pytest.raises(ValueError, match="not of this program|cannot be opened"):
            Lock(tmp_path)
        assert (tmp_path / "other").read_text() == text
        (tmp_path / ".lock").unlink()


def test_an_owner_whose_lock_is_removed_takes_it_again(tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    with Lock(folder, sign_seconds=0.02) as lock:
        shutil.rmtree(folder)
        for _ in range(200):
            if lock.path.exists() and lock.path.stat().st_size:
                break
            threading.Event().wait(0.02)
        with pytest.raises(ValueError, match=f"in by process {os.getpid()} "):
            Lock(folder)
    assert "was removed while this run trains here: made again" in caplog.text


def test_checkpoints_to_which_two_folders_lead_have_one_owner(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "two/ckpt").symlink_to(tmp_path / "one/ckpt")
    with saving_alone(tmp_path / "one/ckpt"):
        with pytest.raises(ValueError, match="another run, in another folder, saves into .*two"):
            with saving_alone(tmp_path / "two/ckpt"):
                pass
        assert not list((tmp_path / "one/ckpt").iterdir())
    with saving_alone(tmp_path / "two/ckpt"):
        pass


@pytest.mark.parametrize("name", ENTRIES)
def test_a_link_to_a_disk_that_is_not_mounted_is_no_new_run(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / "disk" / "of the run")
    with pytest.raises(ValueError, match=f"{name} is a link to .*disk.* not there: mount"):
        make_folder(tmp_path)
    (tmp_path / "disk" / "of the run").mkdir(parents=True)
    if "." not in name:
        make_folder(tmp_path)


def test_a_link_to_a_checkpoint_that_is_not_there_is_no_new_run(tmp_path):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/step-4").symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match="step-4 is a link to .*disk, which is not there"):
        make_folder(tmp_path)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_file_where_a_folder_belongs_and_the_other_way_round(tmp_path, name):
    (tmp_path / name).touch() if "." not in name else (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} is (no|a) folder: move it away"):
        make_folder(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/run", "x" * 300):
        with pytest.raises(ValueError, match="job.folder = .* cannot be made: "):
            make_folder(tmp_path / folder)


def test_reports_of_an_earlier_run_are_set_aside(tmp_path, caplog):
    set_aside(tmp_path)
    assert not list(tmp_path.iterdir())
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(f"{number}\n")
        (tmp_path / "tb").mkdir()
        (tmp_path / "notes.txt").touch()
        with caplog.at_level(logging.WARNING):
            set_aside(tmp_path)
        assert f"earlier-{number}" in caplog.messages[-1]
        aside = tmp_path / f"earlier-{number}"
        assert {path.name for path in aside.iterdir()} == {"metrics.jsonl", "tb"}
        assert (aside / "metrics.jsonl").read_text() == f"{number}\n"
    assert (tmp_path / "notes.txt").exists() and not (tmp_path / "tb").exists()


def test_reports_are_set_aside_all_or_none(tmp_path, monkeypatch):
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile/trace").touch()
    (tmp_path / "config.toml").touch()
    (tmp_path / "earlier-1").symlink_to("nowhere")
    rename = Path.rename

    def busy(path, target):
        if path.parent == tmp_path and path.name == "config.toml":
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(ValueError, match="config.toml of an earlier run cannot be moved to .*busy"):
        set_aside(tmp_path)
    assert (tmp_path / "profile/trace").exists() and not (tmp_path / "earlier-2").exists()
    monkeypatch.undo()
    set_aside(tmp_path)
    assert (tmp_path / "earlier-2/profile/trace").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml"])
def test_a_pipe_where_a_file_belongs(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is no file: move it away"):
        make_folder(tmp_path)
