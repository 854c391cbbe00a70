"""Checkpoints of one process: bitwise resume, asynchronous = synchronous, weights alone, and what
does not fit."""

import json
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lmoe import checkpoint
from lmoe.checkpoint import Checkpointer, load_model, read_extra, verify
from lmoe.checkpoint_state import HostMemory
from tests.checkpoint.toy import Toy, adamw, assert_equal, seed, tensors, train

# --------------------------------------------------------------------------------------------------
# contents


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=str
)
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
    monkeypatch.setattr(
        Checkpointer, "_prepare", lambda self, tmp: (trained.wait(60), prepare(self, tmp))
    )
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


def test_work_that_goes_on_is_told(tmp_path):
    """Hashing, loading and a save that training waits for are no hang."""
    told = []
    model = Toy()
    optimizers = adamw(model)
    train(model, optimizers, 1)
    checkpointer = Checkpointer(tmp_path, advance=lambda: told.append(1))
    checkpointer.save(1, model, optimizers, {}, sync=True)
    assert told
    reader = Checkpointer(tmp_path, advance=lambda: told.append(2))
    path = reader.find()
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert told.count(2) >= len(files)
    told.clear()
    reader.load(model, optimizers)
    assert told.count(2) >= len(tensors(model, optimizers))


def test_names_do_not_know_of_wrappers(tmp_path):
    """Saved with recomputation and compilation wrapped around modules, loaded without, and the
    other way round."""
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
    """The writer would clone, and keep, a tensor that does not fill its storage: that would double
    the host memory of a save."""
    state = {
        "a": torch.arange(5.0),
        "b": torch.ones(3, 4, dtype=torch.bfloat16).T,
        "c": torch.tensor(2.0),
        "d": torch.ones(0, 3),
    }
    memory = HostMemory()
    copies = memory.copy(state)
    for key, tensor in copies.items():
        assert torch.equal(tensor, state[key]) and tensor.dtype == state[key].dtype
        assert tensor.untyped_storage().size() == tensor.nbytes
    assert memory.copy(state)["b"].data_ptr() == copies["b"].data_ptr()  # reused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=str
)  # step on the GPU, or not
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

    Checkpointer(tmp_path).save(
        7, Toy(), [], {"a": 1}, {"config.toml": "x = 1"}, save_tokenizer, sync=True
    )
    path = tmp_path / "step-7"
    assert (path / "config.toml").read_text() == "x = 1" and read_extra(path) == {"a": 1}
    sealed = json.loads((path / "manifest.json").read_text())["files"]
    here = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert set(sealed) | {"manifest.json"} == here  # nothing is left unsealed
    (path / "tokenizer" / "ranks.tiktoken").write_text("rankz")
    assert verify(path) == [
        "tokenizer/ranks.tiktoken: damaged (its sha256 differs from the manifest's)"
    ]


# --------------------------------------------------------------------------------------------------
# model only


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


# --------------------------------------------------------------------------------------------------
# strictness


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
    for load in (
        lambda: load_model(model, folder),
        lambda: Checkpointer(folder).load(model, adamw(model)),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_resume_refuses_another_dtype_and_another_optimizer(run):
    folder, _ = run
    model = Toy(dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match="model.first.bias is torch.float32 instead of torch.bfloat16"
    ):
        Checkpointer(folder).load(model, adamw(model))
    model = Toy()
    with pytest.raises(
        ValueError, match="optimizer.name: .* saved with .*AdamW.* cannot resume with .*SGD"
    ):
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
