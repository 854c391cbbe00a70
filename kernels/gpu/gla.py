"""gla on a GPU: S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t^T v_t (formulas, and why chunks are halved: chunk/common.py, chunk/gla.py).

Inside a chunk the pairs of tokens are grouped by the smallest aligned block of 2b tokens that holds both. For each b all rows are decayed
at once, q from the block's middle and k to it, with one exponential an element, and one product gives the pairs of that b; the others are
masked. The sums of decays run from the middle, never as differences, so that strong decays cost the weak ones beside them nothing.
"""

import torch
import triton
import triton.language as tl

from lmoe.kernels.gpu.common import contiguous, mm, tile
from lmoe.kernels.gpu.documents import Documents, laid_out_chunks, of_documents, wanted
from lmoe.kernels.gpu.state import Plan, border_state, channel_gates, decayed, documents, load_state
from lmoe.kernels.gpu.step import step as one_token


@triton.jit
def level(a, t, W: tl.constexpr, C: tl.constexpr, D: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """Blocks of 2 W tokens: e^(sum of the log decays a [C, D]) from the middle to the tokens of second halves (up to each, or before it),
    from the tokens of first halves to the middle."""
    blocks = tl.reshape(a, [C // W, W, D])
    to = tl.reshape(tl.cumsum(blocks, 1), [C, D])
    fro = tl.reshape(tl.cumsum(blocks, 1, reverse=True), [C, D]) - a
    if EXCLUSIVE:
        to -= a
    second = ((t // W) % 2 == 1)[:, None]
    return tl.exp(tl.minimum(tl.where(second, to, fro), 0.0))


@triton.jit
def pairs_of(t, W: tl.constexpr):
    """[C, C]: row in the second half and column in the first half of one block of 2 W tokens."""
    block = t // W
    return (block[:, None] % 2 == 1) & (block[None, :] == block[:, None] - 1)


@triton.jit
def same_document(start):
    return start[:, None] == start[None, :]


@triton.jit
def suffix_sums(x, start, C: tl.constexpr, DOCS: tl.constexpr):
    """[C, D]: sums over the tokens from each one to the end of the chunk, or of its document."""
    if not DOCS:
        return tl.cumsum(x, 0, reverse=True)
    # A later document must not even be rounded into this one.
    place = tl.arange(0, C)
    keep = (place[:, None] <= place[None, :]) & same_document(start)
    return tl.dot(tl.where(keep, 1.0, 0.0), x, input_precision="ieee")


@triton.jit
def _outputs(
    q, k, v, gk, gv, u, starts, states, entering, decays, decays_k, decays_v, weights, o, scale, T, NC, L, NS,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    GK: tl.constexpr, GV: tl.constexpr, U: tl.constexpr, DOCS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    i_v, c = tl.program_id(0), tl.program_id(1)
    b, h = tl.program_id(2) // H, tl.program_id(2) % H
    place, vs = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    t = c * C + place
    real = t < T
    row = (b * T + t).to(tl.int64) * H + h
    start, seen, _ = documents(starts, c, t, T, C, DOCS)
    A, inter, own = tl.zeros([C, C], tl.float32), tl.zeros([C, BV], tl.float32), tl.zeros([C], tl.float32)
    for i_k in range((K + BK - 1) // BK):
        ks = i_k * BK + tl.arange(0, BK)
        at, mask = row[:, None] * K + ks[None, :], real[:, None] & (ks < K)[None, :]
        Q = tl.load(q + at, mask=mask, other=0.0).to(tl.float32)
        Kt = tl.load(k + at, mask=mask, other=0.0).to(tl.float32)
        S = load_state(states, entering, decays, decays_k, decays_v, b, c, h, NC, L, NS, ks, vs, H, K, V, GK, GV)
        if U:
            own += tl.sum(Q * Kt * tl.load(u + h * K + ks, mask=ks < K, other=0.0).to(tl.float32)[None, :], 1)
        else:
            own += tl.sum(Q * Kt, 1)
        if GK:
            a = channel_gates(gk, b, h, t, ks, T, H, K)
            for i in tl.static_range(LEVELS):
                w = level(a, place, 2**i, C, BK, U)
                A += tl.where(pairs_of(place, 2**i), mm(Q * w, tl.trans(Kt * w), ROUND), 0.0)
            inter += mm(decayed(Q, a, seen, True, U), S, ROUND)
        else:
            A += mm(Q, tl.trans(Kt), ROUND)
            inter += mm(tl.where(seen[:, None], Q, 0.0), S, ROUND)
    diagonal = place[:, None] == place[None, :]
    A = tl.where(diagonal, own[:, None], tl.where((place[:, None] > place[None, :]) & same_document(start), A, 0.0))
    if i_v == 0:
        table = weights + ((b * NC + c).to(tl.int64) * H + h) * C * C + place[:, None] * C + place[None, :]
        tl.store(table, A.to(weights.dtype.element_ty))
    at, mask = row[:, None] * V + vs[None, :], real[:, None] & (vs < V)[None, :]
    Vt = tl.load(v + at, mask=mask, other=0.0).to(tl.float32)
    if GV:
        a = channel_gates(gv, b, h, t, vs, T, H, V)
        out = own[:, None] * Vt + decayed(inter, a, seen, True, U)
        for i in tl.static_range(LEVELS):
            w = level(a, place, 2**i, C, BV, U)
            out += mm(tl.where(pairs_of(place, 2**i), A, 0.0), Vt * w, ROUND) * w
    else:
        out = mm(A, Vt, ROUND) + inter
    tl.store(o + at, (out * scale).to(o.dtype.element_ty), mask=mask)


@triton.jit
def _gradients(
    q, k, v, gk, gv, u, starts, states, entering, decays, decays_k, decays_v,
    dstates, dentering, ddecays, ddecays_k, ddecays_v, weights, do, dq, dk, dv, dgk, dgv, du, scale, T, NC, L, NS,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    GK: tl.constexpr, GV: tl.constexpr, U: tl.constexpr, DOCS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """du [B, NC, H, K]: sums over the tokens of a chunk."""
    c = tl.program_id(0)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    place, ks, vs = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    t = c * C + place
    real = t < T
    row = (b * T + t).to(tl.int64) * H + h
    start, seen, kept = documents(starts, c, t, T, C, DOCS)
    whole = tl.sum(tl.where(seen & kept, 1, 0)) > 0  # whether the last document began before the chunk
    diagonal = place[:, None] == place[None, :]
    below = (place[:, None] > place[None, :]) & same_document(start)
    table = ((b * NC + c).to(tl.int64) * H + h) * C * C + place[:, None] * C + place[None, :]
    A = tl.load(weights + table).to(tl.float32) * scale
    dA, own = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)

    # Tile by tile of V: dv and dgv, and the gradient of the weights.
    for i_v in range((V + BV - 1) // BV):
        vt = i_v * BV + vs
        at_v, mask_v = row[:, None] * V + vt[None, :], real[:, None] & (vt < V)[None, :]
        Vt = tl.load(v + at_v, mask=mask_v, other=0.0).to(tl.float32)
        dO = tl.load(do + at_v, mask=mask_v, other=0.0).to(tl.float32)
        own += tl.sum(dO * Vt, 1)
        out, late, carried = tl.zeros([C, BV], tl.float32), tl.zeros([C, BV], tl.float32), tl.zeros([BV], tl.float32)
        for i_k in range((K + BK - 1) // BK):
            kt = i_k * BK + ks
            at_k, mask_k = row[:, None] * K + kt[None, :], real[:, None] & (kt < K)[None, :]
            Kt = tl.load(k + at_k, mask=mask_k, other=0.0).to(tl.float32)
            a_k = tl.zeros([C, BK], tl.float32)
            if GK:
                a_k = channel_gates(gk, b, h, t, kt, T, H, K)
            dS = load_state(dstates, dentering, ddecays, ddecays_k, ddecays_v, b, c, h, NC, L, NS, kt, vt, H, K, V, GK, GV)
            out += mm(decayed(Kt, a_k, kept, False, False), dS, ROUND)
            if GV:
                Q = tl.load(q + at_k, mask=mask_k, other=0.0).to(tl.float32) * scale
                S = load_state(states, entering, decays, decays_k, decays_v, b, c, h, NC, L, NS, kt, vt, H, K, V, GK, GV)
                late += mm(decayed(Q, a_k, seen, True, U), S, ROUND)
                carried += tl.sum(S * dS * tl.exp(tl.sum(a_k, 0))[:, None], 0)
        if GV:
            a_v = channel_gates(gv, b, h, t, vt, T, H, V)
            out, late = decayed(out, a_v, kept, False, False), decayed(late, a_v, seen, True, U)
            dV = tl.zeros([C, BV], tl.float32)
            for i in tl.static_range(LEVELS):
                w = level(a_v, place, 2**i, C, BV, U)
                these = pairs_of(place, 2**i)
                here = tl.where(these & below, A, 0.0)
                dA += tl.where(these, mm(dO * w, tl.trans(Vt * w), ROUND), 0.0)
                late += mm(here, Vt * w, ROUND) * w
                dV += mm(tl.trans(here), dO * w, ROUND) * w
            dV += out
            read = late * dO
            dlog = suffix_sums(read - Vt * dV, start, C, DOCS)
            if U:
                dlog -= read
            leaving = tl.sum(Vt * out, 0) + tl.where(whole, carried * tl.exp(tl.sum(a_v, 0)), 0.0)
            tl.store(dgv + at_v, (dlog + tl.where(kept[:, None], leaving[None, :], 0.0)).to(dgv.dtype.element_ty), mask=mask_v)
            dV += tl.sum(tl.where(diagonal, A, 0.0), 1)[:, None] * dO
        else:
            dA += mm(dO, tl.trans(Vt), ROUND)
            dV = mm(tl.trans(A), dO, ROUND) + out
        tl.store(dv + at_v, dV.to(dv.dtype.element_ty), mask=mask_v)
    dA = tl.where(below, dA, 0.0)

    # Tile by tile of K: dq, dk, dgk and du.
    for i_k in range((K + BK - 1) // BK):
        kt = i_k * BK + ks
        at_k, mask_k = row[:, None] * K + kt[None, :], real[:, None] & (kt < K)[None, :]
        dQ, dK, carried_k = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([BK], tl.float32)
        for i_v in range((V + BV - 1) // BV):
            vt = i_v * BV + vs
            at_v, mask_v = row[:, None] * V + vt[None, :], real[:, None] & (vt < V)[None, :]
            Vt = tl.load(v + at_v, mask=mask_v, other=0.0).to(tl.float32)
            dO = tl.load(do + at_v, mask=mask_v, other=0.0).to(tl.float32)
            S = load_state(states, entering, decays, decays_k, decays_v, b, c, h, NC, L, NS, kt, vt, H, K, V, GK, GV)
            dS = load_state(dstates, dentering, ddecays, ddecays_k, ddecays_v, b, c, h, NC, L, NS, kt, vt, H, K, V, GK, GV)
            both = S * dS
            if GV:
                a_v = channel_gates(gv, b, h, t, vt, T, H, V)
                both *= tl.exp(tl.sum(a_v, 0))[None, :]
                dO, Vt = decayed(dO, a_v, seen, True, U), decayed(Vt, a_v, kept, False, False)
            dQ += mm(dO, tl.trans(S), ROUND)
            dK += mm(Vt, tl.trans(dS), ROUND)
            if GK:
                carried_k += tl.sum(both, 1)
        Q = tl.load(q + at_k, mask=mask_k, other=0.0).to(tl.float32) * scale
        Kt = tl.load(k + at_k, mask=mask_k, other=0.0).to(tl.float32)
        if GK:
            a_k = channel_gates(gk, b, h, t, kt, T, H, K)
            dQ, dK = decayed(dQ, a_k, seen, True, U), decayed(dK, a_k, kept, False, False)
            leaving_k = tl.sum(Kt * dK, 0) + tl.where(whole, carried_k * tl.exp(tl.sum(a_k, 0)), 0.0)
            for i in tl.static_range(LEVELS):
                w = level(a_k, place, 2**i, C, BK, U)
                here = tl.where(pairs_of(place, 2**i), dA, 0.0)
                dQ += mm(here, Kt * w, ROUND) * w
                dK += mm(tl.trans(here), Q * w, ROUND) * w
            read = Q * dQ
            dlog = suffix_sums(read - Kt * dK, start, C, DOCS) + tl.where(kept[:, None], leaving_k[None, :], 0.0)
            if U:
                dlog -= read
            tl.store(dgk + at_k, dlog.to(dgk.dtype.element_ty), mask=mask_k)
        else:
            dQ = mm(dA, Kt, ROUND) + tl.where(seen[:, None], dQ, 0.0)
            dK = mm(tl.trans(dA), Q, ROUND) + tl.where(kept[:, None], dK, 0.0)
        own_q, own_k = own[:, None] * Kt, own[:, None] * Q
        if U:
            bonus = tl.load(u + h * K + kt, mask=kt < K, other=0.0).to(tl.float32)[None, :]
            tl.store(du + ((b * NC + c).to(tl.int64) * H + h) * K + kt, tl.sum(own_k * Kt, 0), mask=kt < K)
            own_q, own_k = own_q * bonus, own_k * bonus
        tl.store(dq + at_k, ((dQ + own_q) * scale).to(dq.dtype.element_ty), mask=mask_k)
        tl.store(dk + at_k, (dK + own_k).to(dk.dtype.element_ty), mask=mask_k)


# ----------------------------------------------------------------------------------------------------------------------------------------
# The ops


def plan_of(k, v, gk, gv, C, exact=False):
    return Plan(k, v, C, gk=gk, gv=gv, tables=C * C, exact=exact)


def shapes(k, v, gk, gv, u, S_in, final, cu_seqlens, C):
    if wanted(S_in, cu_seqlens, final):
        T = laid_out_chunks(k.shape[1], len(cu_seqlens) - 1, C) * C
        k, v = k.new_empty(1, T, *k.shape[2:]), v.new_empty(1, T, *v.shape[2:])
    plan = plan_of(k, v, gk, gv, C, wanted(S_in, cu_seqlens, final))
    return (plan.kept(),), plan.states, plan.state_dtype


def state(k, v, gk, gv, u, cu_seqlens, C):
    plan, (k, v) = plan_of(k, v, gk, gv, C), contiguous(k, v)
    U, (A, A_k, A_v) = plan.walk(k, v, plan.starts(cu_seqlens), None, 1.0, False, *plan.new_states(k))
    # The scalar part says only whether a document ended.
    A_k, A_v = (x if x.shape[-1] else x.new_zeros(*A.shape, D) for x, D in ((A_k, plan.K), (A_v, plan.V)))
    return U, torch.cat([A_k, A_v], -1) + A[..., None], None


def fwd(q, k, v, gk, gv, u, S_in, cu_seqlens, cache, scale, C, output_final_state):
    layout = Documents(cu_seqlens, k.shape[1], C) if wanted(S_in, cu_seqlens, output_final_state) else None
    if layout is not None:
        q, k, v, gk, gv = layout.spread(q, k, v, gk, gv)
    plan, (q, k, v, u) = plan_of(k, v, gk, gv, C, layout is not None), contiguous(q, k, v, u)
    states, kept = plan.new_states(k)
    if layout is None:
        starts = plan.starts(cu_seqlens)
        S_out, _ = plan.walk(k, v, starts, border_state(S_in), 1.0, False, states, kept)
    else:
        starts, added = layout.starts, border_state(layout.every(S_in, 0))
        plan.walk(k, v, starts, None, 1.0, False, states, kept, added=added, added_at=layout.before)
        S_out = plan.state_at(layout.last, states, kept)
    arguments, weights = plan.states_in(states, kept)
    o, BK, BV = torch.empty_like(v), tile(plan.K, 64), tile(plan.V, 128)
    _outputs[(triton.cdiv(plan.V, BV), plan.NC, plan.B * plan.H)](
        q, k, v, plan.gk, plan.gv, u, starts, *arguments, weights, o, scale, plan.T, plan.NC, plan.L, plan.NS,
        **constants(plan, u, starts), BK=BK, BV=BV, num_warps=8, num_stages=1,
    )  # fmt: skip
    o = o if layout is None else layout.collect(o)[0]
    return o, S_out if output_final_state else None, kept, states


def dstate(q, k, v, gk, gv, u, do, cu_seqlens, cache, scale, C):
    plan, (q, do) = plan_of(k, v, gk, gv, C), contiguous(q, do)
    return plan.walk(q, do, plan.starts(cu_seqlens), None, scale, True, *plan.new_states(q), exclusive=u is not None)[0]


def bwd(q, k, v, gk, gv, u, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad):
    layout = Documents(cu_seqlens, k.shape[1], C) if S.shape[1] != triton.cdiv(k.shape[1], C) else None
    if layout is not None:
        q, k, v, gk, gv, do = layout.spread(q, k, v, gk, gv, do)
    plan, (q, k, v, u, do) = plan_of(k, v, gk, gv, C, layout is not None), contiguous(q, k, v, u, do)
    after, exclusive = plan.new_states(q), u is not None
    if layout is None:
        starts = plan.starts(cu_seqlens)
        dS_in, _ = plan.walk(q, do, starts, border_state(dS_out), scale, True, *after, exclusive=exclusive)
        if cu_seqlens is not None:
            dS_in = of_documents(dS_in, cu_seqlens)
    else:
        starts, added = layout.starts, border_state(layout.every(dS_out, layout.T - 1))
        plan.walk(q, do, starts, None, scale, True, *after, exclusive=exclusive, added=added, added_at=layout.after)
        dS_in = plan.state_at(layout.first, *after)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dgk, dgv = (None if x is None else torch.empty_like(x) for x in (plan.gk, plan.gv))
    du = None if u is None else u.new_empty(plan.B * plan.NC, *u.shape, dtype=torch.float32)
    arguments, weights = plan.states_in(S, kept)
    _gradients[(plan.NC, plan.B * plan.H)](
        q, k, v, plan.gk, plan.gv, u, starts, *arguments, *plan.states_in(*after)[0], weights, do, dq, dk, dv, dgk, dgv, du,
        scale, plan.T, plan.NC, plan.L, plan.NS, **constants(plan, u, starts), BK=tile(plan.K, 64), BV=tile(plan.V, 64),
        num_warps=8, num_stages=1,
    )  # fmt: skip
    grads = dq, dk, dv, dgk, dgv
    grads = grads if layout is None else layout.collect(*grads)
    return *grads, None if u is None else du.sum(0).to(u.dtype), dS_in if input_state_grad else None


def constants(plan, u, starts):
    return {
        "H": plan.H, "K": plan.K, "V": plan.V, "C": plan.C, "LEVELS": plan.C.bit_length() - 1, **plan.gates, "U": u is not None,
        "DOCS": starts is not None, "ROUND": plan.round,
    }  # fmt: skip


def step(q, k, v, gk, gv, u, state, scale):
    return one_token(q, k, v, state, scale, gk=gk, gv=gv, u=u)
