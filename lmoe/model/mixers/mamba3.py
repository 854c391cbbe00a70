"""Mamba3 (arXiv 2603.15569): the trapezoidal rule and rotating states,

    h_t = alpha_t h_{t-1} + (1 - lambda_t) dt_t alpha_t B_{t-1}^T x_{t-1} + lambda_t dt_t B_t^T x_t,
          y_t = C_t h_t + D x_t.

With c_t = (1 - lambda_t) dt_t this is one recurrence over v_t = (lambda_t dt_t + c_{t+1}) x_t: what
the next token will add of this one enters the state with it. Only the token's own output must not
see that part, so it is weighted by `diag`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lmoe.kernels.pointwise import swiglu
from lmoe.model.batch import Segment
from lmoe.model.config import opt
from lmoe.model.init import keep_fp32, local
from lmoe.model.mixers.base import Mixer, last_inputs, output_projection, projections
from lmoe.model.mixers.decay import initial_dt_bias
from lmoe.model.mixers.mamba2 import SSMOptions, split_groups
from lmoe.model.norm import RMSNorm


@dataclass
class Mamba3Options(SSMOptions):
    rope_fraction: float = opt(0.5, "share of the N dims of B and C that rotate")
    heavy_tail: bool = opt(False, "A = -(max(a, 0) + 1 / (1 - min(a, 0))), not -softplus(a)")

    @property
    def angles(self):
        return int(self.state * self.rope_fraction) // 2

    def shape(self, model):
        if not 0 <= self.rope_fraction <= 1:
            raise ValueError(f"mixer.rope_fraction = {self.rope_fraction} must be between 0 and 1")
        if self.angles < 1:
            raise ValueError(
                f"mixer.rope_fraction = {self.rope_fraction} of mixer.state = {self.state} leaves"
                " no pair of dims to rotate"
            )
        return super().shape(model)


def rotate(x, phi):
    """x [T, H, N], its first 2 R dims turned by phi [T, H, R], neighbours in pairs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    turned, rest = x.split([2 * phi.shape[-1], x.shape[-1] - 2 * phi.shape[-1]], -1)
    a, b = turned.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = phi.cos().to(wide), phi.sin().to(wide)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], -1)


