"""Readers beside a run that saves and removes: other processes, none of which fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmoe import checkpoint_files
from lmoe.checkpoint import Checkpointer
from lmoe.checkpoint_files import Gone, lock, reading, unlock
from tests.checkpoint.toy import Toy, adamw

ROOT = Path(__file__).parent.parent.parent


def start(*words):
    command = [sys.executable, "tests/scripts/checkpoint_race.py", *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("writer, readers", [("write", "read branch"), ("replace", "read read")])
def test_no_reader_fails_beside_a_run_that_saves_and_prunes(tmp_path, seconds, writer, readers):
    folder = tmp_path / "ckpt"
    Checkpointer(folder).save(0, _small(), [], {"step": 0}, sync=True)
    processes = [start(kind, folder, seconds) for kind in readers.split()]
    processes.append(start(writer, folder, seconds))
    for process in processes:
        output, _ = process.communicate(timeout=seconds + 100)
        assert process.returncode == 0 and " times" in output, output
        assert "skipped" not in output, output
    assert len(list(folder.iterdir())) <= 3


def _small():
    from torch import nn

    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(3)))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def test_what_find_returns_stays_until_it_is_loaded(run):
    folder, _ = run
    branch = Checkpointer(folder.parent / "branch")
    path = branch.find(folder)
    model = Toy()
    run_itself = Checkpointer(folder, keep=1)
    run_itself.save(4, model, [], {}, sync=True)
    assert path.exists() and not (folder / "step-2").exists()
    assert branch.load(model, adamw(model), path) == {"step": 3}
    run_itself.save(5, model, [], {}, sync=True)
    assert [left.name for left in folder.iterdir()] == ["step-5"]


def test_a_lock_is_of_the_checkpoint_that_is_there(run):
    folder, _ = run
    path = folder / "step-1"
    with pytest.raises(Gone, match="step-1"), reading(path):
        path.rename(folder / "step-1.tmp")
    with pytest.raises(Gone):
        lock(path)
    with pytest.raises(Gone), reading(folder / "step-2"):
        (folder / "step-2").rename(folder / "gone")
        raise ValueError("whatever the reader made of it")
    unlock(lock(folder / "step-3"))


def test_one_replaced_just_when_it_is_locked_is_gone(run, monkeypatch):
    folder, _ = run
    open_regular = checkpoint_files.open_regular

    def replaced(path):
        monkeypatch.setattr(checkpoint_files, "open_regular", open_regular)
        Checkpointer(folder).save(3, Toy(), [], {}, sync=True)
        raise FileNotFoundError(path)  # as between the two renames

    monkeypatch.setattr(checkpoint_files, "open_regular", replaced)
    with pytest.raises(Gone):
        lock(folder / "step-3")
    (folder / "step-3/manifest.json").unlink()
    with pytest.raises(FileNotFoundError):
        lock(folder / "step-3")


def test_one_replaced_while_it_is_loaded_is_not_half_of_each(run, monkeypatch):
    folder, _ = run
    checkpointer = Checkpointer(folder)
    fill = Checkpointer._fill

    def replaced(self, *arguments, **options):
        Checkpointer(folder).save(3, Toy(), [], {}, sync=True)
        fill(self, *arguments, **options)

    monkeypatch.setattr(Checkpointer, "_fill", replaced)
    with pytest.raises(ValueError, match="step-3 was replaced while it was read"):
        checkpointer.load_model(Toy(), folder / "step-3")
