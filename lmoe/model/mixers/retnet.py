"""RetNet (arXiv 2307.08621): S_t = gamma_h S_{t-1} + k_t^T v_t, o_t = q_t S_t, gamma_h = 1 -
2^(-5-h) for head h."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lmoe.kernels import families
from lmoe.model.config import opt
from lmoe.model.mixers.base import LinearOptions, QKVMixer
from lmoe.model.rope import rope


@dataclass
class RetNetOptions(LinearOptions):
    rope: bool = opt(False, "rotary position embedding on q and k, and no SiLU")
    rope_theta: float = opt(10000.0, "base of the rotary frequencies", least=1)

    def shape(self, config):
        shape = super().shape(config)
        if self.rope and shape.K % 2:
            raise ValueError(
                f"mixer.rope needs an even head size, not {shape.K}; choose other mixer.heads or "
                "mixer.rope = false"
            )
        return shape


class RetNet(QKVMixer):
    """Multi-scale retention (eq. 8), without the paper's denominators, which the RMSNorm per head
    absorbs; a SiLU gate on the output."""

    Options = RetNetOptions
    presets = {"uniform": {}, "faithful": {"rope": True, "expand_v": 2.0}}
    family = families.SSD

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        self.register_buffer("log_decay", torch.empty(options.shape(config).qk_heads))

    def reset_buffers(self):
        exponent = -5.0 - torch.arange(len(self.log_decay), dtype=torch.float64)
        self.log_decay.copy_(torch.log1p(-(2.0**exponent)))

    def features(self, x, seq):
        return rope(x, seq.positions, self.options.rope_theta) if self.options.rope else F.silu(x)

    def constants(self):
        return {"gamma": self.log_decay[self.local_heads]}
