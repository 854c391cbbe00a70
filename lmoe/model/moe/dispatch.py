"""Bringing tokens to their experts and back.

A dispatch is an object with three methods, and expert and tensor parallelism replace the local one
by others:
    begin(ids [T, K]) -> plan: who goes where; ranks begin to tell each other dispatch(x [T, D],
    weights [T, K], plan) -> (rows [R, D] sorted by expert, counts per local expert, handle)
    combine(rows [R, D], handle) -> y [T, D], y_t = sum_k weights_tk * (row of token t at its k-th
    expert)

Both directions gather: backward of "copy a token to its K rows" is "gather the K rows of a token
and add them up", in fp32 and in a fixed order. No scatter-add and no atomics, so the same inputs
give the same bits.
"""

from typing import NamedTuple

import torch

from lmoe.kernels.norm import cast


class Plan(NamedTuple):
    """order [T*K]: the slot t*K + k that each row comes from; slots [T, K]: the row of each slot;
    counts [E]: rows per expert."""

    order: torch.Tensor
    slots: torch.Tensor
    counts: torch.Tensor


class Handle(NamedTuple):
    """Of a Plan, with the weights [T, K]."""

    order: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor


class LocalDispatch:
    """Every expert is here: a stable sort of the T*K slots by expert."""

    def __init__(self, experts):
        self.experts = experts

    def begin(self, ids):
        return sort_slots(ids, self.experts)

    def dispatch(self, x, weights, plan):
        return (
            Permute.apply(x, plan.order, plan.slots),
            plan.counts,
            Handle(plan.order, plan.slots, weights),
        )

    def combine(self, rows, handle):
        return Combine.apply(rows, handle.weights, handle.order, handle.slots)


def sort_slots(ids, experts):
    """ids [T, K] -> Plan; rows of an expert keep the order of their tokens."""
    sorted_ids, order = ids.flatten().sort(stable=True)
    slots = (
        torch.empty_like(order)
        .scatter(0, order, torch.arange(order.shape[0], device=order.device))
        .view_as(ids)
    )
    ends = torch.searchsorted(sorted_ids, torch.arange(experts, device=ids.device), right=True)
    return Plan(order, slots, ends.diff(prepend=ends.new_zeros(1)))


def gather_sum(rows, slots, weights=None):
    """[T, D]: the K rows of each token, times its weights [T, K] if given, added up in fp32
    (float64 in float64) in the order of k."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    total = 0
    for k in range(slots.shape[1]):
        row = rows.index_select(0, slots[:, k]).to(dtype)
        total = total + (row if weights is None else row * weights[:, k, None])
    return cast(total, rows.dtype)


class Permute(torch.autograd.Function):
    """x [T, D] -> rows [T*K, D]."""

    @staticmethod
    def forward(ctx, x, order, slots):
        ctx.save_for_backward(slots)
        return x.index_select(0, order // slots.shape[1])

    @staticmethod
    def backward(ctx, drows):
        (slots,) = ctx.saved_tensors
        return gather_sum(drows, slots), None, None


class Combine(torch.autograd.Function):
    """rows [T*K, D], weights [T, K] -> y [T, D]; products and sums in fp32, y in the rows'
    dtype."""

    @staticmethod
    def forward(ctx, rows, weights, order, slots):
        ctx.save_for_backward(rows, weights, order, slots)
        return gather_sum(rows, slots, weights)

    @staticmethod
    def backward(ctx, dy):
        rows, weights, order, slots = ctx.saved_tensors
        drows = (
            dy.index_select(0, order // slots.shape[1])
            * weights.flatten().index_select(0, order)[:, None]
        )
        dweights = [
            (rows.index_select(0, slots[:, k]).to(weights.dtype) * dy).sum(1)
            for k in range(slots.shape[1])
        ]
        return drows.to(rows.dtype), torch.stack(dweights, 1), None, None
