"""The common parts of state space models: the shape of their layers, groups of heads with one B and
C, and the decay of Mamba2 and what followed it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lmoe.kernels import families
from lmoe.model.config import opt
from lmoe.model.init import fp32_parameter, local
from lmoe.model.mixers.base import HeadShape, Mixer, ScanOptions, in_heads, projections
from lmoe.model.norm import widened


@dataclass
class SSMOptions(ScanOptions):
    """The shape of Mamba's layers."""

    expand: float = opt(2.0, "width of the inner layer over model.dim", above=0)
    head_dim: int = opt(
        64, "channels P of a head of x, which give the number of heads; 0: by heads", least=0
    )
    d_state: int = opt(128, "size N of B and C", least=1)
    n_groups: int = opt(1, "groups of heads that share B and C", least=1)

    def width(self, config):
        return config.dim * self.expand

    def shape(self, config):
        """Return the sizes: groups as heads of q and k, heads, N, P."""
        self.check()
        width = self.width(config)
        heads = self.count_heads(config)
        if width % heads:
            raise ValueError(
                f"mixer.expand = {self.expand}: model.dim = {config.dim} times it does not divide "
                f"into {heads} heads; choose other mixer.heads, or mixer.head_dim"
            )
        if heads % self.n_groups:
            raise ValueError(f"mixer.n_groups = {self.n_groups} does not divide the {heads} heads")
        return HeadShape(self.n_groups, heads, self.d_state, int(width // heads))


class SSM(Mixer):
    """A mixer with projections to a gate z, x, B, C and dt, whose heads share B and C in groups (q
    is C, k is B), and y_t = o_t + D x_t. With fewer groups than tensor parallel ranks, the
    children `group_children`, which make B and C, stay whole, and a rank takes the group
    `local_group` that its heads read. inputs: the scan's, among what project_kv gives."""

    family = families.SSD
    replicated_heads = "key"
    group_children = ("wB", "wC")
    local_group = slice(None)
    inputs = ("k", "v", "g")

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        groups, heads, self.N, self.P = options.shape(config)
        x = heads * self.P
        bc = groups * self.N
        self.wz, self.wx, self.wB, self.wC, self.wdt = projections(config, [x, x, bc, bc, heads])

    def shard_heads(self, size, index):
        plan = super().shard_heads(size, index)
        groups = self.options.n_groups
        if groups % size == 0:
            return plan | dict.fromkeys(self.group_children, 0)
        group = index * groups // size
        self.local_group = slice(group, group + 1)
        return plan

    def in_groups(self, x):
        """View x [T, groups N] as this rank's groups [T, groups, N]."""
        return in_heads(x, self.N)[:, self.local_group]

    def project_gate(self, x):
        return in_heads(self.wz(x), self.P)

    def scans(self, kv):
        return [self.scan({name: kv[name] for name in self.inputs}, scale=1.0)]

    def read(self, q, kv, scans, entering, seq, state):
        o = super().read(q, kv, scans, entering, seq, state)
        x = kv["x"]
        return o + (local(self.D)[:, None] * x).to(x.dtype)


def initial_dt_bias(tensor, generator):
    """Draw it so that its softplus is log-uniform in [1e-3, 0.1], as in Mamba (arXiv 2312.00752,
    section 3.6)."""
    dt = tensor.uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
    dt = dt.exp_().clamp_(min=1e-4)
    tensor.copy_(dt + torch.log(-torch.expm1(-dt)))


class Decay(nn.Module):
    """dt_t = softplus(a_t + dt_bias), log alpha_t = -exp(A_log) dt_t per head, fp32: a [T, H] ->
    (log alpha, dt) [T, H] each. A starts from U(least, 16), never below 1e-4."""

    def __init__(self, heads, least=1.0):
        super().__init__()
        self.least = least
        self.A_log = fp32_parameter(heads)
        self.dt_bias = fp32_parameter(heads)

    def init_parameter(self, name, tensor, generator):
        if name == "A_log":
            tensor.uniform_(self.least, 16.0, generator=generator).clamp_(min=1e-4).log_()
        else:
            initial_dt_bias(tensor, generator)

    def forward(self, a):
        dt = F.softplus(widened(a) + local(self.dt_bias))
        # Beyond e^20 nothing is left of a state, but e^89 would make every gradient NaN for good.
        return -local(self.A_log).clamp(max=20.0).exp() * dt, dt
