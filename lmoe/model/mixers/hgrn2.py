"""HGRN2 (arXiv 2404.07904): S_t = diag(f_t) S_{t-1} + (1 - f_t)^T v_t, o_t = q_t S_t: what a key
writes is what its dim forgets."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lmoe.kernels import families
from lmoe.model.config import opt
from lmoe.model.init import fp32_parameter
from lmoe.model.mixers.base import LinearOptions, QKVMixer, in_heads
from lmoe.model.norm import widened


@dataclass
class HGRN2Options(LinearOptions):
    lower_bounds: bool = opt(False, "learned lower bounds of f that rise with the depth")
    full_width_norm: bool = opt(False, "RMSNorm over all heads together, not per head")


class LowerBounds(nn.Module):
    """The bounds of all layers (eq. 2 of arXiv 2311.04823): gamma_l = sum of softmax(logits)[1 ..
    l], zero in layer 0."""

    def __init__(self, layers, width):
        super().__init__()
        self.logits = fp32_parameter(layers, width, marks=["every_stage", "no_decay"])

    def init_parameter(self, name, tensor, generator):
        tensor.zero_()

    def forward(self, layer):
        """[H K] of layer > 0."""
        return torch.softmax(self.logits, 0)[1 : layer + 1].sum(0)


class HGRN2(QKVMixer):
    """f = gamma + (1 - gamma) sigmoid(z), k = 1 - f; SiLU on q; a norm and no gate on the
    output."""

    Options = HGRN2Options
    presets = {
        "uniform": {},
        "faithful": {"head_dim": 128, "lower_bounds": True, "full_width_norm": True},
    }
    family = families.GLA

    def __init__(self, config, options, layer=0, shared=None):
        wide = options.full_width_norm
        super().__init__(config, options, layer, shared, wide=wide, gated=False)
        self.bounded = options.lower_bounds and layer > 0
        if options.lower_bounds:
            width = self.wk.out_features
            self.share("hgrn2_bounds", lambda: LowerBounds(config.layers, width))

    def project_q(self, x, left, seq, state):
        return in_heads(F.silu(self.wq(x)), self.K)

    def project_kv(self, x, left, seq, state, residuals):
        z = in_heads(widened(self.wk(x)), self.K)
        # Never 1 - f: near f = 1 nothing would be left of it.
        k = torch.sigmoid(-z)
        gk = F.logsigmoid(z)
        if self.bounded:
            gamma = in_heads(self.hgrn2_bounds(self.layer).to(z.dtype), self.K)[self.local_heads]
            k = (1 - gamma) * k
            gk = torch.logaddexp(gamma.log(), torch.log1p(-gamma) + gk)
        return {"k": k.to(x.dtype), "v": in_heads(self.wv(x), self.V), "gk": gk}
