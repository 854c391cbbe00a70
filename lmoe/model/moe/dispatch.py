"""Bringing tokens to their experts and back.

A dispatch has three methods; expert and tensor parallelism replace the local one by others:

    begin     sort the choices by expert; ranks begin to exchange how many rows each will send
    dispatch  find the experts' rows: a source and an index into it
    combine   add up each token's outputs, times its routing weights

Row r of the experts' input is source[index.rows[r]]; whoever computes the products gathers it.

Both directions gather: backward of "copy a token to its K rows" is "gather the K rows of a token
and add them up", in fp32 and in a fixed order. No scatter-add and no atomics, so the same inputs
give the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lmoe.kernels.norm import cast, compute_dtype


class RowIndex(NamedTuple):
    """Rows [R, D] that copy the rows of a source [S, D], k = R / S times each.

    rows [R]: the source row of each row. copies [S, k]: the rows that copy each source row.
    """

    rows: Tensor
    copies: Tensor


class Plan(NamedTuple):
    """The T*K choices in the order of their experts.

    permutation [T*K]: the choice t*K + k of each row. inverse_permutation [T, K]: the row of each
    choice. counts [E]: rows per expert.
    """

    permutation: Tensor
    inverse_permutation: Tensor
    counts: Tensor

    @property
    def index(self) -> RowIndex:
        """The rows as copies of tokens."""
        top_k = self.inverse_permutation.shape[1]
        return RowIndex(self.permutation // top_k, self.inverse_permutation)


class LocalDispatch:
    """Dispatch to `experts` experts that are all here. ranks: those that share the work, if any."""

    def __init__(self, experts: int, ranks=None):
        self.experts = experts
        self.ranks = ranks

    def begin(self, topk_ids: Tensor) -> Plan:
        """Sort by expert. topk_ids [T, K] -> what dispatch and combine need."""
        return sort_by_expert(topk_ids, self.experts)

    def dispatch(self, x: Tensor, plan: Plan) -> tuple[Tensor, RowIndex, Tensor]:
        """Find the experts' rows. x [T, D] -> (source [S, D], index of the R rows, sorted by
        expert; counts [local experts], which sum to R)."""
        return x, plan.index, plan.counts

    def combine(self, rows: Tensor, index: RowIndex, weights: Tensor, plan: Plan) -> Tensor:
        """Add up each token's K outputs. rows [R, D] and the index that dispatch gave, weights
        [T, K] -> y [T, D], y_t = sum_k weights_tk (output of the k-th expert of token t)."""
        return Combine.apply(rows, weights, plan.permutation, plan.inverse_permutation)


def sort_by_expert(topk_ids: Tensor, experts: int) -> Plan:
    """Sort choices stably by expert: rows of an expert keep the order of their tokens. [T, K]."""
    sorted_ids, permutation = topk_ids.flatten().sort(stable=True)
    every = torch.arange(experts, device=topk_ids.device)
    ends = torch.searchsorted(sorted_ids, every, right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    return Plan(permutation, invert(permutation).view_as(topk_ids), counts)


def invert(permutation: Tensor) -> Tensor:
    """Invert a permutation [R]."""
    places = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter(0, permutation, places)


def gather_rows(source: Tensor, index: RowIndex) -> Tensor:
    """Gather the rows of every expert. source [S, D] -> [R, D]; backward sums the copies of each
    source row in a fixed order in fp32."""
    return _GatherRows.apply(source, *index)


def sum_copies(rows, copies, weights=None):
    """Sum the k rows of each source row, times weights [S, k] if given, in fp32 (float64 in
    float64). rows [R, D], copies [S, k] -> [S, D] in the rows' dtype."""
    if weights is None and copies.shape[1] == 1:
        return rows.index_select(0, copies[:, 0])
    dtype = compute_dtype(rows)
    total = 0
    for k in range(copies.shape[1]):
        row = rows.index_select(0, copies[:, k]).to(dtype)
        total = total + (row if weights is None else row * weights[:, k, None])
    return cast(total, rows.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, rows, copies):
        ctx.save_for_backward(copies)
        return source.index_select(0, rows)

    @staticmethod
    def backward(ctx, drows):
        (copies,) = ctx.saved_tensors
        return sum_copies(drows, copies), None, None


class Combine(torch.autograd.Function):
    """Weigh and add up the rows of each token. rows [T*K, D], weights [T, K] -> y [T, D]; products
    and sums in fp32, y in the rows' dtype."""

    @staticmethod
    def forward(ctx, rows, weights, permutation, inverse):
        ctx.save_for_backward(rows, weights, permutation, inverse)
        return sum_copies(rows, inverse, weights)

    @staticmethod
    def backward(ctx, dy):
        rows, weights, permutation, inverse = ctx.saved_tensors
        top_k = inverse.shape[1]
        row_weights = weights.flatten().index_select(0, permutation)
        drows = dy.index_select(0, permutation // top_k) * row_weights[:, None]
        dweights = [
            (rows.index_select(0, inverse[:, k]).to(weights.dtype) * dy).sum(1)
            for k in range(top_k)
        ]
        return drows.to(rows.dtype), torch.stack(dweights, 1), None, None
