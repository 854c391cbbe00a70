"""Mamba2 (arXiv 2405.21060): S_t = exp(-A dt_t) S_{t-1} + (dt_t B_t)^T x_t, y_t = C_t S_t + D x_t:
q = C, k = B, v = dt x."""

from dataclasses import dataclass

import torch
from torch import nn

from lmoe.kernels import families
from lmoe.model.config import opt
from lmoe.model.conv import ShortConv, convolve
from lmoe.model.init import keep_fp32, local
from lmoe.model.mixers.base import entry, output_projection, projections
from lmoe.model.mixers.ssm import SSM, Decay, SSMOptions
from lmoe.model.norm import WideRMSNorm


@dataclass
class Mamba2Options(SSMOptions):
    conv_size: int = opt(4, "taps of the short convolution on x, B and C", least=1)


class Mamba2(SSM):
    """Convolutions and SiLU on x, B and C; RMSNorm over each group's channels of y * silu(z)."""

    Options = Mamba2Options
    family = families.SSD
    cut = ("wx", "wz", "wdt", "conv_x", "decay", "D", "norm")
    tp_plan = dict.fromkeys(cut, 0) | {"wo": 1}
    group_children = ("wB", "wC", "conv_B", "conv_C")

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        groups, heads, self.N, self.P = options.shape(config)
        x, bc = heads * self.P, groups * self.N
        self.wz, self.wx, self.wB, self.wC, self.wdt = projections(config, [x, x, bc, bc, heads])
        self.conv_x, self.conv_B, self.conv_C = (
            ShortConv(width, options.conv_size, bias=True, backend=options.backend)
            for width in (x, bc, bc)
        )
        self.left_rows = options.conv_size - 1
        self.decay = Decay(heads)
        self.D = keep_fp32(nn.Parameter(torch.empty(heads)))
        self.norm = WideRMSNorm(x, groups=groups, gate_first=True)
        self.wo = output_projection(config, x)

    def init_parameter(self, name, tensor, generator):
        tensor.fill_(1.0)  # D

    def project_q(self, x, left, seq, state):
        C = convolve(self.wC, self.conv_C, x, left, seq, entry(state, "conv_C"))
        return C.unflatten(-1, (-1, self.N))[:, self.local_group]

    def project_kv(self, x, left, seq, state, residuals):
        g, dt = self.decay(self.wdt(x))
        inner = convolve(self.wx, self.conv_x, x, left, seq, entry(state, "conv_x"))
        B = convolve(self.wB, self.conv_B, x, left, seq, entry(state, "conv_B"))
        inner = inner.unflatten(-1, (-1, self.P))
        k = B.unflatten(-1, (-1, self.N))[:, self.local_group]
        return {"k": k, "v": (inner * dt[..., None]).to(x.dtype), "g": g, "x": inner}

    def project_gate(self, x):
        return self.wz(x).unflatten(-1, (-1, self.P))

    def scans(self, kv):
        return [self.scan({name: kv[name] for name in ("k", "v", "g")}, scale=1.0)]

    def read(self, q, kv, scans, entering, seq, state):
        o = super().read(q, kv, scans, entering, seq, state)
        return o + (local(self.D)[:, None] * kv["x"]).to(kv["x"].dtype)

    def output(self, o, gate):
        return self.wo(self.norm(o, gate).flatten(-2))
