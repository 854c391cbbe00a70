"""Validation: the loss on fixed batches, without side effects on training."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lmoe.data.packing import IGNORE, HostBatch
from lmoe.model.batch import SeqBuilder
from lmoe.parallel.dims import Dims


def mean_loss(
    evaluate: Callable,
    batches: Iterable[HostBatch],
    make_batch: SeqBuilder,
    dims: Dims,
    abandon: Callable[[], bool] = lambda: False,
) -> float | None:
    """Average the loss over the valid tokens of all ranks (nats), the same on every rank; None
    where abandon() said so after a batch, on every rank alike."""
    sums = torch.zeros(2, dtype=torch.float64, device=dims.device)
    for batch in batches:
        loss = evaluate(*make_batch(batch))
        # Each rank has its part of the loss; the ranks that share a microbatch have its labels in
        # common.
        valid = (batch.labels != IGNORE).sum().double().to(dims.device)
        sums += torch.stack([loss.double(), valid * dims.data_world / dims.world])
        if abandon():
            return None
    if dims.world > 1:
        dist.all_reduce(sums)
    total, count = sums.tolist()
    return total / max(count, 1)


def windows(batch: HostBatch, length: int, split: int, shuffle: bool) -> HostBatch:
    """Cut a batch into documents of `length` tokens with one label each, at the last token.

    shuffle: put the tokens before the last one in random order (the same every time), so that only
    what a model learnt of their order is lost. split: how many ranks must be able to share the
    tokens; empty documents fill them up.
    """
    pieces = len(batch.tokens) // length
    more = -pieces % (split // math.gcd(split, length)) * length
    pad = (0, pieces * length + more - len(batch.tokens))  # or cut, where it is negative
    tokens = F.pad(batch.tokens, pad).view(-1, length)
    labels = F.pad(batch.labels, pad, value=IGNORE).view(-1, length)
    if shuffle:
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(len(tokens), length - 1, generator=generator).argsort(1)
        tokens[:, :-1] = tokens[:, :-1].gather(1, order)
    labels[:, :-1] = IGNORE
    borders = torch.arange(len(tokens) + 1, dtype=torch.int32) * length
    return HostBatch(tokens.flatten(), labels.flatten(), borders, length)


@torch.no_grad()
def validate(
    evaluate: Callable,
    batches: Iterable[HostBatch],
    make_batch: SeqBuilder,
    dims: Dims,
    *,
    context: bool = False,
    window_length: int = 64,
    abandon: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Measure {"validation_loss": nats per token} and, with context, the loss at the end of windows
    of 64 tokens with their order kept (context_loss) and shuffled (context_shuffled_loss): equal
    for a model that sees no further than the last token. Empty where it was abandoned.

    evaluate: of parallelize(); make_batch: a SeqBuilder without loss weights; abandon(): the same
    on every rank, asked after each batch.
    """
    seen = []

    def reading():  # one by one, so that a stop is heard between them
        for batch in batches:
            seen.append(batch)
            yield batch

    def cut(shuffle):
        length = min(window_length, seen[0].seq_len)
        return (windows(batch, length, dims.cp * dims.tp, shuffle) for batch in seen)

    passes = {"validation_loss": reading}
    if context:
        passes["context_loss"] = lambda: cut(shuffle=False)
        passes["context_shuffled_loss"] = lambda: cut(shuffle=True)
    losses = {}
    for name, read in passes.items():
        losses[name] = mean_loss(evaluate, read(), make_batch, dims, abandon)
        if losses[name] is None:
            return {}
    return losses
