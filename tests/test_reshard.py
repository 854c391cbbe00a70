"""A checkpoint of one layout goes on under another: weights, moments of every parameter, experts
among them, router biases."""

import pytest

import train
from lmoe.checkpoint import Checkpointer
from tests.harness.compare import (
    build_run,
    differences,
    full,
    held_part,
    microbatches_of,
    run_layout,
)
from tests.harness.layouts import words

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.xdist_group("world4")]

LAYOUTS = [
    {"tp": 2, "cp": 2},
    {"ep": 4},
    {"pp": 2, "tp": 2},
    {"dp_replicate": 2, "ep": 2},
    {"tp": 2, "ep": 4},
    {"dp_shard": 4},
    {"pp": 2, "cp": 2, "ep": 2},
]


def one_step(layout, step, load, save):
    """Step number `step` under a layout, from the checkpoint `load` (or the initial weights),
    written to `save`."""
    config, dims, model, parallel, optimizer, build = build_run(layout)
    if load:
        Checkpointer(load).load(model, [optimizer])
    batches, valid = microbatches_of(config, dims, build, step)
    losses, counts, norm, skip = train.train_step(
        model, parallel, optimizer, config, dims, batches, valid, config.optimizer.lr
    )
    if save:
        Checkpointer(save).save(step, model, [optimizer], {}, sync=True)
    weights = {name: full(t) for stage in model.stages for name, t in stage.state_dict().items()}
    return {"losses": losses, "counts": counts, "norm": norm, "skip": skip}, weights


@pytest.fixture(scope="module")
def alone(one_rank):
    return run_layout([], 3)


MOVES = [
    pytest.param(*move, marks=pytest.mark.slow if n % 2 else ())
    for n, move in enumerate(zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1]))
]


@pytest.mark.parametrize("first, second", MOVES, ids=str)
def test_from_one_layout_to_another(pools, alone, tmp_path, first, second):
    pools(4).run(one_step, words(first), 0, None, tmp_path / "a")
    pools(4).run(one_step, words(second), 1, tmp_path / "a", tmp_path / "b")
    for step, weights in pools(4).run(one_step, words(first), 2, tmp_path / "b", None):
        got, expected = (
            [step, weights],
            [{k: alone["steps"][2][k] for k in step}, held_part(alone["weights"], weights)],
        )
        wrong = {
            path: value for path, value in differences(expected, got).items() if not value <= 1e-9
        }
        assert not wrong, wrong


def test_four_ranks_to_one(pools, alone, tmp_path):
    pools(4).run(one_step, words(LAYOUTS[0]), 0, None, tmp_path / "a")
    pools(4).run(one_step, words(LAYOUTS[2]), 1, tmp_path / "a", tmp_path / "b")
    step, weights = one_step([], 2, tmp_path / "b", None)
    assert max(differences(alone["weights"], weights).values()) < 1e-9
