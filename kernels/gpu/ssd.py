"""ssd on a GPU: S_t = e^g_t S_{t-1} + k_t^T v_t, o_t = q_t S_t (the formulas: chunk/ssd.py).

Forward: the state pass, then all chunks at once. Backward: the state pass mirrored, then all chunks at once, one program for all value
heads that share q and k, so that nothing is summed by atomics.
"""

import torch
import triton
import triton.language as tl

from lmoe.kernels.gpu.common import INTERPRETED, document_starts, mm, processors, tile
from lmoe.kernels.gpu.state import States, gate_kind, load_state, scalar_gates, segment_count, sizes


@triton.jit
def pair_decays(a, start, G: tl.constexpr, C: tl.constexpr, ROUND: tl.constexpr):
    """D [C, C]: the decay from token i to token t of one document, 0 for other pairs and i > t. a, start [C]."""
    t = tl.arange(0, C)
    mask = (t[:, None] >= t[None, :]) & (start[:, None] == start[None, :])
    if G == 0:
        return tl.where(mask, 1.0, 0.0)
    if ROUND:
        G_t = tl.sum(tl.where(mask, a[None, :], 0.0), 1)  # from the document's start: other documents are not even rounded in
        logs = G_t[:, None] - G_t[None, :]
    else:  # sums of the decays between, not differences of sums
        logs = tl.cumsum(tl.where((t[:, None] > t[None, :]) & mask, a[:, None] + tl.zeros([1, C], tl.float32), 0.0), 0)
    return tl.exp(tl.where(mask, tl.minimum(logs, 0.0), -float("inf")))


@triton.jit
def from_start(a, start, seen, G: tl.constexpr, C: tl.constexpr):
    """[C]: the decay from the chunk's start to each token that sees what was there, else 0."""
    if G == 0:
        return tl.where(seen, 1.0, 0.0)
    return tl.where(seen, tl.exp(tl.cumsum(tl.where(seen, a, 0.0), 0)), 0.0)


@triton.jit
def to_end(a, kept, G: tl.constexpr, C: tl.constexpr):
    """[C]: the decay from each token of the last document to the chunk's end, 0 for the others."""
    if G == 0:
        return tl.where(kept, 1.0, 0.0)
    mine = tl.where(kept, a, 0.0)
    return tl.where(kept, tl.exp(tl.cumsum(mine, 0, reverse=True) - mine), 0.0)


@triton.jit
def documents(starts, c, t, T, C: tl.constexpr, DOCS: tl.constexpr):
    """Of the tokens t [C] of chunk c: (start of the document, whether it began before the chunk, whether it is the last one's)."""
    real = t < T
    if not DOCS:
        return tl.zeros([C], tl.int32), real, real
    start = tl.load(starts + t, mask=real, other=-1)
    last = tl.load(starts + tl.minimum(c * C + C, T) - 1)
    return start, real & (start < tl.maximum(c * C, 1)), real & (start == last)


