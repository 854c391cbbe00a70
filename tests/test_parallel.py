"""Every parallelism, and every pair, trains as one rank does: loss, every gradient, clip norm,
weights after two steps, router state."""

from unittest import mock

import pytest
import torch

from lmoe.checks import check_config
from lmoe.config import load_config
from lmoe.model.mixers import MIXERS
from lmoe.model.moe.router import Router
from lmoe.parallel.dims import build_dims
from tests.harness.compare import (
    TINY,
    compare_to_one_rank,
    differences,
    held_part,
    run_layout,
)
from tests.harness.layouts import AXES, COMPILED, EXPERTS, PAIRS, RECOMPUTED, TRIPLES, words
from tests.model.variants import MIXER_VARIANTS, UNREGISTERED
from tests.test_layouts import compiled_step

pytestmark = pytest.mark.usefixtures("one_rank")


def world(size):
    return pytest.mark.xdist_group(f"world{size}")


@world(2)
@pytest.mark.parametrize("axis", [a for a in AXES if a != "dp_replicate"])
def test_two_ranks(pools, axis):
    compare_to_one_rank(pools(2), [], words({axis: 2}))


@world(4)
@pytest.mark.parametrize("axis", AXES)
def test_four_ranks(pools, axis):
    compare_to_one_rank(
        pools(4),
        {"pp": ["--model.layers=6"], "tp": ["--model.heads=4"]}.get(axis, []),
        words({axis: 4}),
    )


@world(4)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs(pools, pair):
    compare_to_one_rank(pools(4), [], words(dict.fromkeys(pair, 2)))


@world(4)
@pytest.mark.parametrize("impl", ["grouped", "loop"])
@pytest.mark.parametrize("layout", EXPERTS, ids=str)
def test_other_ways_to_share_experts(pools, layout, impl):
    compare_to_one_rank(pools(4), [f"--moe.impl={impl}"], words(layout))


def run_lopsided(*args):
    """run_layout of routers that prefer the second expert above all, then the first."""

    def reset_buffers(router):
        router.bias.copy_(torch.tensor([50.0, 100.0, 0.0, 0.0]))

    with mock.patch.object(Router, "reset_buffers", reset_buffers):
        return run_layout(*args)


