"""Validation: the mean over valid tokens of all ranks, the shuffled context, and no side
effects."""

import pytest
import torch
import torch.distributed as dist

from lmoe.data.packing import HostBatch
from lmoe.evaluate import validate
from lmoe.model.batch import SeqBuilder
from lmoe.parallel.context import make_builder
from lmoe.parallel.parallelize import evaluate
from tests.harness.compare import TINY, build_run, full

pytestmark = pytest.mark.usefixtures("one_rank")
ROWS, LENGTH = 2, 48


def make_batches(rank, world):
    """Three batches dealt to `world` ranks: documents of uneven lengths, unequal numbers of valid
    labels, one batch with none."""
    batches = []
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        tokens, labels = torch.randint(0, 64, (2, ROWS * LENGTH), generator=generator)
        labels[: 30 * i] = -100
        if i == 1:
            labels[:] = -100
        batches.append(
            HostBatch(
                tokens,
                labels,
                torch.tensor([0, 5 + i, LENGTH, LENGTH + 20, ROWS * LENGTH], dtype=torch.int32),
                LENGTH,
            )
        )
    empty = batches[1]
    batches += [empty] * (-len(batches) % world)
    return batches[rank::world]


def build_validation(words):
    """(dims, model, a function of batches and the options of validate)."""
    config, dims, model, *_ = build_run(words)
    build = make_builder(config, dims, dense_mask=True)
    return (
        dims,
        model,
        lambda batches, **options: validate(evaluate(model), batches, build, dims, **options),
    )


def measure(words, context=True):
    dims, _, run = build_validation(words)
    return run(make_batches(dims.data_rank, dims.data_world), context=context, window_length=16)


def token_losses(model, batch):
    seq = SeqBuilder("cpu", dense_mask=True, windows={0}).seq_info(
        batch.cu_seqlens, len(batch.tokens) // batch.seq_len, batch.seq_len
    )
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(
            model(batch.tokens, seq), batch.labels, reduction="none"
        )


def test_the_loss_is_the_mean_over_valid_tokens():
    _, model, run = build_validation([])
    losses = torch.cat([token_losses(model, batch) for batch in make_batches(0, 1)])
    valid = torch.cat([batch.labels for batch in make_batches(0, 1)]) != -100
    measured = run(make_batches(0, 1))
    assert measured.keys() == {"validation_loss"}
    assert measured["validation_loss"] == pytest.approx(losses[valid].mean().item(), rel=1e-12)


def test_the_context_loss_is_that_of_the_last_tokens_of_windows():
    _, model, run = build_validation([])
    losses = []
    for batch in make_batches(0, 1):
        for tokens, label in zip(
            batch.tokens.view(-1, 16), batch.labels.view(-1, 16)[:, -1], strict=True
        ):
            if label != -100:
                labels = torch.full((16,), -100).index_fill(0, torch.tensor(15), label)
                losses.append(
                    token_losses(
                        model,
                        HostBatch(tokens, labels, torch.tensor([0, 16], dtype=torch.int32), 16),
                    )[-1]
                )
    measured = measure([])
    assert measured["context_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)
    assert measured["context_shuffled_loss"] != measured["context_loss"]


def test_a_model_without_context_does_not_mind_the_shuffling():
    _, model, run = build_validation([])
    for block in model.blocks:
        torch.nn.init.zeros_(block.mixer.wo.weight)
    measured = run(make_batches(0, 1), context=True, window_length=16)
    assert measured["context_shuffled_loss"] == pytest.approx(measured["context_loss"], rel=1e-12)


def test_validation_touches_nothing():
    _, model, run = build_validation([])
    before = {name: full(tensor) for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    first = run(make_batches(0, 1), context=True)
    assert first == run(make_batches(0, 1), context=True)
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled() and model.training
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(full(after[name]), before[name]) for name in before)


def states_around_validation(words):
    """Whether the checkpoint's tensors are the same, and sharded alike, before and after a
    validation."""
    from lmoe.checkpoint_state import model_tensors

    dims, model, run = build_validation(words)
    before = {name: (type(tensor), full(tensor)) for name, tensor in model_tensors(model).items()}
    run(make_batches(dims.data_rank, dims.data_world))
    after = model_tensors(model)
    return all(
        kind is type(after[name]) and torch.equal(full(after[name]), value)
        for name, (kind, value) in before.items()
    )


@pytest.mark.xdist_group("world2")
def test_two_ranks_measure_what_one_does(pools):
    alone = measure([])
    assert dist.get_world_size() == 1 and TINY["training"]["dtype"] == "float64"
    for result in pools(2).run(measure, []):
        assert result == pytest.approx(alone, rel=1e-12)
    assert all(pools(2).run(states_around_validation, []))


@pytest.mark.parametrize("after", [1, 3, 4])
def test_an_abandoned_validation_gives_no_value(after):
    """In its first pass and in those over windows."""
    _, _, run = build_validation([])
    asked = []

    def abandon():
        asked.append(1)
        return len(asked) == after

    assert run(make_batches(0, 1), context=True, window_length=16, abandon=abandon) == {}
    assert len(asked) == after
