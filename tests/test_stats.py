"""Statistics of routers by name: sums over microbatches, means over layers, loads."""

from types import SimpleNamespace

import pytest
import torch

from lmoe.config import load_config
from lmoe.model.build import build_model
from lmoe.model.model import Output
from lmoe.parallel.stats import loads, loss_weights, reduce_stats
from tests.harness.compare import TINY

ONE_RANK = SimpleNamespace(world=1)


def report(counts, balance, z):
    return SimpleNamespace(
        counts=torch.tensor(counts), balance=torch.tensor(balance), z=torch.tensor(z)
    )


def output(loss, z_loss, stats):
    return Output(torch.tensor(loss), torch.tensor(z_loss), stats)


def test_sums_by_name():
    """FFN routers and those of mixers each have their losses; a router of another stage is zero
    here."""
    routers = {"0.mixer": 2, "0.ffn": 3, "1.ffn": 3, "2.ffn": 3}
    stats = {
        "0.mixer": report([1, 3], 8.0, 0.5),
        "0.ffn": report([1, 2, 3], 1.0, 16.0),
        "1.ffn": report([6, 0, 0], 2.0, 32.0),
    }
    outputs = [output(1.0, 0.25, stats), output(3.0, 0.25, stats)]
    losses, counts = reduce_stats(outputs, routers, ONE_RANK)
    assert {name: loss.item() for name, loss in losses.items()} == {
        "loss": 4.0,
        "z_loss": 0.5,
        "balance_loss": 6.0,
        "router_z_loss": 96.0,
        "mixer_balance_loss": 16.0,
        "mixer_router_z_loss": 1.0,
    }
    assert {name: n.tolist() for name, n in counts.items()} == {
        "0.mixer": [2, 6],
        "0.ffn": [2, 4, 6],
        "1.ffn": [12, 0, 0],
        "2.ffn": [0, 0, 0],
    }
    assert all(t.dtype == torch.float64 for t in (*losses.values(), *counts.values()))
    del counts["2.ffn"]
    assert loads(counts, 1) == {"memory_load": [1.5], "expert_load": [1.5, 3.0]}
    uneven = {"0.mixer": torch.tensor([1.0, 3.0]), "0.ffn": torch.tensor([2.0, 4.0, 6.0, 0.0])}
    expected = {"memory_load": [1.5], "expert_load": [2.0], "rank_load": [1.0]}
    assert loads(uneven, 2) == expected


def test_only_what_is_there_is_reported():
    losses, counts = reduce_stats([output(1.0, 0.0, {})], {}, ONE_RANK)
    assert list(losses) == ["loss", "z_loss", "balance_loss", "router_z_loss"]
    assert counts == loads(counts, 2) == {}


@pytest.mark.parametrize("words, layers", [([], 3), (["--model.ffn_pattern=DEE"], 2)])
def test_weights_are_means_over_the_layers_with_experts(words, layers):
    config = load_config([*words, "--model.ffn_hidden=24"], toml=TINY)
    with torch.device("meta"):
        model = build_model(config)
    assert list(model.routers.items()) == [(f"{3 - layers + i}.ffn", 4) for i in range(layers)]
    weights = loss_weights(config, model.routers, "ffn")
    assert weights.sequence == 1 / (4 * layers) and weights.token == 1 / (4 * 48 * layers)
    mixers = {f"{i}.mixer": 2 for i in range(3)}
    assert loss_weights(config, model.routers | mixers, "ffn") == weights
    assert loss_weights(config, model.routers | mixers, "mixer").sequence == 1 / (4 * 3)
