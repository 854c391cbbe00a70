"""Values that mixers carry over the depth: under every parallelism as on one rank, across stages of
pipelines and through stages that only pass them on, in validation and in decoding."""

from unittest import mock

import pytest
import torch

from lmoe.config import load_config
from lmoe.generate import Decoder
from lmoe.model.build import build_model
from lmoe.model.init import init_weights, materialise
from lmoe.model.mixers import MIXERS
from lmoe.model.mixers.gla import GLA
from tests.harness.compare import TINY, compare_to_one_rank, differences, run_layout
from tests.harness.layouts import words
from tests.model.variants import make_seq
from tests.test_pipeline import EVERY_SCHEDULE, pipeline, validated

pytestmark = pytest.mark.usefixtures("one_rank")


class Residual(GLA):
    """GLA whose values, but in the first layer, are half those of the first layer."""

    joined = True  # whether gradients flow back to it

    def __init__(self, model, options, layer=0, shared=None):
        super().__init__(model, options, layer, shared)
        self.carries = {"first": (options.shape(model)[0], self.V)}

    def carry(self, inputs, carried):
        if "first" not in carried:
            return inputs, {**carried, "first": inputs["v"]}
        first = carried["first"] if self.joined else carried["first"].detach()
        return {**inputs, "v": (inputs["v"] + first.tanh()) / 2}, carried


# The first and the last layer know nothing of the value, nor do two between those that give and
# take it.
TOML = TINY | {
    "model": TINY["model"]
    | {
        "layers": 8,
        "heads": 2,
        "pattern": [
            "gla",
            "residual",
            "attention",
            "gated_deltanet",
            "residual",
            "residual",
            "gla",
            "attention",
        ],
    }
}


def with_residual(function):
    """function, where the registry has the toy: it must not be there while other tests are
    collected."""

    def run(*args):
        with mock.patch.dict(MIXERS, residual=Residual):
            return function(*args)

    return run


def carried_layout(*args):
    return with_residual(run_layout)(*args)


def carried_validation(words):
    return with_residual(validated)(words, TOML)


def compare(pool, words, layout, **kwargs):
    return compare_to_one_rank(pool, words, layout, toml=TOML, run=carried_layout, **kwargs)


def test_gradients_flow_to_the_first_layer():
    with mock.patch.object(Residual, "joined", False):
        cut = carried_layout([], 1, TOML)
    whole = carried_layout([], 1, TOML)
    wrong = {
        name
        for name, value in differences(
            whole["steps"][0]["gradients"], cut["steps"][0]["gradients"]
        ).items()
        if value > 1e-6
    }
    assert "blocks.1.mixer.wv.weight" in wrong and "blocks.2.mixer.wv.weight" not in wrong


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize(
    "axis",
    ["cp", *(pytest.param(axis, marks=pytest.mark.slow) for axis in ("tp", "dp_shard", "ep"))],
)
def test_two_ranks(pools, axis):
    compare(pools(2), [], words({axis: 2}))


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_pipelines_of_two(pools, schedule):
    compare(pools(2), [], pipeline(schedule))


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("mode", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_recomputed(pools, mode):
    compare(pools(2), [f"--activation_checkpoint.mode={mode}"], pipeline("1f1b"))


@pytest.mark.slow
@pytest.mark.xdist_group("world2")
def test_compiled(pools):
    common = ["--training.dtype=float32", "--moe.impl=grouped", "--optimizer.eps=1e-3"]
    compare(
        pools(2),
        common,
        [*pipeline("1f1b"), "--compile.enable=true", "--compile.backend=aot_eager"],
        tolerance=1e-4,
        steps=1,
    )


@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize(
    "layout",
    [{"pp": 2, "tp": 2}, {"pp": 2, "cp": 2}]
    + [
        pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in ({"pp": 4}, {"tp": 2, "cp": 2}, {"pp": 2, "dp_shard": 2})
    ],
    ids=str,
)
def test_four_ranks(pools, layout):
    compare(pools(4), [], words(layout))


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("layout", [pipeline("1f1b"), pipeline("interleaved")], ids=str)
def test_validation(pools, layout):
    alone = carried_validation([])
    for measured in pools(2).run(carried_validation, layout):
        for here, there in zip(alone, measured, strict=True):
            assert here == pytest.approx(there, rel=1e-12)


def test_decoding():
    """Prefill of a part of each document, then token by token: the logits of the whole."""
    with mock.patch.dict(MIXERS, residual=Residual):
        config = load_config([], toml=TOML)
        with torch.device("meta"):
            model = build_model(config).double()
    materialise(model, "cpu")
    init_weights(model, 0)
    documents = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()
    whole = model(torch.tensor(documents).flatten(), make_seq([12, 12])).view(2, 12, -1)
    decoder = Decoder(model, torch.device("cpu"), torch.float64, dense_mask=True, windows={0})
    torch.testing.assert_close(
        decoder.prefill([document[:7] for document in documents], 12), whole[:, 6]
    )
    for place in range(7, 12):
        torch.testing.assert_close(decoder.step(torch.tensor(documents)[:, place]), whole[:, place])
