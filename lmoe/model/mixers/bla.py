"""BLA, basic linear attention (arXiv 2006.16236): S_t = S_{t-1} + phi(k_t)^T v_t, o_t = phi(q_t)
S_t."""

from dataclasses import dataclass

import torch

from lmoe.kernels import families
from lmoe.kernels.pointwise import swiglu
from lmoe.model.config import opt
from lmoe.model.mixers.base import LinearOptions, QKVMixer
from lmoe.model.mixers.features import FEATURE_MAPS, POSITIVE


@dataclass
class BLAOptions(LinearOptions):
    feature_map: str = opt("silu", "map phi of q and k", choices=tuple(FEATURE_MAPS))
    normalise: bool = opt(
        False, "divide o by the sum of its weights (with a map that is never below zero)"
    )
    norm: bool = opt(True, "RMSNorm per head of the output")
    gate: bool = opt(True, "SiLU gate on the output")

    def shape(self, config):
        if self.normalise and self.feature_map not in POSITIVE:
            raise ValueError(
                "mixer.normalise needs a feature_map that is never below zero, of "
                f"{', '.join(POSITIVE)}"
            )
        return super().shape(config)


class BLA(QKVMixer):
    """RMSNorm per head and a SiLU gate on the output, or neither. Normalised (eq. 9-12), a second
    recurrence sums the keys: o_t = phi(q_t) S_t / (phi(q_t) z_t + eps)."""

    Options = BLAOptions
    presets = {
        "uniform": {},
        # A norm over what is normalised already would cancel the normaliser.
        "faithful": {"feature_map": "elu1", "normalise": True, "norm": False, "gate": False},
    }
    family = families.SSD
    eps = 1e-6

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared, gated=options.gate)
        self.map = FEATURE_MAPS[options.feature_map]
        if not options.norm:
            self.norm = None

    def features(self, x, seq):
        return self.map(x)

    def scans(self, kv):
        if not self.options.normalise:
            return super().scans(kv)
        # The sum of weights is wide: it grows with the length, and everything is divided by it.
        v = kv["v"]
        wide = torch.promote_types(v.dtype, torch.float32)
        return [self.scan(kv), self.scan({**kv, "v": v.new_ones(*v.shape[:2], 1, dtype=wide)})]

    def read(self, q, kv, scans, entering, seq, state):
        o = super().read(q, kv, scans, entering, seq, state)
        if not self.options.normalise:
            return o
        z = self.recur("z", scans[1], q, entering[1], seq, state)
        return (o / (z + self.eps)).to(o.dtype)

    def output(self, o, gate):
        if self.norm is not None:
            return super().output(o, gate)
        return self.wo((o if gate is None else swiglu(gate, o)).flatten(-2))

    def scan_shapes(self):
        shapes = super().scan_shapes()
        return shapes | {"z": shapes["S"]._replace(V=1)} if self.options.normalise else shapes
