"""Norms on a GPU: one pass over memory forward and one backward, with the gate before or after the
norm (the formulas: kernels/norm.py).

Rows of any width are whole in a program, several of them where they are short. Backward recomputes
all but the rows' 1 / rms.
"""

import torch
import triton
import triton.language as tl

from lmoe.kernels.choice import WIDEST
from lmoe.kernels.gpu.common import contiguous, load_fp32
from lmoe.kernels.gpu.pointwise import activate, activate_slope, offsets, ready, within
from lmoe.kernels.gpu.tiles import cdiv, power_of_2
from lmoe.kernels.norm import ACTIVATIONS
from lmoe.kernels.op import op

# of a backward pass: each adds up its share of the weight's gradient. The same on any GPU, and so
# are the bits.
PROGRAMS = 528


@triton.jit
def _normalise(
    x,
    weight,
    bias,
    gate,
    y,
    rstd,
    T,
    eps,
    P: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    GATE: tl.constexpr,
    SILU: tl.constexpr,
    FIRST: tl.constexpr,
    MEAN: tl.constexpr,
):
    """Rows [T, P, D]; weight, bias [P, D]. With a bias (never gate first) rows lose their mean."""
    p, d = tl.program_id(0) % P, tl.arange(0, BD)
    t = tl.program_id(0) // P * BR + tl.arange(0, BR)
    row = t.to(tl.int64) * P + p
    at, mask = offsets(row, d, D), within(t, d, T, D)
    X = load_fp32(x + at, mask)
    if GATE:
        factor = activate(load_fp32(gate + at, mask), SILU)
        if FIRST:
            X *= factor
    if BIAS:
        X = tl.where(mask, X - (tl.sum(X, 1) / D)[:, None], 0.0)
    squares = tl.sum(X * X, 1)
    r = tl.rsqrt((squares / D if MEAN else squares) + eps)
    tl.store(rstd + row, r, mask=t < T)
    Y = X * r[:, None]
    if WEIGHT:
        Y *= load_fp32(weight + p * D + d, d < D)[None, :]
    if BIAS:
        Y += load_fp32(bias + p * D + d, d < D)[None, :]
    if GATE and not FIRST:
        Y *= factor
    tl.store(y + at, Y, mask=mask)


