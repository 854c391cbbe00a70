"""Mamba2 (arXiv 2405.21060): S_t = exp(-A dt_t) S_{t-1} + (dt_t B_t)^T x_t, y_t = C_t S_t + D x_t:
q = C, k = B, v = dt x."""

from dataclasses import dataclass

from lmoe.model.config import opt
from lmoe.model.conv import ShortConv, convolve
from lmoe.model.init import fp32_parameter
from lmoe.model.mixers.base import entry, in_heads, output_projection
from lmoe.model.mixers.ssm import SSM, Decay, SSMOptions
from lmoe.model.norm import WideRMSNorm


@dataclass
class Mamba2Options(SSMOptions):
    conv_size: int = opt(4, "taps of the short convolution on x, B and C", least=1)


class Mamba2(SSM):
    """Convolutions and SiLU on x, B and C; RMSNorm over each group's channels of y * silu(z)."""

    Options = Mamba2Options
    cut = ("wx", "wz", "wdt", "conv_x", "decay", "D", "norm")
    tp_plan = dict.fromkeys(cut, 0) | {"wo": 1}
    group_children = (*SSM.group_children, "conv_B", "conv_C")

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        groups, heads, N, P = options.shape(config)
        x = heads * P
        bc = groups * N
        self.conv_x, self.conv_B, self.conv_C = (
            ShortConv(width, options.conv_size, bias=True, backend=options.backend)
            for width in (x, bc, bc)
        )
        self.left_rows = options.conv_size - 1
        self.decay = Decay(heads)
        self.D = fp32_parameter(heads)
        self.norm = WideRMSNorm(x, options.norm_eps, groups=groups, gate_first=True)
        self.wo = output_projection(config, x)

    def init_parameter(self, name, tensor, generator):
        tensor.fill_(1.0)  # D

    def project_q(self, x, left, seq, state):
        C = convolve(self.wC, self.conv_C, x, left, seq, entry(state, "conv_C"))
        return self.in_groups(C)

    def project_kv(self, x, left, seq, state, residuals):
        g, dt = self.decay(self.wdt(x))
        inner = convolve(self.wx, self.conv_x, x, left, seq, entry(state, "conv_x"))
        B = convolve(self.wB, self.conv_B, x, left, seq, entry(state, "conv_B"))
        inner = in_heads(inner, self.P)
        v = (inner * dt[..., None]).to(x.dtype)
        return {"k": self.in_groups(B), "v": v, "g": g, "x": inner}
