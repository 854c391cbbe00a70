"""Norms of the model: statistics and weights in fp32 whatever the compute dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe.kernels.choice import on_gpu
from lmoe.kernels.norm import ACTIVATIONS, compute_dtype, gated_rms_norm, rms_norm
from lmoe.model.init import fp32_parameter, local


def widened(x: Tensor) -> Tensor:
    """Cast x to fp32 if it is narrower; float64 stays."""
    return x.to(compute_dtype(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467); output in
    x.dtype. affine: with a weight."""

    def __init__(self, dim, eps=1e-5, affine=True):
        super().__init__()
        self.eps = eps
        self.weight = fp32_parameter(dim) if affine else None

    def init_parameter(self, name, tensor, generator):
        tensor.fill_(1.0)

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """RMSNorm with the weight 1 + w, w starting from zero (as in Gemma, arXiv 2403.08295)."""

    def init_parameter(self, name, tensor, generator):
        tensor.zero_()

    def forward(self, x):
        return rms_norm(x, 1 + self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm over the value dim of every head, times silu(gate): o [T, H, V], gate [T, H, V] or
    None."""

    def forward(self, o, gate=None):
        return gated_rms_norm(o, self.weight, gate, self.eps)


class WideRMSNorm(RMSNorm):
    """RMSNorm over all heads together, or over `groups` of neighbouring heads, with a gate: o [T,
    H, V], gate [T, H, V] or None.

    The gate comes after the norm, or (gate_first, as in Mamba2) before it. A rank of tensor
    parallelism has some of the heads and of the weights; where groups span ranks, this one's is
    number `group`, and `sum_over_heads`
    sums squares [T, groups] over all of them.
    """

    group = 0
    sum_over_heads = None

    def __init__(self, width, eps=1e-5, activation="silu", groups=1, gate_first=False):
        super().__init__(width, eps)
        self.groups = groups
        self.size = width // groups
        self.activation = activation
        self.gate_first = gate_first

    def forward(self, o, gate=None):
        weight = local(self.weight)
        if weight.numel() >= self.size and on_gpu(o, weight, gate, width=self.size):
            from lmoe.kernels.gpu import norm as gpu

            return gpu.wide_rms_norm(
                o, weight, gate, self.eps, self.size, self.activation, self.gate_first
            )
        wide = widened(o)
        gate = 1 if gate is None else ACTIVATIONS[self.activation](gate.to(wide.dtype))
        x = (wide * gate if self.gate_first else wide).flatten(-2)
        here = min(self.size, x.shape[-1])
        x = x.unflatten(-1, (-1, here))
        squares = x.square().sum(-1, keepdim=True)
        if here < self.size:
            place = F.pad(squares.squeeze(-1), (self.group, self.groups - 1 - self.group))
            squares = self.sum_over_heads(place)[:, self.group : self.group + 1, None]
        y = (x * torch.rsqrt(squares / self.size + self.eps)).flatten(-2) * weight
        y = y.view_as(o)
        return (y if self.gate_first else y * gate).to(o.dtype)


class HeadGroupNorm(nn.Module):
    """GroupNorm over each head, (o - mean) / sqrt(var + eps) * weight + bias, times
    activation(gate) (RWKV): o, gate [T, H, V]."""

    scale = 1.0  # what the weights start from

    def __init__(self, width, eps, activation):
        super().__init__()
        self.eps = eps
        self.activation = activation
        self.weight, self.bias = (fp32_parameter(width) for _ in range(2))

    def init_parameter(self, name, tensor, generator):
        tensor.fill_(self.scale if name == "weight" else 0.0)

    def forward(self, o, gate):
        weight = local(self.weight)
        bias = local(self.bias)
        if on_gpu(o, weight, bias, gate, width=o.shape[-1]):
            from lmoe.kernels.gpu import norm as gpu

            return gpu.head_group_norm(o, weight, bias, gate, self.eps, self.activation)
        wide = widened(o)
        wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        wide = wide * weight.view(o.shape[-2:]) + bias.view(o.shape[-2:])
        return (wide * ACTIVATIONS[self.activation](gate.to(wide.dtype))).to(o.dtype)
