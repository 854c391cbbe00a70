"""Rotary position embedding (arXiv 2104.09864), half-split rotation."""

import torch


def rope(x, positions, theta):
    """x [T, H, D] rotated by positions [T]; angles and rotation in fp32 (float64 for float64), output in x.dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angles = positions.to(wide)[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(wide).split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
