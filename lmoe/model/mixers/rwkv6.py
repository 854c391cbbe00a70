"""RWKV6 (arXiv 2404.05892): S_t = diag(e^-e^w_t) S_{t-1} + k_t^T v_t, read before the token's own
decay and with a bonus for it: o_t = r_t (S_{t-1} + diag(u) k_t^T v_t)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lmoe.kernels import families
from lmoe.model.config import opt
from lmoe.model.conv import TokenShift
from lmoe.model.init import Linear, fp32_parameter, local, marked, orthogonal
from lmoe.model.mixers.base import (
    LinearOptions,
    Mixer,
    entry,
    in_heads,
    output_projection,
    projections,
)
from lmoe.model.norm import HeadGroupNorm, widened

STREAMS = ("w", "k", "v", "r", "g")


@dataclass
class RWKV6Options(LinearOptions):
    norm_eps: float = opt(64e-5, "epsilon of the norm", least=0)
    mix_low_rank_dim: int = opt(32, "rank of the data-dependent part of each token shift", least=1)
    decay_low_rank_dim: int = opt(64, "rank of the data-dependent part of the decay", least=1)
    official_init: bool = opt(
        False,
        "projections and norm start from the values of the official code, whatever model.init_std;"
        " no weight decay on low-rank matrices",
    )


class Mix(nn.Module):
    """The data-dependent token shift (eq. 14-15): for each of five streams x + (x_{t-1} - x_t) *
    (lambda + tanh(x' A) B)."""

    def __init__(self, config, rank, layer):
        super().__init__()
        self.dim = config.dim
        self.rank = rank
        self.place = (layer, config.layers)
        self.mu = fp32_parameter(config.dim)
        self.lambdas = fp32_parameter(len(STREAMS), config.dim, marks=["no_decay"])
        self.A = Linear(config.dim, rank * len(STREAMS), std=0.0)
        self.B = nn.Parameter(torch.empty(len(STREAMS), rank, config.dim))

    def init_parameter(self, name, tensor, generator):
        if name == "B":
            tensor.uniform_(-0.01, 0.01, generator=generator)
            return
        ratio = torch.arange(self.dim) / self.dim
        first, left = depth(*self.place)
        slow = ratio**left
        fast = ratio ** (0.5 * left)
        curves = torch.stack([slow, slow, slow + 0.3 * first, fast, fast])  # of STREAMS
        tensor.copy_(1 - (slow if name == "mu" else curves))

    def flops_per_token(self):
        return 2 * self.B.numel()

    def forward(self, x, delta):
        """Mix x and its difference to the token before, [T, D] each: {stream: [T, D]}."""
        base = x + delta * self.mu.to(x.dtype)
        low = torch.tanh(self.A(base)).unflatten(-1, (len(STREAMS), self.rank)).transpose(0, 1)
        mixed = (low @ local(self.B)) + self.lambdas.to(x.dtype)[:, None]
        return dict(zip(STREAMS, x + delta * mixed))


def depth(layer, layers):
    """Place a layer: (0 in the first to 1 in the last, 1 in the first to almost 0 in the last)."""
    return layer / max(1, layers - 1), 1 - layer / layers


class RWKV6(Mixer):
    """GroupNorm per head and a SiLU gate on the output. Token shifts, decays and bonus start as in
    the official code (RWKV-LM, x060); with official_init all of it does."""

    Options = RWKV6Options
    presets = {"uniform": {}, "faithful": {"head_dim": 64, "official_init": True}}
    family = families.GLA
    cut = ("wr", "wk", "wv", "wg", "decay_out", "decay_bias", "u", "norm")
    tp_plan = dict.fromkeys(cut, 0) | {"wo": 1}
    left_rows = 1

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        heads, _, self.K, self.V = options.shape(config)
        k = heads * self.K
        v = heads * self.V
        self.shift = TokenShift(config.dim)
        self.mix = Mix(config, options.mix_low_rank_dim, layer)
        self.wr, self.wk, self.wv, self.wg = projections(config, [k, k, v, v])
        self.decay_in = Linear(config.dim, options.decay_low_rank_dim, std=0.0)
        self.decay_out = Linear(options.decay_low_rank_dim, k, std=0.01)
        self.decay_bias = fp32_parameter(k)
        self.u = fp32_parameter(heads, self.K, marks=["no_decay"])
        self.norm = HeadGroupNorm(v, options.norm_eps, "silu")
        self.wo = output_projection(config, v)
        if options.official_init:
            self.start_as_official()

    def start_as_official(self):
        """Set what all but `init_parameter` here and in Mix starts from, and what decays."""
        gains = {self.wr: 1.0, self.wk: 0.1, self.wv: 1.0, self.wg: 0.1}
        for projection, gain in gains.items():
            wider = max(1.0, projection.out_features / projection.in_features)
            projection.draw = partial(orthogonal, gain=gain * wider**0.5)
        self.decay_out.draw = partial(nn.init.uniform_, a=-0.01, b=0.01)
        self.norm.scale = ((self.layer + 1) / self.config.layers) ** 0.7
        self.wo.std = 0.0
        low_rank = self.mix.A.weight, self.mix.B, self.decay_in.weight, self.decay_out.weight
        for matrix in low_rank:
            marked(matrix, "no_decay")

    def init_parameter(self, name, tensor, generator):
        first, _ = depth(self.layer, self.config.layers)
        n = torch.arange(tensor.numel())
        ratio = n / max(1, tensor.numel() - 1)
        if name == "decay_bias":
            values = -6 + 5 * ratio ** (0.7 + 1.3 * first)
        else:
            values = first * (1 - ratio) + 0.1 * ((n + 1) % 3 - 1)
        tensor.copy_(values.view_as(tensor))

    def streams(self, x, left, seq, state):
        before = self.shift(x, left, seq, entry(state, "shift"))
        return self.mix(x, before - x)

    def project_q(self, x, left, seq, state):
        return in_heads(self.wr(x["r"]), self.K)

    def project_kv(self, x, left, seq, state, residuals):
        w = widened(self.decay_out(torch.tanh(self.decay_in(x["w"]))))
        w = w + local(self.decay_bias).to(w.dtype)
        return {
            "k": in_heads(self.wk(x["k"]), self.K),
            "v": in_heads(self.wv(x["v"]), self.V),
            # At 5 nothing survives a token; beyond, e^w would only overflow.
            "gk": in_heads(-w.clamp(max=5.0).exp(), self.K),
        }

    def project_gate(self, x):
        return in_heads(self.wg(x["g"]), self.V)

    def constants(self):
        return {"u": local(self.u), "scale": 1.0}
