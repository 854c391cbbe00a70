"""Checkpoints of several ranks: FSDP2, HSDP, other numbers of ranks, and failures of one rank that all must agree on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmoe.checkpoint import Checkpointer, load_model
from tests.scripts.checkpoint_ranks import assert_equal, build, whole

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "tests/scripts/checkpoint_ranks.py", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.count("passed") == 4, done.stdout + done.stderr
    return folder


@pytest.mark.xdist_group("torchrun")
def test_four_ranks(four_ranks):
    """The assertions are in the script."""


@pytest.mark.xdist_group("torchrun")
@pytest.mark.parametrize("name", ["fsdp4", "hsdp2x2"])
def test_one_process_without_a_process_group_loads_what_four_ranks_saved(four_ranks, name):
    saved = torch.load(four_ranks / f"{name}.pt", weights_only=True)
    model, optimizers = build(None, seed=9)
    before = torch.get_rng_state()
    Checkpointer(four_ranks / name).load(model, optimizers, four_ranks / name / "step-2")
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(whole(model, optimizers), saved)
    model, _ = build(None, seed=9)
    load_model(model, four_ranks / name / "step-2")
    assert torch.equal(model.block.weight, saved["model.block.weight"])
