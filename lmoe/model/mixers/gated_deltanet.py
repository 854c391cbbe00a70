"""Gated DeltaNet (arXiv 2412.06464): S_t = alpha_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T
v_t, o_t = q_t S_t (eq. 10)."""

from dataclasses import dataclass

import torch

from lmoe.kernels import families
from lmoe.model.config import opt
from lmoe.model.conv import ShortConv, convolve
from lmoe.model.mixers.base import (
    LinearOptions,
    Mixer,
    entry,
    in_heads,
    output_projection,
    projections,
)
from lmoe.model.mixers.ssm import Decay
from lmoe.model.norm import GatedRMSNorm, widened


@dataclass
class GatedDeltaNetOptions(LinearOptions):
    value_heads: int = opt(
        0, "value heads, a multiple of the heads of q and k; 0: as many", least=0
    )
    conv_size: int = opt(4, "taps of the short convolution on q, k and v", least=1)
    A_init_min: float = opt(
        1.0, "rates A of the decay start from U(this, 16), at least 1e-4", least=0, most=16
    )

    def shape(self, config):
        shape = super().shape(config)
        if shape.v_heads % shape.qk_heads:
            raise ValueError(
                f"mixer.value_heads = {shape.v_heads} is not a multiple of the {shape.qk_heads} "
                "heads of q and k"
            )
        return shape


class GatedDeltaNet(Mixer):
    """q, k, v through short convolutions and SiLU, q and k of unit length; RMSNorm per head and a
    SiLU gate on the output."""

    Options = GatedDeltaNetOptions
    presets = {
        "uniform": {},
        "faithful": {"head_dim": 256, "expand_k": 0.75, "expand_v": 1.5, "A_init_min": 0.0},
    }
    family = families.DELTA
    tp_plan = dict.fromkeys(
        ("wq", "wk", "wv", "wg", "wa", "wb", "conv_q", "conv_k", "conv_v", "decay"), 0
    ) | {"wo": 1}

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        heads, value_heads, self.K, self.V = options.shape(config)
        k = heads * self.K
        v = value_heads * self.V
        self.wq, self.wk, self.wv, self.wg = projections(config, [k, k, v, v])
        self.wa, self.wb = projections(config, [value_heads, value_heads])
        self.conv_q, self.conv_k, self.conv_v = (
            ShortConv(width, options.conv_size, backend=options.backend) for width in (k, k, v)
        )
        self.decay = Decay(value_heads, options.A_init_min)
        self.left_rows = options.conv_size - 1
        self.norm = GatedRMSNorm(self.V, options.norm_eps)
        self.wo = output_projection(config, v)

    def project_q(self, x, left, seq, state):
        q = convolve(self.wq, self.conv_q, x, left, seq, entry(state, "conv_q"))
        return in_heads(q, self.K)

    def project_kv(self, x, left, seq, state, residuals):
        k = convolve(self.wk, self.conv_k, x, left, seq, entry(state, "conv_k"))
        v = convolve(self.wv, self.conv_v, x, left, seq, entry(state, "conv_v"))
        return {
            "k": in_heads(k, self.K),
            "v": in_heads(v, self.V),
            "beta": torch.sigmoid(widened(self.wb(x))),
            "g": self.decay(self.wa(x))[0],
        }

    def project_gate(self, x):
        return in_heads(self.wg(x), self.V)

    def constants(self):
        return {"qk_l2norm": True}
