"""Elementwise kernels: SwiGLU, rotary positions, token shift. Computed in fp32, rounded once, to
the input's dtype.

Every function of this file, norm.py and conv.py stands for a portable one and takes its arguments.
Each is one registered op forward and one backward: torch.compile and recomputation see single
nodes. The same inputs give the same bits: nothing is summed by atomics, and no grid depends on the
GPU. Offsets are 64 bits wide.
"""

import math

import torch
import triton
import triton.language as tl

from lmoe.kernels.choice import DTYPES
from lmoe.kernels.gpu.common import INTERPRETED, contiguous, load_fp32
from lmoe.kernels.gpu.tiles import cdiv, power_of_2
from lmoe.kernels.op import op

HEADS = 4  # that share a program's angles


def ready(**tensors):
    """List the tensors, contiguous, None for None; ValueError for what the kernels can't take."""
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: {x.dtype}; the triton backend takes bfloat16 and float32")
        if x.device.type == "cpu" and not INTERPRETED:
            raise ValueError(
                "backend: triton runs on a GPU; take the portable backend (or set"
                " TRITON_INTERPRET=1, to debug kernels)"
            )
    return contiguous(*tensors.values())


def tiles(rows, width, widest, elements):
    """(BT, BC, programs) for tiles [BT, BC] of `elements` that cover [rows, width], the tiles of a
    row next to each other."""
    BC = min(power_of_2(width), widest)
    BT = max(1, elements // BC)
    return BT, BC, cdiv(rows, BT) * cdiv(width, BC)


@triton.jit
def tile_of(C, BT: tl.constexpr, BC: tl.constexpr):
    """This program's rows [BT] and columns [BC] in the grid of `tiles`."""
    across = (C + BC - 1) // BC
    t = tl.program_id(0) // across * BT + tl.arange(0, BT)
    return t, tl.program_id(0) % across * BC + tl.arange(0, BC)


@triton.jit
def offsets(t, c, STRIDE):
    """Locate columns c of rows t, which are STRIDE apart: [BT, BC] int64."""
    return t.to(tl.int64)[:, None] * STRIDE + c[None, :]


@triton.jit
def within(t, c, T, C):
    """Tell which of rows t and columns c are of [T, C]: [BT, BC]."""
    return (t < T)[:, None] & (c < C)[None, :]


@triton.jit
def activate(x, SILU: tl.constexpr):
    """silu or sigmoid."""
    s = tl.sigmoid(x)
    return x * s if SILU else s


@triton.jit
def activate_slope(x, SILU: tl.constexpr):
    s = tl.sigmoid(x)
    return s * (1 + x * (1 - s)) if SILU else s * (1 - s)


# --------------------------------------------------------------------------------------------------
# SwiGLU


@triton.jit
def _swiglu(a, b, y, T, C, STRIDE, BT: tl.constexpr, BC: tl.constexpr):
    """Rows of a and b are STRIDE apart: two tensors, or the halves of one."""
    t, c = tile_of(C, BT, BC)
    at, mask = offsets(t, c, STRIDE), within(t, c, T, C)
    A, B = load_fp32(a + at, mask), load_fp32(b + at, mask)
    tl.store(y + offsets(t, c, C), activate(A, True) * B, mask=mask)


@triton.jit
def _swiglu_backward(a, b, dy, da, db, T, C, STRIDE, BT: tl.constexpr, BC: tl.constexpr):
    t, c = tile_of(C, BT, BC)
    at, mask = offsets(t, c, STRIDE), within(t, c, T, C)
    A, B = load_fp32(a + at, mask), load_fp32(b + at, mask)
    dY = load_fp32(dy + offsets(t, c, C), mask)
    tl.store(da + at, dY * B * activate_slope(A, True), mask=mask)
    tl.store(db + at, dY * activate(A, True), mask=mask)


def swiglu(a, b=None):
    """silu(a) * b (arXiv 2002.05202): a, b of one shape and dtype, or a [.., 2 C] holds both, one
    after the other -> [.., C]."""
    assert b is None or (a.shape == b.shape and a.dtype == b.dtype)
    return _swiglu_op(a, b)


@op("gpu_swiglu", "(Tensor a, Tensor? b) -> Tensor")
def _swiglu_op(a, b):
    a, b = ready(a=a, b=b)
    y = a.new_empty(_half(a, b))
    T, C, BT, BC, programs = _swiglu_tiles(y)
    _swiglu[(programs,)](*_pair(a, b), y, T, C, a.shape[-1], BT=BT, BC=BC, num_warps=4)
    return y


@op("gpu_swiglu_bwd", "(Tensor a, Tensor? b, Tensor dy) -> (Tensor, Tensor)")
def _swiglu_bwd(a, b, dy):
    """(da, db), db None where a holds both."""
    a, b, dy = ready(a=a, b=b, dy=dy)
    da = torch.empty_like(a)
    db = None if b is None else torch.empty_like(b)
    T, C, BT, BC, programs = _swiglu_tiles(dy)
    _swiglu_backward[(programs,)](
        *_pair(a, b), dy, *_pair(da, db), T, C, a.shape[-1], BT=BT, BC=BC, num_warps=4
    )
    return da, db


def _half(a, b):
    return a.shape if b is not None else (*a.shape[:-1], a.shape[-1] // 2)


def _pair(a, b):
    return (a, b) if b is not None else a.chunk(2, dim=-1)


def _swiglu_tiles(y):
    C = y.shape[-1]
    T = y.numel() // C
    return T, C, *tiles(T, C, 512, 2048)


_swiglu_op.register_fake(lambda a, b: a.new_empty(_half(a, b)))
_swiglu_bwd.register_fake(
    lambda a, b, dy: (a.new_empty(a.shape), None if b is None else a.new_empty(b.shape))
)
_swiglu_op.register_autograd(
    lambda ctx, dy: _swiglu_bwd(*ctx.saved_tensors, dy),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


# --------------------------------------------------------------------------------------------------
# Rotary positions


@triton.jit
def _rotate(
    x,
    positions,
    y,
    T,
    OCTAVES: tl.constexpr,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    INVERSE: tl.constexpr,
):
    groups: tl.constexpr = (H + HEADS - 1) // HEADS
    group, d = tl.program_id(0) % groups, tl.arange(0, BD)
    t = tl.program_id(0) // groups * BT + tl.arange(0, BT)
    # Angles in float64, less whole turns: in fp32 a position of 10^5 would have angles wrong by
    # 10^-2. All heads of a program share them.
    frequencies = tl.exp2(d.to(tl.float64) * tl.full([BD], -OCTAVES / HALF, tl.float64))
    turns = (
        tl.load(positions + t, mask=t < T, other=0).to(tl.float64)[:, None]
        * (frequencies * 0.15915494309189535)[None, :]
    )
    angles = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
    cos, sin = tl.cos(angles), tl.sin(angles)
    if INVERSE:
        sin = -sin
    mask = within(t, d, T, HALF)
    for h in range(group * HEADS, tl.minimum(group * HEADS + HEADS, H)):
        at = (t.to(tl.int64) * H + h)[:, None] * (2 * HALF) + d[None, :]
        a, b = load_fp32(x + at, mask), load_fp32(x + at + HALF, mask)
        tl.store(y + at, a * cos - b * sin, mask=mask)
        tl.store(y + at + HALF, b * cos + a * sin, mask=mask)


def rope(x, positions, theta):
    """x [T, H, D] rotated by positions [T] (arXiv 2104.09864, half-split)."""
    assert x.shape[-1] % 2 == 0
    return _rope_op(x, positions, float(theta), False)


@op("gpu_rope", "(Tensor x, Tensor positions, float theta, bool inverse) -> Tensor")
def _rope_op(x, positions, theta, inverse):
    (x,), (T, H, D) = ready(x=x), x.shape
    y = torch.empty_like(x)
    BD = power_of_2(D // 2)
    BT = max(1, 1024 // BD)
    _rotate[(cdiv(T, BT) * cdiv(H, HEADS),)](
        x,
        positions.contiguous(),
        y,
        T,
        OCTAVES=math.log2(theta),
        H=H,
        HALF=D // 2,
        HEADS=HEADS,
        BT=BT,
        BD=BD,
        INVERSE=inverse,
        num_warps=4,
    )
    return y


def _rope_setup(ctx, inputs, output):
    _, positions, ctx.theta, ctx.inverse = inputs
    ctx.save_for_backward(positions)


_rope_op.register_fake(lambda x, *_: x.new_empty(x.shape))
_rope_op.register_autograd(
    lambda ctx, dy: _rope_op(dy, *ctx.saved_tensors, ctx.theta, not ctx.inverse),
    setup_context=_rope_setup,
)


# --------------------------------------------------------------------------------------------------
# Token shift


@triton.jit
def _shift(
    x,
    halo,
    positions,
    y,
    T,
    C,
    BT: tl.constexpr,
    BC: tl.constexpr,
    HALO: tl.constexpr,
    BACK: tl.constexpr,
):
    """y_t = x_{t-1} where token t is not its document's first; BACK: y_t = x_{t+1} where token t+1
    is not."""
    t, c = tile_of(C, BT, BC)
    later, source = (t + 1, t + 1) if BACK else (t, t - 1)
    linked = tl.load(positions + later, mask=later < T, other=0) != 0
    row, columns = offsets(source, c, C), (c < C)[None, :]
    tile = tl.load(x + row, mask=(linked & (source >= 0))[:, None] & columns, other=0.0)
    if HALO:
        tile += tl.load(halo + row + C, mask=(linked & (source < 0))[:, None] & columns, other=0.0)
    tl.store(y + offsets(t, c, C), tile, mask=within(t, c, T, C))


def token_shift(x, positions, halo=None):
    """x [T, D] of the token before each one, zero where positions [T] is 0 (arXiv 2404.05892,
    section 4.1); halo [>= 1, D]: the rows before x, None at the stream's start.
    """
    return _shift_op(x, positions, None if halo is None else halo[-1:])


def _shifted(x, halo, positions, back):
    (x,), (T, C) = ready(x=x), x.shape
    y = torch.empty_like(x)
    halo, positions = contiguous(None if halo is None else halo.to(x.dtype), positions)
    BT, BC, programs = tiles(T, C, 256, 2048)
    _shift[(programs,)](
        x,
        halo,
        positions,
        y,
        T,
        C,
        BT=BT,
        BC=BC,
        HALO=halo is not None,
        BACK=back,
        num_warps=4,
    )
    return y


@op("gpu_token_shift", "(Tensor x, Tensor positions, Tensor? halo) -> Tensor")
def _shift_op(x, positions, halo):
    return _shifted(x, halo, positions, False)


@op("gpu_token_shift_bwd", "(Tensor positions, Tensor dy) -> Tensor")
def _shift_bwd(positions, dy):
    return _shifted(dy, None, positions, True)


def _shift_setup(ctx, inputs, output):
    _, positions, halo = inputs
    ctx.save_for_backward(positions)
    ctx.halo_dtype = None if halo is None else halo.dtype


def _shift_backward(ctx, dy):
    (positions,), dhalo = ctx.saved_tensors, None
    if ctx.halo_dtype is not None:
        dhalo = dy[:1].masked_fill(positions[:1, None] == 0, 0).to(ctx.halo_dtype)
    return _shift_bwd(positions, dy), None, dhalo


_shift_op.register_fake(lambda x, *_: x.new_empty(x.shape))
_shift_bwd.register_fake(lambda positions, dy: dy.new_empty(dy.shape))
_shift_op.register_autograd(_shift_backward, setup_context=_shift_setup)
