"""GLA, gated linear attention (arXiv 2312.06635): S_t = diag(alpha_t) S_{t-1} + k_t^T v_t, o_t =
q_t S_t."""

from dataclasses import dataclass

from lmoe.model.config import opt
from lmoe.model.init import Linear
from lmoe.model.mixers.base import LinearOptions, QKVMixer
from lmoe.model.mixers.features import feature_map
from lmoe.model.norm import GatedRMSNorm


@dataclass
class GLAOptions(LinearOptions):
    feature_map: str = opt("silu", "activation of q and k: silu, identity, ...")
    gate_rank: int = opt(16, "rank of the projection to the decay's logits")
    gate_scale: float = opt(16.0, "tau: alpha = sigmoid(logit)^(1/tau)")

    def shape(self, model):
        feature_map(self.feature_map)
        if self.gate_rank < 1:
            raise ValueError(f"mixer.gate_rank = {self.gate_rank} must be at least 1")
        if not self.gate_scale > 0:
            raise ValueError(f"mixer.gate_scale = {self.gate_scale} must be above 0")
        return super().shape(model)


class GLA(QKVMixer):
    """alpha_t = sigmoid(W2 W1 x_t + b)^(1/tau), one for each key dim; RMSNorm per head and a SiLU
    gate on the output (eq. 4-6)."""

    Options = GLAOptions
    presets = {
        "uniform": {},
        "faithful": {"heads": 4, "expand_k": 0.5, "expand_v": 1.0, "feature_map": "identity"},
    }
    family = "gla"
    shards = QKVMixer.shards | {"decay_out": 0}

    def __init__(self, model, options, layer=0, shared=None):
        super().__init__(model, options, layer, shared, norm=lambda heads, V: GatedRMSNorm(V))
        self.decay_in = Linear(model.dim, options.gate_rank, std=model.init_std)
        self.decay_out = Linear(
            options.gate_rank, options.shape(model)[0] * self.K, bias=True, std=model.init_std
        )
        self.map = feature_map(options.feature_map)

    def features(self, x, seq):
        return self.map(x)

    def project_kv(self, x, halo, seq, state):
        logits = self.decay_out(self.decay_in(x)).unflatten(-1, (-1, self.K))
        return super().project_kv(x, halo, seq, state) | {"gk": logits}

    def scan_options(self):
        return {"tau": self.options.gate_scale}
