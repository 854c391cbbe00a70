"""Normalisations: statistics in fp32 (float64 for float64), results in the input's dtype."""

import torch
import torch.nn.functional as F

from lmoe.kernels.choice import on_gpu

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def compute_dtype(x):
    """fp32 for anything narrower, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def cast(x, dtype):
    """x in `dtype`, without a call where it is that already. For results of an autograd.Function:
    torch 2.11 compiles one that returns an alias of an intermediate result, as an idle x.to(dtype)
    does, to wrong gradients (pytorch#180642)."""
    return x if x.dtype == dtype else x.to(dtype)


def l2norm(x, eps=1e-6, wide=False):
    """x / sqrt(sum x^2 + eps) over the last dim (keys of the delta rule: arXiv 2406.06484, section
    3.3); wide: at least an fp32 result."""
    if on_gpu(x, width=x.shape[-1]):
        from lmoe.kernels.gpu import norm as gpu

        return gpu.l2norm(x, eps, wide)
    y = x.to(compute_dtype(x))
    y = y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)
    return y if wide else y.to(x.dtype)


def rms_norm(x, weight, eps):
    """x / sqrt(mean x^2 + eps) * weight over the last dim (arXiv 1910.07467); weight [D] or
    None."""
    return gated_rms_norm(x, weight, None, eps)


def gated_rms_norm(o, weight, gate, eps, activation="silu"):
    """rms_norm(o) * activation(gate): o [.., V], weight [V] or None, gate [.., V] or None; the
    gate's activation in fp32 too (arXiv 2312.06635, section 4.4).
    """
    if on_gpu(o, weight, gate, width=o.shape[-1]):
        from lmoe.kernels.gpu import norm as gpu

        return gpu.gated_rms_norm(o, weight, gate, eps, activation)
    wide = o.to(compute_dtype(o))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide = wide * weight
    if gate is not None:
        wide = wide * ACTIVATIONS[activation](gate.to(wide.dtype))
    return wide.to(o.dtype)
