"""Checkpoints of one process: bitwise resume, asynchronous = synchronous, and everything that can be wrong with a folder of them."""

import errno
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lmoe import checkpoint
from lmoe.checkpoint import Checkpointer, CheckpointError, load_model, main, newest, read_extra, verify
from lmoe.checkpoint_files import reading
from lmoe.checkpoint_state import HostMemory

ROOT = Path(__file__).parent.parent


class Toy(nn.Module):
    """Two layers with dropout, a persistent and a temporary buffer."""

    def __init__(self, hidden=33, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(7, hidden, dtype=dtype)
        self.second = nn.Linear(hidden, 3, bias=False, dtype=dtype)
        self.register_buffer("load", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.second(nn.functional.dropout(self.first(x), 0.3))


def adamw(model, **options):
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [torch.optim.AdamW(decay, lr=0.1, **options), torch.optim.AdamW(rest, lr=0.1, weight_decay=0.0, **options)]


def train(model, optimizers, steps):
    """Steps whose data and dropout come from all the generators that a checkpoint holds."""
    dtype = model.first.weight.dtype
    for _ in range(steps):
        x = torch.randn(4, 7, dtype=dtype) * (1 + random.random()) + float(np.random.normal())
        model(x).square().sum().backward()
        model.load += 1.5
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def tensors(model, optimizers):
    return {
        key: value.detach().clone()
        for key, value in (checkpoint.model_tensors(model) | checkpoint.optimizer_tensors(model, optimizers)).items()
    }


def assert_equal(some, other):
    assert some.keys() == other.keys()
    for key in some:
        assert some[key].dtype == other[key].dtype and some[key].device == other[key].device, key
        assert torch.equal(some[key], other[key]), key


@pytest.fixture
def run(tmp_path):
    """A folder with steps 1, 2, 3 of a run, and what was in step 3."""
    seed(1)
    model = Toy()
    optimizers = adamw(model)
    checkpointer = Checkpointer(tmp_path / "ckpt", keep=3)
    for step in (1, 2, 3):
        train(model, optimizers, 1)
        checkpointer.save(step, model, optimizers, {"step": step}, {"config.toml": f"step = {step}\n"})
    checkpointer.wait()
    return checkpointer.folder, tensors(model, optimizers)


# ------------------------------------------------------------------------------------------------------------------ contents


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=str)
def test_resume_is_bitwise(tmp_path, dtype, options):
    seed(5)
    model = Toy(dtype=dtype)
    optimizers = adamw(model, **options)
    train(model, optimizers, 2)
    Checkpointer(tmp_path).save(2, model, optimizers, {"data": [1, 2]}, sync=True)
    train(model, optimizers, 3)
    numbers = random.random(), np.random.rand(), torch.rand(1).item()

    seed(99)
    again = Toy(dtype=dtype)
    optimizers_again = adamw(again, **options)
    assert Checkpointer(tmp_path).load(again, optimizers_again) == {"data": [1, 2]}
    train(again, optimizers_again, 3)
    assert_equal(tensors(model, optimizers), tensors(again, optimizers_again))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == numbers


def test_numpy_and_python_normals_in_reserve_are_kept(tmp_path):
    """Both generators make normals in pairs; the second waits in the state."""
    model = Toy()
    np.random.normal()
    random.gauss(0, 1)
    Checkpointer(tmp_path).save(0, model, [], {}, sync=True)
    expected = np.random.normal(), random.gauss(0, 1)
    seed(3)
    Checkpointer(tmp_path).load(model, [])
    assert (np.random.normal(), random.gauss(0, 1)) == expected


def test_a_save_before_the_first_step_has_no_optimizer_state(tmp_path):
    model = Toy()
    Checkpointer(tmp_path).save(0, model, adamw(model), {}, sync=True)
    optimizers = adamw(model)
    train(model, optimizers, 1)
    Checkpointer(tmp_path).load(model, optimizers)
    assert not optimizers[0].state and not optimizers[1].state


def test_async_equals_sync_while_training_goes_on(tmp_path, monkeypatch):
    seed(2)
    model = Toy(hidden=500)
    optimizers = adamw(model, fused=True)
    train(model, optimizers, 1)
    trained = threading.Event()
    prepare = Checkpointer._prepare
    monkeypatch.setattr(Checkpointer, "_prepare", lambda self, tmp: (trained.wait(60), prepare(self, tmp)))
    checkpointer = Checkpointer(tmp_path / "async")
    for step in (1, 2):  # the second save reuses the buffers of the first
        trained.set()
        Checkpointer(tmp_path / "sync").save(step, model, optimizers, {}, sync=True)
        trained.clear()
        checkpointer.save(step, model, optimizers, {})
        train(model, optimizers, 2)
        assert not (tmp_path / "async" / f"step-{step}").exists()
        trained.set()
        checkpointer.wait()
    for step in (1, 2):
        loaded = []
        for name in ("async", "sync"):
            other = Toy(hidden=500)
            others = adamw(other, fused=True)
            Checkpointer(tmp_path / name).load(other, others, tmp_path / name / f"step-{step}")
            loaded.append(tensors(other, others) | {"rng": torch.get_rng_state()})
        assert_equal(*loaded)


def test_names_do_not_know_of_wrappers(tmp_path):
    """Saved with recomputation and compilation wrapped around modules, loaded without, and the other way round."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrapped():
        model = Toy()
        model.first = checkpoint_wrapper(model.first)
        model.second = torch.compile(model.second, backend="eager")
        return model

    for save, load in ((wrapped, Toy), (Toy, wrapped)):
        model, other = save(), load()
        optimizers, others = adamw(model), adamw(other)
        train(model, optimizers, 1)
        Checkpointer(tmp_path).save(1, model, optimizers, {}, sync=True)
        Checkpointer(tmp_path).load(other, others)
        assert_equal(tensors(model, optimizers), tensors(other, others))
        assert "model.first.weight" in tensors(model, optimizers)


def test_tied_weights(tmp_path):
    def build():
        model = Toy()
        model.head = nn.Linear(7, 33)
        model.head.weight = model.first.weight
        return model

    seed(4)
    model, other = build(), build()
    optimizers, others = adamw(model), adamw(other)
    train(model, optimizers, 2)
    Checkpointer(tmp_path).save(1, model, optimizers, {}, sync=True)
    Checkpointer(tmp_path).load(other, others)
    assert other.head.weight is other.first.weight
    assert_equal(tensors(model, optimizers), tensors(other, others))


def test_copies_are_exact_and_in_one_block():
    """The writer would clone, and keep, a tensor that does not fill its storage: that would double the host memory of a save."""
    state = {"a": torch.arange(5.0), "b": torch.ones(3, 4, dtype=torch.bfloat16).T, "c": torch.tensor(2.0), "d": torch.ones(0, 3)}
    memory = HostMemory()
    copies = memory.copy(state)
    for key, tensor in copies.items():
        assert torch.equal(tensor, state[key]) and tensor.dtype == state[key].dtype
        assert tensor.untyped_storage().size() == tensor.nbytes
    assert memory.copy(state)["b"].data_ptr() == copies["b"].data_ptr()  # reused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=str)  # step on the GPU, or not
def test_cuda_resume_is_bitwise_and_async(tmp_path, options):
    seed(6)
    model = Toy(hidden=5000).cuda()
    optimizers = adamw(model, **options)
    x = torch.randn(64, 7, device="cuda")

    def train_on_gpu(model, optimizers, steps):
        for _ in range(steps):
            model(x * torch.rand(1, device="cuda")).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2):
        train_on_gpu(model, optimizers, 2)
        checkpointer.save(step, model, optimizers, {})
        train_on_gpu(model, optimizers, 2)
    checkpointer.wait()
    assert torch.frombuffer(checkpointer._host.block, dtype=torch.uint8).is_pinned()
    again = Toy(hidden=5000).cuda()
    optimizers_again = adamw(again, **options)
    seed(7)
    Checkpointer(tmp_path).load(again, optimizers_again)
    train_on_gpu(again, optimizers_again, 2)
    assert_equal(tensors(model, optimizers), tensors(again, optimizers_again))


def test_files_beside_the_tensors(tmp_path):
    def save_tokenizer(folder):
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "ranks.tiktoken").write_text("ranks")
        (folder / "special.json").write_text("{}")

    Checkpointer(tmp_path).save(7, Toy(), [], {"a": 1}, {"config.toml": "x = 1"}, save_tokenizer, sync=True)
    path = tmp_path / "step-7"
    assert (path / "config.toml").read_text() == "x = 1" and read_extra(path) == {"a": 1}
    sealed = json.loads((path / "manifest.json").read_text())["files"]
    here = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert set(sealed) | {"manifest.json"} == here  # nothing is left unsealed
    (path / "tokenizer" / "ranks.tiktoken").write_text("rankz")
    assert verify(path) == ["tokenizer/ranks.tiktoken: damaged (its sha256 differs from the manifest's)"]


# ------------------------------------------------------------------------------------------------------------- model only


def test_load_model_takes_weights_and_buffers_only(run):
    folder, saved = run
    for path in (folder, folder / "step-3"):
        model = Toy()
        before = torch.get_rng_state()
        assert load_model(model, path) == {"step": 3}
        for key, value in checkpoint.model_tensors(model).items():
            assert torch.equal(value, saved[key])
        torch.set_rng_state(before)
    assert torch.equal(torch.get_rng_state(), before)


def test_load_model_rounds_to_the_models_dtype(run):
    folder, saved = run
    model = Toy(dtype=torch.bfloat16)
    load_model(model, folder)
    assert torch.equal(model.first.weight, saved["model.first.weight"].bfloat16())


# ------------------------------------------------------------------------------------------------------------- strictness


def without_second(model):
    del model.second
    return model


def with_third(model):
    model.third = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: with_third(Toy()), "model.third.bias is missing; model.third.weight is missing"),
        (lambda: without_second(Toy()), "model.second.weight is unexpected"),
        (lambda: Toy(hidden=34), r"model.first.bias has shape \(33,\) instead of \(34,\)"),
    ],
)
def test_what_does_not_fit_is_named(run, build, message):
    folder, _ = run
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for load in (lambda: load_model(model, folder), lambda: Checkpointer(folder).load(model, adamw(model))):
        with pytest.raises(ValueError, match=message):
            load()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_resume_refuses_another_dtype_and_another_optimizer(run):
    folder, _ = run
    model = Toy(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="model.first.bias is torch.float32 instead of torch.bfloat16"):
        Checkpointer(folder).load(model, adamw(model))
    model = Toy()
    with pytest.raises(ValueError, match="optimizer.name: .* saved with .*AdamW.* cannot resume with .*SGD"):
        Checkpointer(folder).load(model, [torch.optim.SGD(model.parameters(), lr=0.1)])


def test_an_optimizer_without_a_saved_parameter_is_refused(run):
    folder, _ = run
    model = Toy()
    with pytest.raises(ValueError, match="optim.first.bias.exp_avg is unexpected"):
        Checkpointer(folder).load(model, adamw(model)[:1])


def test_extra_that_json_cannot_hold_is_refused_at_once(tmp_path):
    with pytest.raises(TypeError):
        Checkpointer(tmp_path).save(1, Toy(), [], {"tensor": torch.ones(1)})
    assert not list(tmp_path.glob("*"))


# ---------------------------------------------------------------------------------------------------------------- damage

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
    """Wherever the flipped byte lies, manifest included (its white space aside, nothing of it is redundant)."""
    folder, _ = run
    path = folder / "step-3"
    generator = random.Random(1)
    for file in path.iterdir():
        data = file.read_bytes()
        for _ in range(12):
            where = generator.randrange(len(data))
            if file.name == "manifest.json" and data[where : where + 1].isspace():
                continue
            file.write_bytes(data[:where] + bytes([data[where] ^ (1 << generator.randrange(8))]) + data[where + 1 :])
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
    assert Checkpointer(tmp_path / "ckpt").load(Toy(), []) is None and newest(tmp_path / "ckpt") is None
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


# ---------------------------------------------------------------------------------------------------------- the life of folders


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
    """Between the two renames there is only step-3.old: it loads, and the next save removes it."""
    folder, _ = run
    (folder / "step-3").rename(folder / "step-3.old")
    assert newest(folder).name == "step-3.old"
    model = Toy()
    checkpointer = Checkpointer(folder, keep=3)
    assert checkpointer.load(model, adamw(model)) == {"step": 3}
    checkpointer.save(4, model, [], {}, sync=True)
    assert steps(folder) == ["step-1", "step-2", "step-4"]


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


# ------------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def full_disk():
    """No file may grow beyond a few kB: writes fail as they do when a disk is full, from the operating system."""
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
    assert "saving step-4 failed: rank 0: OSError" in failure and os.strerror(errno.EFBIG) in failure
    assert failure in caplog.text and checkpointer.poll() is None  # said once
    assert steps(folder) == ["step-1", "step-2", "step-3"] and not verify(folder / "step-3")
    with pytest.raises(CheckpointError, match="step-5"):  # the last save of a run, or that of SIGTERM
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
    command = [sys.executable, "tests/scripts/checkpoint_kill.py", str(tmp_path / "ckpt"), str(kills), "3"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout and "kills, 0 steps" not in done.stdout
