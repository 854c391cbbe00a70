"""The short convolution on a GPU (the formula and the arguments: kernels/conv.py)."""

import torch
import triton
import triton.language as tl
from torch.library import custom_op

from lmoe.kernels.conv import is_silu
from lmoe.kernels.gpu.common import contiguous, load_fp32
from lmoe.kernels.gpu.pointwise import (
    activate,
    activate_slope,
    offsets,
    ready,
    tile_of,
    tiles,
    within,
)
from lmoe.kernels.gpu.tiles import cdiv
from lmoe.kernels.op import op


@triton.jit
def _rows(x, halo, s, c, T, C, W: tl.constexpr, HALO: tl.constexpr):
    """Rows s [BT] of the stream, channels c [BC], in fp32: those before 0 from the halo [W-1, C],
    zeros outside."""
    at, columns = offsets(s, c, C), (c < C)[None, :]
    tile = load_fp32(x + at, ((s >= 0) & (s < T))[:, None] & columns)
    if HALO:
        before = ((s < 0) & (s > -W))[:, None] & columns
        tile += load_fp32(halo + at + (W - 1) * C, before)
    return tile


@triton.jit
def _tap(weight, c, d: tl.constexpr, C, W: tl.constexpr):
    """[1, BC] of weight [W, C] (a program's channels lie together): of the token d back."""
    return load_fp32(weight + (W - 1 - d) * C + c, c < C)[None, :]


