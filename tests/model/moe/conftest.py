from types import SimpleNamespace

import pytest
import torch

from lmoe.model.batch import LossWeights
from lmoe.model.config import ModelConfig, MoEConfig
from lmoe.model.moe.moe import MoE
from tests.harness.weights import init_noisy


def _make_seq(rows, row_len, sequence=0.0, token=0.0, microbatch=0.0):
    return SimpleNamespace(
        rows=rows, row_len=row_len, row_of=None, weights=LossWeights(sequence, token, microbatch)
    )


def _make_moe(dim=16, dtype=torch.float64, seed=1, std=0.3, **options):
    moe = MoE(
        ModelConfig(dim=dim, layers=1, init_std=std),
        MoEConfig(**({"experts": 8, "top_k": 3, "hidden": 8} | options)),
    )
    init_noisy(moe, seed)
    return moe.to(dtype)


@pytest.fixture
def make_seq():
    """make_seq(rows, row_len, sequence=, token=, microbatch=): what a MoE layer asks of its
    batch."""
    return _make_seq


@pytest.fixture
def make_moe():
    """make_moe(dim=, dtype=, std=, **MoEConfig fields): a layer with larger weights than in
    training, so that routing is decided."""
    return _make_moe


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
