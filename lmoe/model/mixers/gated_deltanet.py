"""Gated DeltaNet (arXiv 2412.06464): S_t = alpha_t (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T
v_t, o_t = q_t S_t (eq. 10)."""

from dataclasses import dataclass

import torch

from lmoe.model.config import opt
from lmoe.model.mixers.base import LinearOptions, Mixer, ShortConv, output_projection, projections
from lmoe.model.mixers.decay import Decay
from lmoe.model.norm import GatedRMSNorm


@dataclass
class GatedDeltaNetOptions(LinearOptions):
    value_heads: int = opt(0, "value heads, a multiple of the heads of q and k; 0: as many")
    conv_width: int = opt(4, "taps of the short convolution on q, k and v")

    def shape(self, model):
        if self.conv_width < 1:
            raise ValueError(f"mixer.conv_width = {self.conv_width} must be at least 1")
        heads, value_heads, *sizes = super().shape(model)
        if value_heads % heads:
            raise ValueError(
                f"mixer.value_heads = {value_heads} is not a multiple of the {heads} heads of q"
                " and k"
            )
        return heads, value_heads, *sizes


class GatedDeltaNet(Mixer):
    """q, k, v through short convolutions and SiLU, q and k of unit length; RMSNorm per head and a
    SiLU gate on the output."""

    Options = GatedDeltaNetOptions
    presets = {"uniform": {}, "faithful": {"expand_k": 0.75, "expand_v": 1.5}}
    family = "delta"
    shards = dict.fromkeys(
        ("wq", "wk", "wv", "wg", "wa", "wb", "conv_q", "conv_k", "conv_v", "decay"), 0
    ) | {"wo": 1}

    def __init__(self, model, options, layer=0, shared=None):
        super().__init__(model, options, layer, shared)
        heads, value_heads, self.K, self.V = options.shape(model)
        widths = [heads * self.K, heads * self.K, value_heads * self.V, value_heads * self.V]
        self.wq, self.wk, self.wv, self.wg = projections(model, widths)
        self.wa, self.wb = projections(model, [value_heads, value_heads])
        self.conv_q, self.conv_k, self.conv_v = (
            ShortConv(width, options.conv_width, backend=options.backend) for width in widths[:3]
        )
        self.decay = Decay(value_heads)
        self.halo_rows = options.conv_width - 1
        self.norm = GatedRMSNorm(self.V)
        self.wo = output_projection(model, value_heads * self.V)

    def project_q(self, x, halo, seq, state):
        return self.convolved("q", x, halo, seq, state).unflatten(-1, (-1, self.K))

    def convolved(self, name, x, halo, seq, state):
        """The projection w<name> of x through its convolution. The rows before x are projected here
        too, not exchanged three times."""
        project, key = getattr(self, f"w{name}"), f"conv_{name}"
        halo = None if halo is None else project(halo)
        return getattr(self, key)(project(x), halo, seq, state, key)

    def project_kv(self, x, halo, seq, state):
        return {
            "k": self.convolved("k", x, halo, seq, state).unflatten(-1, (-1, self.K)),
            "v": self.convolved("v", x, halo, seq, state).unflatten(-1, (-1, self.V)),
            "beta": torch.sigmoid(self.wb(x).to(torch.promote_types(x.dtype, torch.float32))),
            "g": self.decay(self.wa(x))[0],
        }

    def project_gate(self, x):
        return self.wg(x).unflatten(-1, (-1, self.V))

    def scan_options(self):
        return {"qk_l2norm": True}

    def output(self, o, gate):
        return self.wo(self.norm(o, gate).flatten(-2))
