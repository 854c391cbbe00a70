"""ssd on a GPU: S_t = e^g_t S_{t-1} + k_t^T v_t, o_t = q_t S_t (the formulas: chunk/ssd.py).

Forward: the state pass, then all chunks at once. Backward: the state pass mirrored, then all chunks at once, one program for all value
heads that share q and k, so that nothing is summed by atomics.
"""

import torch
import triton
import triton.language as tl

from lmoe.kernels.gpu.common import contiguous, mm, tile
from lmoe.kernels.gpu.documents import Documents, laid_out_chunks, of_documents, wanted
from lmoe.kernels.gpu.state import Plan, border_state, documents, load_state, scalar_gates
from lmoe.kernels.gpu.step import step as one_token


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
def _outputs(
    q, k, v, g, gamma, diag, starts, states, entering, decays, decays_k, decays_v, o, scale, T, NC, L, NS,
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
        inter += mm(Q, load_state(states, entering, decays, decays_k, decays_v, b, c, h, NC, L, NS, ks, vs, HV, K, V, False, False), ROUND)
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
    q, k, v, g, gamma, diag, starts, states, entering, decays, decays_k, decays_v,
    dstates, dentering, ddecays, ddecays_k, ddecays_v, do, dq, dk, dv, dg, ddiag, scale, T, NC, L, NS,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    G: tl.constexpr, DIAG: tl.constexpr, DOCS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    b, hk = tl.program_id(1) // H, tl.program_id(1) % H
    place, ks, vs = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    t = c * C + place
    real = t < T
    row = (b * T + t).to(tl.int64)
    start, seen, kept = documents(starts, c, t, T, C, DOCS)
    rows_k = (row * H + hk)[:, None] * K
    qk, dqk = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for i_k in range((K + BK - 1) // BK):
        kt = i_k * BK + ks
        mask_k = real[:, None] & (kt < K)[None, :]
        Q = tl.load(q + rows_k + kt[None, :], mask=mask_k, other=0.0)
        Kt = tl.load(k + rows_k + kt[None, :], mask=mask_k, other=0.0)
        qk += mm(Q, tl.trans(Kt), ROUND)
    qk *= scale
    # One value head after another: dv, dg, and what it adds to the gradient of q k^T.
    for r in range(HV // H):
        h = hk * (HV // H) + r
        rows_v = (row * HV + h)[:, None] * V
        a = scalar_gates(g, gamma, b, h, t, T, HV, G)
        D = pair_decays(a, start, G, C, ROUND)
        if DIAG:
            own = tl.load(diag + row * HV + h, mask=real, other=0.0).to(tl.float32)
            D = tl.where(place[:, None] == place[None, :], own[:, None], D)
        to, fro = from_start(a, start, seen, G, C), to_end(a, kept, G, C)
        A = qk * D
        P = tl.zeros([C, C], tl.float32)
        read, leaving, carried = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([BV], tl.float32)
        for i_v in range((V + BV - 1) // BV):
            vt = i_v * BV + vs
            mask_v = real[:, None] & (vt < V)[None, :]
            Vt = tl.load(v + rows_v + vt[None, :], mask=mask_v, other=0.0)
            dO = tl.load(do + rows_v + vt[None, :], mask=mask_v, other=0.0)
            P += mm(dO, tl.trans(Vt), ROUND)
            out, inter = tl.zeros([C, BV], tl.float32), tl.zeros([C, BV], tl.float32)
            for i_k in range((K + BK - 1) // BK):
                kt = i_k * BK + ks
                mask_k = real[:, None] & (kt < K)[None, :]
                Kt = tl.load(k + rows_k + kt[None, :], mask=mask_k, other=0.0)
                dS = load_state(dstates, dentering, ddecays, ddecays_k, ddecays_v, b, c, h, NC, L, NS, kt, vt, HV, K, V, False, False)
                out += mm(Kt, dS, ROUND)
                if G == 1:
                    Q = tl.load(q + rows_k + kt[None, :], mask=mask_k, other=0.0)
                    S = load_state(states, entering, decays, decays_k, decays_v, b, c, h, NC, L, NS, kt, vt, HV, K, V, False, False)
                    inter += mm(Q, S, ROUND)
                    carried += tl.sum(S * dS, 0)
            out *= fro[:, None]
            tl.store(dv + rows_v + vt[None, :], (mm(tl.trans(A), dO, ROUND) + out).to(dv.dtype.element_ty), mask=mask_v)
            if G == 1:
                read += tl.sum(inter * dO, 1)
                leaving += tl.sum(out * Vt, 1)
        if G == 1:
            pairs = tl.where(place[:, None] > place[None, :], A * P, 0.0)
            through = tl.sum(pairs, 1) - tl.sum(pairs, 0) + read * to * scale - leaving
            later = (place[:, None] <= place[None, :]) & (start[:, None] == start[None, :])
            here = tl.sum(tl.where(later, through[None, :], 0.0), 1)
            whole = tl.sum(tl.where(seen & kept, 1, 0)) > 0  # whether the last document began before the chunk
            end = tl.sum(leaving) + tl.where(whole, tl.sum(carried) * tl.exp(tl.sum(a, 0)), 0.0)
            tl.store(dg + row * HV + h, (here + tl.where(kept, end, 0.0)).to(dg.dtype.element_ty), mask=real)
        if DIAG:
            diagonal = tl.sum(tl.where(place[:, None] == place[None, :], qk * P, 0.0), 1)
            tl.store(ddiag + row * HV + h, diagonal.to(ddiag.dtype.element_ty), mask=real)
        dqk += P * D
    dqk *= scale
    # Tile by tile of K: dq and dk, summed over the value heads.
    for i_k in range((K + BK - 1) // BK):
        kt = i_k * BK + ks
        mask_k = real[:, None] & (kt < K)[None, :]
        dQ, dK = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        for r in range(HV // H):
            h = hk * (HV // H) + r
            rows_v = (row * HV + h)[:, None] * V
            a = scalar_gates(g, gamma, b, h, t, T, HV, G)
            dq_in, dk_out = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
            for i_v in range((V + BV - 1) // BV):
                vt = i_v * BV + vs
                mask_v = real[:, None] & (vt < V)[None, :]
                S = load_state(states, entering, decays, decays_k, decays_v, b, c, h, NC, L, NS, kt, vt, HV, K, V, False, False)
                dq_in += mm(tl.load(do + rows_v + vt[None, :], mask=mask_v, other=0.0), tl.trans(S), ROUND)
                dS = load_state(dstates, dentering, ddecays, ddecays_k, ddecays_v, b, c, h, NC, L, NS, kt, vt, HV, K, V, False, False)
                dk_out += mm(tl.load(v + rows_v + vt[None, :], mask=mask_v, other=0.0), tl.trans(dS), ROUND)
            dQ += dq_in * (from_start(a, start, seen, G, C) * scale)[:, None]
            dK += dk_out * to_end(a, kept, G, C)[:, None]
        Q = tl.load(q + rows_k + kt[None, :], mask=mask_k, other=0.0)
        Kt = tl.load(k + rows_k + kt[None, :], mask=mask_k, other=0.0)
        tl.store(dq + rows_k + kt[None, :], (dQ + mm(dqk, Kt, ROUND)).to(dq.dtype.element_ty), mask=mask_k)
        tl.store(dk + rows_k + kt[None, :], (dK + mm(tl.trans(dqk), Q, ROUND)).to(dk.dtype.element_ty), mask=mask_k)


# ----------------------------------------------------------------------------------------------------------------------------------------
# The ops


def shapes(k, v, g, diag, S_in, final, cu_seqlens, C):
    if wanted(S_in, cu_seqlens, final):
        T = laid_out_chunks(k.shape[1], len(cu_seqlens) - 1, C) * C
        k, v = k.new_empty(1, T, *k.shape[2:]), v.new_empty(1, T, *v.shape[2:])
    plan = Plan(k, v, C, exact=wanted(S_in, cu_seqlens, final))
    return (plan.kept(),), plan.states, plan.state_dtype


def state(k, v, g, diag, cu_seqlens, C):
    plan, (k, v) = Plan(k, v, C, g), contiguous(k, v)
    U, (A, _, _) = plan.walk(k, v, plan.starts(cu_seqlens), None, 1.0, False, *plan.new_states(k))
    return U, A, None


def _per_token(g, v):
    """A constant decay as one per token: the empty tokens between documents must not decay anything."""
    return g if g is None or g.ndim == 3 else g.expand(v.shape[:3])


def fwd(q, k, v, g, diag, S_in, cu_seqlens, cache, scale, C, output_final_state):
    layout = Documents(cu_seqlens, k.shape[1], C) if wanted(S_in, cu_seqlens, output_final_state) else None
    if layout is not None:
        q, k, v, g, diag = layout.spread(q, k, v, _per_token(g, v), diag)
    plan, (q, k, v, diag) = Plan(k, v, C, g, exact=layout is not None), contiguous(q, k, v, diag)
    states, kept = plan.new_states(k)
    if layout is None:
        starts = plan.starts(cu_seqlens)
        S_out, _ = plan.walk(k, v, starts, border_state(S_in), 1.0, False, states, kept)
    else:
        starts, added = layout.starts, border_state(layout.every(S_in, 0))
        plan.walk(k, v, starts, None, 1.0, False, states, kept, added=added, added_at=layout.before)
        S_out = plan.state_at(layout.last, states, kept)
    o, BK, BV = torch.empty_like(v), tile(plan.K, 64), tile(plan.V, 128)
    _outputs[(triton.cdiv(plan.V, BV), plan.NC, plan.B * plan.HV)](
        q, k, v, plan.g, plan.g, diag, starts, *plan.states_in(states, kept)[0], o, scale, plan.T, plan.NC, plan.L, plan.NS,
        **constants(plan, diag, starts), BK=BK, BV=BV, num_warps=8, num_stages=2,
    )  # fmt: skip
    o = o if layout is None else layout.collect(o)[0]
    return o, S_out if output_final_state else None, kept, states


def dstate(q, k, v, g, diag, do, cu_seqlens, cache, scale, C):
    plan, (q, do) = Plan(k, v, C, g), contiguous(q, do)
    return plan.walk(q, do, plan.starts(cu_seqlens), None, scale, True, *plan.new_states(q))[0]


def bwd(q, k, v, g, diag, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad):
    layout = Documents(cu_seqlens, k.shape[1], C) if S.shape[1] != triton.cdiv(k.shape[1], C) else None
    constant = g is not None and g.ndim == 1
    if layout is not None:
        q, k, v, g, diag, do = layout.spread(q, k, v, _per_token(g, v), diag, do)
    plan, (q, k, v, diag, do) = Plan(k, v, C, g, exact=layout is not None), contiguous(q, k, v, diag, do)
    after = plan.new_states(q)
    if layout is None:
        starts = plan.starts(cu_seqlens)
        dS_in, _ = plan.walk(q, do, starts, border_state(dS_out), scale, True, *after)
        if cu_seqlens is not None:
            dS_in = of_documents(dS_in, cu_seqlens)
    else:
        starts, added = layout.starts, border_state(layout.every(dS_out, layout.T - 1))
        plan.walk(q, do, starts, None, scale, True, *after, added=added, added_at=layout.after)
        dS_in = plan.state_at(layout.first, *after)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dg = torch.empty_like(plan.g) if plan.kind == 1 else None
    ddiag = None if diag is None else torch.empty_like(diag)
    _gradients[(plan.NC, plan.B * plan.H)](
        q, k, v, plan.g, plan.g, diag, starts, *plan.states_in(S, kept)[0], *plan.states_in(*after)[0], do, dq, dk, dv, dg, ddiag,
        scale, plan.T, plan.NC, plan.L, plan.NS, **constants(plan, diag, starts), BK=tile(plan.K, 64), BV=tile(plan.V, 64),
        num_warps=8, num_stages=2,
    )  # fmt: skip
    grads = dq, dk, dv, None if constant else dg, ddiag
    grads = grads if layout is None else layout.collect(*grads)
    return *grads, dS_in if input_state_grad else None


def constants(plan, diag, starts):
    return {
        "H": plan.H, "HV": plan.HV, "K": plan.K, "V": plan.V, "C": plan.C, "G": plan.kind, "DIAG": diag is not None,
        "DOCS": starts is not None, "ROUND": plan.round,
    }  # fmt: skip


def step(q, k, v, g, diag, state, scale):
    return one_token(q, k, v, state, scale, g=g, diag=diag)
