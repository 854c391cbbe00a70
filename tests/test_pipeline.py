"""Pipelines train and validate as one rank does, under every schedule."""

import gc
import itertools
import random

import pytest
import torch

from lmoe.checks import check_config
from lmoe.config import load_config
from lmoe.data.packing import HostBatch
from lmoe.evaluate import validate
from lmoe.model.build import build_model
from lmoe.optimizer import build_optimizer
from lmoe.parallel.context import make_builder
from lmoe.parallel.parallelize import parallelize
from lmoe.parallel.pipeline import SCHEDULES, split
from lmoe.resolve import resolve_batch_size
from tests.harness.compare import (
    TINY,
    build_run,
    compare_to_one_rank,
    dims_of,
    microbatches_of,
    rows_of_step,
)
from tests.harness.pool import join_alone
from tests.harness.weights import add_noise

pytestmark = pytest.mark.usefixtures("one_rank")

LAYERS = TINY | {
    "model": TINY["model"] | {"layers": 4, "pattern": ["gla", "gated_deltanet", "attention", "gla"]}
}
old_torch = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch splits the backward pass wrongly"
)
EVERY_SCHEDULE = [
    pytest.param(name, marks=old_torch if name == "zero_bubble" else ()) for name in SCHEDULES
]


def pipeline(schedule, pp=2):
    words = [f"--parallel.pp={pp}", f"--parallel.schedule={schedule}"]
    return words + ["--parallel.reshard_after_forward=false"] * (schedule == "zero_bubble")


# --------------------------------------------------------------------------------------------------
# Which blocks go where


def test_the_split_is_the_best_of_all():
    chance = random.Random(0)
    for _ in range(300):
        blocks = chance.randint(1, 8)
        stages, costs = chance.randint(1, blocks), [chance.randint(1, 9) for _ in range(blocks)]
        runs = split(costs, stages)
        assert (
            list(itertools.chain(*runs)) == list(range(blocks))
            and len(runs) == stages
            and all(runs)
        )
        all_borders = [
            (0, *inner, blocks) for inner in itertools.combinations(range(1, blocks), stages - 1)
        ]
        all_sums = [
            [sum(costs[a:b]) for a, b in itertools.pairwise(borders)] for borders in all_borders
        ]
        sums = [sum(costs[i] for i in run) for run in runs]
        assert (max(sums), sum(s * s for s in sums)) == min(
            (max(s), sum(x * x for x in s)) for s in all_sums
        )


def test_a_heavy_head_leaves_its_stage_fewer_blocks():
    assert split([1, 1, 1, 1, 1, 1, 1, 1 + 2], 2) == [range(0, 5), range(5, 8)]
    assert split([1] * 7 + [5], 4) == [
        range(0, 2),
        range(2, 4),
        range(4, 7),
        range(7, 8),
    ]  # no peak but the head's: then even


def held(words):
    *_, dims, model, _, _, _ = build_run(words, LAYERS)
    ends = [name for name in ("embed", "norm", "head") if getattr(model, name) is not None]
    return (
        dims.index("pp"),
        [list(stage.blocks._modules) for stage in model.stages],
        ends,
        list(model.state_dict()),
        list(model.routers),
    )


@pytest.mark.xdist_group("world2")
def test_a_rank_holds_only_its_stages(pools):
    whole = set(build_run([], LAYERS)[2].state_dict())
    names = []
    for place, blocks, ends, keys, routers in pools(2).run(held, pipeline("interleaved")):
        assert blocks == [["0"], ["2"]] if place == 0 else [["1"], ["3"]]
        assert ends == (["embed"] if place == 0 else ["norm", "head"])
        assert routers == ["0.ffn", "1.ffn", "2.ffn", "3.ffn"]  # of the whole model
        names += keys
    assert len(names) == len(whole) and set(names) == whole


# --------------------------------------------------------------------------------------------------
# Training


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_two_ranks(pools, schedule):
    compare_to_one_rank(pools(2), [], pipeline(schedule), toml=LAYERS)


