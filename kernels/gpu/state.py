"""The state pass that the families share: S <- decay . S + sum over a chunk's tokens of x^T y, and its mirror for gradients.

Forwards x, y are k, v, each decayed to the chunk's end, and the state before every chunk is written. Backwards they are q and do, decayed
from the chunk's start, and the gradient of the state after every chunk is written. A chunk is one step of a sequential chain, so a long
sequence of few heads would leave most of a GPU idle: it is cut into segments that start from zero, a second, small pass finds what enters
each of them (transition.py in one GPU), and readers add that, decayed, to the states inside (`load_state`).

Decays: `g` one number per token and value head, or `gamma` one per head, or `gk`, `gv` per channel.
"""

import torch
import triton
import triton.language as tl

from lmoe.kernels.gpu.common import NOTHING, mm

GONE = tl.constexpr(-1e30)  # a log decay that leaves nothing


@triton.jit
def scalar_gates(g, gamma, b, h, t, T, HV, G: tl.constexpr):
    """Log decays of the tokens t [C] of value head h, zero beyond the stream: per token (G = 1), per head (2) or none (0)."""
    here = tl.zeros(t.shape, tl.float32)
    if G == 1:
        here = tl.load(g + (b * T + t).to(tl.int64) * HV + h, mask=t < T, other=0.0).to(tl.float32)
    if G == 2:
        here = tl.where(t < T, tl.load(gamma + h).to(tl.float32), 0.0)
    return tl.maximum(here, NOTHING)


