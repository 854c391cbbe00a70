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
    """Cut a batch into rows of `length` tokens with one label each, the last there is; documents
    stay apart, as in training.

    shuffle: put the tokens before that one in random order (the same every time), but for the first
    of each document, so that only what a model learnt of their order is lost. split: how many ranks
    must be able to share the tokens; empty rows fill them up.
    """
    pieces = len(batch.tokens) // length
    more = -pieces % (split // math.gcd(split, length)) * length
    pad = (0, pieces * length + more - len(batch.tokens))  # or cut, where it is negative
    tokens = F.pad(batch.tokens, pad).view(-1, length)
    labels = F.pad(batch.labels, pad, value=IGNORE).view(-1, length)
    begins = torch.zeros_like(batch.tokens)
    begins[batch.cu_seqlens[:-1].long()] = 1
    begins = F.pad(begins, pad).view(-1, length)
    begins[:, 0] = 1
    place = torch.arange(length)
    last = ((labels != IGNORE) * place).amax(1, keepdim=True)
    labels = labels.masked_fill(place != last, IGNORE)
    if shuffle:
        generator = torch.Generator().manual_seed(0)
        order = begins.cumsum(1) + torch.rand(tokens.shape, generator=generator) * (1 - begins)
        order = torch.where(place < last, order, length + 1 + place)
        tokens = tokens.gather(1, order.argsort(dim=1, stable=True))
    borders = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=tokens.numel())
    return HostBatch(tokens.flatten(), labels.flatten(), borders.int(), length)


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
