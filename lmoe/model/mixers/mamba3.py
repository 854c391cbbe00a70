"""Mamba3 (arXiv 2603.15569): the trapezoidal rule and rotating states,

    h_t = alpha_t h_{t-1} + (1 - lambda_t) dt_t alpha_t B_{t-1}^T x_{t-1} + lambda_t dt_t B_t^T x_t,
          y_t = C_t h_t + D x_t.

With c_t = (1 - lambda_t) dt_t this is one recurrence over v_t = (lambda_t dt_t + c_{t+1}) x_t: what
the next token will add of this one enters the state with it. Only the token's own output must not
see that part, so it is weighted by `diag`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lmoe.kernels.pointwise import swiglu
from lmoe.model.config import opt
from lmoe.model.conv import keep_inputs
from lmoe.model.init import fp32_parameter, local
from lmoe.model.mixers.base import entry, in_heads, output_projection, projections
from lmoe.model.mixers.phases import angle_sums, rotate
from lmoe.model.mixers.ssm import SSM, SSMOptions, initial_dt_bias
from lmoe.model.norm import RMSNorm, widened


@dataclass
class Mamba3Options(SSMOptions):
    rope_fraction: float = opt(0.5, "share of the N dims of B and C that rotate", least=0, most=1)
    heavy_tail: bool = opt(False, "A = -(max(a, 0) + 1 / (1 - min(a, 0))), not -softplus(a)")

    @property
    def angles(self):
        return int(self.d_state * self.rope_fraction) // 2

    def shape(self, config):
        if self.angles < 1:
            raise ValueError(
                f"mixer.rope_fraction = {self.rope_fraction} of mixer.d_state = {self.d_state} "
                "leaves no pair of dims to rotate"
            )
        return super().shape(config)


class Mamba3(SSM):
    """RMSNorm and a bias per head on B and C, which then turn by the angles summed from the
    document's start; no convolution, no norm on the output, a SiLU gate. One input and one output
    per head (SISO)."""

    Options = Mamba3Options
    presets = {"uniform": {}, "faithful": {"heavy_tail": True}}
    cut = ("wx", "wz", "wdt", "wA", "wtrap", "dt_bias", "bias_B", "bias_C", "D")
    tp_plan = dict.fromkeys(cut, 0) | {"wo": 1}
    inputs = (*SSM.inputs, "diag")

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        heads = options.shape(config).v_heads
        self.wA, self.wtrap, self.wangle = projections(config, [heads, heads, options.angles])
        self.norm_B = RMSNorm(self.N, options.norm_eps)
        self.norm_C = RMSNorm(self.N, options.norm_eps)
        self.bias_B, self.bias_C = (
            fp32_parameter(heads, self.N, marks=["no_decay"]) for _ in range(2)
        )
        self.dt_bias, self.D = (fp32_parameter(heads) for _ in range(2))
        self.wo = output_projection(config, heads * self.P)

    def init_parameter(self, name, tensor, generator):
        if name == "dt_bias":
            initial_dt_bias(tensor, generator)
        else:
            tensor.fill_(1.0)

    def of_heads(self, x, norm, bias):
        """Normalise x [T, groups N] and repeat it for each head: [T, H, N]."""
        x = norm(self.in_groups(x))
        bias = local(bias)
        return x.repeat_interleave(len(bias) // x.shape[1], dim=1) + bias.to(x.dtype)

    def steps(self, x, positions):
        """Compute (dt, lambda dt, c) [T, H], c zero where a document starts."""
        dt = F.softplus(widened(self.wdt(x)) + local(self.dt_bias))
        share = torch.sigmoid(widened(self.wtrap(x)))
        return dt, share * dt, ((1 - share) * dt).masked_fill(positions[:, None] == 0, 0)

    def lookahead(self, x, positions):
        return self.steps(x, positions)[2]

    def rates(self, x):
        """Compute A < 0 [T, H]."""
        a = widened(self.wA(x))
        if self.options.heavy_tail:
            return -(a.clamp(min=0) + 1 / (1 - a.clamp(max=0))).clamp(min=1e-4)
        return -F.softplus(a).clamp(min=1e-4)

    def project_kv(self, x, left, seq, state, residuals):
        dt, own, c = self.steps(x, seq.positions)
        phi = self.angles(x, dt, seq, state)
        ahead = torch.zeros_like(c)
        if not seq.decoding:
            ahead = torch.cat([c[1:], seq.context.lookahead(c[:1])])
        weight = own + ahead
        inner = in_heads(self.wx(x), self.P)
        return {
            "k": rotate(self.of_heads(self.wB(x), self.norm_B, self.bias_B), phi),
            "v": (inner * weight[..., None]).to(x.dtype),
            "g": self.rates(x) * dt,
            "diag": own / weight,
            "x": inner,
            "phi": phi,
            "c": c,
        }

    def angles(self, x, dt, seq, state):
        """Sum dt pi tanh(angle) from the document's start, modulo 2 pi: [T, H, R]."""
        turns = dt[..., None] * (torch.pi * torch.tanh(self.wangle(x).to(dt.dtype)))[:, None]
        sums = entry(state, "phi")
        options = self.options
        return angle_sums(turns, seq, sums, options.chunk_size, options.backend)

    def project_q(self, x, left, seq, state):
        return self.of_heads(self.wC(x), self.norm_C, self.bias_C)

    def read(self, q, kv, scans, entering, seq, state):
        k = kv["k"]
        x = kv["x"]
        if seq.decoding:
            late = kv["c"][..., None] * state["x"]
            state["S"] += state["k"][..., :, None] * late[..., None, :]
            state["k"].copy_(k)
            state["x"].copy_(x)
        elif state is not None:
            for key, rows in (("k", k), ("x", x)):
                keep_inputs(state[key].flatten(1)[:, None], rows.flatten(1), None, seq)
        return super().read(rotate(q, kv["phi"]), kv, scans, entering, seq, state)

    def initial_state(self, sequences, max_len, device, dtype):
        """Make S, the sums of angles, and of the token before its B, rotated, and its x."""
        state = super().initial_state(sequences, max_len, device, dtype)
        _, heads, N, P = self.options.shape(self.config)
        sizes = sequences, heads, 1, self.options.angles
        state["phi"] = torch.zeros(sizes, device=device, dtype=torch.float64)
        for key, size in (("k", N), ("x", P)):
            state[key] = torch.zeros(sequences, heads, size, device=device, dtype=state["S"].dtype)
        return state

    def output(self, o, gate):
        return self.wo(swiglu(gate, o).flatten(-2))
