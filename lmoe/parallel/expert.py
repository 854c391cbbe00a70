"""Expert parallelism: whole experts on different ranks, and the tokens sent to them and back.

Rank r of ep holds the experts [r E/ep, (r+1) E/ep). A token's rows go to the owners of its experts
in one all-to-all with uneven splits and come back in another; backward sends the gradients the same
ways. The sizes are exchanged beforehand: the exchange begins right after the routing and is read on
the host as late as possible. A rank without rows, and an expert without rows, take part all the
same: their gradients are zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lmoe.model.moe.dispatch import LocalDispatch, Plan, RowIndex, gather_rows, invert
from lmoe.parallel.collectives import Ranks, all_to_all
from lmoe.parallel.tensor import shard


def check_expert_parallel(config, ep):
    if not config.moe.experts:
        raise ValueError(f"parallel.ep = {ep} needs experts: set moe.experts")
    if config.moe.experts % ep:
        raise ValueError(f"parallel.ep = {ep} does not divide moe.experts = {config.moe.experts}")


def apply_expert_parallel(model, dims):
    ranks = Ranks.of(dims.group("ep"))
    mesh = dims.sparse["ep"]
    for layer in model.moe_layers():
        shard(layer.experts, {"w13": 0, "w2": 0}, mesh)
        layer.experts.dispatch = AllToAllDispatch(layer.cfg.experts, ranks)


class ExpertPlan(NamedTuple):
    """plan: of this rank's tokens, over all experts. received [ep, E/ep]: rows from each rank for
    each expert here. sizes [2, ep] on the host once `ready`: rows sent to and received from each
    rank."""

    plan: Plan
    received: Tensor
    sizes: Tensor
    ready: torch.cuda.Event | None


class AllToAllDispatch(LocalDispatch):
    """Dispatch that sends rows to the ranks of their experts."""

    def begin(self, topk_ids: Tensor) -> ExpertPlan:
        plan = super().begin(topk_ids)
        sent = plan.counts.view(self.ranks.size, -1)
        ones = [1] * self.ranks.size
        received = all_to_all(sent, ones, ones, self.ranks)
        sizes = torch.stack([sent.sum(1), received.sum(1)])
        ready = None
        if sizes.device.type == "cuda":
            host = torch.empty(sizes.shape, dtype=sizes.dtype, pin_memory=True)
            sizes = host.copy_(sizes, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        return ExpertPlan(plan, received, sizes, ready)

    def dispatch(self, x: Tensor, pending: ExpertPlan) -> tuple[Tensor, RowIndex, Tensor]:
        if pending.ready is not None:
            pending.ready.synchronize()
        sent, received = pending.sizes.tolist()
        source = all_to_all(gather_rows(x, pending.plan.index), received, sent, self.ranks)
        # From (rank, expert) order to (expert, rank) order.
        local = pending.received.shape[1]
        expert = torch.arange(local, device=x.device).repeat(self.ranks.size)
        expert = expert.repeat_interleave(pending.received.flatten(), output_size=len(source))
        rows = expert.argsort(stable=True)
        return source, RowIndex(rows, invert(rows)[:, None]), pending.received.sum(0)

    def combine(
        self, rows: Tensor, index: RowIndex, weights: Tensor, pending: ExpertPlan
    ) -> Tensor:
        sent, received = pending.sizes.tolist()
        back = RowIndex(index.copies.flatten(), index.rows[:, None])
        rows = all_to_all(gather_rows(rows, back), sent, received, self.ranks)
        return super().combine(rows, index, weights, pending.plan)
