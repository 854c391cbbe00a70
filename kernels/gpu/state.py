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

from lmoe.kernels.gpu.common import INTERPRETED, NOTHING, contiguous, document_starts, mm, processors, tile

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
def documents(starts, c, t, T, C: tl.constexpr, DOCS: tl.constexpr):
    """Of the tokens t [C] of chunk c: (start of the document, whether it began before the chunk, whether it is the last one's)."""
    real = t < T
    start, seen, kept = tl.zeros([C], tl.int32), real, real
    if DOCS:
        start = tl.load(starts + t, mask=real, other=-1)
        last = tl.load(starts + tl.minimum(c * C + C, T) - 1)
        seen, kept = real & (start < tl.maximum(c * C, 1)), real & (start == last)
    return start, seen, kept


@triton.jit
def channel_gates(g, b, h, t, d, T, H, D: tl.constexpr):
    """Log decays [C, BD] of the tokens t at the channels d of head h, zero beyond the stream."""
    row = (b * T + t).to(tl.int64) * H + h
    here = tl.load(g + row[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
    return tl.maximum(here.to(tl.float32), NOTHING)


@triton.jit
def decayed(x, a, used, REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """x [C, D] of the used tokens (else zero), decayed by a [C, D] to the end, or, reversed, from the start: to a token, or before it."""
    mine = tl.where(used[:, None], a, 0.0)
    log = tl.cumsum(mine, 0, reverse=not REVERSE)
    if (not REVERSE) or EXCLUSIVE:
        log -= mine
    return tl.where(used[:, None], x * tl.exp(tl.minimum(log, 0.0)), 0.0)


@triton.jit
def _walk(
    x, y, g, gamma, gk, gv, starts, added, added_at, out, ends, decays, decays_k, decays_v,
    end_decays, end_decays_k, end_decays_v, scale, T, NC, L, NS,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    G: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, DOCS: tl.constexpr, ADDED: tl.constexpr, REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    VT: tl.constexpr = (V + BV - 1) // BV
    i_k, i_v = tl.program_id(0) // VT, tl.program_id(0) % VT
    segment = tl.program_id(1)
    b, h = tl.program_id(2) // HV, tl.program_id(2) % HV
    hk = h // (HV // H)
    k, v, place = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, C)
    S = tl.zeros([BK, BV], tl.float32)
    run, run_k, run_v = 0.0, tl.zeros([BK], tl.float32), tl.zeros([BV], tl.float32)
    inside = (k < K)[:, None] & (v < V)[None, :]
    first = segment * L
    count = tl.minimum(L, NC - first)
    for step in range(count):
        c = first + (count - 1 - step if REVERSE else step)
        chunk = (b * NC + c).to(tl.int64) * HV + h
        tl.store(out + chunk * K * V + k[:, None] * V + v[None, :], S.to(out.dtype.element_ty), mask=inside)
        tl.store(decays + chunk, run)
        if GK:
            tl.store(decays_k + chunk * K + k, run_k, mask=k < K)
        if GV:
            tl.store(decays_v + chunk * V + v, run_v, mask=v < V)
        t = c * C + place
        real = t < T
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
        Y = tl.where(used[:, None], Y, 0.0)
        if G > 0:
            a = scalar_gates(g, gamma, b, h, t, T, HV, G)
            Y = decayed(Y, a[:, None], used, REVERSE, EXCLUSIVE)
            total = tl.sum(a, 0)
            S *= tl.exp(total)
            run += total
        if GK:
            a_k = channel_gates(gk, b, h, t, k, T, HV, K)
            X = decayed(X, a_k, used, REVERSE, EXCLUSIVE)
            total_k = tl.sum(a_k, 0)
            S *= tl.exp(total_k)[:, None]
            run_k += total_k
        if GV:
            a_v = channel_gates(gv, b, h, t, v, T, HV, V)
            Y = decayed(Y, a_v, used, REVERSE, EXCLUSIVE)
            total_v = tl.sum(a_v, 0)
            S *= tl.exp(total_v)[None, :]
            run_v += total_v
        if DOCS:
            S = tl.where(through, S, 0.0)
            run = tl.where(through, run, GONE)
        S += mm(tl.trans(X), Y, ROUND) * scale
        if ADDED:  # the state of the document added_at[c] comes in after this chunk
            n = tl.load(added_at + c)
            where = (n.to(tl.int64) * HV + h) * K * V + k[:, None] * V + v[None, :]
            S += tl.load(added + where, mask=inside & ((k * 0 + n)[:, None] >= 0), other=0.0)
    end = (b * NS + segment).to(tl.int64) * HV + h
    tl.store(ends + end * K * V + k[:, None] * V + v[None, :], S, mask=inside)
    tl.store(end_decays + end, run)
    if GK:
        tl.store(end_decays_k + end * K + k, run_k, mask=k < K)
    if GV:
        tl.store(end_decays_v + end * V + v, run_v, mask=v < V)


@triton.jit
def decay_of(scalar, of_k, of_v, at, k, v, K: tl.constexpr, V: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr):
    """e^(log decays) at row `at` of the tables, for states at k and v."""
    log = tl.load(scalar + at) + tl.zeros(k.shape, tl.float32)
    if GK:
        log += tl.load(of_k + at * K + k, mask=k < K, other=0.0)
    decay = tl.exp(log)
    if GV:
        decay *= tl.exp(tl.load(of_v + at * V + v, mask=v < V, other=0.0))
    return decay


@triton.jit
def _fold(
    ends, end_decays, end_decays_k, end_decays_v, S_in, final, NS,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, HAS_IN: tl.constexpr, REVERSE: tl.constexpr,
    GK: tl.constexpr, GV: tl.constexpr,
):  # fmt: skip
    """ends [B, NS, HV, K, V]: from what each segment ends with to what enters it; final [B, HV, K, V]: after the last one."""
    b, h = tl.program_id(1) // HV, tl.program_id(1) % HV
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k, v, mask = at // V, at % V, at < K * V
    S = tl.zeros([BLOCK], tl.float32)
    if HAS_IN:
        S = tl.load(S_in + (b * HV + h).to(tl.int64) * K * V + at, mask=mask, other=0.0)
    for step in range(NS):
        end = (b * NS + (NS - 1 - step if REVERSE else step)).to(tl.int64) * HV + h
        U = tl.load(ends + end * K * V + at, mask=mask, other=0.0)
        tl.store(ends + end * K * V + at, S, mask=mask)
        S = S * decay_of(end_decays, end_decays_k, end_decays_v, end, k, v, K, V, GK, GV) + U
    tl.store(final + (b * HV + h).to(tl.int64) * K * V + at, S, mask=mask)


@triton.jit
def load_state(
    states, entering, decays, decays_k, decays_v, b, c, h, NC, L, NS, k, v,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr,
):  # fmt: skip
    """The state of chunk c, [BK, BV] fp32, at rows k and columns v: that inside its segment and, decayed, what enters the segment."""
    inside = (k < K)[:, None] & (v < V)[None, :]
    at = k[:, None] * V + v[None, :]
    chunk = (b * NC + c).to(tl.int64) * HV + h
    S = tl.load(states + chunk * K * V + at, mask=inside, other=0.0).to(tl.float32)
    E = tl.load(entering + ((b * NS + c // L).to(tl.int64) * HV + h) * K * V + at, mask=inside, other=0.0)
    return S + E * decay_of(decays, decays_k, decays_v, chunk, k[:, None], v[None, :], K, V, GK, GV)


def border_state(S):
    """A state of the stream's border as the kernels take it."""
    return None if S is None else S.float().contiguous()


class Plan:
    """Sizes, tiles and segments of a call; ValueError for what the kernels can't take. g [HV] or [B, T, HV], gk, gv by channel, or None."""

    def __init__(self, k, v, C, g=None, gk=None, gv=None, tables=0, exact=False):
        """tables: elements per chunk and head of a family's own in `kept`; exact: keep the states in fp32, because they are results."""
        (self.B, self.T, self.H, self.K), (self.HV, self.V) = k.shape, v.shape[2:]
        if not 16 <= C <= 128:
            raise ValueError(f"chunk_size: {C}; the triton backend takes 16, 32, 64 and 128")
        if max(self.K, self.V) > 256:
            raise ValueError(f"q, v: heads of {self.K} and {self.V} channels; the triton backend takes up to 256")
        if k.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"q: {k.dtype}; the triton backend takes bfloat16 and float32")
        if k.device.type == "cpu" and not INTERPRETED:
            raise ValueError("backend: triton runs on a GPU; take backend = chunk (or set TRITON_INTERPRET=1, to debug kernels)")
        self.C, self.dtype, self.round = C, k.dtype, k.dtype == torch.bfloat16
        self.state_dtype = torch.float32 if exact else k.dtype
        self.g, self.gk, self.gv = contiguous(g, gk, gv)
        self.gates = {"GK": gk is not None, "GV": gv is not None}
        self.BK, self.BV = tile(self.K, 64), tile(self.V, 64)
        self.tiles = triton.cdiv(self.K, self.BK) * triton.cdiv(self.V, self.BV)
        self.NC = triton.cdiv(self.T, C)
        # A sequence is cut until the programs fill the GPU twice, but not into less than four chunks.
        segments = max(1, min(-(-2 * processors(k) // (self.B * self.HV * self.tiles)), self.NC // 4))
        self.L = triton.cdiv(self.NC, segments)
        self.NS = triton.cdiv(self.NC, self.L)
        self.states = (self.B, self.NC, self.HV, self.K, self.V)
        chunks, per_channel = self.B * self.NC * self.HV, [self.K * (gk is not None), self.V * (gv is not None)]
        self.parts = [self.B * self.NS * self.HV * self.K * self.V, chunks, *(chunks * size for size in per_channel)]
        self.small = -(-sum(self.parts) // 4) * 4  # what follows is aligned
        self.tables = chunks * tables

    def kept(self):
        """Elements, of fp32, of what forward keeps beside the states: small, and the family's tables in the inputs' dtype."""
        return self.small + (self.tables // 2 if self.round else self.tables)

    def starts(self, cu_seqlens):
        return None if cu_seqlens is None else document_starts(cu_seqlens, self.T)

    def states_in(self, states, kept):
        """(what load_state reads: states and their tables; the family's own tables) of tensors [..] and [kept()]."""
        entering, decays, of_k, of_v = kept[: sum(self.parts)].split(self.parts)
        return (states, entering, decays, of_k, of_v), kept[self.small :].view(self.dtype)

    def walk(self, x, y, starts, border, scale, reverse, states, kept, exclusive=False, added=None, added_at=None):
        """Fill states [B, NC, HV, K, V] and kept. Returns the state at the far end of the stream [B, HV, K, V] and the log decays of all of
        it, [B, HV], [B, HV, K] and [B, HV, V].

        x [B, T, H, K], y [B, T, HV, V], contiguous; starts: document_starts or None; border [B, HV, K, V] or None: the state that enters
        the stream, or, reversed, the gradient of the one that leaves it. added [N, HV, K, V], added_at [NC]: see documents.py.
        """
        arguments, _ = self.states_in(states, kept)
        far = x.new_empty(self.B, *self.states[2:], dtype=torch.float32)
        widths = ((), (self.K * self.gates["GK"],), (self.V * self.gates["GV"],))
        totals = [x.new_empty(self.B, self.NS, self.HV, *width, dtype=torch.float32) for width in widths]
        _walk[(self.tiles, self.NS, self.B * self.HV)](
            x, y, self.g, self.g, self.gk, self.gv, starts, added, added_at, *arguments, *totals, scale, self.T, self.NC, self.L, self.NS,
            H=self.H, HV=self.HV, K=self.K, V=self.V, C=self.C, BK=self.BK, BV=self.BV, G=self.kind, **self.gates,
            DOCS=starts is not None, ADDED=added is not None, REVERSE=reverse, EXCLUSIVE=exclusive, ROUND=self.round, num_warps=4,
        )  # fmt: skip
        _fold[(triton.cdiv(self.K * self.V, 1024), self.B * self.HV)](
            arguments[1], *totals, border, far, self.NS, HV=self.HV, K=self.K, V=self.V, BLOCK=1024, HAS_IN=border is not None,
            REVERSE=reverse, **self.gates,
        )  # fmt: skip
        return far, [x.sum(1) for x in totals]

    @property
    def kind(self):
        """The kernels' constant G: 0 none, 1 per token, 2 constant."""
        return 0 if self.g is None else 2 if self.g.ndim == 1 else 1

    def state_at(self, chunks, states, kept):
        """The states [n, HV, K, V] before (or the gradients after) the chunks [n] of a stream, fp32."""
        (states, entering, decays, of_k, of_v), _ = self.states_in(states, kept)
        shape = self.NS, self.HV, self.K, self.V
        log = decays.view(self.NC, self.HV, 1, 1)[chunks]
        if len(of_k):
            log = log + of_k.view(self.NC, self.HV, self.K, 1)[chunks]
        if len(of_v):
            log = log + of_v.view(self.NC, self.HV, 1, self.V)[chunks]
        return states[0][chunks].float() + log.exp() * entering.view(shape)[chunks // self.L]

    def new_states(self, like):
        return like.new_empty(self.states, dtype=self.state_dtype), like.new_empty(self.kept(), dtype=torch.float32)
