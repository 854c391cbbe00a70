"""Share between all kernels: documents, rows, precision."""

import contextlib
import os
from typing import NamedTuple

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


class Chunk(NamedTuple):
    """Locate C tokens and a head in tensors [B, T, heads, D] and [B, NC, heads, ..]."""

    base: tl.tensor  # int64: the chunk's first row, of B T
    first: tl.tensor  # its first token
    place: tl.tensor  # [C]: 0, 1, ..
    left: tl.tensor  # how many tokens there are from the first one on
    h: tl.tensor
    index: tl.tensor  # int64: of the chunk and the head together, of B NC heads


@triton.jit
def chunk_at(b, c, h, T, NC, HEADS: tl.constexpr, C: tl.constexpr):
    """Locate chunk c of sequence b for head h. Constants are no part of it: those that a jitted
    function returns are none to its caller."""
    base, index = (b * T + c * C).to(tl.int64), (b * NC + c).to(tl.int64) * HEADS + h
    return Chunk(base, c * C, tl.arange(0, C), T - c * C, h, index)


@triton.jit
def chunk_of(program, T, NC, HEADS: tl.constexpr, C: tl.constexpr):
    """Locate the chunk of a program where there is one for each chunk and head."""
    h, c, b = program % HEADS, program // HEADS % NC, program // HEADS // NC
    return chunk_at(b, c, h, T, NC, HEADS, C)


@triton.jit
def of_head(chunk, h):
    """Locate the same tokens in a tensor of other heads [B, T, heads, D]."""
    return Chunk(chunk.base, chunk.first, chunk.place, chunk.left, h, chunk.index)


@triton.jit
def advanced(chunk, rows):
    """Locate what lies so many rows later in a tensor [.., B, T, heads, D]."""
    return Chunk(chunk.base + rows, chunk.first, chunk.place, chunk.left, chunk.h, chunk.index)


@triton.jit
def load_fp32(at, mask):
    """Load what is at these pointers, in fp32; zero outside the mask."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_places(x, chunk, place, d, HEADS: tl.constexpr, D: tl.constexpr):
    """Load [C, BD] of a tensor [B, T, HEADS, D]: the channels d of the tokens at these places in
    the chunk, zero where the stream has ended."""
    mask = (place < chunk.left)[:, None]
    if D // d.shape[0] * d.shape[0] != D:
        mask &= (d < D)[None, :]
    return tl.load(
        x + (chunk.base * HEADS + chunk.h) * D + (place * (HEADS * D))[:, None] + d[None, :],
        mask=mask,
        other=0.0,
    )


@triton.jit
def load_rows(x, chunk, d, HEADS: tl.constexpr, D: tl.constexpr):
    """Load those of all tokens of the chunk."""
    return load_places(x, chunk, chunk.place, d, HEADS, D)


@triton.jit
def store_rows(x, value, chunk, d, HEADS: tl.constexpr, D: tl.constexpr):
    """Store [C, BD] there, rounded to the tensor's dtype."""
    place = chunk.place
    tl.store(
        x + (chunk.base * HEADS + chunk.h) * D + (place * (HEADS * D))[:, None] + d[None, :],
        value,
        mask=(place < chunk.left)[:, None] & (d < D)[None, :],
    )


@triton.jit
def of_tokens(x, chunk, HEADS: tl.constexpr):
    """Point [C] into a tensor [B, T, HEADS]."""
    return x + chunk.base * HEADS + chunk.h + chunk.place * HEADS


@triton.jit
def diagonal(A, place):
    """[C]: that of A [C, C], in fp32."""
    return tl.sum(tl.where(place[:, None] == place[None, :], A.to(tl.float32), 0.0), 1)


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
