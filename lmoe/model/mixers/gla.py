"""GLA, gated linear attention (arXiv 2312.06635): S_t = diag(alpha_t) S_{t-1} + k_t^T v_t, o_t =
q_t S_t."""

from dataclasses import dataclass

from lmoe.kernels import families
from lmoe.model.config import opt
from lmoe.model.init import Linear
from lmoe.model.mixers.base import LinearOptions, QKVMixer, in_heads
from lmoe.model.mixers.features import FEATURE_MAPS


@dataclass
class GLAOptions(LinearOptions):
    feature_map: str = opt("silu", "activation of q and k", choices=tuple(FEATURE_MAPS))
    gate_low_rank_dim: int = opt(16, "rank of the projection to the decay's logits", least=1)
    gate_logit_normalizer: float = opt(16.0, "tau: alpha = sigmoid(logit)^(1/tau)", above=0)


class GLA(QKVMixer):
    """alpha_t = sigmoid(W2 W1 x_t + b)^(1/tau), one for each key dim; RMSNorm per head and a SiLU
    gate on the output (eq. 4-6)."""

    Options = GLAOptions
    presets = {
        "uniform": {},
        "faithful": {"heads": 4, "expand_k": 0.5, "expand_v": 1.0, "feature_map": "identity"},
    }
    family = families.GLA
    tp_plan = QKVMixer.tp_plan | {"decay_out": 0}

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        rank = options.gate_low_rank_dim
        std = config.init_std
        self.decay_in = Linear(config.dim, rank, std=std)
        self.decay_out = Linear(rank, self.wk.out_features, bias=True, std=std)
        self.map = FEATURE_MAPS[options.feature_map]

    def features(self, x, seq):
        return self.map(x)

    def project_kv(self, x, left, seq, state, residuals):
        logits = in_heads(self.decay_out(self.decay_in(x)), self.K)
        return super().project_kv(x, left, seq, state, residuals) | {"gk": logits}

    def constants(self):
        return {"tau": self.options.gate_logit_normalizer}
