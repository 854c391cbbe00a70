"""gla on a GPU: S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t^T v_t (formulas, and why chunks are
halved: chunk/common.py, chunk/gla.py).

Inside a chunk the pairs of tokens are grouped by the smallest aligned block of 2 W tokens that
holds both. For each W, tokens of second halves are decayed from the block's middle and those of
first halves to it: with x = q in second halves and k in first ones, decayed so, the block's pairs
are in x x^T, and their gradients on x are a symmetric matrix times x. So a W costs one exponential
an element and one product.

Forward: one kernel for all chunks finds the weights of pairs, and q decayed from and k to the
chunk's borders; the state pass; one kernel for outputs. Backward: the state pass mirrored, then all
chunks at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lmoe.kernels.gates import log_decay, logit_gradient
from lmoe.kernels.gpu.common import (
    NOTHING,
    chunk_of,
    diagonal,
    load_fp32,
    load_places,
    load_rows,
    mm,
    store_rows,
    sums,
)
from lmoe.kernels.gpu.documents import Stream, laid_out, wanted
from lmoe.kernels.gpu.state import GONE, Plan, documents, load_state, same_document, spans
from lmoe.kernels.gpu.step import step as one_token
from lmoe.kernels.gpu.tiles import cdiv, chunk, rounds, tile, tiles


@triton.jit
def halves(a, ROUND: tl.constexpr):
    """The log decays a as a sum of two that products take: both bf16 if ROUND (2^-17 of a is lost),
    else a and nothing."""
    high = a.to(tl.bfloat16) if ROUND else a
    low = a - high.to(tl.float32)
    return high, low.to(tl.bfloat16) if ROUND else low


@triton.jit
def decay(which, high, low, ROUND: tl.constexpr):
    """[C, D]: e^(sum over the tokens that `which` [C, C] names of the log decays). A product, so
    that no sum is a difference of others: strong decays cost the weak ones beside them nothing, and
    other documents are not even rounded in."""
    ones = tl.where(which, 1.0, 0.0)
    log = mm(ones, high, ROUND)
    if ROUND:
        log += mm(ones, low, ROUND)
    return tl.exp(tl.minimum(log, 0.0))


@triton.jit
def to_it(place, start, U: tl.constexpr):
    """[C, C]: the tokens of a token's document from the chunk's start up to it (or to that before
    it if U)."""
    which = (place[:, None] >= place[None, :]) & same_document(start)
    if U:
        which &= place[:, None] != place[None, :]
    return which


@triton.jit
def after_it(place, start):
    """[C, C]: the tokens of a token's document after it, up to the chunk's end."""
    return (place[:, None] < place[None, :]) & same_document(start)


@triton.jit
def to_middle(place, i, U: tl.constexpr):
    """[C, C], for blocks of 2 W tokens, W = 2^i: the tokens between the middle and a token; without
    the token itself in first halves, and in second halves if U."""
    half = place >> i
    second = (half & 1 == 1)[:, None]
    if U:
        between = tl.where(second, place[:, None] > place[None, :], place[:, None] < place[None, :])
    else:
        between = (place[:, None] >= place[None, :]) == second
    return (half[:, None] == half[None, :]) & between


@triton.jit
def pairs_of(place, i):
    """[C, C]: whether two tokens are in the two halves of one block of 2 W tokens."""
    half = place >> i
    return (half[:, None] ^ half[None, :]) == 1


@triton.jit
def second_half(place, i):
    return ((place >> i) & 1 == 1)[:, None]


@triton.jit
def gates_of(g, chunk, d, H: tl.constexpr, D: tl.constexpr):
    return tl.maximum(load_rows(g, chunk, d, H, D).to(tl.float32), NOTHING)


@triton.jit
def gates_of_logits(z, tau, chunk, d, H: tl.constexpr, D: tl.constexpr):
    """logsigmoid(z) / tau of bf16 logits z, zero where the stream has ended. What 1 + e^-z loses to
    rounding is far less than z lost."""
    x = load_rows(z, chunk, d, H, D).to(tl.float32)
    log = tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
    real = (chunk.place < chunk.left)[:, None]
    return tl.maximum(tl.where(real, log * (1.0 / tl.load(tau)), 0.0), NOTHING)


# In bf16, exponents may be differences of prefix sums, from the start of each token's document:
# fp32 keeps them to 1e-4 at the very worst. These are in memory (`prefix`), so that a token finds
# its block's middle there.


class Decays(NamedTuple):
    """Hold what exponents of a tile are made of. With ROUND, prefix sums [C, BD] up to each token,
    and, for what is read, up to it or to that before it; else the log decays, and their halves."""

    G: tl.tensor
    E: tl.tensor
    high: tl.tensor
    low: tl.tensor
    total: tl.tensor  # [BD]: of the last document's tokens


@triton.jit
def decays_of(
    gk,
    prefix,
    chunk,
    start,
    kept,
    d,
    H: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Find the Decays of the channels d: of prefix sums, or of the gates gk themselves."""
    if ROUND:
        G = load_rows(prefix, chunk, d, H, D)
        E, place = G, chunk.place
        if U:
            earlier = load_places(prefix, chunk, tl.maximum(place - 1, 0), d, H, D)
            E = tl.where((place > tl.maximum(start - chunk.first, 0))[:, None], earlier, 0.0)
        last = chunk.base + tl.minimum(chunk.left, place.shape[0]) - 1
        total = load_fp32(prefix + (last * H + chunk.h) * D + d, d < D)
        return Decays(G, E, G, G, total)
    else:  # what follows a return is compiled too by Triton 3.6
        a = gates_of(gk, chunk, d, H, D)
        high, low = halves(a, ROUND)
        return Decays(a, a, high, low, tl.sum(tl.where(kept[:, None], a, 0.0), 0))