class Mamba3(Mixer):
    """RMSNorm and a bias per head on B and C, which then turn by the angles summed from the
    document's start; no convolution, no norm on the output, a SiLU gate. One input and one output
    per head (SISO)."""

    Options = Mamba3Options
    presets = {"uniform": {}, "faithful": {}}
    family = "ssd"
    shards = dict.fromkeys(
        ("wx", "wz", "wdt", "wA", "wtrap", "dt_bias", "bias_B", "bias_C", "D"), 0
    ) | {"wo": 1}
    shared_heads = 0
    group = slice(None)

    def __init__(self, model, options, layer=0, shared=None):
        super().__init__(model, options, layer, shared)
        groups, heads, self.N, self.P = options.shape(model)
        x, bc = heads * self.P, groups * self.N
        self.wz, self.wx, self.wB, self.wC = projections(model, [x, x, bc, bc])
        self.wdt, self.wA, self.wtrap, self.wangle = projections(
            model, [heads, heads, heads, options.angles]
        )
        self.norm_B, self.norm_C = RMSNorm(self.N, 1e-5), RMSNorm(self.N, 1e-5)
        self.bias_B, self.bias_C = (
            keep_fp32(nn.Parameter(torch.empty(heads, self.N)), "no_decay") for _ in range(2)
        )
        self.dt_bias, self.D = (keep_fp32(nn.Parameter(torch.empty(heads))) for _ in range(2))
        self.wo = output_projection(model, x)

    def init_parameter(self, name, tensor, generator):
        if name == "dt_bias":
            initial_dt_bias(tensor, generator)
        else:
            tensor.fill_(1.0)

    def split(self, size, index):
        return split_groups(self, super().split(size, index), ("wB", "wC"), size, index)

    def of_heads(self, x, norm, bias):
        """x [T, groups N] -> normed, one for each head: [T, H, N]."""
        x = norm(x.unflatten(-1, (-1, self.N))[:, self.group])
        bias = local(bias)
        return x.repeat_interleave(len(bias) // x.shape[1], dim=1) + bias.to(x.dtype)

    def steps(self, x, positions):
        """(dt, lambda dt, c) [T, H], c zero where a document starts."""
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(self.wdt(x).to(wide) + local(self.dt_bias))
        share = torch.sigmoid(self.wtrap(x).to(wide))
        return dt, share * dt, ((1 - share) * dt).masked_fill(positions[:, None] == 0, 0)

    def ahead(self, x, positions):
        return self.steps(x, positions)[2]

    def rates(self, x):
        """A < 0 [T, H]."""
        a = self.wA(x)
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        return -(
            a.clamp(min=0) + 1 / (1 - a.clamp(max=0)) if self.options.heavy_tail else F.softplus(a)
        ).clamp(min=1e-4)

    def project_kv(self, x, halo, seq, state):
        dt, own, c = self.steps(x, seq.positions)
        phi = self.angles(x, dt, seq, state)
        ahead = (
            torch.zeros_like(c)
            if seq.decoding
            else torch.cat([c[1:], seq.context.following(c[:1])])
        )
        weight = own + ahead
        inner = self.wx(x).unflatten(-1, (-1, self.P))
        k = rotate(self.of_heads(self.wB(x), self.norm_B, self.bias_B), phi)
        v = (inner * weight[..., None]).to(x.dtype)
        return {
            "k": k,
            "v": v,
            "g": self.rates(x) * dt,
            "diag": own / weight,
            "x": inner,
            "phi": phi,
            "c": c,
        }

    def angles(self, x, dt, seq, state):
        """Sums of dt pi tanh(angle) from the document's start, modulo 2 pi [T, H, R]; a recurrence
        without decay, in float64."""
        turns = dt[..., None] * (math.pi * torch.tanh(self.wangle(x).to(dt.dtype)))[:, None]
        ones = turns.new_ones(*turns.shape[:2], 1, dtype=torch.float64)
        inputs = {"k": ones, "v": turns.double()}
        chunk = min(16, self.options.chunk_size)  # as long as it is, a sum costs its length squared
        backend = (
            "reference" if self.options.backend == "reference" else "chunk"
        )  # which take float64
        pending = seq.begin([Segment("ssd", inputs, {"scale": 1.0}, chunk, backend)])
        incoming = seq.finish(pending)
        segment = Segment("ssd", {"q": ones, **inputs}, {"scale": 1.0}, chunk, backend)
        return torch.remainder(
            self.recur("phi", segment, seq, state, incoming and incoming[0]), 2 * math.pi
        ).to(dt.dtype)

    def project_q(self, x, halo, seq, state):
        return self.of_heads(self.wC(x), self.norm_C, self.bias_C)

    def project_gate(self, x):
        return self.wz(x).unflatten(-1, (-1, self.P))

    def scan_options(self):
        return {"scale": 1.0}

    def segments(self, inputs):
        return super().segments({name: inputs.get(name) for name in ("q", "k", "v", "g", "diag")})

    def scan(self, inputs, seq, state, incoming):
        k, x = inputs["k"], inputs["x"]
        if seq.decoding:
            late = inputs["c"][..., None] * state["x"]
            state["S"] += state["k"][..., :, None] * late[..., None, :]
            state["k"], state["x"] = (
                new.to(old.dtype) for new, old in ((k, state["k"]), (x, state["x"]))
            )
        elif state is not None:
            for key, rows in (("k", k), ("x", x)):
                state[key] = (
                    seq.context.last(last_inputs(rows.flatten(1), None, seq, 1), seq)
                    .view(-1, *rows.shape[1:])
                    .to(inputs["g"].dtype)
                )
        o = super().scan({**inputs, "q": rotate(inputs["q"], inputs["phi"])}, seq, state, incoming)
        return o + (local(self.D)[:, None] * x).to(x.dtype)

    def initial_state(self, sequences, max_len, device, dtype):
        """S, the sums of angles, and the token before: its B, rotated, and its x."""
        state = super().initial_state(sequences, max_len, device, dtype)
        _, heads, N, P = self.options.shape(self.model)
        state["phi"] = torch.zeros(
            sequences, heads, 1, self.options.angles, device=device, dtype=torch.float64
        )
        state["k"], state["x"] = (
            torch.zeros(sequences, heads, size, device=device, dtype=state["S"].dtype)
            for size in (N, P)
        )
        return state

    def output(self, o, gate):
        return self.wo(swiglu(gate, o).flatten(-2))
