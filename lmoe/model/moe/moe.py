"""The Mixture-of-Experts layer: router -> dispatch -> experts -> combine, and its statistics."""

import torch
from torch import Tensor, nn

from lmoe.model.batch import SeqInfo, StepInfo
from lmoe.model.config import ModelConfig, MoEConfig
from lmoe.model.ffn import SwiGLU
from lmoe.model.init import Linear
from lmoe.model.moe.balance import (
    LAYOUT_DEPENDENT,
    LocalBalanceGroup,
    add_loss,
    balance_loss,
    warn_layout_dependent,
    z_loss,
)
from lmoe.model.moe.experts import Experts
from lmoe.model.moe.router import Router, RouterStats, Routing


class MoE(nn.Module):
    """A layer of routed experts: y_t = sum over the K chosen experts e of weight_te *
    expert_e(x_t), plus the shared expert (times its gate).

    Forward mutates nothing: losses enter through add_loss, counts leave as values. `balance_group`
    and the experts' `dispatch` are the seams to other ranks; parallel/ replaces them.
    """

    def __init__(self, model: ModelConfig, cfg: MoEConfig):
        super().__init__()
        check(cfg)
        dim = model.dim
        std = model.init_std
        layers = model.layers
        self.cfg = cfg
        self.router = Router(dim, cfg, std=std)
        self.experts = Experts(dim, cfg, std=std, layers=layers)
        self.shared = SwiGLU(dim, cfg.shared, std=std, layers=layers) if cfg.shared else None
        self.shared_gate = Linear(dim, 1, std=std) if cfg.shared_gate else None
        self.balance_group = LocalBalanceGroup()

    def forward(self, x: Tensor, seq: SeqInfo | StepInfo) -> tuple[Tensor, RouterStats]:
        """Route every token through its experts. x [T, D] -> y [T, D]."""
        routing, stats = self.route(x, seq)
        return self.routed_experts(x, routing), stats

    def routed_experts(self, x: Tensor, routing: Routing) -> Tensor:
        """Add up the chosen experts and the shared one. x [T, D] -> y [T, D]."""
        pending = self.experts.dispatch.begin(routing.topk_ids)
        # While the ranks tell each other how many rows they will send.
        shared = self.shared_expert(x)
        y = self.experts(x, routing.weights, pending)
        return y if shared is None else y + shared

    def route(self, x: Tensor, seq: SeqInfo | StepInfo) -> tuple[Routing, RouterStats]:
        """Choose the experts of x [T, D]; the weights carry the losses."""
        cfg, (ids, weights, logits) = self.cfg, self.router(x)
        chosen = torch.zeros_like(logits).scatter(1, ids, 1.0)
        losses = [
            balance_loss(
                cfg.balance,
                cfg.balance_coeff,
                logits,
                chosen,
                seq,
                self.balance_group,
                top_k=cfg.top_k,
                score=cfg.score,
            ),
            z_loss(cfg.z_coeff, logits, seq),
        ]
        for loss in losses:
            if loss is not None:
                weights = add_loss(weights, loss)
        balance, z = (logits.new_zeros(()) if loss is None else loss.detach() for loss in losses)
        return Routing(ids, weights, logits), RouterStats(chosen.sum(0).long(), balance, z)

    def shared_expert(self, x: Tensor) -> Tensor | None:
        """Run the shared expert. x [T, D] -> [T, D], or None without one."""
        if self.shared is None:
            return None
        y = self.shared(x)
        return y if self.shared_gate is None else self.shared_gate(x).sigmoid() * y

    def flops_per_token(self):
        """Count the forward FLOPs of a token: its K experts, the router and the shared expert."""
        parts = (self.router, self.experts, self.shared, self.shared_gate)
        return sum(part.flops_per_token() for part in parts if part is not None)


def check(cfg: MoEConfig):
    """Refuse with a ValueError a [moe] section whose values do not go together."""
    if cfg.top_k > cfg.experts:
        raise ValueError(f"moe.top_k = {cfg.top_k} exceeds moe.experts = {cfg.experts}; lower it")
    if cfg.experts % cfg.groups:
        raise ValueError(f"moe.groups = {cfg.groups} must divide moe.experts = {cfg.experts}")
    if cfg.top_groups > cfg.groups:
        raise ValueError(
            f"moe.top_groups = {cfg.top_groups} exceeds moe.groups = {cfg.groups}; lower it"
        )
    candidates = cfg.top_groups * (cfg.experts // cfg.groups)
    if cfg.groups > 1 and cfg.top_k > candidates:
        raise ValueError(
            f"moe.top_k = {cfg.top_k} exceeds the {candidates} experts in moe.top_groups ="
            f" {cfg.top_groups} of moe.groups = {cfg.groups}; raise moe.top_groups"
        )
    if cfg.shared_gate and not cfg.shared:
        raise ValueError("moe.shared_gate needs a shared expert: set moe.shared to its width")
    if cfg.balance in LAYOUT_DEPENDENT:
        warn_layout_dependent(cfg.balance)
