"""Rotary position embedding (arXiv 2104.09864), half-split rotation."""

import math

import torch

from lmoe.kernels.choice import on_gpu


def rope(x, positions, theta):
    """x [T, H, D] rotated by positions [T] in fp32 (float64 for float64), output in x.dtype."""
    if on_gpu(x):
        from lmoe.kernels.gpu import pointwise as gpu

        return gpu.rope(x, positions, theta)
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    # Angles in float64, less whole turns: at position 100,000 one of fp32 is off by a hundredth.
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = torch.remainder(positions.double()[:, None, None] * frequencies, 2 * math.pi).to(wide)
    cos = angles.cos()
    sin = angles.sin()
    a, b = x.to(wide).split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
