"""GLA, gated linear attention (arXiv 2312.06635): S_t = diag(alpha_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lmoe.model.config import opt
from lmoe.model.init import Linear
from lmoe.model.mixers.base import LinearOptions, Mixer, output_projection, projections
from lmoe.model.norm import GatedRMSNorm


@dataclass
class GLAOptions(LinearOptions):
    feature_map: str = opt("silu", "activation of q and k: silu or identity")
    gate_rank: int = opt(16, "rank of the projection to the decay's logits")
    gate_scale: float = opt(16.0, "tau: alpha = sigmoid(logit)^(1/tau)")

    def shape(self, model):
        if self.feature_map not in ("silu", "identity"):
            raise ValueError(f"mixer.feature_map = {self.feature_map!r} is not known: silu or identity")
        if self.gate_rank < 1:
            raise ValueError(f"mixer.gate_rank = {self.gate_rank} must be at least 1")
        if not self.gate_scale > 0:
            raise ValueError(f"mixer.gate_scale = {self.gate_scale} must be above 0")
        return super().shape(model)


class GLA(Mixer):
    """alpha_t = sigmoid(W2 W1 x_t + b)^(1/tau), one for each key dim; RMSNorm per head and a SiLU gate on the output (eq. 4-6)."""

    Options = GLAOptions
    presets = {"uniform": {}, "faithful": {"heads": 4, "expand_k": 0.5, "expand_v": 1.0, "feature_map": "identity"}}
    family = "gla"
    shards = {"wq": 0, "wk": 0, "wv": 0, "wg": 0, "decay_out": 0, "wo": 1}

    def __init__(self, model, options):
        super().__init__()
        self.model, self.options = model, options
        heads, _, self.K, self.V = options.shape(model)
        self.wq, self.wk, self.wv, self.wg = projections(model, [heads * self.K, heads * self.K, heads * self.V, heads * self.V])
        self.decay_in = Linear(model.dim, options.gate_rank, std=model.init_std)
        self.decay_out = Linear(options.gate_rank, heads * self.K, bias=True, std=model.init_std)
        self.norm = GatedRMSNorm(self.V)
        self.wo = output_projection(model, heads * self.V)
        self.feature_map = F.silu if options.feature_map == "silu" else nn.Identity()

    def project_q(self, x, halo, seq, state):
        return self.feature_map(self.wq(x)).unflatten(-1, (-1, self.K))

    def project_kv(self, x, halo, seq, state):
        logits = self.decay_out(self.decay_in(x))
        # The logits may be bf16; near alpha = 1 its logarithm may not.
        wide = torch.promote_types(x.dtype, torch.float32)
        return {
            "k": self.feature_map(self.wk(x)).unflatten(-1, (-1, self.K)),
            "v": self.wv(x).unflatten(-1, (-1, self.V)),
            "gk": (F.logsigmoid(logits.to(wide)) / self.options.gate_scale).unflatten(-1, (-1, self.K)),
        }

    def project_gate(self, x):
        return self.wg(x).unflatten(-1, (-1, self.V))

    def output(self, o, gate):
        return self.wo(self.norm(o, gate).flatten(-2))
