"""Validation: the mean over valid tokens of all ranks, the shuffled context, and no side
effects."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lmoe.data.packing import IGNORE, HostBatch, pack, stream_row
from lmoe.evaluate import validate, windows
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
    """Each sees what its window holds of its own document."""
    _, model, run = build_validation([])
    losses = []
    for batch in make_batches(0, 1):
        borders = {0, *range(0, ROWS * LENGTH, 16), *batch.cu_seqlens.tolist()}
        for end in range(16, ROWS * LENGTH + 1, 16):
            if batch.labels[end - 1] != -100:
                start = max(b for b in borders if b < end)
                whole = torch.tensor([0, end - start], dtype=torch.int32)
                piece = (x[start:end] for x in (batch.tokens, batch.labels))
                losses.append(token_losses(model, HostBatch(*piece, whole, end - start))[-1])
    measured = measure([])
    assert measured["context_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)
    assert measured["context_shuffled_loss"] != measured["context_loss"]


@pytest.mark.parametrize("length", [1, 7, 16, 24])
@pytest.mark.parametrize("split", [1, 8])
def test_windows_keep_labels_beside_their_inputs_and_documents_apart(length, split):
    """Inputs and labels that spell their places; a document of one token, one that is filled up
    with positions without labels, and answers that are not a window's last tokens."""
    start, eos = 300, 301
    stream = np.arange(97)
    stream[[0, 5, 6, 40, 71]] = eos
    rows = [stream_row(stream[a : a + 49], 48, eos, start) for a in (0, 48)]
    batch = pack([*rows, stream_row(stream[7:38], 48, eos, start)])
    batch.labels[32:48:2] = IGNORE
    kept, shuffled = (windows(batch, length, split, shuffle) for shuffle in (False, True))
    assert len(kept.tokens) % split == 0 and kept.tokens[0] == start
    own = batch.cu_seqlens.tolist()
    pieces = len(batch.tokens) // length
    for k in range(pieces):
        a, b = k * length, (k + 1) * length
        labelled = [p for p in range(a, b) if batch.labels[p] != IGNORE][-1:]
        borders = sorted({a, b, *(p for p in own if a < p < b)})
        for cut in (kept, shuffled):
            assert [p for p in range(a, b) if cut.labels[p] != IGNORE] == labelled
            assert all(cut.labels[p] == batch.labels[p] for p in labelled)
            assert all(cut.tokens[p] == batch.tokens[p] for p in [*borders[:-1], *labelled])
            assert [p for p in cut.cu_seqlens.tolist() if a <= p <= b] == borders
            for c, d in zip(borders, borders[1:]):
                assert sorted(cut.tokens[c:d]) == sorted(batch.tokens[c:d])
    assert torch.equal(kept.tokens[: pieces * length], batch.tokens[: pieces * length])
    assert length == 1 or not torch.equal(kept.tokens, shuffled.tokens)


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