@world(4)
@pytest.mark.parametrize("layout", [{"ep": 4}, {"ep": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("method", ["gather", "all_to_all"])
@pytest.mark.parametrize("top_k, empty", [(1, 3), (4, 0)], ids=["one hot expert", "all experts"])
def test_lopsided_choices(pools, layout, method, top_k, empty):
    """Ranks without rows, and every token on every expert."""
    model = [f"--moe.top_k={top_k}", "--moe.impl=grouped", "--moe.bias_rate=0"]
    layout = [*words(layout), f"--parallel.ep_method={method}"]
    alone, _ = compare_to_one_rank(pools(4), model, layout, run=run_lopsided)
    for counts in alone["steps"][1]["counts"].values():
        assert (counts == 0).sum() == empty


@pytest.mark.slow
@world(8)
@pytest.mark.parametrize("sizes", TRIPLES, ids=str)
def test_triples(pools, sizes):
    compare_to_one_rank(
        pools(8),
        ["--model.layers=6", "--moe.experts=8", "--training.global_batch_size=8"],
        words(sizes),
    )


PLAIN = TINY | {"mixer": {}, "attention": {}}
OTHERS = {
    "tied": ["--model.tie_embeddings=true"],
    "dense first": ["--model.ffn_pattern=DEE", "--model.ffn_hidden=24"],
    "three rows": ["--training.batch_size=3", "--training.global_batch_size=6"],
    "window": ["--attention.window=7"],
    "long window": ["--attention.window=40"],
    "one kv head": ["--attention.kv_heads=1", "--attention.qk_norm=true"],
    "grouped": ["--moe.impl=grouped"],
    "sigmoid": ["--moe.score=sigmoid", "--moe.groups=2"],
}


@world(4)
@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "cp": 2},
        *(pytest.param(x, marks=pytest.mark.slow) for x in ({"cp": 4}, {"cp": 2, "ep": 4})),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", OTHERS)
def test_other_models(pools, name, layout):
    compare_to_one_rank(pools(4), OTHERS[name], words(layout))


@world(4)
@pytest.mark.parametrize(
    "layout",
    [pytest.param(x, marks=pytest.mark.slow if n % 2 else ()) for n, x in enumerate(RECOMPUTED)],
    ids=str,
)
@pytest.mark.parametrize("mode", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_recomputed(pools, layout, mode):
    compare_to_one_rank(pools(4), [f"--activation_checkpoint.mode={mode}"], words(layout))


def run_variant(*args):
    """run_layout, where the registry has the classes of the tests too."""
    with mock.patch.dict(MIXERS, UNREGISTERED):
        return run_layout(*args)


EVERY_MIXER = [
    pytest.param(variant, layout, marks=() if layout == {"tp": 2, "cp": 2} else pytest.mark.slow)
    for variant in MIXER_VARIANTS
    for layout in (
        {"tp": 2, "cp": 2},
        {"tp": 4},
        {"cp": 4},
        {"cp": 2, "cp_method": "all_to_all"},
        {"pp": 2, "dp_shard": 2},
    )
]


@world(4)
@pytest.mark.parametrize("variant, layout", EVERY_MIXER, ids=str)
def test_every_mixer(pools, variant, layout):
    """A layer of every mixer of the registry, in every preset, over the heads, the tokens and the
    depth."""
    name, options = MIXER_VARIANTS[variant]
    section = "attention" if name == "attention" else "mixer"
    preset = variant.rpartition("-")[2]
    model = [
        f"--model.mixer={name}",
        "--model.pattern=L",
        f"--model.layers={layout.get('pp', 1)}",
        "--model.heads=4",
        f"--model.preset={preset if preset in ('uniform', 'faithful') else 'uniform'}",
    ]
    model += [f"--{section}.{key}={str(value).lower()}" for key, value in options.items()]
    try:
        with mock.patch.dict(MIXERS, UNREGISTERED):
            check_config(load_config([*model, *words(layout)], toml=PLAIN), 4, torch.device("cpu"))
    except ValueError as refused:
        shares = (MIXERS | UNREGISTERED)[name].splits_sequence
        assert ("heads of" if shares else "cannot share the stream of") in str(refused)
        pytest.skip(str(refused))
    compare_to_one_rank(pools(4), model, words(layout), steps=1, toml=PLAIN, run=run_variant)


@world(4)
@pytest.mark.parametrize("method", ["lasp2", "all_to_all"])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_latent_attention_recomputed(pools, mode, method):
    model = ["--model.mixer=latent", "--model.pattern=LN", "--model.layers=2", "--model.heads=4"]
    model.append(f"--activation_checkpoint.mode={mode}")
    layout = words({"cp": 4, "cp_method": method})
    compare_to_one_rank(pools(4), model, layout, steps=1, toml=PLAIN, run=run_variant)


COMPILED_MODES = [(layout, mode) for layout in COMPILED for mode in ("full", "none")]


@pytest.mark.slow
@world(2)
@pytest.mark.parametrize("layout, mode", COMPILED_MODES, ids=str)
def test_compiled_blocks(pools, layout, mode):
    common = [
        "--training.dtype=float32",
        "--moe.impl=grouped",
        "--optimizer.eps=1e-3",
        f"--activation_checkpoint.mode={mode}",
    ]
    alone = run_layout(common, 1)
    for result, graphs in pools(2).run(
        compiled_step,
        [*common, *words(layout), "--compile.enable=true", "--compile.backend=aot_eager"],
    ):
        assert graphs >= len(
            {name.split(".")[1] for name in result["weights"] if name.startswith("blocks.")}
        )  # all kinds differ
        wrong = {
            path: value
            for path, value in differences(held_part(alone, result), result).items()
            if not value <= 1e-4
        }
        assert not wrong, wrong


@pytest.mark.slow
@world(3)
def test_an_odd_number_of_slices(pools):
    """The middle rank mirrors itself."""
    compare_to_one_rank(pools(3), ["--training.global_batch_size=3"], words({"cp": 3}))


@pytest.mark.slow
@world(2)
@pytest.mark.parametrize("layout", [{"tp": 2}, {"cp": 2}, {"ep": 2}], ids=str)
def test_inductor(pools, layout):
    """One row a microbatch: what inductor fuses differs from aot_eager's graphs, and has lost
    gradients before."""
    common = [
        "--training.dtype=float32",
        "--moe.impl=grouped",
        "--optimizer.eps=1e-3",
        "--model.pattern=L",
        "--model.layers=1",
    ]
    alone = run_layout(common, 1)
    for result, _ in pools(2).run(
        compiled_step, [*common, *words(layout), "--compile.enable=true"]
    ):
        wrong = {
            path: value
            for path, value in differences(held_part(alone, result), result).items()
            if not value <= 1e-3
        }
        assert not wrong, wrong


def share_text_and_fault():
    dims = build_dims(load_config([]), torch.device("cpu"))
    said = [dims.share(lambda: f"of rank {dims.rank}")]
    for fault in (ValueError("data.paths: é " * 999), FileNotFoundError(2, "None there", "x")):
        try:
            dims.share(mock.Mock(side_effect=fault))
        except ValueError as error:
            said.append(str(error))
    return said


@world(2)
def test_what_one_rank_found_wrong_all_ranks_say(pools):
    """Else the others would die of its leaving, with a traceback."""
    first, second = pools(2).run(share_text_and_fault)
    assert first == second and [first[0], first[2]] == ["of rank 0", "None there: x"]
    assert first[1].startswith("data.paths: é data.paths: ")
