"""What test_ranks.py runs on four ranks.

Saves from FSDP2 and HSDP, loads into other meshes and numbers of ranks, and lets one rank's disk
fail. Every assertion is on every rank.
"""

import os
import random
import resource

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lmoe.checkpoint import Checkpointer, CheckpointError, model_tensors, optimizer_tensors


class Model(nn.Module):
    """Sizes that four ranks cannot divide, one smaller than their number, a float64 and a plain
    fp32 parameter, a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(7, 10)
        self.block = nn.Linear(10, 3, bias=False, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(10))
        self.register_buffer("bias", torch.zeros(5))

    def forward(self, x):
        return self.block((self.embed(x) * self.scale).double())


def build(mesh, seed=0):
    """A model with its optimizers: sharded over a mesh, or whole (mesh None). Other seeds, other
    weights."""
    torch.manual_seed(seed)
    model = Model()
    plain = [model.scale]
    if mesh is not None:
        fully_shard(model.block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=set(plain), reshard_after_forward=False)
    sharded = [parameter for parameter in model.parameters() if parameter is not model.scale]
    return model, [
        torch.optim.AdamW(sharded, lr=0.1, fused=True),
        torch.optim.AdamW(plain, lr=0.1, fused=True),
    ]


def train(model, optimizers, steps, group):
    for _ in range(steps):
        x = torch.randn(3, 7) + random.random()
        model(x).square().sum().backward()
        dist.all_reduce(model.scale.grad, group=group)
        model.bias += 1
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def whole(model, optimizers):
    tensors = model_tensors(model) | optimizer_tensors(model, optimizers)
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for key, value in tensors.items()
    }


def assert_equal(some, other):
    assert some.keys() == other.keys() and len(some) == 5 + 4 * 3, (some.keys(), other.keys())
    for key in some:
        assert some[key].dtype == other[key].dtype and torch.equal(some[key], other[key]), key


def refused(work, kind, *texts):
    try:
        work()
    except kind as error:
        assert all(text in str(error) for text in texts), error
    else:
        raise AssertionError(f"not refused: {texts}")


def save_and_load(folder):
    """On each of four ranks."""
    rank = dist.get_rank()
    pair = dist.new_group([0, 1], backend="gloo")
    meshes = {
        "fsdp4": init_device_mesh("cpu", (4,)),
        "hsdp2x2": init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard")),
    }
    everyone = dist.new_group(backend="gloo")

    for name, mesh in meshes.items():
        torch.manual_seed(100 + rank)
        model, optimizers = build(mesh)
        torch.manual_seed(100 + rank)
        random.seed(100 + rank)
        checkpointer = Checkpointer(folder / name, keep=2)
        train(model, optimizers, 2, everyone)
        with torch.no_grad():
            model(
                torch.randn(1, 7)
            )  # as after an evaluation: the root's parameters are still whole
        saved = whole(model, optimizers)
        with torch.no_grad():
            model(torch.randn(1, 7))
        checkpointer.save(2, model, optimizers, {"tokens": 12}, {"config.toml": "x"})
        train(model, optimizers, 2, everyone)  # while it is being written
        checkpointer.wait()
        straight, after = whole(model, optimizers), torch.rand(3)

        # Here again: bitwise, random generators of each rank included.
        again = build(mesh, seed=9)
        assert checkpointer.load(*again) == {"tokens": 12}
        assert_equal(whole(*again), saved)
        train(*again, 2, everyone)
        assert_equal(whole(*again), straight)
        assert torch.equal(torch.rand(3), after)

        # Into the other mesh, and on two of the four ranks.
        for other in meshes.values():
            again = build(other, seed=9)
            Checkpointer(folder / name).load(*again)
            assert_equal(whole(*again), saved)
        if rank < 2:
            again = build(DeviceMesh.from_group(pair, "cpu"), seed=9)
            torch.manual_seed(rank)
            state = torch.get_rng_state()
            Checkpointer(folder / name, process_group=pair).load(*again)
            assert torch.equal(
                torch.get_rng_state(), state
            )  # other ranks than those that saved: left alone
            assert_equal(whole(*again), saved)
        if rank == 0:
            torch.save(saved, folder / f"{name}.pt")
        dist.barrier()

    # One rank's disk is full: every rank says so, and what was there stays.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    checkpointer.save(5, model, optimizers, {})
    refused(checkpointer.wait, CheckpointError, "step-5", "rank 2", "File too large")
    refused(
        lambda: checkpointer.save(6, model, optimizers, {}, sync=True),
        CheckpointError,
        "step-6",
        "rank 2",
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    assert os.listdir(folder / name) == ["step-2"]
    dist.barrier()
    checkpointer.save(7, model, optimizers, {})
    checkpointer.wait()
    dist.barrier()

    # One rank's file is damaged: whoever finds it, every rank refuses it and takes the one before.
    if rank == 0:
        file = folder / name / "step-7" / "__3_0.distcp"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    dist.barrier()
    refused(
        lambda: Checkpointer(folder / name).load(model, optimizers, folder / name / "step-7"),
        ValueError,
        "__3_0.distcp",
    )
    assert Checkpointer(folder / name).load(model, optimizers) == {"tokens": 12}
    assert_equal(whole(model, optimizers), saved)

    # Strict on every rank alike.
    model.bias = None
    refused(
        lambda: checkpointer.load_model(model, folder / "fsdp4"),
        ValueError,
        "model.bias is unexpected",
    )
    return "passed"
