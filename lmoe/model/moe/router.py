"""The router: which K of the E experts a token goes to, and with which weights.

Everything here is fp32 (float64 in float64), whatever the model computes in: a rounded logit sends
a token elsewhere. That holds because nothing in this project runs under autocast and TF32 stays
off.

score    chosen by               weight of a chosen expert   renormalised
softmax  logit + bias            softmax over all E          softmax over the chosen K
sigmoid  sigmoid(logit) + bias   sigmoid(logit)              sigmoid / sum of the chosen sigmoids
         (arXiv 2412.19437)
all times route_scale. The bias selects and never enters a weight (arXiv 2408.15664).

"Top k, then softmax" (Mixtral) is "softmax, then top k, renormalised": the common denominator
cancels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe.kernels.experts import choose
from lmoe.kernels.op import op
from lmoe.model.config import MoEConfig
from lmoe.model.init import fp32_parameter
from lmoe.model.norm import widened


class Routing(NamedTuple):
    """topk_ids [T, K] int64, ascending in a row; weights [T, K]; logits [T, E]. Weights and logits
    in fp32 (float64 in float64)."""

    topk_ids: Tensor
    weights: Tensor
    logits: Tensor


class RouterStats(NamedTuple):
    """Statistics of one router and one stream. Values, never running sums: the step's are their
    sums.

    counts [E] int64: tokens per expert. balance, z: 0-dim, the detached losses, weighted so that
    their sum over layers, microbatches and ranks is the step's value.
    """

    counts: Tensor
    balance: Tensor
    z: Tensor


@op("route_topk")
def route_topk(scores: Tensor, k: int, groups: int, top_groups: int, best: int) -> Tensor:
    """Choose the k highest scores. scores [T, E] -> ids [T, k] int64, ascending in a row; of equal
    scores the lower index wins.

    With groups > 1 the experts form `groups` equal runs, a group's score is the sum of its `best`
    highest, and only the `top_groups` highest groups take part. An op of its own so that
    recomputation can save the ids: a choice made twice may come out differently.
    """
    if groups > 1:
        grouped = scores.unflatten(1, (groups, -1))
        group_scores = grouped.sort(dim=2, descending=True).values[:, :, :best].sum(2)
        kept = group_scores.sort(dim=1, descending=True, stable=True).indices[:, :top_groups]
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
        scores = grouped.masked_fill(dropped.unsqueeze(2), -torch.inf).flatten(1)
    return choose(scores, k)


@route_topk.register_fake
def _(scores, k, groups, top_groups, best):
    return scores.new_empty(scores.shape[0], k, dtype=torch.int64)


class GatherTopK(torch.autograd.Function):
    """Gather x.gather(1, ids) for ids that differ within a row. x [T, E], ids [T, K] -> [T, K].

    Backward writes nothing in place: torch 2.13's inductor can fuse a read of the sum in front of
    gather's own scatter_add, and train on with the gradient lost.
    """

    @staticmethod
    def forward(ctx, x, ids):
        ctx.save_for_backward(ids)
        ctx.experts = x.shape[1]
        return x.gather(1, ids)

    @staticmethod
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        here = ids.unsqueeze(2) == torch.arange(ctx.experts, device=ids.device)
        return torch.where(here, dy.unsqueeze(2), 0).sum(1), None


class Router(nn.Module):
    """A linear router. weight [E, D] stays fp32; bias [E] is a persistent fp32 buffer that only
    update_bias moves."""

    def __init__(self, dim: int, cfg: MoEConfig, *, std: float):
        super().__init__()
        self.cfg = cfg
        self.std = std
        self.weight = fp32_parameter(cfg.experts, dim)
        self.register_buffer("bias", torch.zeros(cfg.experts))

    def init_parameter(self, name, tensor, generator):
        tensor.normal_(0.0, self.std, generator=generator)

    def reset_buffers(self):
        self.bias.zero_()

    def forward(self, x: Tensor) -> Routing:
        """Choose the experts of every token. x [T, D]."""
        cfg = self.cfg
        sigmoid = self.cfg.score == "sigmoid"
        x = widened(x)
        logits = F.linear(x, self.weight.to(x.dtype))
        scores = logits.detach().sigmoid() if sigmoid else logits.detach()
        # DeepSeek-V3 (sigmoid) ranks groups by their two best experts, DeepSeek-V2 (softmax) by the
        # best one.
        best = 2 if sigmoid else 1
        ids = route_topk(scores + self.bias, cfg.top_k, cfg.groups, cfg.top_groups, best)
        if cfg.renormalize:  # s / sum(s) as a softmax of log(s): scores of any size, no epsilon
            log_scores = F.logsigmoid(logits) if sigmoid else logits
            weights = GatherTopK.apply(log_scores, ids).softmax(1)
        else:
            scores = logits.sigmoid() if sigmoid else logits.softmax(1)
            weights = GatherTopK.apply(scores, ids)
        return Routing(ids, weights * cfg.route_scale, logits)

    def flops_per_token(self):
        return 2 * self.weight.numel()


def probabilities(logits: Tensor, score: str) -> Tensor:
    """Normalise the scores: softmax(logits), or sigmoid(logits) over their sum. logits [T, E] ->
    [T, E], rows that sum to 1; the balance losses call it p."""
    return (F.logsigmoid(logits) if score == "sigmoid" else logits).softmax(1)


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, rate: float, skip: Tensor):
    """Take one step of the load balancing without a loss (arXiv 2408.15664), in place; call it
    once per optimizer step.

    bias [E]; counts [E] int64: tokens per expert, summed over the whole step and all ranks; skip:
    0-dim tensor, non-zero where the step is void. b_e += rate * sign(mean(counts) - counts_e), less
    the mean of that change, so that the bias cannot drift.
    """
    change = rate * torch.sign(counts.sum() - counts * counts.numel()).to(bias.dtype)
    bias += torch.where(skip.bool(), 0.0, change - change.mean())
