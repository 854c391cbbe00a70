"""ssd on a GPU: S_t = e^g_t S_{t-1} + k_t^T v_t, o_t = q_t S_t (the formulas: chunk/ssd.py).

Forward: the state pass, then all chunks at once. Backward: the state pass mirrored, then all chunks
at once. A program of it has q, k and their gradients for all of K, and reads whatever else there is
once, a tile of V after another; it takes all value heads that share q and k, or a part of them, so
that nothing is summed by atomics.
"""

import torch
import triton
import triton.language as tl

from lmoe.kernels.gpu.common import (
    advanced,
    chunk_at,
    chunk_of,
    diagonal,
    load_fp32,
    load_rows,
    mm,
    of_head,
    of_tokens,
    store_rows,
)
from lmoe.kernels.gpu.documents import Stream, laid_out, wanted
from lmoe.kernels.gpu.state import (
    Plan,
    documents,
    from_start,
    load_state,
    same_document,
    scalar_gates,
    spans,
    to_end,
)
from lmoe.kernels.gpu.step import step as one_token
from lmoe.kernels.gpu.tiles import cdiv, chunk, processors, tiles


@triton.jit
def pair_decays(a, start, place, G: tl.constexpr, C: tl.constexpr, ROUND: tl.constexpr):
    """D [C, C]: the decay from token i to token t of one document, 0 for other pairs and i > t. a,
    start [C]."""
    mask = (place[:, None] >= place[None, :]) & same_document(start)
    if G == 0:
        return tl.where(mask, 1.0, 0.0)
    if ROUND:
        G_t = tl.sum(
            tl.where(mask, a[None, :], 0.0), 1
        )  # from the document's start: other documents are not even rounded in
        logs = G_t[:, None] - G_t[None, :]
    else:  # sums of the decays between, not differences of sums
        logs = tl.cumsum(
            tl.where(
                (place[:, None] > place[None, :]) & mask,
                a[:, None] + tl.zeros([1, C], tl.float32),
                0.0,
            ),
            0,
        )
    return tl.exp(tl.where(mask, tl.minimum(logs, 0.0), -float("inf")))


