"""Rotary position embedding (arXiv 2104.09864), half-split rotation."""

import math

import torch
from torch import Tensor

from lmoe.kernels.choice import on_gpu
from lmoe.kernels.op import op


def rope(x, positions, theta):
    """x [T, H, D] rotated by positions [T] in fp32 (float64 for float64), output in x.dtype."""
    if on_gpu(x):
        from lmoe.kernels.gpu import pointwise as gpu

        return gpu.rope(x, positions, theta)
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    cos, sin = (t[:, None].to(wide) for t in rope_table(positions, theta, half, wide.itemsize == 8))
    a, b = x.to(wide).split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@op("rope_table")
def rope_table(positions: Tensor, theta: float, half: int, double: bool) -> tuple[Tensor, Tensor]:
    """Make cos and sin [T, half] of the angles of positions [T], in fp32 or, if `double`, float64.

    An op of its own: a compiler would work the angles out again for every element of every head.
    """
    # Angles in float64, less whole turns: at position 100,000 one of fp32 is off by a hundredth.
    places = torch.arange(half, device=positions.device, dtype=torch.float64)
    angles = torch.remainder(positions[:, None] * theta ** (-places / half), 2 * math.pi)
    angles = angles if double else angles.float()
    return angles.cos(), angles.sin()


@rope_table.register_fake
def _(positions, theta, half, double):
    dtype = torch.float64 if double else torch.float32
    shape = positions.shape[0], half
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)
