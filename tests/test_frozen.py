"""Frozen parameters: no gradient, no moments, no decay, no part in the clip norm, under every
parallelism and over a checkpoint."""

import functools

import pytest
import torch

import train
from lmoe.checkpoint import Checkpointer
from lmoe.checkpoint_state import optimizer_tensors
from tests.harness.compare import (
    TINY,
    build_run,
    compare_to_one_rank,
    full,
    microbatches_of,
    run_layout,
)
from tests.harness.layouts import words

pytestmark = pytest.mark.usefixtures("one_rank")

SOME = ("embed.", "blocks.0.norm_mixer.", "blocks.1.mixer.norm.", "blocks.2.ffn.experts.")
ROUTER = ("blocks.1.ffn.router.", "blocks.0.mixer.wq.", "head.")
FIRST_STAGE = ("embed.", "blocks.0.", "blocks.1.")
LAST_STAGE = ("blocks.2.", "blocks.3.", "norm.", "head.")
DECAY = "--optimizer.weight_decay=0.5"
FOUR_BLOCKS = TINY | {
    "model": TINY["model"] | {"layers": 4, "pattern": ["gla", "gated_deltanet", "attention", "gla"]}
}


def frozen_layout(frozen, argv, steps, toml):
    return run_layout(argv, steps, toml, frozen)


def compare(pool, layout, frozen, toml=TINY, argv=()):
    """Assert that a layout trains as one rank does, and that exactly the frozen stay."""
    run = functools.partial(frozen_layout, frozen)
    alone, ranks = compare_to_one_rank(pool, [DECAY, *argv], layout, toml=toml, run=run)
    for result in (alone, *ranks):
        for name, initial in result["initial"].items():
            stays = torch.equal(initial, result["weights"][name])
            assert stays == name.startswith(frozen), name
            for step in result["steps"]:
                assert (name in step["gradients"]) == (not stays), name


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("frozen", [SOME, ROUTER], ids=["some", "router"])
@pytest.mark.parametrize(
    "sizes", [{"dp_shard": 2}, {"dp_replicate": 2}, {"tp": 2}, {"ep": 2}], ids=str
)
def test_two_ranks(pools, sizes, frozen):
    compare(pools(2), words(sizes), frozen)


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_two_ranks_that_recompute(pools, mode):
    compare(pools(2), [], SOME, argv=[f"--activation_checkpoint.mode={mode}"])


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("frozen", [SOME, FIRST_STAGE, LAST_STAGE], ids=["some", "first", "last"])
def test_a_pipeline(pools, frozen, schedule):
    """Of a stage all parameters may be frozen."""
    layout = [*words({"pp": 2}), f"--parallel.schedule={schedule}"]
    compare(pools(2), layout, frozen, FOUR_BLOCKS)


@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize(
    "sizes", [{"pp": 2, "dp_shard": 2}, {"tp": 2, "cp": 2}, {"pp": 2, "tp": 2}], ids=str
)
def test_four_ranks(pools, sizes):
    compare(pools(4), words(sizes), FIRST_STAGE if "pp" in sizes else SOME, FOUR_BLOCKS)


def test_the_optimizer_leaves_them_out():
    _, _, model, _, optimizer, _ = build_run([], frozen=SOME)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all((id(p) in held) == p.requires_grad for p in model.parameters())


def resumed(argv, folder):
    """[weights and moments after three steps: in one go, and from a checkpoint of the second],
    and the names that have moments."""
    ends = []
    for stop in (None, 2):
        step = 0
        while step < 3:
            if step in (0, stop):
                config, dims, model, parallel, optimizer, build = build_run(argv, FOUR_BLOCKS, SOME)
            if step == stop:
                Checkpointer(folder).load(model, [optimizer])
            batches, valid = microbatches_of(config, dims, build, step)
            train.train_step(model, parallel, optimizer, config, dims, batches, valid, 1e-2)
            step += 1
            if step == stop:
                Checkpointer(folder).save(step, model, [optimizer], {}, sync=True)
        moments = optimizer_tensors(model, [optimizer])
        weights = {name: full(p) for name, p in model.named_parameters()}
        ends.append(weights | {name: full(t) for name, t in moments.items()})
    return ends, {name.removeprefix("optim.").rpartition(".")[0] for name in moments}


def check_resumed(results):
    for (straight, again), with_moments in results:
        assert straight.keys() == again.keys()
        assert all(torch.equal(straight[name], again[name]) for name in straight)
        names = {name for name in straight if not name.startswith("optim.")}
        assert with_moments == {name for name in names if not name.startswith(SOME)}


def test_a_resumed_run_repeats_every_bit(tmp_path):
    check_resumed([resumed([DECAY], tmp_path)])


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("sizes", [{"dp_shard": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_two_ranks_resume(pools, tmp_path, sizes):
    check_resumed(pools(2).run(resumed, [DECAY, *words(sizes)], tmp_path))
