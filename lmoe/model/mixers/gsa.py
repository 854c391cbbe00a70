"""GSA, gated slot attention (arXiv 2409.07146): softmax over M slots, whose keys and values are two
gated recurrences (eq. 7-9)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lmoe.kernels import families
from lmoe.model.config import opt
from lmoe.model.mixers.base import (
    LinearOptions,
    QKVMixer,
    in_heads,
    projections,
)
from lmoe.model.mixers.features import softmax
from lmoe.model.norm import widened


@dataclass
class GSAOptions(LinearOptions):
    slots: int = opt(64, "slots M per head", least=1)
    gate_logit_normalizer: float = opt(8.0, "tau: alpha = sigmoid(logit)^(1/tau)", above=0)
    full_width_norm: bool = opt(False, "RMSNorm over all heads together, not per head")


class GSA(QKVMixer):
    """K_t = K_{t-1} diag(alpha_t) + k_t^T s_t, V_t = diag(alpha_t) V_{t-1} + s_t^T v_t with s_t = 1
    - alpha_t; o_t = softmax(q_t K_t) V_t.

    SiLU on q, k, v and o, a norm and no gate."""

    Options = GSAOptions
    presets = {"uniform": {}, "faithful": {"heads": 4, "full_width_norm": True}}
    family = families.GLA
    tp_plan = QKVMixer.tp_plan | {"wf": 0}

    def __init__(self, config, options, layer=0, shared=None):
        wide = options.full_width_norm
        super().__init__(config, options, layer, shared, wide=wide, gated=False)
        width = options.shape(config).qk_heads * options.slots
        (self.wf,) = projections(config, [width])

    def features(self, x, seq):
        return F.silu(x)

    def project_kv(self, x, left, seq, state, residuals):
        kv = super().project_kv(x, left, seq, state, residuals)
        g = F.logsigmoid(widened(self.wf(x))) / self.options.gate_logit_normalizer
        g = in_heads(g, self.options.slots)
        return {"k": kv["k"], "v": F.silu(kv["v"]), "s": -torch.expm1(g).to(x.dtype), "g": g}

    def scans(self, kv):
        k, v, s, g = (kv[name] for name in ("k", "v", "s", "g"))
        keys = self.scan({"k": k, "v": s, "gv": g}, scale=1.0)
        return [keys, self.scan({"k": s, "v": v, "gk": g}, scale=1.0)]

    def read(self, q, kv, scans, entering, seq, state):
        scores = self.recur("K", scans[0], q, entering[0], seq, state)
        return self.recur("V", scans[1], softmax(scores), entering[1], seq, state)

    def scan_shapes(self):
        shape = super().scan_shapes()["S"]
        slots = self.options.slots
        return {"K": shape._replace(V=slots), "V": shape._replace(K=slots)}

    def output(self, o, gate):
        return super().output(F.silu(o), gate)