@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_sharded_stages(pools, schedule):
    compare_to_one_rank(pools(4), [], pipeline(schedule), toml=LAYERS)


@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_four_stages(pools, schedule):
    compare_to_one_rank(pools(4), [], pipeline(schedule, 4), toml=LAYERS)


VARIANTS = {
    "recompute": ["--activation_checkpoint.mode=full"],
    "rounds": ["--training.global_batch_size=6"],
    "uneven": [
        "--model.layers=3",
        '--model.pattern=["gla", "gated_deltanet", "attention"]',
        "--model.vocab_size=128",
    ],
    "dense_first": [
        "--model.ffn_pattern=DEEE",
        "--model.ffn_hidden=24",
        "--parallel.reshard_after_forward=false",
    ],
}


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(pools, name):
    compare_to_one_rank(pools(2), VARIANTS[name], pipeline("1f1b"), toml=LAYERS)


@pytest.mark.xdist_group("world2")
def test_compiled_blocks(pools):
    words = [
        "--training.dtype=float32",
        "--moe.impl=grouped",
        "--optimizer.eps=1e-3",
        "--model.pattern=LN",
    ]
    layout = [*pipeline("interleaved"), "--compile.enable=true", "--compile.backend=aot_eager"]
    compare_to_one_rank(pools(2), words, layout, tolerance=1e-4, toml=LAYERS)


@pytest.mark.slow
@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE[2:])
def test_stages_per_rank(pools, schedule, stages):
    words = ["--model.layers=12", "--training.global_batch_size=8"]
    compare_to_one_rank(
        pools(4),
        words,
        [*pipeline(schedule, 4), f"--parallel.stages_per_rank={stages}"],
        toml=LAYERS,
    )


@pytest.mark.slow
@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
@pytest.mark.parametrize("axis", ["dp_replicate", "tp", "cp", "ep"])
def test_with_another_axis(pools, schedule, axis):
    words = ["--training.global_batch_size=8"]
    compare_to_one_rank(pools(4), words, [*pipeline(schedule), f"--parallel.{axis}=2"], toml=LAYERS)


@pytest.mark.slow
@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_recomputation_under_every_schedule(pools, schedule, mode):
    compare_to_one_rank(
        pools(2), [f"--activation_checkpoint.mode={mode}"], pipeline(schedule), toml=LAYERS
    )


class Kept:
    """A tensor that a graph keeps for its backward pass."""

    made = alive = 0

    def __init__(self, tensor):
        self.tensor = tensor.detach()
        Kept.made += 1
        Kept.alive += 1

    def __del__(self):
        Kept.alive -= 1


def kept_after_steps(words):
    """(tensors that graphs still keep after a step, forward calls of each stage in it), with
    Python's garbage collection off."""
    config, dims, model, parallel, _, build = build_run(words, LAYERS)
    calls = [0] * len(model.stages)

    def count(i):
        calls[i] += 1

    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *_, i=i: count(i))
    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            outputs = parallel.forward_backward(*microbatches_of(config, dims, build, 0))
        assert not any(
            t.requires_grad
            for o in outputs
            for t in (o.loss, o.z_loss, *itertools.chain(*o.stats.values()))
        )
        assert Kept.made
        return Kept.alive, calls
    finally:
        gc.enable()


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_a_step_calls_a_stage_once_per_microbatch_and_frees_its_graph(pools, schedule):
    for alive, calls in pools(2).run(kept_after_steps, pipeline(schedule)):
        assert alive == 0
        assert calls == [4] * len(calls) and len(calls) == (2 if SCHEDULES[schedule][1] else 1)


# --------------------------------------------------------------------------------------------------
# Validation


