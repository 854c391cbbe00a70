"""Mamba2 (arXiv 2405.21060): S_t = exp(-A dt_t) S_{t-1} + (dt_t B_t)^T x_t, y_t = C_t S_t + D x_t:
q = C, k = B, v = dt x."""

from dataclasses import dataclass

import torch
from torch import nn

from lmoe.model.config import opt
from lmoe.model.init import keep_fp32, local
from lmoe.model.mixers.base import Mixer, ScanOptions, ShortConv, output_projection, projections
from lmoe.model.mixers.decay import Decay
from lmoe.model.norm import WideRMSNorm


@dataclass
class SSMOptions(ScanOptions):
    """The shape of Mamba's layers."""

    expand: float = opt(2.0, "width of the inner layer over model.dim")
    head_dim: int = opt(64, "size P of a head of x; mixer.heads sets the number of heads instead")
    state: int = opt(128, "size N of B and C")
    groups: int = opt(1, "groups of heads that share B and C")

    def shape(self, model):
        """(groups, heads, N, P)"""
        self.check()
        width = model.dim * self.expand
        heads = self.heads or width / self.head_dim
        if heads != int(heads) or heads < 1 or width % heads:
            raise ValueError(
                f"mixer.expand = {self.expand}: model.dim = {model.dim} times it does not divide"
                f" into heads of {self.head_dim}; choose another mixer.head_dim, or mixer.heads"
            )
        if self.state < 1:
            raise ValueError(f"mixer.state = {self.state} must be at least 1")
        if self.groups < 1 or heads % self.groups:
            raise ValueError(f"mixer.groups = {self.groups} does not divide the {int(heads)} heads")
        return self.groups, int(heads), self.state, int(width // heads)


@dataclass
class Mamba2Options(SSMOptions):
    conv_width: int = opt(4, "taps of the short convolution on x, B and C")

    def shape(self, model):
        if self.conv_width < 1:
            raise ValueError(f"mixer.conv_width = {self.conv_width} must be at least 1")
        return super().shape(model)


def split_groups(mixer, shards, names, size, index):
    """What to cut of the children `names`, which make B and C: groups by groups, or, with fewer
    groups than ranks, nothing; then mixer.group is the one that this rank's heads read."""
    groups = mixer.options.groups
    if groups % size == 0:
        return shards | dict.fromkeys(names, 0)
    mixer.group = slice(index * groups // size, index * groups // size + 1)
    return shards


class Mamba2(Mixer):
    """Convolutions and SiLU on x, B and C; RMSNorm over each group's channels of y * silu(z)."""

    Options = Mamba2Options
    presets = {"uniform": {}, "faithful": {}}
    family = "ssd"
    shards = dict.fromkeys(("wx", "wz", "wdt", "conv_x", "decay", "D", "norm"), 0) | {"wo": 1}
    shared_heads = 0
    group = slice(None)

    def __init__(self, model, options, layer=0, shared=None):
        super().__init__(model, options, layer, shared)
        groups, heads, self.N, self.P = options.shape(model)
        x, bc = heads * self.P, groups * self.N
        self.wz, self.wx, self.wB, self.wC, self.wdt = projections(model, [x, x, bc, bc, heads])
        self.conv_x, self.conv_B, self.conv_C = (
            ShortConv(width, options.conv_width, bias=True, backend=options.backend)
            for width in (x, bc, bc)
        )
        self.halo_rows = options.conv_width - 1
        self.decay = Decay(heads)
        self.D = keep_fp32(nn.Parameter(torch.empty(heads)))
        self.norm = WideRMSNorm(x, groups=groups, gate_first=True)
        self.wo = output_projection(model, x)

    def init_parameter(self, name, tensor, generator):
        tensor.fill_(1.0)  # D

    def split(self, size, index):
        return split_groups(
            self, super().split(size, index), ("wB", "wC", "conv_B", "conv_C"), size, index
        )

    def convolved(self, name, x, halo, seq, state, size):
        """[T, heads, size]; the rows before x are projected here too, as in Gated DeltaNet."""
        project, conv = getattr(self, f"w{name}"), f"conv_{name}"
        halo = None if halo is None else project(halo)
        return getattr(self, conv)(project(x), halo, seq, state, conv).unflatten(-1, (-1, size))

    def project_q(self, x, halo, seq, state):
        return self.convolved("C", x, halo, seq, state, self.N)[:, self.group]

    def project_kv(self, x, halo, seq, state):
        g, dt = self.decay(self.wdt(x))
        inner = self.convolved("x", x, halo, seq, state, self.P)
        k = self.convolved("B", x, halo, seq, state, self.N)[:, self.group]
        return {"k": k, "v": (inner * dt[..., None]).to(x.dtype), "g": g, "x": inner}

    def project_gate(self, x):
        return self.wz(x).unflatten(-1, (-1, self.P))

    def scan_options(self):
        return {"scale": 1.0}

    def segments(self, inputs):
        return super().segments({name: inputs.get(name) for name in ("q", "k", "v", "g")})

    def scan(self, inputs, seq, state, incoming):
        return super().scan(inputs, seq, state, incoming) + (
            local(self.D)[:, None] * inputs["x"]
        ).to(inputs["x"].dtype)

    def output(self, o, gate):
        return self.wo(self.norm(o, gate).flatten(-2))
