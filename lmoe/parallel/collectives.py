"""Exchange tensors between ranks inside a forward or backward pass: the only collectives there
besides FSDP2's and the pipeline's.

Functions with a gradient, out of place, legal in compiled regions. What recomputation must not do
twice, or may keep, is a registered op.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lmoe.kernels.norm import cast, compute_dtype
from lmoe.kernels.op import op
from lmoe.parallel import compat


@dataclass(frozen=True)
class Ranks:
    """A process group as compiled code can hold it: its name, its size, this rank's place in it."""

    name: str
    size: int
    index: int

    @classmethod
    def of(cls, group):
        return cls(group.group_name, dist.get_world_size(group), dist.get_rank(group))


def all_reduce(x, ranks):
    """The sum over the ranks; no gradient."""
    return compat.wait(compat.start_all_reduce(x.detach(), "sum", ranks.name))


def all_gather(x, ranks):
    return compat.wait(compat.start_all_gather(x, ranks.size, ranks.name))


def reduce_scatter(x, ranks):
    return compat.wait(compat.start_reduce_scatter(x, ranks.size, ranks.name))


class _Exchange(torch.autograd.Function):
    """exchange(x, ranks), whose gradient goes through back(dy, ranks)."""

    @staticmethod
    def forward(ctx, x, exchange, back, ranks):
        ctx.back = back
        ctx.ranks = ranks
        return exchange(x, ranks)

    @staticmethod
    def backward(ctx, dy):
        return ctx.back(dy, ctx.ranks), None, None, None


def _register_gradient(exchange, back):
    """Register the gradient of an op: back(dy, *its arguments that are no tensors)."""

    def setup(ctx, inputs, output):
        ctx.rest = [x for x in inputs if not isinstance(x, Tensor)]

    def backward(ctx, dy):
        return back(dy, *ctx.rest), *[None] * (len(ctx.needs_input_grad) - 1)

    exchange.register_autograd(backward, setup_context=setup)


def _like(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gather_tokens(x, ranks):
    """[T, ..] of each rank -> [T size, ..] on every rank; backward sums each slice's gradients onto
    its owner."""
    return _Exchange.apply(x, all_gather, reduce_scatter, ranks)


def scatter_tokens(x, ranks):
    """Partial sums [T, ..] on every rank -> this rank's slice [T / size, ..] of their sum; backward
    gathers."""
    return _Exchange.apply(x, reduce_scatter, all_gather, ranks)


def _sum_slices(x, ranks):
    """The sum of what the ranks have for this one's tokens: x [T size, ..] of each -> [T, ..]. In
    the order of the ranks, in fp32 (float64 in float64), and rounded once: unlike a reduce-scatter
    the same bits on any machine."""
    rows = [len(x) // ranks.size] * ranks.size
    first, *rest = compat.wait(compat.start_all_to_all(x, rows, rows, ranks.name)).split(rows)
    total = first.to(compute_dtype(x))
    for part in rest:
        total = total + part
    return cast(total, x.dtype)


def gather_parts(x, ranks):
    """[T, ..] of each rank -> [T size, ..] on every rank, as gather_tokens; backward sums by
    _sum_slices."""
    return _Exchange.apply(x, all_gather, _sum_slices, ranks)


def sum_parts(x, ranks):
    """Partial sums [T size, ..] on every rank -> this rank's slice [T, ..] of their sum, by
    _sum_slices; backward gathers."""
    return _Exchange.apply(x, _sum_slices, all_gather, ranks)


# --------------------------------------------------------------------------------------------------
# All to all


@op("all_to_all")
def _all_to_all(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    return compat.wait(compat.start_all_to_all(x, received, sent, group))


@_all_to_all.register_fake
def _(x, received, sent, group):
    return x.new_empty(sum(received), *x.shape[1:])


_register_gradient(
    _all_to_all, lambda dy, received, sent, group: _all_to_all(dy, sent, received, group)
)


def all_to_all(x, received, sent, ranks):
    """Rows [sum(sent), ..], in the order of the ranks they go to -> [sum(received), ..], in the
    order of the ranks they come from."""
    return _all_to_all(x, received, sent, ranks.name)


# --------------------------------------------------------------------------------------------------
# Sums of counts


@op("sum_over_ranks")
def sum_over_ranks(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks of a group; no gradient. Recomputation keeps it."""
    return compat.wait(compat.start_all_reduce(x, "sum", group))


sum_over_ranks.register_fake(_like)


def _sum(x, ranks):
    return sum_over_ranks(x.contiguous(), ranks.name)


def sum_in_both_directions(x, ranks):
    """The sum over the ranks, which all of them go on with: backward sums what each one's part of
    the loss has for it."""
    return _Exchange.apply(x, _sum, _sum, ranks)


# --------------------------------------------------------------------------------------------------
# Rows of the neighbours


@op("shift_rows")
def _shift_rows(x: Tensor, by: int, size: int, index: int, group: str) -> Tensor:
    """x [R, ..] of the rank `by` places before this one (after it, for by < 0); zeros where there
    is none."""
    received, sent = (
        [len(x) if other == index + step else 0 for other in range(size)] for step in (-by, by)
    )
    rows = compat.wait(compat.start_all_to_all(x[: sum(sent)], received, sent, group))
    return rows if len(rows) else torch.zeros_like(x)


_shift_rows.register_fake(_like)
_register_gradient(_shift_rows, lambda dy, by, *place: _shift_rows(dy, -by, *place))


def previous_rows(x, ranks):
    """x [R, ..] of the rank before this one, zeros on the first; backward hands their gradient
    back."""
    return _shift_rows(x, 1, ranks.size, ranks.index, ranks.name)


def next_rows(x, ranks):
    """x [R, ..] of the rank after this one, zeros on the last; backward hands their gradient
    back."""
    return _shift_rows(x.contiguous(), -1, ranks.size, ranks.index, ranks.name)


@op("mirror_rows")
def _mirror_rows(x: Tensor, after: Tensor, size: int, index: int, group: str) -> Tensor:
    # The middle one of an odd number of ranks sends to itself: every rank takes part in every
    # exchange of its group.
    splits = [len(x) if other == size - 1 - index else 0 for other in range(size)]
    return compat.wait(compat.start_all_to_all(x, splits, splits, group))


_mirror_rows.register_fake(_like)
_register_gradient(_mirror_rows, lambda dy, *place: _mirror_rows(dy, dy, *place))


def mirror_rows(x, ranks, after):
    """x [R, ..] of the rank at the mirrored place, size - 1 - index: an exchange of pairs, its own
    inverse. after: what an exchange of the same ranks before it gave, so that no compiler changes
    their order."""
    return _mirror_rows(x, after.detach(), ranks.size, ranks.index, ranks.name)
