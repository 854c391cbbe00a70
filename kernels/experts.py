"""SwiGLU experts over tokens that each chose some of them: sort, gather, two grouped products,
combine.

T tokens, K choices each, E experts here, R rows: one for each choice of an expert that is here. The
number of rows is known on the device alone, where some experts are elsewhere; R is what they can be
at most, and rows from ends[-1] on are neither written nor read.

Kept for the backward pass are x, the plan, the weights and h, what the first product gives: with
a = swiglu(h), the gradient da' of an expert's output times W2, before the weight w of its choice,
gives both w's gradient <da', a> and da = w da'. No output of an expert, and no gathered row, is
kept; and of h only SLACK times the rows of equally popular experts, where that is less than R: the
product of the rows beyond, if there are any, is taken again in the backward pass, and so costs time
but no memory, and no bit. Both directions gather: no scatter-add and no atomics, so the same inputs
give the same bits.

bfloat16 goes to torch.nn.functional.grouped_mm, which leaves the sizes of the groups on the device.
Every other dtype takes one mm per expert: it must read the sizes, which costs nothing on a CPU and
a wait for the device on CUDA (fp32 there is for checking).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe.kernels.choice import on_gpu
from lmoe.kernels.norm import cast, compute_dtype
from lmoe.kernels.op import op
from lmoe.kernels.pointwise import swiglu

ALIGNMENT = 8  # torch's grouped_mm wants row strides that are multiples of 16 bytes
SLACK = 1.25


class Plan(NamedTuple):
    """The choices in the order of their experts.

    rows [R] int32: the choice t K + k of each row; an expert's rows keep the order of their tokens.
    places [T, K] int32: the row of each choice, -1 where its expert is elsewhere. ends [E] int32:
    where each expert's rows end (inclusive sums of their numbers); rows from ends[-1] on are any
    choice. kept: rows of which an expert's h is kept.
    """

    rows: Tensor
    places: Tensor
    ends: Tensor
    kept: int

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


def sort_by_expert(ids: Tensor, experts: int, first: int = 0, every: int = 0) -> Plan:
    """Sort choices stably by expert. ids [T, K], those of a token all different; the experts here
    are `experts` from number `first` on, of `every` in all (0: no others)."""
    likely = math.ceil(SLACK * ids.numel() * experts / (every or experts))
    return Plan(*_sort(ids, experts, first), min(likely, most_rows(ids, experts)))


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
    return _gather_rows(x, *plan[:3])


def combine_rows(rows: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
    """Add up each token's rows, times weights [T, K] if given, in fp32 (float64 in float64) and in
    the order of its choices. rows [R, D] -> [T, D] in the rows' dtype."""
    return _combine_rows(rows, weights, *plan[:3])


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
    if x.device.type == "meta":
        return y
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
    if x.device.type == "meta":
        return dw
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
    return forward(x, weights, *plan[:3], w13, w2, plan.kept)[0]


def _piece(rows, ends, start, end):
    """The rows of a plan from `start` to `end`, and where experts end among them."""
    if end - start == len(rows):
        return rows, ends
    return rows[start:end], (ends - start).clamp(0, end - start)


def _up(x, w13, rows, places, ends, start, end):
    """h [end - start, 2 I]: gate and up of these rows."""
    rows, ends = _piece(rows, ends, start, end)
    return grouped_mm(_gather(x, rows, places, ends), w13.flatten(1, 2).transpose(1, 2), ends)


def _swiglu(h, rows, ends, start, out):
    """out[start:] = swiglu(h) of these rows."""
    end = start + len(h)
    if gpu := _triton(h):
        gpu.swiglu_rows(h, _piece(rows, ends, start, end)[1], out[start:end])
    else:
        out[start:end] = swiglu(h)


@op(
    "experts",
    "(Tensor x, Tensor? weights, Tensor rows, Tensor places, Tensor ends, Tensor w13, Tensor w2,"
    " int kept) -> (Tensor, Tensor)",
)
def forward(x, weights, rows, places, ends, w13, w2, kept):
    """(y, h [kept, 2 I])."""
    w13, w2 = w13.contiguous(), w2.contiguous()
    a = x.new_empty(len(rows), w2.shape[2])
    h = _up(x, w13, rows, places, ends, 0, kept)
    _swiglu(h, rows, ends, 0, a)
    if kept < len(rows):
        _swiglu(_up(x, w13, rows, places, ends, kept, len(rows)), rows, ends, kept, a)
    return _combine(grouped_mm(a, w2.transpose(1, 2), ends), weights, places), h


