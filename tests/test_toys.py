"""What coming mixers will need, in whole models of toys: under every parallelism as on one rank, in
validation, recomputation and decoding."""

from unittest import mock

import pytest
import torch

from lmoe.checks import check_config
from lmoe.config import load_config
from lmoe.generate import Decoder
from lmoe.model.build import build_model
from lmoe.model.init import materialise
from lmoe.model.mixers import MIXERS
from tests.harness.compare import TINY, compare_to_one_rank, differences, run_layout
from tests.harness.layouts import words
from tests.harness.weights import init_noisy
from tests.model.variants import make_seq
from tests.test_pipeline import EVERY_SCHEDULE, pipeline, validated
from tests.toys import TOYS, FirstValue

pytestmark = pytest.mark.usefixtures("one_rank")
slow = pytest.mark.slow


def layers(*names):
    model = TINY["model"] | {"layers": len(names), "heads": 4, "pattern": list(names)}
    return TINY | {"model": model}


# Residuals: the first and the last layer know nothing of the value, nor do two between those that
# give and take it.
DEPTH = ["gla", "first_value", "attention", "gated_deltanet", "first_value", "first_value", "gla"]
RESIDUALS = layers(*DEPTH, "attention")
# All that context parallel ranks can share: states that do not compose, complex ones, angles, sums
# over heads; and what they cannot.
STREAM = layers("mini_batch", "rotor", "turning", "selective", "attention", "mini_batch")
MEMORIES = layers("memories", "gla", "memories", "mini_batch")


def with_toys(function):
    """Run a function where the registry has the toys: they must not be there while other tests are
    collected."""

    def run(*args):
        with mock.patch.dict(MIXERS, TOYS):
            return function(*args)

    return run


def toy_layout(*args):
    return with_toys(run_layout)(*args)


def toy_validation(words):
    return with_toys(validated)(words, RESIDUALS)


def compare(pool, words, layout, toml, **kwargs):
    return compare_to_one_rank(pool, words, layout, toml=toml, run=toy_layout, **kwargs)


def test_gradients_flow_to_the_first_layer():
    with mock.patch.object(FirstValue, "joined", False):
        cut = toy_layout([], 1, RESIDUALS)
    whole = toy_layout([], 1, RESIDUALS)
    gradients = (result["steps"][0]["gradients"] for result in (whole, cut))
    wrong = {name for name, value in differences(*gradients).items() if value > 1e-6}
    assert "blocks.1.mixer.wv.weight" in wrong and "blocks.2.mixer.wv.weight" not in wrong


TWO = [
    (RESIDUALS, "cp"),
    *(pytest.param(RESIDUALS, axis, marks=slow) for axis in ("tp", "dp_shard", "ep")),
    (STREAM, "tp"),
    (MEMORIES, "tp"),
    *(pytest.param(toml, "dp_shard", marks=slow) for toml in (STREAM, MEMORIES)),
]


def which(toml):
    return toml["model"]["pattern"][1] if isinstance(toml, dict) and "model" in toml else str(toml)


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("toml, axis", TWO, ids=which)
def test_two_ranks(pools, toml, axis):
    compare(pools(2), [], words({axis: 2}), toml)


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_pipelines_of_two(pools, schedule):
    compare(pools(2), [], pipeline(schedule), RESIDUALS)


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("toml", [STREAM, MEMORIES], ids=which)
def test_stages(pools, toml):
    compare(pools(2), [], pipeline("1f1b"), toml)


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("toml", [RESIDUALS, STREAM, MEMORIES], ids=which)
@pytest.mark.parametrize("mode", ["full", pytest.param("selective", marks=slow)])
def test_recomputed(pools, toml, mode):
    """On a pipeline as on one rank; and on one rank the same bits as without."""
    recomputed = [f"--activation_checkpoint.mode={mode}"]
    compare(pools(2), recomputed, pipeline("1f1b"), toml, steps=1)
    once, again = (toy_layout(more, 1, toml) for more in ([], recomputed))
    assert not any(differences(once, again).values())