@triton.jit
def _outputs(
    q, k, v, g, gamma, diag, starts, states, entering, decays, o, scale, T, NC, L, NS,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    G: tl.constexpr, DIAG: tl.constexpr, DOCS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    i_v, c = tl.program_id(0), tl.program_id(1)
    b, h = tl.program_id(2) // HV, tl.program_id(2) % HV
    hk = h // (HV // H)
    place, vs = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    t = c * C + place
    real = t < T
    row = (b * T + t).to(tl.int64)
    start, seen, _ = documents(starts, c, t, T, C, DOCS)
    a = scalar_gates(g, gamma, b, h, t, T, HV, G)
    A, inter = tl.zeros([C, C], tl.float32), tl.zeros([C, BV], tl.float32)
    for i_k in range((K + BK - 1) // BK):
        ks = i_k * BK + tl.arange(0, BK)
        at, mask = (row * H + hk)[:, None] * K + ks[None, :], real[:, None] & (ks < K)[None, :]
        Q, Kt = tl.load(q + at, mask=mask, other=0.0), tl.load(k + at, mask=mask, other=0.0)
        A += mm(Q, tl.trans(Kt), ROUND)
        inter += mm(Q, load_state(states, entering, decays, b, c, h, NC, L, NS, ks, vs, HV, K, V), ROUND)
    D = pair_decays(a, start, G, C, ROUND)
    if DIAG:
        own = tl.load(diag + row * HV + h, mask=real, other=0.0).to(tl.float32)
        D = tl.where(place[:, None] == place[None, :], own[:, None], D)
    at, mask = (row * HV + h)[:, None] * V + vs[None, :], real[:, None] & (vs < V)[None, :]
    Vt = tl.load(v + at, mask=mask, other=0.0)
    out = mm(A * D, Vt, ROUND) + inter * from_start(a, start, seen, G, C)[:, None]
    tl.store(o + at, (out * scale).to(o.dtype.element_ty), mask=mask)


@triton.jit
def _gradients(
    q, k, v, g, gamma, diag, starts, states, entering, decays, dstates, dentering, ddecays, do, dq, dk, dv, dg, ddiag, scale,
    B, T, NC, L, NS, DL, DNS,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    G: tl.constexpr, DIAG: tl.constexpr, DOCS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """A program has one tile BK of q and k and all of V. dv, dg and ddiag are sums over K: [tiles of K, B, T, HV, ..]."""
    i_k, c = tl.program_id(0), tl.program_id(1)
    b, hk = tl.program_id(2) // H, tl.program_id(2) % H
    part = i_k.to(tl.int64) * B * T * HV
    place, ks, vs = tl.arange(0, C), i_k * BK + tl.arange(0, BK), tl.arange(0, BV)
    t = c * C + place
    real = t < T
    row = (b * T + t).to(tl.int64)
    start, seen, kept = documents(starts, c, t, T, C, DOCS)
    at_k, mask_k = (row * H + hk)[:, None] * K + ks[None, :], real[:, None] & (ks < K)[None, :]
    Q, Kt = tl.load(q + at_k, mask=mask_k, other=0.0), tl.load(k + at_k, mask=mask_k, other=0.0)
    qk = mm(Q, tl.trans(Kt), ROUND) * scale  # this tile's share
    dQ, dK = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    for r in range(HV // H):
        h = hk * (HV // H) + r
        a = scalar_gates(g, gamma, b, h, t, T, HV, G)
        D = pair_decays(a, start, G, C, ROUND)
        if DIAG:
            own = tl.load(diag + row * HV + h, mask=real, other=0.0).to(tl.float32)
            D = tl.where(place[:, None] == place[None, :], own[:, None], D)
        to, fro = from_start(a, start, seen, G, C), to_end(a, kept, G, C)
        P = tl.zeros([C, C], tl.float32)
        dq_in, dk_out, kept_part = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), 0.0
        for i_v in range((V + BV - 1) // BV):
            vt = i_v * BV + vs
            at_v, mask_v = (row * HV + h)[:, None] * V + vt[None, :], real[:, None] & (vt < V)[None, :]
            Vt, dO = tl.load(v + at_v, mask=mask_v, other=0.0), tl.load(do + at_v, mask=mask_v, other=0.0)
            S = load_state(states, entering, decays, b, c, h, NC, L, NS, ks, vt, HV, K, V)
            dS = load_state(dstates, dentering, ddecays, b, c, h, NC, DL, DNS, ks, vt, HV, K, V)
            P += mm(dO, tl.trans(Vt), ROUND)
            dq_in += mm(dO, tl.trans(S), ROUND)
            dk_out += mm(Vt, tl.trans(dS), ROUND)
            dV = mm(tl.trans(qk * D), dO, ROUND) + mm(Kt, dS, ROUND) * fro[:, None]
            tl.store(dv + part * V + at_v, dV.to(dv.dtype.element_ty), mask=mask_v)
            if G == 1:
                kept_part += tl.sum(S * dS)
        dq_in, dk_out = dq_in * (to * scale)[:, None], dk_out * fro[:, None]
        if G == 1:
            pairs = tl.where(place[:, None] > place[None, :], qk * D * P, 0.0)
            leaving = tl.sum(Kt * dk_out, 1)
            through = tl.sum(pairs, 1) - tl.sum(pairs, 0) + tl.sum(Q * dq_in, 1) - leaving
            later = (place[:, None] <= place[None, :]) & (start[:, None] == start[None, :])
            here = tl.sum(tl.where(later, through[None, :], 0.0), 1)
            whole = tl.sum(tl.where(seen & kept, 1, 0)) > 0  # whether the last document began before the chunk
            end = tl.sum(leaving) + tl.where(whole, kept_part * tl.exp(tl.sum(a, 0)), 0.0)
            here = here + tl.where(kept, end, 0.0)
            tl.store(dg + part + row * HV + h, here, mask=real)
        if DIAG:
            diagonal = tl.where(place[:, None] == place[None, :], qk * P, 0.0)
            tl.store(ddiag + part + row * HV + h, tl.sum(diagonal, 1), mask=real)
        dqk = P * D * scale
        dQ += mm(dqk, Kt, ROUND) + dq_in
        dK += mm(tl.trans(dqk), Q, ROUND) + dk_out
    tl.store(dq + at_k, dQ.to(dq.dtype.element_ty), mask=mask_k)
    tl.store(dk + at_k, dK.to(dk.dtype.element_ty), mask=mask_k)


# ----------------------------------------------------------------------------------------------------------------------------------------
# The ops


class Plan:
    """Tiles and segments for the shapes of a call; ValueError for what the kernels can't take."""

    def __init__(self, k, v, C):
        (self.B, self.T, self.H, self.K), (self.HV, self.V) = k.shape, v.shape[2:]
        if not 16 <= C <= 128:
            raise ValueError(f"chunk_size: {C}; the triton backend takes 16, 32, 64 and 128")
        if max(self.K, self.V) > 256:
            raise ValueError(f"q, v: heads of {self.K} and {self.V} channels; the triton backend takes up to 256")
        if k.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"q: {k.dtype}; the triton backend takes bfloat16 and float32")
        if k.device.type == "cpu" and not INTERPRETED:
            raise ValueError("backend: triton runs on a GPU; take backend = chunk (or set TRITON_INTERPRET=1, to debug kernels)")
        self.C, self.dtype = C, k.dtype
        self.walk = tile(self.K, 64), tile(self.V, 64)
        self.segments = segment_count(
            self.B * self.HV * triton.cdiv(self.K, self.walk[0]) * triton.cdiv(self.V, self.walk[1]), triton.cdiv(self.T, C), processors(k)
        )
        self.small = sizes(self.B, self.T, self.HV, self.K, self.V, C, self.segments)[3]
        self.states = (self.B, triton.cdiv(self.T, C), self.HV, self.K, self.V)

    def starts(self, cu_seqlens):
        return None if cu_seqlens is None else document_starts(cu_seqlens, self.T)

    def sizes(self):
        return {"H": self.H, "HV": self.HV, "K": self.K, "V": self.V, "C": self.C}

    def pass_states(self, x, y, g, starts, border, scale, reverse):
        return States.walk(x, y, g, starts, border, self.C, scale, reverse, self.walk, self.segments, 4, self.dtype)


def border_state(S, cu_seqlens, name):
    """A state of the stream's border, [B, HV, K, V] fp32; per document they are refused."""
    if S is not None and cu_seqlens is not None and len(S) > 1:
        raise ValueError(f"{name}: the triton backend takes no states of single packed documents; use backend = chunk")
    return None if S is None else S.float().contiguous()


def contiguous(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]


def shapes(k, v, cu_seqlens, C):
    plan = Plan(k, v, C)
    return (plan.small,), plan.states, plan.dtype


def state(k, v, g, diag, cu_seqlens, C):
    plan, (k, v, g) = Plan(k, v, C), contiguous(k, v, g)
    passed = plan.pass_states(k, v, g, plan.starts(cu_seqlens), None, 1.0, False)
    return passed.far, passed.through, None


def fwd(q, k, v, g, diag, S_in, cu_seqlens, cache, scale, C, output_final_state):
    plan, (q, k, v, g, diag) = Plan(k, v, C), contiguous(q, k, v, g, diag)
    if output_final_state and cu_seqlens is not None and len(cu_seqlens) > 2:
        raise ValueError("output_final_state: the triton backend gives no states of single packed documents; use backend = chunk")
    starts = plan.starts(cu_seqlens)
    passed = plan.pass_states(k, v, g, starts, border_state(S_in, cu_seqlens, "initial_state"), 1.0, False)
    o, (BK, BV) = torch.empty_like(v), (tile(plan.K, 64), tile(plan.V, 128))
    _outputs[(triton.cdiv(plan.V, BV), passed.NC, plan.B * plan.HV)](
        q, k, v, g, g, diag, starts, passed.states, passed.entering, passed.decays, o, scale, plan.T, passed.NC, passed.L, passed.NS,
        **plan.sizes(), BK=BK, BV=BV, G=gate_kind(g), DIAG=diag is not None, DOCS=starts is not None, ROUND=k.dtype == torch.bfloat16,
        num_warps=4,
    )  # fmt: skip
    return o, passed.far if output_final_state else None, torch.cat([passed.entering, passed.decays]), passed.states


def dstate(q, k, v, g, diag, do, cu_seqlens, cache, scale, C):
    plan, (q, g, do) = Plan(k, v, C), contiguous(q, g, do)
    return plan.pass_states(q, do, g, plan.starts(cu_seqlens), None, scale, True).far


def bwd(q, k, v, g, diag, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad):
    plan, (q, k, v, g, diag, do) = Plan(k, v, C), contiguous(q, k, v, g, diag, do)
    starts = plan.starts(cu_seqlens)
    before = States(S, kept, C, plan.T, plan.segments)
    after = plan.pass_states(q, do, g, starts, border_state(dS_out, cu_seqlens, "the final state's gradient"), scale, True)
    BK, BV = tile(plan.K, 128), tile(plan.V, 64)
    parts = triton.cdiv(plan.K, BK)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    wide = v.dtype if parts == 1 else torch.float32
    dv = v.new_empty(parts, *v.shape, dtype=wide)
    dg = None if g is None or g.ndim == 1 else g.new_empty(parts, *g.shape, dtype=torch.float32)
    ddiag = None if diag is None else diag.new_empty(parts, *diag.shape, dtype=torch.float32)
    _gradients[(parts, before.NC, plan.B * plan.H)](
        q, k, v, g, g, diag, starts, before.states, before.entering, before.decays, after.states, after.entering, after.decays, do,
        dq, dk, dv, dg, ddiag, scale, plan.B, plan.T, before.NC, before.L, before.NS, after.L, after.NS,
        **plan.sizes(), BK=BK, BV=BV, G=gate_kind(g), DIAG=diag is not None, DOCS=starts is not None, ROUND=k.dtype == torch.bfloat16,
        num_warps=8,
    )  # fmt: skip

    def whole(x, like):
        return None if x is None else (x[0] if parts == 1 else x.sum(0)).to(like.dtype)

    dS_in = None
    if input_state_grad:
        N = plan.B if cu_seqlens is None else len(cu_seqlens) - 1
        dS_in = after.far
        if N != plan.B:  # of the document that the stream's first token belongs to
            dS_in = dS_in.new_zeros(N, *dS_in.shape[1:])
            first = torch.searchsorted(cu_seqlens[1:].contiguous(), cu_seqlens.new_zeros(1), right=True)
            dS_in[first] = after.far
    return dq, dk, whole(dv, v), whole(dg, g), whole(ddiag, diag), dS_in
