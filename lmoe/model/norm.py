"""Norms of the model: statistics and weights in fp32 whatever the compute dtype."""

import torch
from torch import nn

from lmoe.kernels.norm import gated_rms_norm, rms_norm
from lmoe.model.init import keep_fp32


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467); output in x.dtype."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = keep_fp32(nn.Parameter(torch.empty(dim)))

    def init_parameter(self, name, tensor, generator):
        tensor.fill_(1.0)

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """RMSNorm over the value dim of every head, times activation(gate): o [T, H, V], gate [T, H, V] or None."""

    def __init__(self, dim, eps=1e-5, activation="silu"):
        super().__init__(dim, eps)
        self.activation = activation

    def forward(self, o, gate=None):
        return gated_rms_norm(o, self.weight, gate, self.eps, self.activation)