def validated(words, toml=LAYERS):
    """Validation losses, of windows of another length too, before, between and after steps."""
    join_alone()
    config = load_config(words, toml=toml)
    world = torch.distributed.get_world_size()
    check_config(config, world, torch.device("cpu"))
    resolve_batch_size(config, world)
    dims = dims_of(config)
    with torch.device("meta"):
        model = build_model(config)
    parallel = parallelize(model, config, dims)
    add_noise(model)
    optimizer = build_optimizer(config.optimizer, model)
    build, plain = (
        make_builder(config, dims, dense_mask=True, **kw) for kw in ({"weights": (None, None)}, {})
    )
    borders = torch.tensor([0, config.data.seq_len], dtype=torch.int32)
    rows = [rows_of_step(config, step)[0] for step in range(5)]
    batches = [HostBatch(t, x, borders, len(t)) for t, x, _ in rows]

    def measure():
        return validate(parallel.evaluate, batches, plain, dims, context=True, window_length=16)

    measured = [measure()]
    for step in range(2):
        parallel.forward_backward(*microbatches_of(config, dims, build, step))
        parallel.unsharded.reduce()
        optimizer.step()
        optimizer.zero_grad()
        measured.append(measure())
    return measured


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_validation(pools, schedule):
    alone = validated([])
    for measured in pools(2).run(validated, pipeline(schedule)):
        for here, there in zip(alone, measured, strict=True):
            assert here == pytest.approx(there, rel=1e-12) and len(here) == 3
    assert alone[0] != alone[1] != alone[2]


@pytest.mark.slow
@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize(
    "words",
    [pipeline("1f1b", 4), pipeline("interleaved"), [*pipeline("interleaved"), "--parallel.tp=2"]],
    ids=str,
)
def test_validation_on_four_ranks(pools, words):
    words = [*words, "--training.global_batch_size=4"]
    alone = validated([])
    for measured in pools(4).run(validated, words):
        for here, there in zip(alone, measured, strict=True):
            assert here == pytest.approx(there, rel=1e-9)


# --------------------------------------------------------------------------------------------------
# Refusals

ZERO = ["--parallel.schedule=zero_bubble", "--parallel.reshard_after_forward=false"]
REFUSED = [
    (["--parallel.schedule=2f2b"], "parallel.schedule = '2f2b' is not known"),
    (["--parallel.stages_per_rank=2"], "runs one stage a rank"),
    (["--parallel.stages_per_rank=-1"], "parallel.stages_per_rank = -1"),
    (["--model.layers=1", "--model.pattern=N"], "model.layers = 1 are fewer than the stages"),
    (
        ["--parallel.schedule=interleaved", "--parallel.stages_per_rank=3"],
        "2 x 3; lower parallel.pp",
    ),
    (
        ["--training.global_batch_size=1"],
        "training.global_batch_size = 1 makes 1 microbatches a step, fewer than the stages",
    ),
    (
        ["--parallel.schedule=interleaved", "--training.global_batch_size=5"],
        "set it to a multiple of .* = 2$",
    ),
    (["--model.tie_embeddings=true"], "model.tie_embeddings"),
    pytest.param(
        [*ZERO, "--activation_checkpoint.mode=selective"],
        "activation_checkpoint.mode = none",
        marks=old_torch,
    ),
    pytest.param(
        [*ZERO, "--compile.enable=true", "--moe.impl=grouped"],
        "compile.enable = false",
        marks=old_torch,
    ),
    pytest.param(
        [*ZERO, "--parallel.reshard_after_forward=true"],
        "reshard_after_forward = false",
        marks=old_torch,
    ),
    pytest.param(
        ZERO,
        "torch 2.1",
        marks=pytest.mark.skipif(
            torch.__version__ >= (2, 13), reason="torch splits the backward pass right"
        ),
    ),
]


@pytest.mark.parametrize("words, message", REFUSED)
def test_what_cannot_run_is_refused(words, message):
    with pytest.raises(ValueError, match=message) as error:
        config = load_config(["--parallel.pp=2", *words], toml=LAYERS)
        check_config(config, 2, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_a_schedule_without_a_pipeline_is_refused():
    with pytest.raises(ValueError, match="parallel.pp above 1"):
        check_config(
            load_config(["--parallel.schedule=gpipe"], toml=LAYERS), 1, torch.device("cpu")
        )