@triton.jit
def _outputs(
    q,
    k,
    v,
    g,
    gamma,
    diag,
    starts,
    states,
    o,
    scale,
    T,
    NC,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    G: tl.constexpr,
    DIAG: tl.constexpr,
    DOCS: tl.constexpr,
    ROUND: tl.constexpr,
):
    VT: tl.constexpr = (V + BV - 1) // BV
    chunk = chunk_of(tl.program_id(0) // VT, T, NC, HV, C)
    place, vs = chunk.place, tl.program_id(0) % VT * BV + tl.arange(0, BV)
    keys = of_head(chunk, chunk.h // (HV // H))
    qk, out = tl.zeros([C, C], tl.float32), tl.zeros([C, BV], tl.float32)
    for i_k in range((K + BK - 1) // BK):
        ks = i_k * BK + tl.arange(0, BK)
        Q, Kt = load_rows(q, keys, ks, H, K), load_rows(k, keys, ks, H, K)
        out += mm(Q, load_state(states, chunk, ks, vs, K, V), ROUND)
        qk += mm(Q, tl.trans(Kt), ROUND)
    Vt = load_rows(v, chunk, vs, HV, V)
    start, seen, _ = documents(starts, chunk, DOCS)
    a = scalar_gates(g, gamma, chunk, HV, G)
    D = pair_decays(a, start, place, G, C, ROUND)
    if DIAG:
        own = load_fp32(of_tokens(diag, chunk, HV), place < chunk.left)
        D = tl.where(place[:, None] == place[None, :], own[:, None], D)
    if G > 0 or DOCS:
        out *= from_start(a, seen, G)[:, None]
    out += mm(qk * D, Vt, ROUND)
    store_rows(o, out * scale, chunk, vs, HV, V)


@triton.jit
def _value_tile(
    i_v,
    sums,
    weighted,
    tensors,
    chunk,
    ks,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    G: tl.constexpr,
    HEADWISE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Add to `sums` what a tile of V adds to the gradients: of weights P, q and k through the
    states, and for that of g what is read from the states, written into them (if heads must be told
    apart) and carried past the chunk. The gradient of v is stored.

    weighted: q, k, and the weights of pairs, of reading and of writing."""
    P, read, leaving, carried, dQ, dK = sums
    Q, Kt, A, to, fro = weighted
    v, do, states, dstates, dv = tensors
    vs = i_v * BV + tl.arange(0, BV)
    Vt, dO = load_rows(v, chunk, vs, HV, V), load_rows(do, chunk, vs, HV, V)
    S, dS = load_state(states, chunk, ks, vs, K, V), load_state(dstates, chunk, ks, vs, K, V)
    P += mm(dO, tl.trans(Vt), ROUND)
    dV = mm(Kt, dS, ROUND)
    if WEIGHTED:
        dV *= fro[:, None]
    if G == 1:
        if HEADWISE:
            leaving += tl.sum(dV * Vt, 1)
            read += tl.sum(mm(Q, S, ROUND) * dO, 1)
        carried += tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1), 0)
    store_rows(dv, dV + mm(tl.trans(A), dO, ROUND), chunk, vs, HV, V)
    # A head alone is weighted after its last tile.
    dQ += mm(dO * to[:, None] if WEIGHTED and HEADWISE else dO, tl.trans(S), ROUND)
    dK += mm(Vt * fro[:, None] if WEIGHTED and HEADWISE else Vt, tl.trans(dS), ROUND)
    return P, read, leaving, carried, dQ, dK


@triton.jit
def add_pairs(dQ, dK, dqk, Q, Kt, scale, ROUND: tl.constexpr):
    """dq and dk of the states' part and that of the pairs, whose weights have the gradient dqk."""
    dqk *= scale
    return dQ * scale + mm(dqk, Kt, ROUND), dK + mm(tl.trans(dqk), Q, ROUND)


@triton.jit
def _gradients(
    q,
    k,
    v,
    g,
    gamma,
    diag,
    starts,
    states,
    dstates,
    do,
    dq,
    dk,
    dv,
    dg,
    ddiag,
    scale,
    T,
    NC,
    tokens,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    G: tl.constexpr,
    DIAG: tl.constexpr,
    DOCS: tl.constexpr,
    ROUND: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dq, dk [PARTS, B, T, H, K]: of the value heads of each part."""
    EACH: tl.constexpr = HV // H // PARTS
    WEIGHTED: tl.constexpr = G > 0 or DOCS
    HEADWISE: tl.constexpr = HV != H
    hk, rest = tl.program_id(0) % H, tl.program_id(0) // H
    part, c, b = rest % PARTS, rest // PARTS % NC, rest // PARTS // NC
    keys, ks = chunk_at(b, c, hk, T, NC, H, C), tl.arange(0, BK)
    place, real = keys.place, keys.place < keys.left
    start, seen, kept = documents(starts, keys, DOCS)
    Q, Kt = load_rows(q, keys, ks, H, K), load_rows(k, keys, ks, H, K)
    qk = mm(Q, tl.trans(Kt), ROUND)
    self_qk = diagonal(qk, place) * scale
    dQ, dK, dqk = (
        tl.zeros([C, BK], tl.float32),
        tl.zeros([C, BK], tl.float32),
        tl.zeros([C, C], tl.float32),
    )
    for r in range(EACH):
        chunk = chunk_at(b, c, hk * (HV // H) + part * EACH + r, T, NC, HV, C)
        a = scalar_gates(g, gamma, chunk, HV, G)
        D = pair_decays(a, start, place, G, C, ROUND)
        if DIAG:
            own = load_fp32(of_tokens(diag, chunk, HV), real)
            D = tl.where(place[:, None] == place[None, :], own[:, None], D)
        to, fro = from_start(a, seen, G), to_end(a, kept, G)
        # As they are multiplied, rounded or not: fewer registers.
        A, D = (qk * D * scale).to(Q.dtype), D.to(Q.dtype)
        weighted, tensors = (Q, Kt, A, to, fro), (v, do, states, dstates, dv)
        none = tl.zeros([C], tl.float32)
        sums = tl.zeros([C, C], tl.float32), none, none, tl.zeros([], tl.float32), dQ, dK
        if V <= BV:  # then the loop over heads is the innermost one, whose loads are issued ahead
            sums = _value_tile(
                0, sums, weighted, tensors, chunk, ks, HV, K, V, BV, G, HEADWISE, WEIGHTED, ROUND
            )
        else:
            for i_v in range((V + BV - 1) // BV):
                sums = _value_tile(
                    i_v,
                    sums,
                    weighted,
                    tensors,
                    chunk,
                    ks,
                    HV,
                    K,
                    V,
                    BV,
                    G,
                    HEADWISE,
                    WEIGHTED,
                    ROUND,
                )
        P, read, leaving, carried, dQ, dK = sums
        dqk += P * D
        if WEIGHTED and not HEADWISE:
            dQ, dK = dQ * to[:, None], dK * fro[:, None]
        if G == 1:
            if HEADWISE:
                pairs = tl.where(place[:, None] > place[None, :], A * P, 0.0)
                through = tl.sum(pairs, 1) - tl.sum(pairs, 0) + read * to * scale - leaving
            else:  # the same is q . dq - k . dk, in which what a token reads of itself cancels
                leaving = tl.sum(dK * Kt, 1)
                dQ, dK = add_pairs(dQ, dK, dqk, Q, Kt, scale, ROUND)
                through = tl.sum(dQ * Q - dK * Kt, 1)
            later = (place[:, None] <= place[None, :]) & same_document(start)
            # In one sum along rows: that of leaving by itself, a scalar, Triton 3.6 fails to
            # compile for sm_100.
            past = tl.where(later, through[None, :], 0.0) + tl.where(
                kept[:, None], leaving[None, :], 0.0
            )
            whole = spans(seen, kept)
            dlog = tl.sum(past, 1) + tl.where(kept & whole, carried * tl.exp(tl.sum(a, 0)), 0.0)
            tl.store(of_tokens(dg, chunk, HV), dlog, mask=real)
        if DIAG:
            tl.store(of_tokens(ddiag, chunk, HV), diagonal(P, place) * self_qk, mask=real)
    if G != 1 or HEADWISE:
        dQ, dK = add_pairs(dQ, dK, dqk, Q, Kt, scale, ROUND)
    keys = advanced(keys, part.to(tl.int64) * tokens)
    store_rows(dq, dQ, keys, ks, H, K)
    store_rows(dk, dK, keys, ks, H, K)


# --------------------------------------------------------------------------------------------------
# The ops


def shapes(k, v, g, diag, S_in, final, cu_seqlens, C):
    C = chunk("ssd", k, v, C)
    k, v, own = laid_out(k, v, S_in, final, cu_seqlens, C)
    plan = Plan(k, v, C, exact=own)
    return (0,), plan.states, plan.state_dtype


def state(k, v, g, diag, cu_seqlens, C):
    C = chunk("ssd", k, v, C)
    stream = Stream(cu_seqlens, k.shape[1], C, False)
    (k, v), plan = stream.spread(k, v), Plan(k, v, C, g)
    U, (A, _, _) = plan.walk(k, v, stream.starts, None, 1.0, False, states=False)
    return U, A, None


def _begin(own, q, k, v, g, diag, cu_seqlens, C, *more):
    """(the stream, the plan, q, k, v, diag and more in its layout)"""
    stream = Stream(cu_seqlens, k.shape[1], C, own)
    if own and g is not None and g.ndim == 1:
        g = g.expand(v.shape[:3])  # the empty tokens between documents must not decay anything
    q, k, v, diag, *more = stream.spread(q, k, v, diag, *more)
    g = g if g is None or g.ndim == 1 else stream.spread(g)[0]
    return stream, Plan(k, v, C, g, exact=own), q, k, v, diag, *more


def fwd(q, k, v, g, diag, S_in, cu_seqlens, cache, scale, C, output_final_state):
    C = chunk("ssd", k, v, C)
    own = wanted(S_in, cu_seqlens, output_final_state)
    stream, plan, q, k, v, diag = _begin(own, q, k, v, g, diag, cu_seqlens, C)
    states, S_out = stream.walk(
        plan, k, v, S_in, 1.0, False, output_final_state, starts=stream.starts
    )
    o = torch.empty_like(v)
    options = tiles("ssd outputs", plan, None if plan.round else "exact")
    _outputs[(cdiv(plan.V, options["BV"]) * plan.chunks,)](
        q,
        k,
        v,
        plan.g,
        plan.g,
        diag,
        stream.starts,
        states,
        o,
        scale,
        plan.T,
        plan.NC,
        **plan.constants("HV", DIAG=diag, DOCS=stream.starts),
        G=plan.kind,
        **options,
    )
    return *stream.collect(o), S_out, None, states


def dstate(q, k, v, g, diag, do, cu_seqlens, cache, scale, C):
    C = chunk("ssd", k, v, C)
    stream = Stream(cu_seqlens, k.shape[1], C, False)
    (q, do), plan = stream.spread(q, do), Plan(k, v, C, g)
    return plan.walk(q, do, stream.starts, None, scale, True, states=False)[0]


def bwd(q, k, v, g, diag, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad):
    C = chunk("ssd", k, v, C)
    own = S.shape[1] != cdiv(k.shape[1], C)
    stream, plan, q, k, v, diag, do = _begin(own, q, k, v, g, diag, cu_seqlens, C, do)
    dstates, dS_in = stream.walk(
        plan, q, do, dS_out, scale, True, input_state_grad, starts=stream.starts
    )
    # Value heads that share q and k are one program's work, unless a GPU would idle.
    each = plan.HV // plan.H
    parts = next(
        n
        for n in range(1, each + 1)
        if each % n == 0 and (n == each or n * plan.chunks // each >= 2 * processors(k))
    )
    dq, dk = (
        x.new_empty(parts, *x.shape, dtype=torch.float32 if parts > 1 else x.dtype) for x in (q, k)
    )
    dv = torch.empty_like(v)
    dg = torch.empty_like(plan.g) if plan.kind == 1 else None
    ddiag = None if diag is None else torch.empty_like(diag)
    light = max(plan.K, plan.V) <= 64 or (each == 1 and plan.kind == 0)
    variant = "exact" if not plan.round else "wide" if plan.K > 128 else "light" if light else None
    _gradients[(parts * plan.chunks // each,)](
        q,
        k,
        v,
        plan.g,
        plan.g,
        diag,
        stream.starts,
        S,
        dstates,
        do,
        dq,
        dk,
        dv,
        dg,
        ddiag,
        scale,
        plan.T,
        plan.NC,
        plan.B * plan.T,
        **plan.constants("HV", DIAG=diag, DOCS=stream.starts),
        G=plan.kind,
        PARTS=parts,
        **tiles("ssd gradients", plan, variant),
    )
    dq, dk = (x[0] if parts == 1 else x.sum(0).to(q.dtype) for x in (dq, dk))
    dg = None if g is not None and g.ndim == 1 else dg
    return *stream.collect(dq, dk, dv, dg, ddiag), dS_in


def step(q, k, v, g, diag, state, scale):
    return one_token(q, k, v, state, scale, g=g, diag=diag)