@triton.jit
def from_border(decays, place, start, U: tl.constexpr, ROUND: tl.constexpr):
    """[C, BD]: the decay from the chunk's, or the document's, start to what a token reads."""
    if ROUND:
        return tl.exp(decays.E)
    else:
        return decay(to_it(place, start, U), decays.high, decays.low, ROUND)


@triton.jit
def to_border(decays, place, start, ROUND: tl.constexpr):
    """[C, BD]: the decay from a token to the chunk's, or the document's, end."""
    if ROUND:
        return tl.exp(tl.minimum(decays.total[None, :] - decays.G, 0.0))
    else:
        return decay(after_it(place, start), decays.high, decays.low, ROUND)


@triton.jit
def level_decay(
    decays,
    prefix,
    chunk,
    d,
    i,
    H: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    ROUND: tl.constexpr,
):
    """[C, BD], for blocks of 2^(i + 1) tokens: the decay between a token and the middle of its
    block."""
    place = chunk.place
    if ROUND:
        middle = load_places(prefix, chunk, (((place >> i) | 1) << i) - 1, d, H, D)
        own = tl.where(second_half(place, i), decays.E, decays.G) if U else decays.G
        return tl.exp(-tl.abs(own - middle))
    else:
        return decay(to_middle(place, i, U), decays.high, decays.low, ROUND)


@triton.jit
def table(weights, chunk):
    """Point [C, C] to the chunk's weights of pairs."""
    place, C = chunk.place, chunk.place.shape[0]
    return weights + chunk.index * C * C + place[:, None] * C + place[None, :]


