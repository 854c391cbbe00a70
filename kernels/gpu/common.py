"""Share between all kernels: documents, rows, precision."""

import contextlib
import os

import torch
import triton
import triton.language as tl

from lmoe.kernels.gpu.tiles import cdiv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = tl.constexpr(INTERPRETED)
# A decay below this is nothing, to the last bit of fp32 and beyond; sums of these are still well
# within its range.
NOTHING = tl.constexpr(-30.0)


@triton.jit
def _starts(cu, out, T, N, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + N
    for _ in range(STEPS):  # the last border at or before t; borders [low] <= t < [high]
        middle = (low + high) // 2
        found = tl.load(cu + middle) <= t
        low, high = tl.where(found, middle, low), tl.where(found, high, middle)
    tl.store(out + t, tl.load(cu + low).to(tl.int32), mask=t < T)


def document_starts(cu_seqlens, T):
    """[T] int32: where the document of each token of the stream starts."""
    starts = torch.empty(T, dtype=torch.int32, device=cu_seqlens.device)
    N = len(cu_seqlens) - 1
    _starts[(cdiv(T, 256),)](cu_seqlens, starts, T, N, BLOCK=256, STEPS=max(1, N.bit_length()))
    return starts


@triton.jit
def mm(a, b, ROUND: tl.constexpr):
    """a @ b in fp32: of bf16 operands if ROUND, else exact."""
    if ROUND:
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if not EMULATED:
            return tl.dot(a, b)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def sums(which, x, ROUND: tl.constexpr):
    """which [M, C] of ones and zeros @ x [C, D], to fp32's precision: as products of x's three bf16
    parts if ROUND."""
    if not ROUND:
        return mm(tl.where(which, 1.0, 0.0), x, False)
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    ones = tl.where(which, 1.0, 0.0).to(tl.bfloat16)
    return mm(ones, high, True) + (
        mm(ones, middle, True) + mm(ones, rest - middle.to(tl.float32), True)
    )


@triton.jit
def load_rows(x, base, h, place, d, left, HEADS: tl.constexpr, D: tl.constexpr):
    """[C, BD] of a tensor [.., HEADS, D]: the channels d of head h of the tokens base + place
    (base: int64), zero from `left` on."""
    mask = (place < left)[:, None]
    if D // d.shape[0] * d.shape[0] != D:
        mask &= (d < D)[None, :]
    return tl.load(
        x + (base * HEADS + h) * D + (place * (HEADS * D))[:, None] + d[None, :],
        mask=mask,
        other=0.0,
    )


@triton.jit
def store_rows(x, value, base, h, place, d, left, HEADS: tl.constexpr, D: tl.constexpr):
    """The same way back, rounded to the tensor's dtype."""
    mask = (place < left)[:, None] & (d < D)[None, :]
    tl.store(
        x + (base * HEADS + h) * D + (place * (HEADS * D))[:, None] + d[None, :],
        value.to(x.dtype.element_ty),
        mask=mask,
    )


@contextlib.contextmanager
def without_launches():
    """Wrappers make the tensors that they make, and launch nothing."""
    kernels = type(_starts)
    run = kernels.run
    kernels.run = lambda *args, **kwargs: None
    try:
        yield
    finally:
        kernels.run = run


def contiguous(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]