@triton.jit
def _walk(
    x, y, g, gamma, starts, out, ends, decays, end_decays, scale, T, NC, L, NS,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    G: tl.constexpr, DOCS: tl.constexpr, REVERSE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    VT: tl.constexpr = (V + BV - 1) // BV
    i_k, i_v = tl.program_id(0) // VT, tl.program_id(0) % VT
    segment = tl.program_id(1)
    b, h = tl.program_id(2) // HV, tl.program_id(2) % HV
    hk = h // (HV // H)
    k, v, place = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    S = tl.zeros([BK, BV], tl.float32)
    run = 0.0
    inside = (k < K)[:, None] & (v < V)[None, :]
    first = segment * L
    count = tl.minimum(L, NC - first)
    for step in range(count):
        c = first + (count - 1 - step if REVERSE else step)
        where = ((b * NC + c).to(tl.int64) * HV + h) * K * V
        tl.store(out + where + k[:, None] * V + v[None, :], S.to(out.dtype.element_ty), mask=inside)
        tl.store(decays + (b * NC + c).to(tl.int64) * HV + h, run)
        t = c * C + place
        real = t < T
        a = scalar_gates(g, gamma, b, h, t, T, HV, G)
        used = real
        if DOCS:
            start = tl.load(starts + t, mask=real, other=0)
            last = tl.load(starts + tl.minimum(c * C + C, T) - 1)
            border = tl.maximum(c * C, 1)
            through = last < border
            used = real & (start < border if REVERSE else start == last)
        row = (b * T + t).to(tl.int64)
        X = tl.load(x + (row * H + hk)[:, None] * K + k[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
        Y = tl.load(y + (row * HV + h)[:, None] * V + v[None, :], mask=real[:, None] & (v < V)[None, :], other=0.0)
        total = tl.sum(a, 0)
        if G == 0:
            Y = tl.where(used[:, None], Y, 0.0)
        else:
            # Only of the document that counts: the others' decays must not even be rounded into it.
            mine = tl.where(used, a, 0.0)
            log = tl.cumsum(mine, 0)
            log = log if REVERSE else tl.cumsum(mine, 0, reverse=True) - mine
            Y = tl.where(used, tl.exp(log), 0.0)[:, None] * Y
        carry = tl.exp(total)
        run += total
        if DOCS:
            carry = tl.where(through, carry, 0.0)
            run = tl.where(through, run, GONE)
        S = S * carry + mm(tl.trans(X), Y, ROUND) * scale
    where = ((b * NS + segment).to(tl.int64) * HV + h) * K * V
    tl.store(ends + where + k[:, None] * V + v[None, :], S, mask=inside)
    tl.store(end_decays + (b * NS + segment) * HV + h, run)


@triton.jit
def _fold(
    ends, end_decays, S_in, final, NS,
    HV: tl.constexpr, KV: tl.constexpr, BLOCK: tl.constexpr, HAS_IN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """ends [B, NS, HV, K V]: from what each segment ends with to what enters it; final [B, HV, K V]: after the last one."""
    b, h = tl.program_id(1) // HV, tl.program_id(1) % HV
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < KV
    S = tl.zeros([BLOCK], tl.float32)
    if HAS_IN:
        S = tl.load(S_in + (b * HV + h).to(tl.int64) * KV + at, mask=mask, other=0.0)
    for step in range(NS):
        segment = NS - 1 - step if REVERSE else step
        where = ends + ((b * NS + segment).to(tl.int64) * HV + h) * KV + at
        U = tl.load(where, mask=mask, other=0.0)
        tl.store(where, S, mask=mask)
        S = S * tl.exp(tl.load(end_decays + (b * NS + segment) * HV + h)) + U
    tl.store(final + (b * HV + h).to(tl.int64) * KV + at, S, mask=mask)


@triton.jit
def load_state(states, entering, decays, b, c, h, NC, L, NS, k, v, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """The state of chunk c, [BK, BV] fp32, at rows k and columns v: that inside its segment and, decayed, what enters the segment."""
    inside = (k < K)[:, None] & (v < V)[None, :]
    at = k[:, None] * V + v[None, :]
    S = tl.load(states + ((b * NC + c).to(tl.int64) * HV + h) * K * V + at, mask=inside, other=0.0).to(tl.float32)
    E = tl.load(entering + ((b * NS + c // L).to(tl.int64) * HV + h) * K * V + at, mask=inside, other=0.0)
    return S + E * tl.exp(tl.load(decays + (b * NC + c).to(tl.int64) * HV + h))


def segment_count(programs, chunks, processors):
    """Segments of a sequence: enough that `programs` times them fill the GPU, of at least four chunks each."""
    return max(1, min(-(-2 * processors // programs), chunks // 4))


def sizes(B, T, HV, K, V, C, segments):
    """(chunks, chunks a segment, segments, elements of States.small)"""
    NC = triton.cdiv(T, C)
    L = triton.cdiv(NC, segments)
    NS = triton.cdiv(NC, L)
    return NC, L, NS, B * HV * (NS * K * V + NC)


class States:
    """The states before (or, reversed, the gradients after) all chunks, as load_state reads them; `far`: the one at the other end of the
    stream [B, HV, K, V]; `through`: log decay of the whole stream [B, HV].

    states [B, NC, HV, K, V] in bf16 or fp32; small: one fp32 tensor of what enters segments [B, NS, HV, K, V] and of the decays from there
    to the chunks [B, NC, HV].
    """

    def __init__(self, states, small, C, T, segments):
        B, _, HV, K, V = states.shape
        self.NC, self.L, self.NS, _ = sizes(B, T, HV, K, V, C, segments)
        self.states = states
        self.entering, self.decays = small.split([B * self.NS * HV * K * V, B * self.NC * HV])

    @classmethod
    def walk(cls, x, y, g, starts, border, C, scale, reverse, tiles, segments, warps, dtype):
        """x [B, T, H, K], y [B, T, HV, V], contiguous; g None, [HV] or [B, T, HV]; border [B, HV, K, V] or None: the state that enters the
        stream, or the gradient of the one that leaves it; tiles (BK, BV); dtype: of the states."""
        (B, T, H, K), (HV, V) = x.shape, y.shape[2:]
        NC, _, NS, small = sizes(B, T, HV, K, V, C, segments)
        it = cls(x.new_empty(B, NC, HV, K, V, dtype=dtype), x.new_empty(small, dtype=torch.float32), C, T, segments)
        it.far = x.new_empty(B, HV, K, V, dtype=torch.float32)
        end_decays = x.new_empty(B, NS, HV, dtype=torch.float32)
        BK, BV = tiles
        _walk[(triton.cdiv(K, BK) * triton.cdiv(V, BV), NS, B * HV)](
            x, y, g, g, starts, it.states, it.entering, it.decays, end_decays, scale, T, NC, it.L, NS,
            H=H, HV=HV, K=K, V=V, C=C, BK=BK, BV=BV, G=gate_kind(g), DOCS=starts is not None, REVERSE=reverse,
            ROUND=x.dtype == torch.bfloat16, num_warps=warps,
        )  # fmt: skip
        _fold[(triton.cdiv(K * V, 1024), B * HV)](
            it.entering, end_decays, border, it.far, NS, HV=HV, KV=K * V, BLOCK=1024, HAS_IN=border is not None, REVERSE=reverse
        )
        it.through = end_decays.sum(1)
        return it


def gate_kind(g):
    """The constant G of the kernels: 0 none, 1 per token, 2 constant."""
    return 0 if g is None else 2 if g.ndim == 1 else 1
