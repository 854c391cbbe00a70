"""Validation: the loss on fixed batches, without side effects on training."""

import torch
import torch.distributed as dist

from lmoe.model.batch import SeqBuilder

IGNORE = -100


def _mean_loss(model, batches, build, dims, change=None):
    """Nats per valid token over HostBatches, the same on every rank. change: a function of (tokens, labels, cu_seqlens, seq_len)."""
    sums = torch.zeros(2, dtype=torch.float64, device=dims.device)
    for batch in batches:
        tokens, labels, cu_seqlens, row_len = batch.tokens, batch.labels, batch.cu_seqlens, batch.seq_len
        if change is not None:
            tokens, labels, cu_seqlens, row_len = change(tokens, labels, row_len)
        seq = build(cu_seqlens, len(tokens) // row_len, row_len)
        labels = labels.to(dims.device)
        output = model(tokens.to(dims.device), seq, labels, 1.0)
        sums += torch.stack([output.loss.double(), (labels != IGNORE).sum().double()])
    if dims.world > 1:
        dist.all_reduce(sums)
    total, count = sums.tolist()
    return total / max(count, 1)


def _windows(length, shuffle):
    """A change of batch: pieces of `length` tokens, each a document with one label, at its last token. shuffle: the tokens before the
    last one in random order (the same every time), so that only what a model learnt of their order is lost."""

    def change(tokens, labels, row_len):
        pieces = len(tokens) // length
        tokens, labels = tokens[: pieces * length].view(pieces, length).clone(), labels[: pieces * length].view(pieces, length).clone()
        if shuffle:
            order = torch.rand(pieces, length - 1, generator=torch.Generator().manual_seed(0)).argsort(1)
            tokens[:, :-1] = tokens[:, :-1].gather(1, order)
        labels[:, :-1] = IGNORE
        borders = torch.arange(pieces + 1, dtype=torch.int32) * length
        return tokens.flatten(), labels.flatten(), borders, length

    return change


@torch.no_grad()
def validate(model, batches, dims, *, dense_mask, window, context=False, window_length=64):
    """{"validation_loss": nats per token} and, with context, the loss at the end of windows of 64 tokens with their order kept
    (context_loss) and shuffled (context_shuffled_loss): equal for a model that sees no further than the last token."""
    build = SeqBuilder(dims.device, dense_mask=dense_mask, window=window)
    batches = list(batches)
    losses = {"validation_loss": _mean_loss(model, batches, build, dims)}
    if context:
        length = min(window_length, batches[0].seq_len)
        losses["context_loss"] = _mean_loss(model, batches, build, dims, _windows(length, shuffle=False))
        losses["context_shuffled_loss"] = _mean_loss(model, batches, build, dims, _windows(length, shuffle=True))
    return losses
