"""SwiGLU experts over tokens that each chose some of them: sort, gather, two grouped products,
combine.

T tokens, K choices each, E experts here, R rows: one for each choice of an expert that is here. The
number of rows is known on the device alone, where some experts are elsewhere; R is what they can be
at most, and rows from ends[-1] on are neither written nor read.

Kept for the backward pass are x, the plan, the weights and h, what the first product gives: with
a = swiglu(h), the gradient da' of an expert's output times W2, before the weight w of its choice,
gives both w's gradient <da', a> and da = w da'. No output of an expert, and no gathered row, is
kept. Both directions gather: no scatter-add and no atomics, so the same inputs give the same bits.

bfloat16 goes to torch.nn.functional.grouped_mm, which leaves the sizes of the groups on the device.
Every other dtype takes one mm per expert: it must read the sizes, which costs nothing on a CPU and
a wait for the device on CUDA (fp32 there is for checking).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe.kernels.choice import on_gpu
from lmoe.kernels.norm import cast, compute_dtype
from lmoe.kernels.op import op
from lmoe.kernels.pointwise import swiglu

ALIGNMENT = 8  # torch's grouped_mm wants row strides that are multiples of 16 bytes


class Plan(NamedTuple):
    """The choices in the order of their experts.

    rows [R] int32: the choice t K + k of each row; an expert's rows keep the order of their tokens.
    places [T, K] int32: the row of each choice, -1 where its expert is elsewhere. ends [E] int32:
    where each expert's rows end (inclusive sums of their numbers); rows from ends[-1] on are any
    choice.
    """

    rows: Tensor
    places: Tensor
    ends: Tensor

    @property
    def counts(self) -> Tensor:
        """Rows of each expert [E]."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))


def _triton(*tensors):
    """The kernels where they serve: inside an op also in compiled code."""
    if not on_gpu(*tensors, pointwise=False):
        return None
    from lmoe.kernels.gpu import experts as gpu

    return gpu


# --------------------------------------------------------------------------------------------------
# The choice


def choose(scores: Tensor, k: int) -> Tensor:
    """Choose the k highest of scores [T, E] -> ids [T, k] int64, ascending in a row; of equal
    scores the lower index wins, and NaN is the highest. No gradient."""
    if scores.dtype == torch.float32 and (gpu := _triton(scores)):
        return gpu.choose(scores, k)
    ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return ids.sort(dim=1).values


# --------------------------------------------------------------------------------------------------
# The plan


def sort_by_expert(ids: Tensor, experts: int, first: int = 0) -> Plan:
    """Sort choices stably by expert. ids [T, K], those of a token all different; the experts here
    are `experts` from number `first` on."""
    return Plan(*_sort(ids, experts, first))