@triton.jit
def _decayed(
    x,
    g,
    starts,
    out,
    totals,
    T,
    NC,
    H: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    GATED: tl.constexpr,
    U: tl.constexpr,
    DOCS: tl.constexpr,
    FROM: tl.constexpr,
    TOTALS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """out [B, T, H, D]: x decayed from the chunk's start, or to its end. totals [B, NC, H, D]: the
    log decays of whole chunks."""
    TILES: tl.constexpr = (D + BD - 1) // BD
    chunk = chunk_of(tl.program_id(0) // TILES, T, NC, H, C)
    place, d = chunk.place, tl.program_id(0) % TILES * BD + tl.arange(0, BD)
    start, seen, kept = documents(starts, chunk, DOCS)
    X = load_rows(x, chunk, d, H, D)
    total = tl.zeros([BD], tl.float32)
    if GATED:
        a = gates_of(g, chunk, d, H, D)
        total = tl.sum(tl.where(kept[:, None], a, 0.0), 0)
        high, low = halves(a, ROUND)
        X = X * decay(to_it(place, start, U) if FROM else after_it(place, start), high, low, ROUND)
    store_rows(out, tl.where((seen if FROM else kept)[:, None], X, 0.0), chunk, d, H, D)
    if TOTALS:
        total = tl.where(spans(seen, kept), total, GONE)
        tl.store(totals + chunk.index * D + d, total, mask=d < D)


@triton.jit
def _weights(
    q,
    k,
    gk,
    tau,
    u,
    starts,
    weights,
    q_from,
    k_to,
    prefix,
    totals,
    T,
    NC,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    LEVELS: tl.constexpr,
    GK: tl.constexpr,
    TAU: tl.constexpr,
    U: tl.constexpr,
    DOCS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """weights [B, NC, H, C, C]: of the pairs of a chunk's tokens, without gv; q_from, k_to, totals:
    as of _decayed; prefix [B, T, H, K]: sums of log decays in the chunk."""
    chunk = chunk_of(tl.program_id(0), T, NC, H, C)
    place = chunk.place
    start, seen, kept = documents(starts, chunk, DOCS)
    whole = spans(seen, kept)
    A, own = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    if (
        GK and ROUND
    ):  # in a loop of its own: what it keeps in registers would be kept through the next one
        for i_k in range((K + BK - 1) // BK):
            ks = i_k * BK + tl.arange(0, BK)
            if TAU:
                a = gates_of_logits(gk, tau, chunk, ks, H, K)
            else:
                a = gates_of(gk, chunk, ks, H, K)
            store_rows(prefix, sums(to_it(place, start, False), a, ROUND), chunk, ks, H, K)
        tl.debug_barrier()  # other threads' rows are read
    for i_k in range((K + BK - 1) // BK):
        ks = i_k * BK + tl.arange(0, BK)
        Q, Kt = load_rows(q, chunk, ks, H, K), load_rows(k, chunk, ks, H, K)
        both = Q.to(tl.float32) * Kt.to(tl.float32)
        if U:
            both *= load_fp32(u + chunk.h * K + ks, ks < K)[None, :]
        own += tl.sum(both, 1)
        if GK:
            decays = decays_of(gk, prefix, chunk, start, kept, ks, H, K, U, ROUND)
            total = decays.total
            for i in range(LEVELS):
                w = level_decay(decays, prefix, chunk, ks, i, H, K, U, ROUND)
                x = tl.where(second_half(place, i), Q, Kt) * w
                A += tl.where(pairs_of(place, i), mm(x, tl.trans(x), ROUND), 0.0)
            Q = Q * from_border(decays, place, start, U, ROUND)
            Kt = Kt * to_border(decays, place, start, ROUND)
        else:
            total = tl.zeros([BK], tl.float32)
            A += mm(Q, tl.trans(Kt), ROUND)
        store_rows(q_from, tl.where(seen[:, None], Q, 0.0), chunk, ks, H, K)
        store_rows(k_to, tl.where(kept[:, None], Kt, 0.0), chunk, ks, H, K)
        tl.store(totals + chunk.index * K + ks, tl.where(whole, total, GONE), mask=ks < K)
    below = (place[:, None] > place[None, :]) & same_document(start)
    A = tl.where(place[:, None] == place[None, :], own[:, None], tl.where(below, A, 0.0))
    tl.store(table(weights, chunk), A)


@triton.jit
def _outputs(
    q_from,
    v,
    gv,
    starts,
    states,
    weights,
    o,
    scale,
    T,
    NC,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    GV: tl.constexpr,
    U: tl.constexpr,
    DOCS: tl.constexpr,
    ROUND: tl.constexpr,
):
    VT: tl.constexpr = (V + BV - 1) // BV
    chunk = chunk_of(tl.program_id(0) // VT, T, NC, H, C)
    place, vs = chunk.place, tl.program_id(0) % VT * BV + tl.arange(0, BV)
    A = tl.load(table(weights, chunk))
    Vt = load_rows(v, chunk, vs, H, V)
    out = tl.zeros([C, BV], tl.float32)
    for i_k in range((K + BK - 1) // BK):
        ks = i_k * BK + tl.arange(0, BK)
        Q = load_rows(q_from, chunk, ks, H, K)
        out += mm(Q, load_state(states, chunk, ks, vs, K, V), ROUND)
    if GV:
        start, _, _ = documents(starts, chunk, DOCS)
        high, low = halves(gates_of(gv, chunk, vs, H, V), ROUND)
        out *= decay(to_it(place, start, U), high, low, ROUND)
        out += diagonal(A, place)[:, None] * Vt
        for i in range(LEVELS):
            w = decay(to_middle(place, i, U), high, low, ROUND)
            r = mm(tl.where(pairs_of(place, i), A, 0.0), Vt * w, ROUND) * w
            out += tl.where(second_half(place, i), r, 0.0)
    else:
        out += mm(A, Vt, ROUND)
    store_rows(o, out * scale, chunk, vs, H, V)


@triton.jit
def log_gradient(read, written, leaving, start, kept, place, U: tl.constexpr, ROUND: tl.constexpr):
    """[C, D]: of log decays: what reads less what was written, summed from each token to the end of
    its document, and what leaves the chunk. read: what each token reads, with its own log decay
    unless U."""
    later = (place[:, None] <= place[None, :]) & same_document(start)
    dlog = sums(later, read - written, ROUND) + tl.where(kept[:, None], leaving[None, :], 0.0)
    return dlog - read if U else dlog


@triton.jit
def _value_gradients(
    v,
    gv,
    starts,
    states,
    dstates,
    weights,
    q_from,
    k_to,
    totals,
    do,
    dweights,
    dv,
    dgv,
    scale,
    T,
    NC,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    GV: tl.constexpr,
    U: tl.constexpr,
    DOCS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """dv, dgv, and dweights [B, NC, H, C, C]: the gradient of the weights plus its transpose, once
    on the diagonal."""
    chunk = chunk_of(tl.program_id(0), T, NC, H, C)
    place = chunk.place
    start, seen, kept = documents(starts, chunk, DOCS)
    below = (place[:, None] > place[None, :]) & same_document(start)
    A = tl.load(table(weights, chunk))
    dA, own = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for i_v in range((V + BV - 1) // BV):
        vs = i_v * BV + tl.arange(0, BV)
        dV, late, carried = (
            tl.zeros([C, BV], tl.float32),
            tl.zeros([C, BV], tl.float32),
            tl.zeros([BV], tl.float32),
        )
        for i_k in range((K + BK - 1) // BK):
            ks = i_k * BK + tl.arange(0, BK)
            dS = load_state(dstates, chunk, ks, vs, K, V)
            dV += mm(load_rows(k_to, chunk, ks, H, K), dS, ROUND)
            if GV:
                S = load_state(states, chunk, ks, vs, K, V)
                late += mm(load_rows(q_from, chunk, ks, H, K), S, ROUND)
                total = load_fp32(totals + chunk.index * K + ks, ks < K)
                carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32) * tl.exp(total)[:, None], 0)
        Vt, dO = load_rows(v, chunk, vs, H, V), load_rows(do, chunk, vs, H, V)
        if GV:
            own += tl.sum(dO.to(tl.float32) * Vt.to(tl.float32), 1)
            a = gates_of(gv, chunk, vs, H, V)
            high, low = halves(a, ROUND)
            dV *= decay(after_it(place, start), high, low, ROUND)
            leaving = tl.sum(Vt * dV, 0) + carried * tl.exp(
                tl.sum(tl.where(kept[:, None], a, 0.0), 0)
            )
            late *= decay(to_it(place, start, U), high, low, ROUND)
            both = tl.where(below, A.to(tl.float32), 0.0)
            both += tl.trans(both)
            for i in range(LEVELS):
                second, these = second_half(place, i), pairs_of(place, i)
                w = decay(to_middle(place, i, U), high, low, ROUND)
                x = tl.where(second, dO, Vt) * w
                dA += tl.where(these, mm(x, tl.trans(x), ROUND), 0.0)
                r = mm(tl.where(these, both, 0.0), x, ROUND) * w
                late += tl.where(second, r, 0.0)
                dV += tl.where(second, 0.0, r * scale)
            dlog = log_gradient(late * scale * dO, Vt * dV, leaving, start, kept, place, U, ROUND)
            store_rows(dgv, dlog, chunk, vs, H, V)
            dV += diagonal(A, place)[:, None] * dO * scale
        else:
            dA += mm(dO, tl.trans(Vt), ROUND)
            dV += mm(tl.trans(A), dO, ROUND) * scale
        store_rows(dv, dV, chunk, vs, H, V)
    if not GV:
        own = diagonal(dA, place)
    dA = tl.where(below, dA, 0.0)
    dA = tl.where(place[:, None] == place[None, :], own[:, None], dA + tl.trans(dA))
    tl.store(table(dweights, chunk), dA * scale)


@triton.jit
def _key_gradients(
    q,
    k,
    gk,
    tau,
    u,
    starts,
    states,
    dstates,
    dweights,
    prefix,
    totals_k,
    v_to,
    do_from,
    totals_v,
    dq,
    dk,
    dgk,
    du,
    scale,
    T,
    NC,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    GK: tl.constexpr,
    TAU: tl.constexpr,
    GV: tl.constexpr,
    U: tl.constexpr,
    DOCS: tl.constexpr,
    ROUND: tl.constexpr,
):
    """dq, dk, dgk, and du [B, NC, H, K]: sums over the tokens of a chunk."""
    KT: tl.constexpr = (K + BK - 1) // BK
    chunk = chunk_of(tl.program_id(0) // KT, T, NC, H, C)
    place, ks = chunk.place, tl.program_id(0) % KT * BK + tl.arange(0, BK)
    dQ, dK, carried = (
        tl.zeros([C, BK], tl.float32),
        tl.zeros([C, BK], tl.float32),
        tl.zeros([BK], tl.float32),
    )
    for i_v in range((V + BV - 1) // BV):
        vs = i_v * BV + tl.arange(0, BV)
        S, dS = load_state(states, chunk, ks, vs, K, V), load_state(dstates, chunk, ks, vs, K, V)
        dQ += mm(load_rows(do_from, chunk, vs, H, V), tl.trans(S), ROUND)
        dK += mm(load_rows(v_to, chunk, vs, H, V), tl.trans(dS), ROUND)
        if GK:
            both = S.to(tl.float32) * dS.to(tl.float32)
            if GV:
                both *= tl.exp(load_fp32(totals_v + chunk.index * V + vs, vs < V))[None, :]
            carried += tl.sum(both, 1)
    start, seen, kept = documents(starts, chunk, DOCS)
    Q, Kt = load_rows(q, chunk, ks, H, K), load_rows(k, chunk, ks, H, K)
    dA = tl.load(table(dweights, chunk))
    own = diagonal(dA, place)
    dQ = tl.where(seen[:, None], dQ * scale, 0.0)
    dK = tl.where(kept[:, None], dK, 0.0)
    if GK:
        decays = decays_of(gk, prefix, chunk, start, kept, ks, H, K, U, ROUND)
        dQ *= from_border(decays, place, start, U, ROUND)
        dK *= to_border(decays, place, start, ROUND)
        # 0 if the last document began in the chunk
        through = tl.exp(load_fp32(totals_k + chunk.index * K + ks, ks < K))
        leaving = tl.sum(Kt * dK, 0) + carried * through
        for i in range(LEVELS):
            second = second_half(place, i)
            w = level_decay(decays, prefix, chunk, ks, i, H, K, U, ROUND)
            r = mm(tl.where(pairs_of(place, i), dA, 0.0), tl.where(second, Q, Kt) * w, ROUND) * w
            dQ += tl.where(second, r, 0.0)
            dK += tl.where(second, 0.0, r)
        dlog = log_gradient(Q * dQ, Kt * dK, leaving, start, kept, place, U, ROUND)
        if TAU:
            z = load_rows(gk, chunk, ks, H, K).to(tl.float32)
            dlog *= tl.sigmoid(-z) * (1.0 / tl.load(tau))
        store_rows(dgk, dlog, chunk, ks, H, K)
    else:
        dQ += mm(tl.where(place[:, None] > place[None, :], dA, 0.0), Kt, ROUND)
        dK += mm(tl.where(place[:, None] < place[None, :], dA, 0.0), Q, ROUND)
    own_q, own_k = own[:, None] * Kt, own[:, None] * Q
    if U:
        bonus = load_fp32(u + chunk.h * K + ks, ks < K)[None, :]
        tl.store(du + chunk.index * K + ks, tl.sum(own_k * Kt, 0), mask=ks < K)
        own_q, own_k = own_q * bonus, own_k * bonus
    store_rows(dq, dQ + own_q, chunk, ks, H, K)
    store_rows(dk, dK + own_k, chunk, ks, H, K)


# --------------------------------------------------------------------------------------------------
# The ops


class Kept:
    """Take apart what forward leaves to backward, views of one tensor: weights, q_from, k_to and
    v_to in the inputs' dtype, the others in fp32."""

    WIDE = "totals_k", "totals_v", "prefix"

    def __init__(self, plan, gated_k, gated_v, like=None, tensor=None):
        (B, NC, H, K, V), T, C = plan.states, plan.T, plan.C
        self.shapes = {
            "totals_k": (B, NC, H, K),
            "totals_v": (B, NC, H, V * gated_v),
            "weights": (B, NC, H, C, C),
            "q_from": (B, T, H, K),
            "k_to": (B, T, H, K),
            "v_to": (B, T, H, V * gated_v),
            "prefix": (B, T, H, K * gated_k * plan.round),
        }
        self.sizes = {}
        at = 0
        for name, shape in self.shapes.items():
            size = torch.Size(shape).numel()
            narrow = plan.round and name not in self.WIDE
            self.sizes[name] = at, size, narrow
            at += cdiv(cdiv(size, 2) if narrow else size, 4) * 4  # what follows is aligned
        self.numel = at
        self.tensor = tensor if like is None else like.new_empty(at, dtype=torch.float32)

    def __getattr__(self, name):
        at, size, narrow = self.sizes[name]
        if not size:
            return None
        if narrow:
            part = self.tensor[at : at + cdiv(size, 2)].view(torch.bfloat16)[:size]
        else:
            part = self.tensor[at : at + size]
        return part.view(self.shapes[name])


def shapes(k, v, gk, gv, u, tau, S_in, final, cu_seqlens, C):
    C = chunk("gla", k, v, C)
    k, v, own = laid_out(k, v, S_in, final, cu_seqlens, C)
    plan = Plan(k, v, C, exact=own)
    return (Kept(plan, gk is not None, gv is not None).numel,), plan.states, plan.state_dtype


def decayed(plan, x, g, starts, forwards, u=None, totals=None, out=None):
    """x decayed to the chunks' ends, or, if forwards is false, from their starts. x itself where
    there is nothing to do."""
    if g is None and starts is None and totals is None:
        return x
    out = torch.empty_like(x) if out is None else out
    D = x.shape[-1]
    BD = tile(D, 64)
    _decayed[(cdiv(D, BD) * plan.chunks,)](
        x,
        g,
        starts,
        out,
        totals,
        plan.T,
        plan.NC,
        H=plan.H,
        D=D,
        C=plan.C,
        BD=BD,
        GATED=g is not None,
        U=u is not None,
        DOCS=starts is not None,
        FROM=not forwards,
        TOTALS=totals is not None,
        ROUND=plan.round,
        num_warps=4,
    )
    return out


def _totals(plan, x, gv):
    """Room for the log decays of chunks: [B, NC, H, K], [B, NC, H, V] or None."""
    B, NC, H, *widths = plan.states
    of_k, of_v = (x.new_empty(B, NC, H, D, dtype=torch.float32) for D in widths)
    return of_k, None if gv is None else of_v


def state(k, v, gk, gv, u, tau, cu_seqlens, C):
    C = chunk("gla", k, v, C)
    gk = log_decay(gk, tau)
    stream = Stream(cu_seqlens, k.shape[1], C, False)
    (k, v, gk, gv), plan = stream.spread(k, v, gk, gv), Plan(k, v, C)
    totals = _totals(plan, k, gv)
    k = decayed(plan, k, gk, stream.starts, True, totals=totals[0])
    v = v if gv is None else decayed(plan, v, gv, stream.starts, True, totals=totals[1])
    U, (_, A_k, A_v) = plan.walk(k, v, None, None, 1.0, False, totals=totals, states=False)
    A_v = A_k.new_zeros(plan.B, plan.H, plan.V) if A_v is None else A_v
    return U, torch.cat([A_k, A_v], -1), None


def fwd(q, k, v, gk, gv, u, tau, S_in, cu_seqlens, cache, scale, C, output_final_state):
    C = chunk("gla", k, v, C)
    own = wanted(S_in, cu_seqlens, output_final_state)
    stream = Stream(cu_seqlens, k.shape[1], C, own)
    if not inside(k, v, gk, tau, own):
        gk = log_decay(gk, tau)
        tau = None
    q, k, v, gk, gv = stream.spread(q, k, v, gk, gv)
    plan = Plan(k, v, C, exact=own)
    u = None if u is None else u.contiguous()
    kept = Kept(plan, gk is not None, gv is not None, like=k)
    constant = constants(plan, gk, tau, gv, u, stream)
    options = tiles("gla weights", plan)
    del options["BV"]
    _weights[(plan.chunks,)](
        q,
        k,
        gk,
        tau,
        u,
        stream.starts,
        kept.weights,
        kept.q_from,
        kept.k_to,
        kept.prefix,
        kept.totals_k,
        plan.T,
        plan.NC,
        **{name: x for name, x in constant.items() if name not in ("V", "GV")},
        **options,
    )
    v_to = v
    totals = (kept.totals_k, kept.totals_v)
    if gv is not None:
        v_to = decayed(plan, v, gv, stream.starts, True, totals=kept.totals_v, out=kept.v_to)
    states, S_out = stream.walk(
        plan, kept.k_to, v_to, S_in, 1.0, False, output_final_state, starts=None, totals=totals
    )
    o = torch.empty_like(v)
    options = tiles("gla outputs", plan, None if gv is None else "gv")
    _outputs[(cdiv(plan.V, options["BV"]) * plan.chunks,)](
        kept.q_from,
        v,
        gv,
        stream.starts,
        states,
        kept.weights,
        o,
        scale,
        plan.T,
        plan.NC,
        **{name: x for name, x in constant.items() if name not in ("GK", "TAU")},
        **options,
    )
    return *stream.collect(o), S_out, kept.tensor, states


def dstate(q, k, v, gk, gv, u, tau, do, cu_seqlens, cache, scale, C):
    C = chunk("gla", k, v, C)
    gk = log_decay(gk, tau)
    stream = Stream(cu_seqlens, k.shape[1], C, False)
    (q, do, gk, gv), plan = stream.spread(q, do, gk, gv), Plan(k, v, C)
    totals = _totals(plan, q, gv)
    q = decayed(plan, q, gk, stream.starts, False, u, totals[0])
    do = do if gv is None else decayed(plan, do, gv, stream.starts, False, u, totals[1])
    return plan.walk(q, do, None, None, scale, True, totals=totals, states=False)[0]


def bwd(q, k, v, gk, gv, u, tau, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad):
    C = chunk("gla", k, v, C)
    own = S.shape[1] != cdiv(k.shape[1], C)
    stream = Stream(cu_seqlens, k.shape[1], C, own)
    logits = gk
    outside = None if inside(k, v, gk, tau, own) else tau
    if outside is not None:
        gk = log_decay(gk, tau)
        tau = None
    q, k, v, gk, gv, do = stream.spread(q, k, v, gk, gv, do)
    plan = Plan(k, v, C, exact=own)
    u = None if u is None else u.contiguous()
    kept = Kept(plan, gk is not None, gv is not None, tensor=kept)
    totals = (kept.totals_k, kept.totals_v)
    v_to = v if gv is None else kept.v_to
    do_from = do if gv is None else decayed(plan, do, gv, stream.starts, False, u)
    dstates, dS_in = stream.walk(
        plan,
        kept.q_from,
        do_from,
        dS_out,
        scale,
        True,
        input_state_grad,
        starts=None,
        totals=totals,
    )
    dq, dk, dv, dgk, dgv = (None if x is None else torch.empty_like(x) for x in (q, k, v, gk, gv))
    du = None if u is None else u.new_empty(plan.B * plan.NC, *u.shape, dtype=torch.float32)
    dweights = torch.empty_like(kept.weights)
    constant = constants(plan, gk, tau, gv, u, stream)
    options = tiles("gla value gradients", plan, None if plan.round and gv is None else "narrow")
    _value_gradients[(plan.chunks,)](
        v,
        gv,
        stream.starts,
        S,
        dstates,
        kept.weights,
        kept.q_from,
        kept.k_to,
        kept.totals_k,
        do,
        dweights,
        dv,
        dgv,
        scale,
        plan.T,
        plan.NC,
        **{name: x for name, x in constant.items() if name not in ("GK", "TAU")},
        **options,
    )
    options = tiles("gla key gradients", plan)
    _key_gradients[(cdiv(plan.K, options["BK"]) * plan.chunks,)](
        q,
        k,
        gk,
        tau,
        u,
        stream.starts,
        S,
        dstates,
        dweights,
        kept.prefix,
        kept.totals_k,
        v_to,
        do_from,
        kept.totals_v,
        dq,
        dk,
        dgk,
        du,
        scale,
        plan.T,
        plan.NC,
        **constant,
        **options,
    )
    dq, dk, dv, dgk, dgv = stream.collect(dq, dk, dv, dgk, dgv)
    du = None if u is None else du.sum(0).to(u.dtype)
    return dq, dk, dv, logit_gradient(dgk, logits, outside), dgv, du, None, dS_in


def inside(k, v, gk, tau, own):
    """Tell whether the kernels evaluate the gates: where that saves traffic, and no token is put
    between documents."""
    return tau is not None and rounds(k, v, gk) and not own


def constants(plan, gk, tau, gv, u, stream):
    sizes = plan.constants(GK=gk, TAU=tau, GV=gv, U=u, DOCS=stream.starts)
    return sizes | {"LEVELS": plan.C.bit_length() - 1}


def step(q, k, v, gk, gv, u, tau, state, scale):
    return one_token(q, k, v, state, scale, gk=log_decay(gk, tau), gv=gv, u=u)