@op(
    "experts_bwd",
    "(Tensor dy, Tensor x, Tensor? weights, Tensor rows, Tensor places, Tensor ends, Tensor w13,"
    " Tensor w2, Tensor h, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(dy, x, weights, rows, places, ends, w13, w2, h, needs):
    """Gradients of x, the weights, w13 and w2; needs: of x, w13, w2."""
    w13, w2 = w13.contiguous(), w2.contiguous()
    dy = _gather(dy, rows, places, ends)
    a = grouped_mm(dy, w2, ends)  # da', in whose place a comes
    dh = a.new_empty(len(rows), 2 * a.shape[1])
    dweights = None if weights is None else torch.zeros_like(weights)
    for start, end in ((0, len(h)), (len(h), len(rows))):
        if start < end:
            h = h if end == len(h) else _up(x, w13, rows, places, ends, start, end)
            piece = _piece(rows, ends, start, end)
            gpu = _triton(h, weights)
            swiglu_bwd = gpu.swiglu_rows_bwd if gpu else _swiglu_rows_bwd
            swiglu_bwd(a[start:end], h, weights, *piece, dh[start:end], dweights)
    dw2 = grouped_outer(dy, a, ends) if needs[2] else None
    del dy, a, h  # large
    dx = dw13 = None
    if needs[0]:
        dx = _combine(grouped_mm(dh, w13.flatten(1, 2), ends), None, places)
    if needs[1]:
        dw13 = grouped_outer(dh, _gather(x, rows, places, ends), ends).view(w13.shape)
    return dx, dweights, dw13, dw2


def _swiglu_rows_bwd(da, h, weights, rows, ends, dh, dweights):
    """Turn da [R, I], the gradients of a = swiglu(h) before the weights, into weight times a;
    write h's gradients dh [R, 2 I] and the weights' dweights [T, K], of these choices."""
    there = len(da) if da.device.type == "meta" else int(ends[-1])
    da, h, rows, dh = da[:there], h[:there], rows[:there], dh[:there]
    gate, up = h.to(compute_dtype(h)).chunk(2, dim=1)
    wide = da.to(gate.dtype)
    s = gate.sigmoid()
    a = gate * s * up
    if weights is not None:
        dweights.view(-1)[rows] = (wide * a).sum(1)
        w = weights.flatten()[rows][:, None]
        wide = w * wide
        a = w * a
    dh.copy_(torch.cat([wide * up * (s * (1 + gate * (1 - s))), wide * gate * s], dim=1))
    da.copy_(a)


@forward.register_fake
def _(x, weights, rows, places, ends, w13, w2, kept):
    return x.new_empty(places.shape[0], w2.shape[1]), x.new_empty(kept, 2 * w2.shape[2])


@backward.register_fake
def _(dy, x, weights, rows, places, ends, w13, w2, h, needs):
    like = [t if needed else None for t, needed in zip((x, w13, w2), needs, strict=True)]
    like.insert(1, weights)
    return tuple(None if t is None else t.new_empty(t.shape) for t in like)


def _experts_setup(ctx, inputs, output):
    x, weights, *rest, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.weighted = weights is not None
    ctx.save_for_backward(x, *([weights] if ctx.weighted else []), *rest, output[1])


def _experts_backward(ctx, dy, _):
    x, *weights, rows, places, ends, w13, w2, h = ctx.saved_tensors
    weights = weights[0] if ctx.weighted else None
    needs = [ctx.needs_input_grad[n] for n in (0, 5, 6)]
    dx, dweights, dw13, dw2 = backward(dy, x, weights, rows, places, ends, w13, w2, h, needs)
    return dx, dweights if ctx.weighted else None, None, None, None, dw13, dw2


forward.register_autograd(_experts_backward, setup_context=_experts_setup)
