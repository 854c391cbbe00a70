"""Lightning attention (arXiv 2401.04658, MiniMax-01 2501.08313): S_t = lambda S_{t-1} + k_t^T v_t,
o_t = q_t S_t, lambda fixed per head."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lmoe.kernels import families
from lmoe.model.config import opt
from lmoe.model.mixers.base import LinearOptions, QKVMixer

SLOPES = ("minimax", "transnormer", "alibi")


def alibi(heads):
    """2^(-8 h / H) for h = 1 .. H; where H is no power of two, those of the one below, then every
    second of the one above."""
    power = 2 ** (heads.bit_length() - 1)
    places = [*range(1, power + 1), *(h / 2 for h in range(1, 2 * power, 2))]
    return [2 ** (-8 * h / power) for h in places[:heads]]


def decay_slopes(kind, heads, layer, layers):
    """-log lambda of every head: float64 [H]."""
    if kind == "transnormer":
        return [8 * h / heads * (1 - layer / layers) for h in range(heads)]
    factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5 if kind == "minimax" else 1.0
    return [slope * factor for slope in alibi(heads)]


@dataclass
class LightningOptions(LinearOptions):
    slopes: str = opt(
        "minimax",
        "decays: minimax (ALiBi slopes that fall with the depth), transnormer or alibi (the same in"
        " all layers)",
        choices=SLOPES,
    )
    full_width_norm: bool = opt(
        False, "RMSNorm over all heads together and a sigmoid gate, not per head and SiLU"
    )
    silu_v: bool = opt(False, "SiLU on v too, not only on q and k; q k unscaled")


class Lightning(QKVMixer):
    """SiLU on q and k; a decay that depends on head and layer; norm and gate on the output."""

    Options = LightningOptions
    presets = {
        "uniform": {},
        "faithful": {"full_width_norm": True, "silu_v": True, "norm_eps": 1e-6},
    }
    family = families.SSD
    wide_activation = "sigmoid"

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared, wide=options.full_width_norm)
        self.register_buffer("log_decay", torch.empty(options.shape(config).qk_heads))

    def reset_buffers(self):
        slopes = decay_slopes(
            self.options.slopes, len(self.log_decay), self.layer, self.config.layers
        )
        self.log_decay.copy_(-torch.tensor(slopes, dtype=torch.float64))

    def features(self, x, seq):
        return F.silu(x)

    def project_kv(self, x, left, seq, state, residuals):
        inputs = super().project_kv(x, left, seq, state, residuals)
        return inputs | {"v": F.silu(inputs["v"])} if self.options.silu_v else inputs

    def constants(self):
        return {"gamma": self.log_decay[self.local_heads]} | (
            {"scale": 1.0} if self.options.silu_v else {}
        )