@op("sort_by_expert")
def _sort(ids: Tensor, experts: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    if gpu := _triton(ids.new_empty(0, dtype=torch.float32)):
        return gpu.sort_by_expert(ids, experts, first)
    local = ids.flatten() - first
    here = (local >= 0) & (local < experts)
    order, choices = local.masked_fill(~here, experts).sort(stable=True)
    every = torch.arange(experts, device=ids.device, dtype=order.dtype)
    ends = torch.searchsorted(order, every, right=True, out_int32=True)
    row = torch.arange(ids.numel(), device=ids.device, dtype=torch.int32)
    places = torch.empty_like(row).scatter(0, choices, row)
    places = places.masked_fill(~here, -1).view(ids.shape)
    return choices[: most_rows(ids, experts)].int(), places, ends


@_sort.register_fake
def _(ids, experts, first):
    sizes = most_rows(ids, experts), ids.shape, experts
    return tuple(ids.new_empty(size, dtype=torch.int32) for size in sizes)


def most_rows(ids, experts):
    """R, for choices [T, K] of so many experts here."""
    return ids.shape[0] * min(ids.shape[1], experts)


# --------------------------------------------------------------------------------------------------
# Rows


def gather_rows(x: Tensor, plan: Plan) -> Tensor:
    """Copy tokens to the rows of their choices. x [T, D] -> [R, D]; backward sums the copies of
    each token in fp32, in the order of its choices."""
    return _gather_rows(x, *plan)


def combine_rows(rows: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
    """Add up each token's rows, times weights [T, K] if given, in fp32 (float64 in float64) and in
    the order of its choices. rows [R, D] -> [T, D] in the rows' dtype."""
    return _combine_rows(rows, weights, *plan)


@op("gather_rows")
def _gather_rows(x: Tensor, rows: Tensor, places: Tensor, ends: Tensor) -> Tensor:
    return _gather(x, rows, places, ends)


def _gather(x, rows, places, ends, weights=None):
    if gpu := _triton(x, weights):
        return gpu.gather_rows(x, rows, ends, places.shape[1], weights)
    y = x.index_select(0, rows // places.shape[1])
    return y if weights is None else (y * weights.flatten()[rows][:, None]).to(x.dtype)


@op("combine_rows", "(Tensor rows, Tensor? w, Tensor r, Tensor places, Tensor ends) -> Tensor")
def _combine_rows(y, weights, rows, places, ends):
    return _combine(y, weights, places)


def _combine(y, weights, places):
    if gpu := _triton(y, weights):
        return gpu.combine_rows(y, weights, places)
    total = torch.zeros(places.shape[0], y.shape[1], dtype=compute_dtype(y), device=y.device)
    per_choice = [None] * places.shape[1] if weights is None else weights.unbind(1)
    for place, w in zip(places.unbind(1), per_choice, strict=True):
        row = _at(y, place).to(total.dtype)
        total = total + (row if w is None else row * w[:, None])
    return cast(total, y.dtype)


def _at(y, place):
    """Rows of y [R, ..] at places [T]; zero where there is none."""
    if not len(y):
        return y.new_zeros(len(place), *y.shape[1:])
    nowhere = (place < 0).view(-1, *[1] * (y.ndim - 1))
    return y.index_select(0, place.clamp(min=0)).masked_fill(nowhere, 0)


_gather_rows.register_fake(lambda x, rows, *_: x.new_empty(rows.shape[0], x.shape[1]))
_gather_rows.register_autograd(
    lambda ctx, d: _combine_rows(d, None, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
)
_combine_rows.register_fake(lambda y, w, r, places, _: y.new_empty(places.shape[0], y.shape[1]))


@op("combine_rows_bwd")
def _combine_rows_bwd(
    dy: Tensor, y: Tensor, weights: Tensor, rows: Tensor, places: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    dots = [(_at(y, place).to(weights.dtype) * dy).sum(1) for place in places.unbind(1)]
    return _gather(dy, rows, places, ends, weights), torch.stack(dots, 1)


_combine_rows_bwd.register_fake(
    lambda dy, y, weights, *_: (y.new_empty(y.shape), weights.new_empty(weights.shape))
)


def _combine_setup(ctx, inputs, output):
    y, weights, *plan = inputs
    ctx.weighted = weights is not None
    ctx.save_for_backward(*([y, weights] if ctx.weighted else []), *plan)


def _combine_backward(ctx, dy):
    if not ctx.weighted:
        return _gather_rows(dy, *ctx.saved_tensors)
    return _combine_rows_bwd(dy, *ctx.saved_tensors)


_combine_rows.register_autograd(_combine_backward, setup_context=_combine_setup)


# --------------------------------------------------------------------------------------------------
# Grouped products


def _groups(ends):
    start = 0
    for group, end in enumerate(ends.tolist()):
        yield group, slice(start, end)
        start = end


def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """y [R, N] with y_r = x_r w_g, where g is the group of row r. x [R, D], w [E, D, N], ends [E]
    as in Plan."""
    x = x.contiguous()
    if x.dtype == torch.bfloat16 and x.shape[0]:
        return F.grouped_mm(x, w, offs=ends)
    y = x.new_empty(x.shape[0], w.shape[2])
    for group, rows in _groups(ends):
        torch.mm(x[rows], w[group], out=y[rows])
    return y


def grouped_outer(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """[E, N, D]: the sum of dy_r x_r^T over the rows of each group, zero for an empty one. dy
    [R, N], x [R, D]."""
    dy = dy.contiguous()
    x = x.contiguous()
    if x.dtype == torch.bfloat16 and x.shape[0]:
        return F.grouped_mm(dy.t(), x, offs=ends)
    dw = x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])
    for group, rows in _groups(ends):
        torch.mm(dy[rows].t(), x[rows], out=dw[group])
    return dw


# --------------------------------------------------------------------------------------------------
# The experts


def swiglu_experts(
    x: Tensor, weights: Tensor | None, plan: Plan, w13: Tensor, w2: Tensor
) -> Tensor:
    """Run tokens through their experts: y_t = sum over the choices of t that are here of weight
    times w2 swiglu(w13 x_t).

    x [T, D] -> [T, D]; weights [T, K], fp32 (float64), or None: all 1; w13 [E, 2, I, D]: gate, then
    up; w2 [E, D, I], both of x's dtype.
    """
    return _down(_up(x, *plan, w13), weights, *plan, w2)


@op("experts_up")
def _up(x: Tensor, rows: Tensor, places: Tensor, ends: Tensor, w13: Tensor) -> Tensor:
    """h [R, 2 I]: gate and up of every row."""
    x = _gather(x, rows, places, ends)
    return grouped_mm(x, w13.contiguous().flatten(1, 2).transpose(1, 2), ends)


@op("experts_up_bwd")
def _up_bwd(
    dh: Tensor,
    x: Tensor,
    rows: Tensor,
    places: Tensor,
    ends: Tensor,
    w13: Tensor,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor]:
    dx = dw = None
    if need_x:
        dx = _combine(grouped_mm(dh, w13.contiguous().flatten(1, 2), ends), None, places)
    if need_w:
        dw = grouped_outer(dh, _gather(x, rows, places, ends), ends).view(w13.shape)
    return dx, dw


@op(
    "experts_down",
    "(Tensor h, Tensor? weights, Tensor rows, Tensor places, Tensor ends, Tensor w2) -> Tensor",
)
def _down(h, weights, rows, places, ends, w2):
    gpu = _triton(h)
    a = gpu.swiglu_rows(h, ends) if gpu else swiglu(h)
    return _combine(grouped_mm(a, w2.contiguous().transpose(1, 2), ends), weights, places)


@op(
    "experts_down_bwd",
    "(Tensor dy, Tensor h, Tensor? weights, Tensor rows, Tensor places, Tensor ends, Tensor w2,"
    " bool need_w) -> (Tensor, Tensor, Tensor)",
)
def _down_bwd(dy, h, weights, rows, places, ends, w2, need_w):
    """Gradients of h, the weights and w2."""
    dy = _gather(dy, rows, places, ends)
    da = grouped_mm(dy, w2.contiguous(), ends)
    gpu = _triton(h, weights)
    dh, a, dweights = (gpu.swiglu_rows_bwd if gpu else _swiglu_rows_bwd)(
        da, h, weights, rows, places, ends
    )
    return dh, dweights, grouped_outer(dy, a, ends) if need_w else None


def _swiglu_rows_bwd(da, h, weights, rows, places, ends):
    """da [R, I]: gradients of a = swiglu(h), before the weights -> (dh [R, 2 I], weight times a, in
    h's dtype; the weights' gradient [T, K] or None)."""
    gate, up = h.to(compute_dtype(h)).chunk(2, dim=1)
    da = da.to(gate.dtype)
    s = gate.sigmoid()
    a = gate * s * up
    dweights = None
    if weights is not None:
        dots = (da * a).sum(1)
        dweights = torch.stack([_at(dots, place) for place in places.unbind(1)], 1)
        w = weights.flatten()[rows][:, None]
        da = w * da
        a = w * a
    dh = torch.cat([da * up * (s * (1 + gate * (1 - s))), da * gate * s], dim=1)
    return dh.to(h.dtype), a.to(h.dtype), dweights


_up.register_fake(lambda x, rows, p, e, w13: x.new_empty(rows.shape[0], 2 * w13.shape[2]))
_up_bwd.register_fake(
    lambda dh, x, rows, p, e, w13, need_x, need_w: (
        x.new_empty(x.shape) if need_x else None,
        w13.new_empty(w13.shape) if need_w else None,
    )
)
_down.register_fake(lambda h, w, r, places, e, w2: h.new_empty(places.shape[0], w2.shape[1]))
_down_bwd.register_fake(
    lambda dy, h, weights, r, p, e, w2, need_w: (
        h.new_empty(h.shape),
        None if weights is None else weights.new_empty(weights.shape),
        w2.new_empty(w2.shape) if need_w else None,
    )
)


def _up_backward(ctx, dh):
    needs = ctx.needs_input_grad
    dx, dw = _up_bwd(dh, *ctx.saved_tensors, needs[0], needs[4])
    return dx, None, None, None, dw


def _down_setup(ctx, inputs, output):
    h, weights, *plan, w2 = inputs
    ctx.weighted = weights is not None
    ctx.save_for_backward(h, *([weights] if ctx.weighted else []), *plan, w2)


def _down_backward(ctx, dy):
    h, *weights, rows, places, ends, w2 = ctx.saved_tensors
    weights = weights[0] if ctx.weighted else None
    needs = ctx.needs_input_grad[5]
    dh, dweights, dw = _down_bwd(dy, h, weights, rows, places, ends, w2, needs)
    return dh, dweights if ctx.weighted else None, None, None, None, dw


_up.register_autograd(
    _up_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
_down.register_autograd(_down_backward, setup_context=_down_setup)
