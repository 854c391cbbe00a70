"""Losses that spread the tokens over the experts.

T tokens, E experts, K choices a token; p [T, E]: the router's probabilities (rows sum to 1); n_e:
how many of the T*K choices fell on expert e (no gradient flows through it). a = moe.balance_coeff.
"Balanced" is the value when every p and every n is equal (p alone suffices); "one hot" the value
when all tokens choose the same K experts and have all their probability on one of them.

kind          loss                                               balanced   one hot
sequence      mean over layers and rows of                       a          a E/K
              E sum_e n_e/(KT) mean_t p_te (2412.19437 eq. 17-20)
megatron      sum over layers of E sum_e n_e/(KT) mean_t p_te    a layers   a E/K layers
              (Megatron-LM)
global_batch  the same with n summed over the data-parallel      a layers   a E/K layers
              ranks (2501.11873)

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
from torch import Tensor

from lmoe.model.batch import SeqInfo, StepInfo
from lmoe.model.moe.router import probabilities

LAYOUT_DEPENDENT = ("megatron", "global_batch")


class LocalBalanceGroup:
    """Sums over the ranks that hold other tokens, when there are none."""

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Sum counts [E] over all ranks that hold other tokens."""
        return counts

    def sum_rows(self, counts: Tensor) -> Tensor:
        """Sum counts [rows, E] of this microbatch's rows over the ranks that its tokens are split
        over."""
        return counts


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, dx.new_ones((), dtype=ctx.dtype)


def add_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return x unchanged; in backward `loss` (0-dim) gets the gradient 1, as if it had been added
    to the loss that x leads to.

    So an auxiliary loss must be scaled as the main loss is: weights that sum to 1 over a step.
    """
    return _AddLoss.apply(x, loss)


@functools.cache
def warn_layout_dependent(kind: str):
    """Log, once a kind, that its value changes with the layout."""
    logging.getLogger("lmoe").warning(
        "moe.balance = %r is a product of averages over a microbatch: its value depends on the"
        " batch size, the number of ranks and accumulation; moe.balance = 'sequence' does not",
        kind,
    )


def row_sums(x, seq):
    """Sum over this rank's tokens of each row. x [T, E] -> [rows, E]."""
    if seq.row_of is None:
        return x.unflatten(0, (seq.rows, seq.row_len)).sum(1)
    rows = torch.arange(seq.rows, device=x.device)[:, None] == seq.row_of
    return rows.to(x.dtype) @ x  # a product, because adding by index has no fixed order on a GPU


def balance_loss(
    kind: str,
    coeff: float,
    logits: Tensor,
    chosen: Tensor,
    seq: SeqInfo | StepInfo,
    group: LocalBalanceGroup,
    *,
    top_k: int,
    score: str,
) -> Tensor | None:
    """Compute a layer's balance loss for this stream, 0-dim, weighted so that the sum over a step
    (layers, microbatches, ranks) is its value. None where nothing is added: kind none, a
    coefficient of 0, or no training.

    logits [T, E]; chosen [T, E]: 1 where a token goes, else 0.
    """
    weights = seq.weights
    weight = coeff * (weights.sequence if kind == "sequence" else weights.microbatch)
    if weight == 0.0 or kind == "none":
        return None
    p = probabilities(logits, score)
    if kind == "sequence":
        # The loss is linear in p: where a row's tokens lie on several ranks, each adds its share,
        # and only the counts must be whole.
        n = group.sum_rows(row_sums(chosen, seq))
        p = row_sums(p, seq) / seq.row_len
        share = n / (top_k * seq.row_len)
    else:
        n = chosen.sum(0)
        p = p.mean(0)
        if kind == "global_batch":
            n = group.sum_counts(n)
        share = n / n.sum()
    return weight * logits.shape[1] * (share * p).sum()


def z_loss(coeff: float, logits: Tensor, seq: SeqInfo | StepInfo) -> Tensor | None:
    """Compute a layer's z-loss for this stream, weighted as balance_loss is, or None."""
    weight = coeff * seq.weights.token
    if weight == 0.0:
        return None
    return weight * logits.logsumexp(1).square().sum()
