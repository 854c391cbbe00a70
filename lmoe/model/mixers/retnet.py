"""RetNet (arXiv 2307.08621): S_t = gamma_h S_{t-1} + k_t^T v_t, o_t = q_t S_t, gamma_h = 1 -
2^(-5-h) for head h."""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lmoe.kernels import families
from lmoe.model.config import opt
from lmoe.model.mixers.base import LinearOptions, QKVMixer
from lmoe.model.mixers.phases import rotate
from lmoe.model.norm import GatedRMSNorm
from lmoe.model.rope import rope


@dataclass
class RetNetOptions(LinearOptions):
    rope: bool = opt(False, "rotary position embedding on q and k, and no SiLU")
    rope_theta: float = opt(10000.0, "base of the rotary frequencies", least=1)
    rope_interleaved: bool = opt(
        False, "rope turns neighbours in pairs, by frequencies down to 1 / rope_theta itself"
    )
    norm_weight: bool = opt(True, "learned weight of the norm")
    decay_norm: bool = opt(False, "divide o by the root of the sum of its tokens' decays")
    official_init: bool = opt(
        False, "projections start from torchscale's Xavier-uniform values, whatever model.init_std"
    )

    def shape(self, config):
        shape = super().shape(config)
        if self.rope and shape.K % 2:
            raise ValueError(
                f"mixer.rope needs an even head size, not {shape.K}; choose other mixer.heads or "
                "mixer.rope = false"
            )
        return shape


class RetNet(QKVMixer):
    """Multi-scale retention (eq. 8); a SiLU gate on the output. Faithful to the official code
    (torchscale), but for the bound on a token's sum of scores, which no recurrence has: the RMSNorm
    per head absorbs it, as it does any denominator but for its eps."""

    Options = RetNetOptions
    presets = {
        "uniform": {},
        "faithful": {
            "head_dim": 256,
            "expand_v": 2.0,
            "rope": True,
            "rope_interleaved": True,
            "decay_norm": True,
            "norm_weight": False,
            "norm_eps": 1e-6,
            "official_init": True,
        },
    }
    family = families.SSD

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        self.norm = GatedRMSNorm(self.V, options.norm_eps, options.norm_weight)
        if options.official_init:
            for projection in (self.wq, self.wk, self.wv, self.wg):
                projection.draw = partial(nn.init.xavier_uniform_, gain=2**-2.5)
            self.wo.draw = nn.init.xavier_uniform_
        self.register_buffer("log_decay", torch.empty(options.shape(config).qk_heads))

    def reset_buffers(self):
        exponent = -5.0 - torch.arange(len(self.log_decay), dtype=torch.float64)
        self.log_decay.copy_(torch.log1p(-(2.0**exponent)))

    def features(self, x, seq):
        options = self.options
        if not options.rope:
            return F.silu(x)
        if not options.rope_interleaved:
            return rope(x, seq.positions, options.rope_theta)
        exponents = torch.linspace(0, 1, self.K // 2, device=x.device, dtype=torch.float64)
        angles = seq.positions.double()[:, None, None] * options.rope_theta**-exponents
        wide = torch.promote_types(x.dtype, torch.float32)
        return rotate(x, torch.remainder(angles, 2 * math.pi).to(wide))

    def read(self, q, kv, scans, entering, seq, state):
        o = super().read(q, kv, scans, entering, seq, state)
        if not self.options.decay_norm:
            return o
        log_decay = self.log_decay[self.local_heads]
        # 1 + gamma + gamma^2 .. of the tokens so far.
        total = torch.expm1((seq.positions[:, None] + 1) * log_decay) / torch.expm1(log_decay)
        return (o * total.rsqrt()[..., None]).to(o.dtype)

    def constants(self):
        return {"gamma": self.log_decay[self.local_heads]}