@pytest.mark.slow
@pytest.mark.xdist_group("world2")
def test_compiled(pools):
    common = ["--training.dtype=float32", "--moe.impl=grouped", "--optimizer.eps=1e-3"]
    compiled = ["--compile.enable=true", "--compile.backend=aot_eager"]
    layout = [*pipeline("1f1b"), *compiled]
    compare(pools(2), common, layout, RESIDUALS, tolerance=1e-4, steps=1)


@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize(
    "toml, layout",
    [
        (RESIDUALS, {"pp": 2, "tp": 2}),
        (RESIDUALS, {"pp": 2, "cp": 2}),
        (STREAM, {"cp": 4}),
        pytest.param(STREAM, {"cp": 4, "cp_method": "all_to_all"}, marks=slow),
        pytest.param(STREAM, {"cp": 2, "tp": 2}, marks=slow),
        pytest.param(MEMORIES, {"pp": 2, "tp": 2}, marks=slow),
        *(
            pytest.param(RESIDUALS, sizes, marks=slow)
            for sizes in ({"pp": 4}, {"tp": 2, "cp": 2}, {"pp": 2, "dp_shard": 2})
        ),
    ],
    ids=which,
)
def test_four_ranks(pools, toml, layout):
    compare(pools(4), [], words(layout), toml)


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("layout", [pipeline("1f1b"), pipeline("interleaved")], ids=str)
def test_validation(pools, layout):
    alone = toy_validation([])
    for measured in pools(2).run(toy_validation, layout):
        for here, there in zip(alone, measured, strict=True):
            assert here == pytest.approx(there, rel=1e-12)


@pytest.mark.parametrize("toml", [RESIDUALS, STREAM, MEMORIES], ids=which)
def test_decoding(toml):
    """Prefill of a part of each document, then token by token: the logits of the whole."""
    with mock.patch.dict(MIXERS, TOYS):
        config = load_config([], toml=toml)
        with torch.device("meta"):
            model = build_model(config).double()
    materialise(model, "cpu")
    init_noisy(model)
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(0, 64, (2, 12), generator=generator)
    whole = model(documents.flatten(), make_seq([12, 12])).view(2, 12, -1)
    decoder = Decoder(model, torch.device("cpu"), torch.float64, dense_mask=True, windows={0})
    prompts = documents[:, :7].tolist()
    torch.testing.assert_close(decoder.prefill(prompts, 12), whole[:, 6])
    for place in range(7, 12):
        torch.testing.assert_close(decoder.step(documents[:, place]), whole[:, place])


def test_a_router_in_a_mixer_reports():
    """Counts of all tokens, a balance loss beside that of the experts: of every layer that has
    one."""
    step = toy_layout([], 1, MEMORIES)["steps"][0]
    assert step["losses"]["mixer_balance_loss"] > 0 and step["losses"]["balance_loss"] > 0
    tokens = TINY["data"]["seq_len"] * TINY["training"]["global_batch_size"]
    counts = {name: n.sum().item() for name, n in step["counts"].items() if "mixer" in name}
    assert counts == {"0.mixer": tokens, "2.mixer": tokens}


@pytest.mark.parametrize(
    "toml, words, message",
    [
        (STREAM, ["cp_method=lasp2"], "lasp2: states of mini_batch have no transition"),
        (STREAM, ["cp_method=auto", "tp=2"], r"tp x cp .*auto\) = 8 does not divide the 4 heads"),
        (MEMORIES, [], "ranks cannot share the stream of memories; set parallel.cp = 1"),
    ],
    ids=which,
)
def test_refusals(toml, words, message):
    with mock.patch.dict(MIXERS, TOYS):
        words = ["--parallel.cp=4", *(f"--parallel.{word}" for word in words)]
        config = load_config(words, toml=toml)
        with pytest.raises(ValueError, match=message):
            check_config(config, 8 if "--parallel.tp=2" in words else 4, torch.device("cpu"))
