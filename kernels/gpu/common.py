"""What all kernels share: documents, precision, and sizes of tiles."""

import functools
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A decay below this is nothing, to the last bit of fp32 and beyond; sums of these are still well within its range.
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
    _starts[(triton.cdiv(T, 256),)](cu_seqlens, starts, T, N, BLOCK=256, STEPS=max(1, N.bit_length()))
    return starts


@triton.jit
def mm(a, b, ROUND: tl.constexpr):
    """a @ b in fp32: of bf16 operands if ROUND, else exact."""
    if ROUND:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


def tile(size, most):
    """The tile of a dim: a power of two from 16 up to `most`."""
    return min(max(16, triton.next_power_of_2(size)), most)


@functools.cache
def _processors(index):
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x):
    """Multiprocessors of a tensor's GPU; of an H100 where there is none."""
    return _processors(x.device.index) if x.device.type == "cuda" else 132


def contiguous(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]
