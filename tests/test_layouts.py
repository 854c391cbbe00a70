"""FSDP2, HSDP and accumulation train as one rank does."""

from unittest import mock

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from tests.harness.compare import (
    build_run,
    compare_to_one_rank,
    differences,
    full,
    microbatches_of,
    run_layout,
)

pytestmark = pytest.mark.usefixtures("one_rank")

REDUCE = "torch.distributed.fsdp._fully_shard._fsdp_param_group.foreach_reduce"
TWO = [[], ["--parallel.reshard_after_forward=false"]]
FOUR = [[], ["--parallel.dp_replicate=2"], ["--parallel.dp_replicate=4"]]
VARIANTS = {
    "plain": [],
    "tied": ["--model.tie_embeddings=true"],
    "dense_first": ["--model.ffn_pattern=DEE", "--model.ffn_hidden=24"],
    "recompute": ["--activation_checkpoint.mode=full"],
    "unclipped": ["--training.max_norm=0"],
    "accumulated": ["--training.global_batch_size=8"],
    "sigmoid": ["--moe.score=sigmoid", "--moe.groups=2"],
}


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("layout", TWO, ids=str)
def test_two_ranks(pools, layout):
    compare_to_one_rank(pools(2), [], layout)


@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize("layout", FOUR, ids=str)
def test_four_ranks(pools, layout):
    alone, _ = compare_to_one_rank(pools(4), [], layout)
    assert all(step["norm"] > 0.5 for step in alone["steps"])  # else nothing was clipped


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("layout", ["--parallel.pp=2", "--parallel.ep=2"])
def test_dense_layers_between_experts(pools, layout):
    words = ["--model.layers=6", "--model.ffn_pattern=DE", "--model.ffn_hidden=24"]
    alone, _ = compare_to_one_rank(pools(2), words, [layout])
    sizes = {name: len(n) for name, n in alone["steps"][0]["counts"].items()}
    assert sizes == {"1.ffn": 4, "3.ffn": 4, "5.ffn": 4}


@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_on_four_ranks(pools, name):
    compare_to_one_rank(pools(4), VARIANTS[name], ["--parallel.dp_replicate=2"])


def test_accumulation_is_a_larger_batch():
    accumulated, whole = run_layout([]), run_layout(["--training.batch_size=4"])
    assert max(differences(accumulated, whole).values()) < 1e-9


def test_one_rank_hands_on_its_gradients_once_a_step():
    """There is nothing to sum, so FSDP2's way to a sum is not gone for every microbatch."""
    config, dims, model, parallel, _, build = build_run(["--training.dtype=bfloat16"])
    batches, valid = microbatches_of(config, dims, build, 0)
    units = sum(isinstance(module, FSDPModule) for module in model.modules())

    def gradients(batches):
        with mock.patch(REDUCE, wraps=_fsdp_param_group.foreach_reduce) as reduce:
            parallel.forward_backward(batches, valid)
        assert len(batches) and reduce.call_count == units
        found = [full(p.grad) for p in model.parameters()]
        model.zero_grad()
        return found

    parts = [gradients([batch]) for batch in batches]
    assert len(parts) > 1
    for p, whole, *each in zip(model.parameters(), gradients(batches), *parts, strict=True):
        assert whole.dtype == p.dtype and torch.equal(whole, sum(each[1:], each[0]))


def test_the_seed_reaches_the_weights():
    first, again, other = (build_run([f"--job.seed={seed}"])[2].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(full(first[name]), full(again[name])) for name in first)
    assert not torch.equal(full(first["embed.weight"]), full(other["embed.weight"]))


@pytest.mark.parametrize("words", [["--moe.experts=0"], ["--model.ffn_pattern=D"]])
def test_a_model_without_experts_trains(words):
    result = run_layout([*words, "--model.ffn_hidden=24"])
    assert all(
        step["counts"] == {}
        and step["losses"]["balance_loss"] == step["losses"]["router_z_loss"] == 0
        for step in result["steps"]
    )
    assert result["steps"][1]["losses"]["loss"].isfinite() and result["steps"][0]["norm"] > 0


