"""A family whose state is several tensors, committed every few tokens, so that segments of a stream
do not compose; and its mixer. After TTT (arXiv 2407.04620): a linear model per head, W and b, that
learns k -> v with rates of its own for each place in a mini-batch."""

import torch
from torch import nn

from lmoe.kernels.family import Family
from lmoe.model.init import Linear, local
from lmoe.model.mixers.base import QKVMixer


def states(K, V):
    """W and b as committed, less the initial W; what this mini-batch adds; tokens in it so far."""
    return {"W": (K, V), "b": (V,), "dW": (K, V), "db": (V,), "count": (1,)}


def one_token(S, q, k, v, eta, rates, W0, scale):
    """Advance the states by one token: (S, o). S {name: [.., H, ..]}; q, k [.., H, K], v [.., H,
    V], eta [.., H]; rates [b]; W0 [H, K, V]."""
    W, b, dW, db, count = (S[name] for name in ("W", "b", "dW", "db", "count"))
    size = len(rates)
    error = v - (k[..., None, :] @ (W0 + W)).squeeze(-2) - b
    rate = eta[..., None] * rates[count.long() % size]
    dW = dW + k[..., :, None] * (rate * error)[..., None, :]
    db = db + rate * error
    o = scale * ((q[..., None, :] @ (W0 + W + dW)).squeeze(-2) + b + db)
    count = count + 1
    ends = count == size
    W = torch.where(ends[..., None], W + dW, W)
    b = torch.where(ends, b + db, b)
    dW = dW.masked_fill(ends[..., None], 0)
    db, count = db.masked_fill(ends, 0), count.masked_fill(ends, 0)
    return {"W": W, "b": b, "dW": dW, "db": db, "count": count}, o


def pack(S):
    return torch.cat([x.flatten(2) for x in S.values()], -1)


def run(q, k, v, eta, rates, W0, S, cu_seqlens, scale, C):
    """Run streams [B, T, ..] or documents from states S [N, H, elements]: (o, final states)."""
    T, ends = v.shape[1], None if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(slice(None), 0, T)]
    if ends is not None:
        spans = [(slice(0, 1), a, b) for a, b in zip(ends, ends[1:])]
    outputs, finals = [], []
    for n, (rows, start, end) in enumerate(spans):
        held = S if ends is None else S[n : n + 1]
        state = MINI_BATCH.views(held, k.shape[-1], v.shape[-1])
        for t in range(start, end):
            token = (x[rows, t].to(S.dtype) for x in (q, k, v, eta))
            state, o = one_token(state, *token, rates, W0, scale)
            outputs.append(o)
        finals.append(pack(state))
    return torch.stack(outputs, 1).to(v.dtype), torch.cat(finals)


def reference(q, k, v, eta, rates, W0, scale, initial_state, cu_seqlens):
    N = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    elements = MINI_BATCH.state_shape(k.shape[-1], v.shape[-1])
    S = v.new_zeros(N, v.shape[2], *elements) if initial_state is None else initial_state
    return run(q, k, v, eta, rates, W0, S, cu_seqlens, scale, 0)


def step(q, k, v, eta, rates, W0, state, scale):
    views = MINI_BATCH.views(state, k.shape[-1], v.shape[-1])
    new, o = one_token(views, *(x.to(state.dtype) for x in (q, k, v, eta)), rates, W0, scale)
    state.copy_(pack(new))
    return o


MINI_BATCH = Family(
    name="toy_mini_batch",
    arguments="q T H K, k T H K, v T H V, eta T H, rates b, W0 H K V",
    tensors="q k v eta rates W0",
    reference=reference,
    forms={"chunk": "tests.toys.mini_batch_form"},
    transition=None,
    states=states,
    gates=("eta rates W0",),
    samples={"eta": lambda x: 0.3 * x.sigmoid(), "rates": lambda x: x.sigmoid()},
)


class MiniBatch(QKVMixer):
    family = MINI_BATCH
    tp_plan = QKVMixer.tp_plan | {"wr": 0, "W0": 0}

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        heads = options.shape(config).v_heads
        self.wr = Linear(config.dim, heads, std=config.init_std)
        self.W0 = nn.Parameter(torch.empty(heads, self.K, self.V))
        self.rates = nn.Parameter(torch.empty(4))

    def init_parameter(self, name, tensor, generator):
        tensor.uniform_(0.1, 0.5, generator=generator)

    def project_kv(self, x, left, seq, state, residuals):
        eta = 0.3 * torch.sigmoid(self.wr(x))
        return super().project_kv(x, left, seq, state, residuals) | {"eta": eta}

    def constants(self):
        return {"rates": self.rates, "W0": local(self.W0), "scale": 1.0}
