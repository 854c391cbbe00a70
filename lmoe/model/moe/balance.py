"""Losses that spread the tokens over the experts.

T tokens, E experts, K choices a token; p [T, E]: the router's probabilities (rows sum to 1); n_e:
how many of the T*K choices fell on expert e (no gradient flows through it). a = moe.balance_coeff.
"Balanced" is the value when every p and every n is equal (p alone suffices); "one hot" the value
when all tokens choose the same K experts and have all their probability on one of them.

kind          loss                                                                 balanced   one
              hot   from
sequence      a mean over layers and rows of  E sum_e n_e/(KT) mean_t p_te          a          a E/K
                  DeepSeek-V3, 2412.19437 eq. 17-20
megatron      a sum over layers of  E sum_e n_e/(KT) mean_t p_te                    a layers   a E/K
              "   Megatron-LM
global_batch  the same with n summed over the data-parallel ranks                   a layers   a E/K
              "   2501.11873
switch        the same with n_e/(KT) replaced by the share of tokens whose          a layers   a E "
                  Switch, 2101.03961 eq. 4-6
              highest probability is at e
hf_pooled     a E sum_e (n_e/T) mean_t p_te, with n and p over all layers at once   a K        a E
                  Hugging Face's Mixtral and Qwen MoE

In `sequence` T counts one row of seq_len tokens, documents packed into it included: its value does
not depend on how rows are laid out over microbatches and ranks. In the others T is a microbatch on
one rank, and the value is averaged over those: a product of two averages, which changes with the
layout (so does global_batch, which sums over ranks but not over accumulated microbatches).

The z-loss (arXiv 2202.08906 eq. 5) is moe.z_coeff times the mean over layers and tokens of
logsumexp(logits)^2.
"""

import functools
import logging

import torch

from lmoe.model.moe.router import probabilities

KINDS = ("none", "sequence", "switch", "megatron", "global_batch", "hf_pooled")
LAYOUT_DEPENDENT = KINDS[2:]


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, dx.new_ones((), dtype=ctx.dtype)


def add_loss(x, loss):
    """x unchanged; in backward `loss` (0-dim) gets the gradient 1, as if it had been added to the
    loss that x leads to.

    So an auxiliary loss must be scaled as the main loss is: weights that sum to 1 over a step.
    """
    return _AddLoss.apply(x, loss)


@functools.cache
def say_layout_dependent(kind):
    logging.getLogger("lmoe").warning(
        "moe.balance = %r is a product of averages over a microbatch: its value depends on the"
        " batch size, the number of ranks and accumulation; moe.balance = 'sequence' does not",
        kind,
    )


def row_sums(x, seq):
    """[rows, E] from x [T, E]: over this rank's tokens of each row."""
    if seq.row_of is None:
        return x.unflatten(0, (seq.rows, seq.row_len)).sum(1)
    rows = torch.arange(seq.rows, device=x.device)[:, None] == seq.row_of
    return rows.to(x.dtype) @ x  # a product, because adding by index has no fixed order on a GPU


def balance_loss(cfg, logits, chosen, seq, world):
    """This layer's balance loss for this stream, 0-dim, weighted so that the sum over a step
    (layers, microbatches, ranks) is its value.

    logits [T, E]; chosen [T, E]: 1 where a token goes, else 0. None where nothing is added: kind
    none, hf_pooled (the model adds it), a coefficient of 0, or no training.
    """
    weight = cfg.balance_coeff * (
        seq.weights.sequence if cfg.balance == "sequence" else seq.weights.microbatch
    )
    if weight == 0.0 or cfg.balance in ("none", "hf_pooled"):
        return None
    p = probabilities(logits, cfg.score)
    if cfg.balance == "sequence":
        # The loss is linear in p: where a row's tokens lie on several ranks, each adds its share,
        # and only the counts must be whole.
        n, p = world.sum_rows(row_sums(chosen, seq)), row_sums(p, seq) / seq.row_len
        share = n / (cfg.top_k * seq.row_len)
    else:
        if cfg.balance == "switch":
            chosen = torch.zeros_like(p).scatter(1, p.detach().argmax(1, keepdim=True), 1.0)
        n, p = chosen.sum(0), p.mean(0)
        if cfg.balance == "global_batch":
            n = world.sum_counts(n)
        share = n / n.sum()
    return weight * cfg.experts * (share * p).sum()


def z_loss(cfg, logits, seq):
    """This layer's z-loss for this stream, weighted as balance_loss is, or None."""
    weight = cfg.z_coeff * seq.weights.token
    if weight == 0.0:
        return None
    return weight * logits.logsumexp(1).square().sum()


def hf_pooled_loss(stats, coeff, weight):
    """The loss over all MoE layers at once for one stream, 0-dim, times coeff and weight
    (seq.weights.microbatch).

    stats: the layers' MoEStats of that stream. The model adds it after its last block with
    add_loss.
    """
    p = torch.stack([s.pooled for s in stats]).mean(0)
    n = torch.stack([s.counts for s in stats]).sum(0).to(p.dtype)
    return coeff * weight * len(p) * (n / n.sum() * p).sum()
