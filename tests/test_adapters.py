"""Low-rank adapters (LoRA, arXiv 2106.09685) over frozen projections: each parameter of a layer
says how tensor parallelism cuts it."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmoe.model.init import Linear, local
from lmoe.model.mixers import base
from tests.harness.compare import TINY, compare_to_one_rank, run_layout
from tests.harness.layouts import words

pytestmark = pytest.mark.usefixtures("one_rank")
RANK = 3


class LoraLinear(Linear):
    """y = W x + B (A x)."""

    def __init__(self, in_features, out_features, bias=False, *, std):
        super().__init__(in_features, out_features, bias, std=std)
        self.lora_A = nn.Parameter(torch.empty(RANK, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, RANK))

    def shards(self, dim):
        return {"weight": dim, "lora_A": 1} if dim else {"weight": 0, "lora_B": 0}

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, local(self.lora_A)), local(self.lora_B))


TOML = TINY | {"model": TINY["model"] | {"pattern": ["gla", "gsa", "gla"]}}
ADAPTED = [f"blocks.{layer}.mixer.{w}" for layer in range(3) for w in ("wq", "wk", "wv", "wo")]
FROZEN = tuple(f"{name}.weight" for name in ADAPTED)


def adapted(words, steps, toml):
    with mock.patch.object(base, "Linear", LoraLinear):
        return run_layout(words, steps, toml, FROZEN)


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize(
    "sizes", [{"tp": 2}, *(pytest.param(x, marks=pytest.mark.slow) for x in ({"pp": 2}, {"cp": 2}))]
)
def test_adapters_train_as_on_one_rank(pools, sizes):
    alone, ranks = compare_to_one_rank(pools(2), [], words(sizes), toml=TOML, run=adapted)
    for name in ADAPTED:
        stays = torch.equal(alone["initial"][f"{name}.weight"], alone["weights"][f"{name}.weight"])
        moved = [
            alone["initial"][f"{name}.{x}"] - alone["weights"][f"{name}.{x}"]
            for x in ("lora_A", "lora_B")
        ]
        assert stays and all(change.abs().max() > 0 for change in moved)