@pytest.mark.xdist_group("world2")
def test_the_global_batch_loss_counts_over_ranks(pools):
    """Two ranks without accumulation balance as one rank with the whole batch does."""
    words = ["--moe.balance=global_batch"]
    whole = run_layout([*words, "--training.batch_size=4"])
    for result in pools(2).run(run_layout, [*words, "--training.batch_size=2"]):
        assert max(differences(whole, result).values()) < 1e-9


def compiled_step(words):
    """(one step, number of graphs compiled)."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return run_layout(words, 1), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.slow), "selective"])
def test_compiled_blocks_train_as_eager_ones(pools, mode):
    words = [
        "--training.dtype=float32",
        "--moe.impl=grouped",
        "--optimizer.eps=1e-3",
        f"--activation_checkpoint.mode={mode}",
    ]
    alone = run_layout(words, 1)
    for result, graphs in pools(2).run(
        compiled_step, [*words, "--compile.enable=true", "--compile.backend=aot_eager"]
    ):
        assert graphs >= 3  # three kinds of blocks
        wrong = {
            path: value for path, value in differences(alone, result).items() if not value <= 1e-4
        }
        assert not wrong, wrong


@pytest.mark.slow
def test_compiled_blocks_meet_any_number_of_documents():
    """In training and validation, with two kinds of blocks, numbers of documents far apart and, as
    in the windows of the context loss, other lengths: no limit of torch ends the run."""
    torch._dynamo.reset()
    words = [
        "--training.dtype=float32",
        "--moe.impl=grouped",
        "--compile.enable=true",
        "--compile.backend=aot_eager",
    ]
    shape = [
        "--model.pattern=N",
        "--model.layers=2",
        "--model.ffn_pattern=DE",
        "--model.ffn_hidden=16",
    ]  # blocks that compile fast
    *_, model, _, _, build = build_run([*words, *shape])
    for grad in (True, False):
        for documents, rows, length in ((10, 1, 64), (70, 1, 128), (7, 7, 16)):
            borders = torch.arange(documents + 1, dtype=torch.int32) * (rows * length // documents)
            borders[-1] = rows * length
            with torch.set_grad_enabled(grad):
                assert (
                    model(
                        torch.zeros(rows * length, dtype=torch.int64),
                        build.seq_info(borders, rows, length),
                        None,
                    )
                    .isfinite()
                    .all()
                )


def parts_held(words):
    """This rank's share of every sharded weight, gradient shape and moment."""
    config, dims, model, parallel, optimizer, build = build_run(words)
    parallel.forward_backward(*microbatches_of(config, dims, build, 0))
    parallel.unsharded.reduce()
    optimizer.step()
    tensors = [
        (p, t)
        for p in model.parameters()
        if isinstance(p, DTensor)
        for t in (p, p.grad, optimizer.state[p]["exp_avg"])
    ]
    return sum(t.to_local().numel() for _, t in tensors) / sum(p.numel() for p, _ in tensors)


@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize(
    "layout, copies",
    [([], 1), (["--parallel.dp_replicate=2"], 2), (["--parallel.dp_replicate=4"], 4)],
    ids=str,
)
def test_weights_gradients_and_moments_are_sharded(pools, layout, copies):
    assert sum(pools(4).run(parts_held, layout)) == pytest.approx(copies)


def sums_over_replicas(words):
    """All-reduces of gradients in a step."""
    config, dims, _, parallel, _, build = build_run(words)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as counted:
        parallel.forward_backward(*microbatches_of(config, dims, build, 0))
        parallel.unsharded.reduce()
    return counted.call_count


@pytest.mark.xdist_group("world4")
def test_replicas_meet_once_a_step(pools):
    words = ["--parallel.dp_replicate=2"]
    (once, *_), (more, *_) = (
        pools(4).run(sums_over_replicas, [*words, f"--training.global_batch_size={n}"])
        for n in (4, 16)
    )
    assert once == more > 0
    alone = [
        "--parallel.dp_replicate=1",
        "--training.global_batch_size=4",
    ]  # the parameters that FSDP2 leaves out remain
    assert pools(4).run(sums_over_replicas, alone)[0] == 1


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_nothing(mode):
    kept, redone = run_layout([]), run_layout([f"--activation_checkpoint.mode={mode}"])
    assert max(differences(kept, redone).values()) == 0
