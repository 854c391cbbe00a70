"""Elementwise work that has a kernel: computed in fp32 (float64 for float64), rounded once, to the
input's dtype."""

import torch
import torch.nn.functional as F

from lmoe.kernels.choice import on_gpu
from lmoe.kernels.norm import compute_dtype


def swiglu(a, b=None):
    """silu(a) * b (arXiv 2002.05202): a, b of one shape, or a [.., 2 C] holds both, one after the
    other -> [.., C]."""
    if on_gpu(a, b):
        from lmoe.kernels.gpu import pointwise as gpu

        return gpu.swiglu(a, b)
    a, b = a.chunk(2, dim=-1) if b is None else (a, b)
    return (F.silu(a.to(compute_dtype(a))) * b).to(a.dtype)


def token_shift(x, positions, halo=None):
    """x [T, D] of the token before each one, zero where positions [T] is 0 (arXiv 2404.05892,
    section 4.1); halo [>= 1, D]: the rows before x, None at the stream's start.
    """
    if on_gpu(x, halo):
        from lmoe.kernels.gpu import pointwise as gpu

        return gpu.token_shift(x, positions, halo)
    halo = x.new_zeros(1, x.shape[1]) if halo is None else halo[-1:].to(x.dtype)
    return torch.cat([halo, x[:-1]]).masked_fill(positions[:, None] == 0, 0)
