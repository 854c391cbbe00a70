"""A family with a complex diagonal transition, after S4 (arXiv 2111.00396), and its mixer: states
decay and turn by constants of their own for each channel, S_t = diag(e^(a + i b)) S_{t-1} + k_t^T
v_t, o_t = q_t Re(S_t)."""

import torch

from lmoe.kernels import transition
from lmoe.kernels.family import Family
from lmoe.model.init import fp32_parameter, local
from lmoe.model.mixers.base import QKVMixer


def one_token(S, q, k, v, decay, angle, scale):
    """Advance S [.., H, K, V, 2] by one token: (S, o)."""
    S = transition.Complex.apply(torch.stack([decay, angle], -1), S)
    kv = k[..., :, None] * v[..., None, :]
    S = S + torch.stack([kv, torch.zeros_like(kv)], -1)
    return S, scale * (q[..., None, :] @ S[..., 0]).squeeze(-2)


def run(q, k, v, decay, angle, S, cu_seqlens, scale, C):
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(slice(None), 0, v.shape[1])]
    if ends is not None:
        spans = [(slice(0, 1), a, b) for a, b in zip(ends, ends[1:])]
    outputs, finals = [], []
    for n, (rows, start, end) in enumerate(spans):
        state = S if ends is None else S[n : n + 1]
        for t in range(start, end):
            token = (x[rows, t].to(S.dtype) for x in (q, k, v))
            state, o = one_token(state, *token, decay, angle, scale)
            outputs.append(o)
        finals.append(state)
    return torch.stack(outputs, 1).to(v.dtype), torch.cat(finals)


def decay_of(k, v, decay, angle):
    """The transition of a stream without borders inside: [B, H, K, 2]."""
    A = torch.stack([decay, angle], -1) * k.shape[1]
    return A.expand(k.shape[0], *A.shape)


def reference(q, k, v, decay, angle, scale, initial_state, cu_seqlens):
    N = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = N, v.shape[2], k.shape[-1], v.shape[-1], 2
    S = v.new_zeros(shape) if initial_state is None else initial_state
    return run(q, k, v, decay, angle, S, cu_seqlens, scale, 0)


def step(q, k, v, decay, angle, state, scale):
    new, o = one_token(state, *(x.to(state.dtype) for x in (q, k, v)), decay, angle, scale)
    state.copy_(new)
    return o


ROTOR = Family(
    name="toy_rotor",
    arguments="q T H K, k T H K, v T H V, decay H K, angle H K",
    tensors="q k v decay angle",
    reference=reference,
    forms={"chunk": "tests.toys.rotor_form"},
    transition=transition.Complex,
    states=lambda K, V: {"S": (K, V, 2)},
    gates=("decay angle",),
    samples={"decay": lambda x: -x.abs()},
)


class Rotor(QKVMixer):
    family = ROTOR
    tp_plan = QKVMixer.tp_plan | {"log_decay": 0, "angle": 0}

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        heads = options.shape(config).qk_heads
        self.log_decay, self.angle = (
            fp32_parameter(heads, self.K, marks=["no_decay"]) for _ in range(2)
        )

    def init_parameter(self, name, tensor, generator):
        tensor.uniform_(-2.0, 1.0, generator=generator)

    def constants(self):
        return {"decay": -local(self.log_decay).exp(), "angle": local(self.angle)}
