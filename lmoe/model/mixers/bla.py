"""BLA, basic linear attention (arXiv 2006.16236): S_t = S_{t-1} + phi(k_t)^T v_t, o_t = phi(q_t)
S_t."""

from dataclasses import dataclass

import torch

from lmoe.model.config import opt
from lmoe.model.mixers.base import LinearOptions, QKVMixer
from lmoe.model.mixers.features import POSITIVE, feature_map
from lmoe.model.norm import GatedRMSNorm


@dataclass
class BLAOptions(LinearOptions):
    feature_map: str = opt(
        "silu", "map phi of q and k: silu, elu1, relu, relu2, sigmoid, softmax or identity"
    )
    normalise: bool = opt(
        False, "divide o by the sum of its weights (with a map that is never below zero)"
    )
    gate: bool = opt(True, "SiLU gate on the output")

    def shape(self, model):
        feature_map(self.feature_map)
        if self.normalise and self.feature_map not in POSITIVE:
            raise ValueError(
                "mixer.normalise needs a feature_map that is never below zero, of"
                f" {', '.join(POSITIVE)}"
            )
        return super().shape(model)


class BLA(QKVMixer):
    """RMSNorm per head. Normalised (eq. 9-12), a second recurrence sums the keys: o_t = phi(q_t)
    S_t / (phi(q_t) z_t + eps)."""

    Options = BLAOptions
    presets = {"uniform": {}, "faithful": {"feature_map": "elu1", "normalise": True, "gate": False}}
    family = "ssd"
    eps = 1e-6

    def __init__(self, model, options, layer=0, shared=None):
        super().__init__(
            model, options, layer, shared, norm=lambda heads, V: GatedRMSNorm(V), gated=options.gate
        )
        self.map = feature_map(options.feature_map)

    def features(self, x, seq):
        return self.map(x)

    def segments(self, inputs):
        if not self.options.normalise:
            return super().segments(inputs)
        # The sum of weights is wide: it grows with the length, and everything is divided by it.
        ones = inputs["v"].new_ones(
            *inputs["v"].shape[:2], 1, dtype=torch.promote_types(inputs["v"].dtype, torch.float32)
        )
        return [self.segment(inputs), self.segment({**inputs, "v": ones})]

    def scan(self, inputs, seq, state, incoming):
        if not self.options.normalise:
            return super().scan(inputs, seq, state, incoming)
        values, weights = self.segments(inputs)
        incoming = incoming or (None, None)
        o = self.recur("S", values, seq, state, incoming[0])
        z = self.recur("z", weights, seq, state, incoming[1])
        return (o / (z + self.eps)).to(o.dtype)

    def state_shapes(self):
        heads, K, _ = super().state_shapes()["S"]
        return super().state_shapes() | ({"z": (heads, K, 1)} if self.options.normalise else {})