@triton.jit
def _normalise_backward(
    x,
    weight,
    bias,
    gate,
    rstd,
    dy,
    dx,
    dgate,
    dweight,
    dbias,
    T,
    STEP,
    P: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    GATE: tl.constexpr,
    SILU: tl.constexpr,
    FIRST: tl.constexpr,
    MEAN: tl.constexpr,
):
    """A program takes every STEP-th block of BR rows; dweight, dbias [STEP, P, D] are its sums."""
    p, part, d = tl.program_id(0) % P, tl.program_id(0) // P, tl.arange(0, BD)
    dW, dB = tl.zeros([BR, BD], tl.float32), tl.zeros([BR, BD], tl.float32)
    if WEIGHT:
        W = load_fp32(weight + p * D + d, d < D)[None, :]
    if BIAS:
        B = load_fp32(bias + p * D + d, d < D)[None, :]
    for block in range(part, (T + BR - 1) // BR, STEP):
        t = block * BR + tl.arange(0, BR)
        row = t.to(tl.int64) * P + p
        at, mask = offsets(row, d, D), within(t, d, T, D)
        X = load_fp32(x + at, mask)
        dU = load_fp32(dy + at, mask)
        r = load_fp32(rstd + row, t < T)[:, None]
        unit = tl.where(mask, X - (tl.sum(X, 1) / D)[:, None], 0.0) * r if BIAS else X * r
        if GATE:
            g = load_fp32(gate + at, mask)
            factor, slope = activate(g, SILU), activate_slope(g, SILU)
            if FIRST:
                unit *= factor
            else:
                normed = unit * W if WEIGHT else unit
                if BIAS:
                    normed += B
                tl.store(dgate + at, dU * normed * slope, mask=mask)
                dU *= factor
        if BIAS:
            dB += dU
        if WEIGHT:
            dW += dU * unit
            dU *= W
        along = tl.sum(dU * unit, 1)[:, None]
        if BIAS:
            dU -= (tl.sum(dU, 1) / D)[:, None]
        dU = r * (dU - unit * (along / D if MEAN else along))
        if GATE and FIRST:
            tl.store(dgate + at, dU * X * slope, mask=mask)
            dU *= factor
        tl.store(dx + at, dU, mask=mask)
    if WEIGHT:
        tl.store(dweight + (part * P + p) * D + d, tl.sum(dW, 0), mask=d < D)
    if BIAS:
        tl.store(dbias + (part * P + p) * D + d, tl.sum(dB, 0), mask=d < D)


def rms_norm(x, weight, eps):
    """x / sqrt(mean x^2 + eps) * weight over the last dim (arXiv 1910.07467); weight [D] or
    None."""
    return wide_rms_norm(x, weight, None, eps, x.shape[-1])


def gated_rms_norm(o, weight, gate, eps, activation="silu"):
    """rms_norm(o) * activation(gate): o [.., V], weight [V] or None, gate [.., V] or None (arXiv
    2312.06635, section 4.4)."""
    return wide_rms_norm(o, weight, gate, eps, o.shape[-1], activation)


def wide_rms_norm(o, weight, gate, eps, size, activation="silu", gate_first=False):
    """RMSNorm over every `size` neighbouring channels, heads together, times activation(gate), or
    (gate_first) of o * activation(gate) (Mamba2: arXiv 2405.21060). o [T, H, V]; weight [H V]; gate
    [T, H, V] or None.
    """
    _check(activation)
    return _rms_op(o, weight, None, gate, eps, size, activation, gate_first)[0]


def head_group_norm(o, weight, bias, gate, eps, activation="silu"):
    """((o - mean) / sqrt(var + eps) * weight + bias) * activation(gate), statistics over each head:
    o, gate [T, H, V]; weight, bias [H V] (RWKV6: arXiv 2404.05892).
    """
    _check(activation)
    return _rms_op(o, weight, bias, gate, eps, o.shape[-1], activation, False)[0]


def l2norm(x, eps=1e-6, wide=False):
    """x / sqrt(sum x^2 + eps) over the last dim (arXiv 2406.06484, section 3.3); wide: an fp32
    result whatever x is."""
    return _l2_op(x, eps, wide)[0]


def _check(activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: no {activation!r}; there are {' and '.join(ACTIVATIONS)}")


class _Launch:
    """Sizes of a call on x seen as rows [T, P, D], and the kernels' flags."""

    def __init__(self, x, weight, bias, gate, size, activation, gate_first, mean):
        if size > WIDEST:
            raise ValueError(f"x: rows of {size} channels; the triton backend takes up to {WIDEST}")
        self.P = 1 if weight is None else weight.numel() // size
        BD = power_of_2(size)
        self.T = x.numel() // (self.P * size)
        BR = max(1, 2048 // BD)
        self.blocks = cdiv(self.T, BR)
        self.flags = {
            "P": self.P,
            "D": size,
            "BR": BR,
            "BD": BD,
            "num_warps": max(4, BD // 512),
            "WEIGHT": weight is not None,
            "BIAS": bias is not None,
            "GATE": gate is not None,
            "SILU": activation == "silu",
            "FIRST": gate_first,
            "MEAN": mean,
        }


def _forward(x, weight, bias, gate, eps, dtype, *how):
    x, gate = ready(x=x, gate=gate)
    weight, bias = contiguous(weight, bias)
    launch = _Launch(x, weight, bias, gate, *how)
    y = torch.empty_like(x, dtype=dtype)
    rstd = x.new_empty(launch.T * launch.P, dtype=torch.float32)
    _normalise[(launch.blocks * launch.P,)](
        x, weight, bias, gate, y, rstd, launch.T, eps, **launch.flags
    )
    return y, rstd


def _backward(x, weight, bias, gate, rstd, dy, *how):
    """(dx, dweight, dbias, dgate), None or empty where there is none."""
    x, weight, bias, gate, dy = contiguous(x, weight, bias, gate, dy)
    launch = _Launch(x, weight, bias, gate, *how)
    # Without a weight there is nothing to add up, and every block has a program of its own.
    step = launch.blocks if weight is None else min(launch.blocks, max(1, PROGRAMS // launch.P))
    dx = torch.empty_like(x)
    dgate = x.new_empty(0) if gate is None else torch.empty_like(gate)
    parts = [
        x.new_empty((step, 0 if t is None else t.numel()), dtype=torch.float32)
        for t in (weight, bias)
    ]
    _normalise_backward[(step * launch.P,)](
        x, weight, bias, gate, rstd, dy, dx, dgate, *parts, launch.T, step, **launch.flags
    )
    sums = (
        None if t is None else p.sum(0).view(t.shape).to(t.dtype)
        for t, p in zip((weight, bias), parts)
    )
    return dx, *sums, dgate


_INPUTS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? gate"
_HOW = "SymInt size, str activation, bool gate_first"


@op("gpu_rms_norm", f"({_INPUTS}, float eps, {_HOW}) -> (Tensor, Tensor)")
def _rms_op(x, weight, bias, gate, eps, *how):
    return _forward(x, weight, bias, gate, eps, x.dtype, *how, True)


@op(
    "gpu_rms_norm_bwd",
    f"({_INPUTS}, Tensor rstd, Tensor dy, {_HOW}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _rms_bwd(*args):
    return _backward(*args, True)


@_rms_op.register_fake
def _(x, weight, bias, gate, eps, size, *_):
    return x.new_empty(x.shape), x.new_empty(x.numel() // size, dtype=torch.float32)


@_rms_bwd.register_fake
def _(*args):
    return [None if t is None else t.new_empty(t.shape) for t in args[:4]]


def _rms_setup(ctx, inputs, output):
    x, weight, bias, gate, _, *ctx.how = inputs
    ctx.save_for_backward(x, weight, bias, gate, output[1])
    ctx.set_materialize_grads(False)


def _rms_backward(ctx, dy, _):
    return _rms_bwd(*ctx.saved_tensors, dy, *ctx.how)


_rms_op.register_autograd(_rms_backward, setup_context=_rms_setup)


_L2 = "silu", False, False  # sums of squares, without a gate


@op("gpu_l2norm", "(Tensor x, float eps, bool wide) -> (Tensor, Tensor)")
def _l2_op(x, eps, wide):
    dtype = torch.float32 if wide else x.dtype
    return _forward(x, None, None, None, eps, dtype, x.shape[-1], *_L2)


@op("gpu_l2norm_bwd", "(Tensor x, Tensor rstd, Tensor dy) -> Tensor")
def _l2_bwd(x, rstd, dy):
    return _backward(x, None, None, None, rstd, dy, x.shape[-1], *_L2)[0]


@_l2_op.register_fake
def _(x, eps, wide):
    y = x.new_empty(x.shape, dtype=torch.float32 if wide else x.dtype)
    return y, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


def _l2_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.set_materialize_grads(False)


_l2_bwd.register_fake(lambda x, rstd, dy: x.new_empty(x.shape))
_l2_op.register_autograd(
    lambda ctx, dy, _: _l2_bwd(*ctx.saved_tensors, dy), setup_context=_l2_setup
)
