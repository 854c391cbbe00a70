"""Everything that can be wrong with a folder of checkpoints: damage, leftovers, a full disk, kills
at any moment."""

import errno
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmoe.checkpoint import (
    Checkpointer,
    CheckpointError,
    load_model,
    main,
    newest,
    read_extra,
    verify,
)
from lmoe.checkpoint_files import reading
from tests.checkpoint.toy import Toy, adamw

ROOT = Path(__file__).parent.parent.parent

# --------------------------------------------------------------------------------------------------
# damage

FILES = [".metadata", "__0_0.distcp", "rng-0.pt", "meta.json", "config.toml", "manifest.json"]


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_by_name_and_resume_takes_the_one_before(run, damage, name, caplog):
    folder, saved = run
    damage(folder / "step-3" / name)
    model = Toy()
    optimizers = adamw(model)
    with pytest.raises(ValueError, match=f"step-3 cannot be loaded: {name}"):
        Checkpointer(folder).load(model, optimizers, folder / "step-3")
    problems = verify(folder / "step-3")
    assert len(problems) == 1 and problems[0].startswith(name)
    with caplog.at_level(logging.WARNING):
        assert Checkpointer(folder).load(model, optimizers) == {"step": 2}
    assert len(caplog.messages) == 1 and f"step-3 skipped: {name}" in caplog.messages[0]
    assert load_model(model, folder) == {"step": 2}


def test_every_byte_counts(run):
    """Wherever the flipped byte lies, manifest included (its white space aside, nothing of it is
    redundant)."""
    folder, _ = run
    path = folder / "step-3"
    generator = random.Random(1)
    for file in path.iterdir():
        data = file.read_bytes()
        for _ in range(12):
            where = generator.randrange(len(data))
            if file.name == "manifest.json" and data[where : where + 1].isspace():
                continue
            file.write_bytes(
                data[:where]
                + bytes([data[where] ^ (1 << generator.randrange(8))])
                + data[where + 1 :]
            )
            assert verify(path), (file, where)
        file.write_bytes(data)
    assert not verify(path)


def test_nothing_whole_is_an_error_not_a_new_start(run):
    folder, _ = run
    for path in folder.iterdir():
        flip(path / "__0_0.distcp")
    with pytest.raises(ValueError, match="no whole checkpoint in .*__0_0.distcp"):
        Checkpointer(folder).load(Toy(), [])
    assert newest(folder) == folder / "step-3"  # newest looks at names and sizes; loading hashes


def test_nothing_there(tmp_path):
    assert (
        Checkpointer(tmp_path / "ckpt").load(Toy(), []) is None
        and newest(tmp_path / "ckpt") is None
    )
    with pytest.raises(ValueError, match="nowhere cannot be loaded: manifest.json: missing"):
        load_model(Toy(), tmp_path / "nowhere")


