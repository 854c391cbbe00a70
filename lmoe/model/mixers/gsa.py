"""GSA, gated slot attention (arXiv 2409.07146): softmax over M slots, whose keys and values are two
gated recurrences (eq. 7-9)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lmoe.model.config import opt
from lmoe.model.init import Linear
from lmoe.model.mixers.base import LinearOptions, QKVMixer
from lmoe.model.norm import GatedRMSNorm, WideRMSNorm


@dataclass
class GSAOptions(LinearOptions):
    slots: int = opt(64, "slots M per head")
    gate_scale: float = opt(8.0, "tau: alpha = sigmoid(logit)^(1/tau)")
    wide_norm: bool = opt(False, "RMSNorm over all heads together, not per head")

    def shape(self, model):
        if self.slots < 1:
            raise ValueError(f"mixer.slots = {self.slots} must be at least 1")
        if not self.gate_scale > 0:
            raise ValueError(f"mixer.gate_scale = {self.gate_scale} must be above 0")
        return super().shape(model)


class GSA(QKVMixer):
    """K_t = K_{t-1} diag(alpha_t) + k_t^T s_t, V_t = diag(alpha_t) V_{t-1} + s_t^T v_t with s_t = 1
    - alpha_t; o_t = softmax(q_t K_t) V_t.

    SiLU on q, k, v and o, a norm and no gate."""

    Options = GSAOptions
    presets = {"uniform": {}, "faithful": {"heads": 4, "wide_norm": True}}
    family = "gla"
    shards = QKVMixer.shards | {"wf": 0}

    def __init__(self, model, options, layer=0, shared=None):
        def norm(heads, V):
            return WideRMSNorm(heads * V) if options.wide_norm else GatedRMSNorm(V)

        super().__init__(model, options, layer, shared, norm=norm, gated=False)
        self.wf = Linear(model.dim, options.shape(model)[0] * options.slots, std=model.init_std)

    def features(self, x, seq):
        return F.silu(x)

    def project_kv(self, x, halo, seq, state):
        inputs = super().project_kv(x, halo, seq, state)
        wide = torch.promote_types(x.dtype, torch.float32)
        g = (
            F.logsigmoid(self.wf(x).to(wide)).unflatten(-1, (-1, self.options.slots))
            / self.options.gate_scale
        )
        return {
            "k": inputs["k"],
            "v": F.silu(inputs["v"]),
            "s": -torch.expm1(g).to(x.dtype),
            "g": g,
        }

    def segments(self, inputs):
        k, v, s, g = (inputs[name] for name in ("k", "v", "s", "g"))
        keys = self.segment({"q": inputs.get("q"), "k": k, "v": s, "gv": g}, scale=1.0)
        return [keys, self.segment({"q": inputs.get("p"), "k": s, "v": v, "gk": g}, scale=1.0)]

    def scan(self, inputs, seq, state, incoming):
        incoming = incoming or (None, None)
        scores = self.recur("K", self.segments(inputs)[0], seq, state, incoming[0])
        p = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
            scores.dtype
        )
        return self.recur("V", self.segments({**inputs, "p": p})[1], seq, state, incoming[1])

    def state_shapes(self):
        heads, _, K, V = self.options.shape(self.model)
        return {"K": (heads, K, self.options.slots), "V": (heads, self.options.slots, V)}

    def output(self, o, gate):
        return super().output(F.silu(o), gate)