@triton.jit
def _linear(
    x,
    weight,
    bias,
    halo,
    s,
    shift: tl.constexpr,
    place,
    c,
    T,
    C,
    W: tl.constexpr,
    HALO: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The convolution at the tokens s + shift, whose places in their documents are `place`. Rows
    are counted from s: then the compiler sees which of several calls' rows are the same, and loads
    them once."""
    z = tl.zeros([s.shape[0], c.shape[0]], tl.float32)
    for d in tl.static_range(W):
        row = _rows(x, halo, s + (shift - d), c, T, C, W, HALO)
        z += tl.where((place >= d)[:, None], row, 0.0) * _tap(weight, c, d, C, W)
    if BIAS:
        z += load_fp32(bias + c, c < C)[None, :]
    return z


@triton.jit
def _convolve(
    x,
    weight,
    bias,
    positions,
    halo,
    y,
    T,
    C,
    W: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    HALO: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    t, c = tile_of(C, BT, BC)
    place = tl.load(positions + t, mask=t < T, other=0)
    z = _linear(x, weight, bias, halo, t, 0, place, c, T, C, W, HALO, BIAS)
    z = activate(z, True) if SILU else z
    tl.store(y + offsets(t, c, C), z, mask=within(t, c, T, C))


@triton.jit
def _convolve_backward(
    x,
    weight,
    bias,
    positions,
    halo,
    dy,
    dx,
    dhalo,
    sums,
    T,
    C,
    W: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    HALO: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """dx of the rows s, the halo's among them; sums [tiles of rows, W + 1, C]: the tile's share of
    dweight^T and dbias.

    dx_s takes the gradients of the W tokens from s on, each recomputed here: cheaper than a pass
    that writes them."""
    s, c = tile_of(C, BT, BC)
    tile = tl.program_id(0) // ((C + BC - 1) // BC)
    if HALO:
        s -= W - 1
    columns = (c < C)[None, :]
    dX = tl.zeros([BT, BC], tl.float32)
    for d in tl.static_range(W - 1, -1, -1):  # the token itself last: its gradient serves the sums
        t = s + d
        real = (t >= 0) & (t < T)
        place = tl.load(positions + t, mask=real, other=0)
        dz = load_fp32(dy + offsets(t, c, C), real[:, None] & columns)
        if SILU:
            z = _linear(x, weight, bias, halo, s, d, place, c, T, C, W, HALO, BIAS)
            dz *= activate_slope(z, True)
        dX += tl.where((real & (place >= d))[:, None], dz, 0.0) * _tap(weight, c, d, C, W)
    dz = tl.where(real[:, None], dz, 0.0)
    at = offsets(s, c, C)
    out = sums + tile.to(tl.int64) * (W + 1) * C + c
    for d in tl.static_range(W):
        row = tl.where((real & (place >= d))[:, None], _rows(x, halo, s - d, c, T, C, W, HALO), 0.0)
        tl.store(out + (W - 1 - d) * C, tl.sum(row * dz, 0), mask=c < C)
    if BIAS:
        tl.store(out + W * C, tl.sum(dz, 0), mask=c < C)
    tl.store(dx + at, dX, mask=real[:, None] & columns)
    if HALO:
        tl.store(dhalo + at + (W - 1) * C, dX, mask=(s < 0)[:, None] & columns)


@triton.jit
def _convolve_step(
    x,
    window,
    weight,
    bias,
    y,
    N,
    C,
    W: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """weight [C, W] as it is: a copy would take longer than a step."""
    n, c = tile_of(C, BT, BC)
    mask = within(n, c, N, C)
    at, old = offsets(n, c, C), offsets(n, c, (W - 1) * C)
    token = load_fp32(x + at, mask)
    z = token * load_fp32(weight + c * W + W - 1, c < C)[None, :]
    for j in tl.static_range(W - 1):
        row = tl.load(window + old + j * C, mask=mask, other=0.0)
        z += row.to(tl.float32) * load_fp32(weight + c * W + j, c < C)[None, :]
        if j > 0:
            tl.store(window + old + (j - 1) * C, row, mask=mask)
    if W > 1:
        tl.store(window + old + (W - 2) * C, token, mask=mask)
    if BIAS:
        z += load_fp32(bias + c, c < C)[None, :]
    z = activate(z, True) if SILU else z
    tl.store(y + at, z, mask=mask)


def short_conv(x, weight, bias, positions, halo=None, activation=None):
    """y_t = act(bias + sum_{d < W} weight[:, W-1-d] x_{t-d}), the tap d only where positions[t] >=
    d (arXiv 2312.00752).

    x [T, C]; weight [C, W]; bias [C] or None; positions [T]; halo [W-1, C], the rows before x, or
    None; activation: None or "silu".
    """
    return _conv_op(x, weight, bias, positions, halo, is_silu(activation))


def short_conv_step(x, window, weight, bias, activation=None):
    """One token of `short_conv` for each of N sequences: x [N, C]; window [N, W-1, C], shifted in
    place. Without gradients."""
    return _conv_step(x, window, weight, bias, is_silu(activation))


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor positions, Tensor? halo, bool silu"


def _prepare(x, weight, bias, positions, halo):
    halo = None if halo is None else halo.to(x.dtype)
    return *ready(x=x), *contiguous(weight.t(), bias, positions, halo)


@op("gpu_short_conv", f"({_INPUTS}) -> Tensor")
def _conv_op(x, weight, bias, positions, halo, silu):
    x, *rest = _prepare(x, weight, bias, positions, halo)
    (T, C), y = x.shape, torch.empty_like(x)
    BT, BC, programs = tiles(T, C, 128, 4096)
    _convolve[(programs,)](
        x,
        *rest,
        y,
        T,
        C,
        W=weight.shape[1],
        BT=BT,
        BC=BC,
        HALO=halo is not None,
        BIAS=bias is not None,
        SILU=silu,
        num_warps=8,
    )
    return y


@op("gpu_short_conv_bwd", f"({_INPUTS}, Tensor dy) -> (Tensor, Tensor, Tensor, Tensor)")
def _conv_bwd(x, weight, bias, positions, halo, silu, dy):
    """(dx, dweight, dbias, dhalo), None or empty where there is none."""
    x, *rest = _prepare(x, weight, bias, positions, halo)
    (T, C), W = x.shape, weight.shape[1]
    dx = torch.empty_like(x)
    dhalo = x.new_empty(0) if halo is None else halo.new_empty(halo.shape)
    rows = T if halo is None else T + W - 1
    # Tall tiles, because each writes W + 1 rows of sums; 8 elements a thread, because most of its
    # registers hold neighbouring rows.
    BT, BC, programs = tiles(rows, C, 32, 2048)
    sums = x.new_empty(cdiv(rows, BT), W + 1, C, dtype=torch.float32)
    _convolve_backward[(programs,)](
        x,
        *rest,
        dy.contiguous(),
        dx,
        dhalo,
        sums,
        T,
        C,
        W=W,
        BT=BT,
        BC=BC,
        HALO=halo is not None,
        BIAS=bias is not None,
        SILU=silu,
        num_warps=8,
    )
    *dw, db = sums.sum(0)
    db = None if bias is None else db.to(bias.dtype, copy=True)
    return dx, torch.stack(dw, 1).to(weight.dtype), db, dhalo


@_conv_op.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


@_conv_bwd.register_fake
def _(x, weight, bias, positions, halo, silu, dy):
    return [None if t is None else t.new_empty(t.shape) for t in (x, weight, bias, halo)]


def _conv_setup(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _conv_backward(ctx, dy):
    *grads, dhalo = _conv_bwd(*ctx.saved_tensors, ctx.silu, dy)
    return *grads, None, dhalo


_conv_op.register_autograd(_conv_backward, setup_context=_conv_setup)


@custom_op(
    "lmoe::gpu_short_conv_step",
    mutates_args={"window"},
    schema="(Tensor x, Tensor(a!) window, Tensor weight, Tensor? bias, bool silu) -> Tensor",
)
def _conv_step(x, window, weight, bias, silu):
    (x,), (N, C) = ready(x=x), x.shape
    rows, weight, bias = contiguous(window, weight, bias)
    y = torch.empty_like(x)
    BT, BC, programs = tiles(N, C, 256, 1024)
    _convolve_step[(programs,)](
        x,
        rows,
        weight,
        bias,
        y,
        N,
        C,
        W=weight.shape[1],
        BT=BT,
        BC=BC,
        BIAS=bias is not None,
        SILU=silu,
        num_warps=4,
    )
    if rows is not window:
        window.copy_(rows)
    return y


@_conv_step.register_fake
def _(x, window, weight, bias, silu):
    return x.new_empty(x.shape)