def test_verify_on_the_command_line(run, capsys):
    folder, _ = run
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out.count("whole") == 3
    flip(folder / "step-2" / "__0_0.distcp")
    assert main(["verify", str(folder)]) == 1
    assert "step-2: damaged\n    __0_0.distcp: damaged" in capsys.readouterr().out
    command = [sys.executable, "-m", "lmoe.checkpoint", "verify", str(folder / "step-2")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "__0_0.distcp" in done.stdout


# --------------------------------------------------------------------------------------------------
# the life of folders


def steps(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("keep, left", [(1, [5]), (2, [4, 5]), (0, [1, 2, 3, 4, 5])])
def test_the_last_ones_are_kept(tmp_path, keep, left):
    checkpointer = Checkpointer(tmp_path, keep=keep)
    for step in range(1, 6):
        checkpointer.save(step, Toy(), [], {})
    checkpointer.wait()
    assert steps(tmp_path) == [f"step-{step}" for step in left]


def test_steps_are_numbers(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    for step in (9, 10):
        checkpointer.save(step, Toy(), [], {}, sync=True)
    assert steps(tmp_path) == ["step-10"] and newest(tmp_path).name == "step-10"


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    model = Toy()
    for value in (1.0, 2.0):
        model.load.fill_(value)
        Checkpointer(tmp_path, keep=1).save(1, model, [], {"value": value}, sync=True)
    assert steps(tmp_path) == ["step-1"] and read_extra(tmp_path / "step-1") == {"value": 2.0}


def test_killed_while_replacing_a_step(run):
    """Between the two renames there is only step-3.old: it loads, and counts as step-3 would."""
    folder, _ = run
    (folder / "step-3").rename(folder / "step-3.old")
    assert newest(folder).name == "step-3.old"
    model = Toy()
    checkpointer = Checkpointer(folder, keep=3)
    assert checkpointer.load(model, adamw(model)) == {"step": 3}
    checkpointer.save(4, model, [], {}, sync=True)
    assert steps(folder) == ["step-2", "step-3.old", "step-4"]
    checkpointer.save(3, model, [], {}, sync=True)
    assert steps(folder) == ["step-2", "step-3", "step-4"]


def test_a_damaged_one_does_not_push_out_a_whole_one(run):
    folder, _ = run
    (folder / "step-3" / "__0_0.distcp").unlink()
    Checkpointer(folder, keep=2).save(4, Toy(), [], {}, sync=True)
    assert steps(folder) == ["step-2", "step-3", "step-4"]


def test_one_that_is_being_read_stays(run):
    folder, _ = run
    with reading(folder / "step-1"):
        Checkpointer(folder, keep=2).save(4, Toy(), [], {}, sync=True)
        assert steps(folder) == ["step-1", "step-3", "step-4"]
    Checkpointer(folder, keep=2).save(5, Toy(), [], {}, sync=True)
    assert steps(folder) == ["step-4", "step-5"]


def test_what_dead_runs_left_is_removed(run):
    folder, _ = run
    shutil.copytree(folder / "step-3", folder / "step-4.tmp")
    (folder / "step-0.tmp").mkdir()
    (folder / "mine").mkdir()
    assert newest(folder).name == "step-3"
    Checkpointer(folder).save(4, Toy(), [], {}, sync=True)
    assert steps(folder) == ["mine", "step-2", "step-3", "step-4"]


# --------------------------------------------------------------------------------------------------
# a full disk


@pytest.fixture
def full_disk():
    """No file may grow beyond a few kB: writes fail as they do when a disk is full, from the
    operating system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_training_and_the_previous_checkpoint_alive(run, full_disk, caplog):
    folder, saved = run
    model = Toy(hidden=500)
    optimizers = adamw(model)
    checkpointer = Checkpointer(folder)
    checkpointer.save(4, model, optimizers, {})
    checkpointer._thread.join()
    failure = checkpointer.poll()
    assert (
        "saving step-4 failed: rank 0: OSError" in failure and os.strerror(errno.EFBIG) in failure
    )
    assert failure in caplog.text and checkpointer.poll() is None  # said once
    assert steps(folder) == ["step-1", "step-2", "step-3"] and not verify(folder / "step-3")
    with pytest.raises(
        CheckpointError, match="step-5"
    ):  # the last save of a run, or that of SIGTERM
        checkpointer.save(5, model, optimizers, {}, sync=True)
    checkpointer.save(6, model, optimizers, {})
    with pytest.raises(CheckpointError, match="step-6"):
        checkpointer.wait()
    full_disk()
    checkpointer.save(7, model, optimizers, {})
    checkpointer.wait()
    assert steps(folder) == ["step-2", "step-3", "step-7"]


@pytest.mark.parametrize("where", ["os.fsync", "lmoe.checkpoint.prune"])
def test_other_places_where_a_disk_fails(run, monkeypatch, where):
    folder, _ = run

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, fail)
    checkpointer = Checkpointer(folder)
    if where == "lmoe.checkpoint.prune":  # the checkpoint is whole: only a warning
        checkpointer.save(4, Toy(), [], {}, sync=True)
        assert newest(folder).name == "step-4"
    else:
        with pytest.raises(CheckpointError, match="No space left"):
            checkpointer.save(4, Toy(), [], {}, sync=True)
        assert steps(folder) == ["step-1", "step-2", "step-3"]


@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    command = [
        sys.executable,
        "tests/scripts/checkpoint_kill.py",
        str(tmp_path / "ckpt"),
        str(kills),
        "3",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout and "kills, 0 steps" not in done.stdout
