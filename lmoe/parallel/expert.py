"""Expert parallelism: whole experts on different ranks, and tokens that go to them and back.

Rank r of ep holds the experts [r E/ep, (r+1) E/ep).

gather: every rank gathers the tokens of all, and the choices; runs those of its own experts; and
sends each rank its tokens' partial sums, which that one adds up in the order of the ranks. With K
choices a token goes to most of up to K ranks anyway, so no more bytes travel than rows would take;
and all shapes are fixed: no sizes are exchanged, and the host waits for nothing.

all_to_all: a token's rows go to the owners of its experts in one all-to-all with uneven splits and
come back in another; backward sends the gradients the same ways. The sizes are exchanged
beforehand: the exchange begins right after the routing and is read on the host as late as possible.

Nothing is dropped in either, and a rank without rows, and an expert without rows, take part all the
same: their gradients are zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lmoe.kernels.experts import Plan, combine_rows, gather_rows, sort_by_expert
from lmoe.model.moe.dispatch import LocalDispatch
from lmoe.parallel.collectives import (
    Ranks,
    all_gather,
    all_to_all,
    gather_parts,
    sum_parts,
)
from lmoe.parallel.tensor import shard


def check_expert_parallel(config, ep):
    method = config.parallel.ep_method
    if ep == 1:
        if method != "auto":
            raise ValueError(f"parallel.ep_method = {method} is for parallel.ep above 1")
        return
    if not config.moe.experts:
        raise ValueError(f"parallel.ep = {ep} needs experts: set moe.experts")
    if config.moe.experts % ep:
        raise ValueError(f"parallel.ep = {ep} does not divide moe.experts = {config.moe.experts}")


def apply_expert_parallel(model, config, dims):
    ranks = Ranks.of(dims.group("ep"))
    mesh = dims.sparse["ep"]
    method = config.parallel.ep_method
    alone = dims.dp_replicate * dims.sparse["efsdp"].size() == 1
    for layer in model.moe_layers():
        shard(layer.experts, {"w13": 0, "w2": 0}, mesh)
        gathers = method == "gather" or (method == "auto" and ranks.size <= layer.cfg.top_k)
        dispatch = GatheredDispatch if gathers else AllToAllDispatch
        layer.experts.fsdp = "not at all" if alone else "apart"
        layer.experts.dispatch = dispatch(layer.cfg.experts, ranks)


class GatheredDispatch(LocalDispatch):
    """Dispatch of all ranks' tokens to the experts of this one."""

    def begin(self, topk_ids: Tensor) -> Plan:
        held = self.experts // self.ranks.size
        ids = all_gather(topk_ids, self.ranks)
        return sort_by_expert(ids, held, self.ranks.index * held, self.experts)

    def run(self, experts, x: Tensor, weights: Tensor, pending: Plan) -> Tensor:
        x, weights = (gather_parts(t, self.ranks) for t in (x, weights))
        return sum_parts(experts(x, weights, pending), self.ranks)


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

    reads_sizes = True

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

    def run(self, experts, x: Tensor, weights: Tensor, pending: ExpertPlan) -> Tensor:
        if pending.ready is not None:
            pending.ready.synchronize()
        sent, received = pending.sizes.tolist()
        rows = all_to_all(gather_rows(x, pending.plan), received, sent, self.ranks)
        # They come in the order of (rank, expert).
        held = pending.received.shape[1]
        ids = torch.arange(held, device=x.device).repeat(self.ranks.size)
        ids = ids.repeat_interleave(pending.received.flatten(), output_size=len(rows))
        rows = experts(rows, None, sort_by_expert(ids[:, None], held))
        back = all_to_all(rows, sent, received, self.ranks)
        return combine_rows(back, weights, pending.plan)
