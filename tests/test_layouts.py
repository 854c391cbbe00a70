"""FSDP2, HSDP and accumulation train as one rank does."""

import pytest

from tests.harness.compare import compare_to_one_rank, differences, run_layout

pytestmark = pytest.mark.usefixtures("one_rank")

TWO = [[], ["--parallel.reshard_after_forward=false"]]
FOUR = [[], ["--parallel.dp_replicate=2"], ["--parallel.dp_replicate=4"]]
VARIANTS = {
    "plain": [],
    "tied": ["--model.tie_embeddings=true"],
    "dense_first": ["--model.dense_layers=1", "--model.ffn_hidden=24"],
    "recompute": ["--activation_checkpoint.mode=full"],
    "unclipped": ["--training.max_norm=0"],
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


@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_on_four_ranks(pools, name):
    compare_to_one_rank(pools(4), VARIANTS[name], ["--parallel.dp_replicate=2"])


def test_accumulation_is_a_larger_batch():
    accumulated, whole = run_layout([]), run_layout(["--training.batch_size=4"])
    assert max(differences(accumulated, whole).values()) < 1e-9


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_nothing(mode):
    kept, redone = run_layout([]), run_layout([f"--activation_checkpoint.mode={mode}"])
    assert max(differences(kept, redone).values()) == 0
