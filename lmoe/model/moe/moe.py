"""The Mixture-of-Experts layer: router -> dispatch -> experts -> combine, and what it reports."""

from typing import NamedTuple

import torch
from torch import nn

from lmoe.model.ffn import SwiGLU
from lmoe.model.init import Linear
from lmoe.model.moe.balance import (
    LAYOUT_DEPENDENT,
    add_loss,
    balance_loss,
    say_layout_dependent,
    z_loss,
)
from lmoe.model.moe.dispatch import LocalWorld
from lmoe.model.moe.experts import Experts
from lmoe.model.moe.router import Router, Routing, probabilities


class MoEStats(NamedTuple):
    """What a layer reports of one stream. Values, never running sums: who wants the step's adds
    them up.

    counts [E] int64: tokens per expert. balance, z: 0-dim, the detached losses, weighted so that
    their sum over layers, microbatches and ranks is the step's value. pooled [E] (with moe.balance
    = "hf_pooled", else [0]): K times the mean probability, with gradient.
    """

    counts: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor
    pooled: torch.Tensor


class MoE(nn.Module):
    """y_t = sum over the K chosen experts e of weight_te * expert_e(x_t), plus the shared expert
    (times its gate).

    model: ModelConfig; cfg: MoEConfig. Forward mutates nothing: losses enter through add_loss,
    counts leave as values. `world` and the experts' `dispatch` are the seams to other ranks;
    parallel/ replaces them.
    """

    def __init__(self, model, cfg):
        super().__init__()
        check(cfg)
        dim, std, layers = model.dim, model.init_std, model.layers
        self.cfg = cfg
        self.router = Router(dim, cfg, std=std)
        self.experts = Experts(dim, cfg, std=std, layers=layers)
        self.shared = SwiGLU(dim, cfg.shared, std=std, layers=layers) if cfg.shared else None
        self.shared_gate = Linear(dim, 1, std=std) if cfg.shared_gate else None
        self.world = LocalWorld()

    def forward(self, x, seq):
        """x [T, D], seq: the batch (rows, row_len, weights) -> (y [T, D], MoEStats)."""
        routing, stats = self.route(x, seq)
        return self.experts_of(x, routing), stats

    def experts_of(self, x, routing):
        """x [T, D] and what `route` said of it -> y [T, D]."""
        plan = self.experts.dispatch.begin(routing.ids)
        shared = self.shared_expert(
            x
        )  # while the ranks tell each other how many rows they will send
        y = self.experts(x, routing.weights, plan)
        return y if shared is None else y + shared

    def route(self, x, seq):
        """(Routing whose weights carry the losses, MoEStats)."""
        cfg, (ids, weights, logits) = self.cfg, self.router(x)
        chosen = torch.zeros_like(logits).scatter(1, ids, 1.0)
        losses = [balance_loss(cfg, logits, chosen, seq, self.world), z_loss(cfg, logits, seq)]
        for loss in losses:
            if loss is not None:
                weights = add_loss(weights, loss)
        balance, z = (logits.new_zeros(()) if loss is None else loss.detach() for loss in losses)
        pooled = (
            cfg.top_k * probabilities(logits, cfg.score).mean(0)
            if cfg.balance == "hf_pooled"
            else logits.new_empty(0)
        )
        stats = MoEStats(chosen.sum(0).long(), balance, z, pooled)
        return Routing(ids, weights, logits), stats

    def shared_expert(self, x):
        """[T, D], or None without one."""
        if self.shared is None:
            return None
        y = self.shared(x)
        return y if self.shared_gate is None else self.shared_gate(x).sigmoid() * y

    def flops_per_token(self):
        """Forward FLOPs of a token: its K experts, the router and the shared expert."""
        parts = (self.router, self.experts, self.shared, self.shared_gate)
        return sum(part.flops_per_token() for part in parts if part is not None)


def check(cfg):
    """Refuse a [moe] section that cannot work."""
    if cfg.top_k > cfg.experts:
        raise ValueError(f"moe.top_k = {cfg.top_k} exceeds moe.experts = {cfg.experts}")
    if cfg.experts % cfg.groups:
        raise ValueError(f"moe.groups = {cfg.groups} must divide moe.experts = {cfg.experts}")
    if cfg.top_groups > cfg.groups:
        raise ValueError(f"moe.top_groups = {cfg.top_groups} exceeds moe.groups = {cfg.groups}")
    if cfg.groups > 1 and cfg.top_k > cfg.top_groups * (cfg.experts // cfg.groups):
        raise ValueError(
            f"moe.top_k = {cfg.top_k} exceeds the {cfg.top_groups * (cfg.experts // cfg.groups)}"
            f" experts in moe.top_groups = {cfg.top_groups} of moe.groups = {cfg.groups}; raise"
            " moe.top_groups"
        )
    if cfg.shared_gate and not cfg.shared:
        raise ValueError("moe.shared_gate needs a shared expert: set moe.shared to its width")
    if cfg.balance in LAYOUT_DEPENDENT:
        say_layout_dependent(cfg.balance)
