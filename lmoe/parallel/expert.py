"""Expert parallelism: whole experts on different ranks, and the tokens sent to them and back.

Rank r of ep holds the experts [r E/ep, (r+1) E/ep). A token's rows go to the owners of its experts
in one all-to-all with uneven splits and come back in another; backward sends the gradients the same
ways. The sizes are exchanged beforehand: the exchange begins right after the routing and is read on
the host as late as possible. A rank without rows, and an expert without rows, take part all the
same: their gradients are zeros.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from lmoe.model.moe.dispatch import Combine, Handle, Permute, sort_slots
from lmoe.parallel import compat
from lmoe.parallel.collectives import Ranks, all_to_all


def check_expert_parallel(config, ep):
    if not config.moe.experts:
        raise ValueError(f"parallel.ep = {ep} needs experts: set moe.experts")
    if config.moe.experts % ep:
        raise ValueError(f"parallel.ep = {ep} does not divide moe.experts = {config.moe.experts}")


def apply_expert_parallel(model, dims):
    ranks, mesh = Ranks.of(dims.group("ep")), dims.sparse["ep"]
    for layer in model.moe_layers():
        for name, parameter in list(layer.experts.named_parameters(recurse=False)):
            cut = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            layer.experts.register_parameter(name, nn.Parameter(cut, parameter.requires_grad))
        layer.experts.dispatch = AllToAllDispatch(layer.cfg.experts, ranks)


class ExpertPlan(NamedTuple):
    """order, slots: as in Plan. received [ep, E/ep]: rows from each rank for each expert here.
    sizes [2, ep] on the host once `ready`: rows sent to and received from each rank."""

    order: torch.Tensor
    slots: torch.Tensor
    received: torch.Tensor
    sizes: torch.Tensor
    ready: object


class Reorder(torch.autograd.Function):
    """rows[order], whose backward is a gather too."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, drows):
        order, inverse = ctx.saved_tensors
        return drows.index_select(0, inverse), None, None


class AllToAllDispatch:
    def __init__(self, experts, ranks):
        self.experts, self.ranks = experts, ranks

    def begin(self, ids):
        order, slots, counts = sort_slots(ids, self.experts)
        sent = counts.view(self.ranks.size, -1)
        ones = [1] * self.ranks.size
        received = compat.wait(compat.start_all_to_all(sent, ones, ones, self.ranks.name))
        sizes, ready = torch.stack([sent.sum(1), received.sum(1)]), None
        if sizes.device.type == "cuda":
            host = torch.empty(sizes.shape, dtype=sizes.dtype, pin_memory=True)
            sizes, ready = host.copy_(sizes, non_blocking=True), torch.cuda.Event()
            ready.record()
        return ExpertPlan(order, slots, received, sizes, ready)

    def dispatch(self, x, weights, plan):
        if plan.ready is not None:
            plan.ready.synchronize()
        sent, received = plan.sizes.tolist()
        rows = all_to_all(Permute.apply(x, plan.order, plan.slots), received, sent, self.ranks)
        # From (rank, expert) order to (expert, rank) order.
        local = plan.received.shape[1]
        expert = torch.arange(local, device=x.device).repeat(self.ranks.size)
        expert = expert.repeat_interleave(plan.received.flatten(), output_size=len(rows))
        there = expert.argsort(stable=True)
        back = torch.empty_like(there).scatter(0, there, torch.arange(len(rows), device=x.device))
        handle = Handle(plan.order, plan.slots, weights)
        return (
            Reorder.apply(rows, there, back),
            plan.received.sum(0),
            (handle, there, back, received, sent),
        )

    def combine(self, rows, handle):
        (order, slots, weights), there, back, received, sent = handle
        rows = all_to_all(Reorder.apply(rows, back, there), sent, received, self.ranks)
        return Combine.apply(rows, weights, order, slots)
