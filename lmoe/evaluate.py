"""Validation: the loss on fixed batches, without side effects on training."""

import math

import torch
import torch.distributed as dist

IGNORE = -100


def _mean_loss(evaluate, batches, build, dims, change=None):
    """Nats per valid token over HostBatches, the same on every rank. change: (tokens, labels,
    row_len) -> those and cu_seqlens."""
    sums = torch.zeros(2, dtype=torch.float64, device=dims.device)
    for batch in batches:
        tokens, labels, cu_seqlens, row_len = (
            batch.tokens,
            batch.labels,
            batch.cu_seqlens,
            batch.seq_len,
        )
        if change is not None:
            tokens, labels, cu_seqlens, row_len = change(tokens, labels, row_len)
        loss = evaluate(*build(tokens, labels, cu_seqlens, len(tokens) // row_len, row_len))
        # Each rank has its part of the loss; the ranks that share a microbatch have its labels in
        # common.
        valid = (labels != IGNORE).sum().double().to(dims.device) * dims.data_world / dims.world
        sums += torch.stack([loss.double(), valid])
    if dims.world > 1:
        dist.all_reduce(sums)
    total, count = sums.tolist()
    return total / max(count, 1)


def _windows(length, shuffle, split):
    """A change of batch: pieces of `length` tokens, each a document with one label, at its last
    token. shuffle: the tokens before the last one in random order (the same every time), so that
    only what a model learnt of their order is lost. split: how many ranks must be able to share the
    tokens; empty pieces fill them up."""

    def change(tokens, labels, row_len):
        pieces = len(tokens) // length
        more = -pieces % (split // math.gcd(split, length)) * length
        tokens = torch.cat([tokens[: pieces * length], tokens.new_zeros(more)]).view(-1, length)
        labels = torch.cat([labels[: pieces * length], labels.new_full((more,), IGNORE)]).view(
            -1, length
        )
        pieces = len(tokens)
        if shuffle:
            order = torch.rand(
                pieces, length - 1, generator=torch.Generator().manual_seed(0)
            ).argsort(1)
            tokens[:, :-1] = tokens[:, :-1].gather(1, order)
        labels[:, :-1] = IGNORE
        borders = torch.arange(pieces + 1, dtype=torch.int32) * length
        return tokens.flatten(), labels.flatten(), borders, length

    return change


@torch.no_grad()
def validate(evaluate, batches, build, dims, *, context=False, window_length=64):
    """{"validation_loss": nats per token} and, with context, the loss at the end of windows of 64
    tokens with their order kept (context_loss) and shuffled (context_shuffled_loss): equal for a
    model that sees no further than the last token.

    evaluate: of parallelize(); build: a SeqBuilder without loss weights."""
    batches = list(batches)
    losses = {"validation_loss": _mean_loss(evaluate, batches, build, dims)}
    if context:
        length, split = min(window_length, batches[0].seq_len), dims.cp * dims.tp
        losses["context_loss"] = _mean_loss(
            evaluate, batches, build, dims, _windows(length, False, split)
        )
        losses["context_shuffled_loss"] = _mean_loss(
            evaluate, batches, build, dims, _windows(length, True, split)
        )
    return losses
