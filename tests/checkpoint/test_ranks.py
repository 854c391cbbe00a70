"""Checkpoints of several ranks: FSDP2, HSDP, other numbers of ranks, and failures of one rank that
all must agree on."""

import pytest
import torch
import torch.distributed as dist

from lmoe.checkpoint import Checkpointer, load_model
from tests.checkpoint.ranks import assert_equal, build, save_and_load, whole

pytestmark = pytest.mark.xdist_group("world4")


@pytest.fixture(scope="module")
def four_ranks(pools, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    assert pools(4).run(save_and_load, folder) == ["passed"] * 4
    return folder


def test_four_ranks(four_ranks):
    """The assertions are in the function."""


@pytest.mark.parametrize("name", ["fsdp4", "hsdp2x2"])
def test_one_process_without_a_process_group_loads_what_four_ranks_saved(
    four_ranks, name, monkeypatch
):
    monkeypatch.setattr(
        dist, "is_initialized", lambda: False
    )  # other tests of this process may have joined one
    saved = torch.load(four_ranks / f"{name}.pt", weights_only=True)
    model, optimizers = build(None, seed=9)
    before = torch.get_rng_state()
    Checkpointer(four_ranks / name).load(model, optimizers, four_ranks / name / "step-2")
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(whole(model, optimizers), saved)
    model, _ = build(None, seed=9)
    load_model(model, four_ranks / name / "step-2")
    assert torch.equal(model.block.weight, saved["model.block.weight"])
