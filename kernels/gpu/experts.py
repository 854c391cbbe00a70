"""Kernels around the experts' grouped products: the choice of experts, the plan by a counting sort,
gather, SwiGLU with the weights' gradient, combine. Each stands for a step of kernels/experts.py.

Rows from ends[-1] on are neither read nor written. Nothing is summed by atomics, and no grid
depends on the GPU, so the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl

from lmoe.kernels.gpu.common import load_fp32
from lmoe.kernels.gpu.pointwise import activate, activate_slope, offsets, ready, tile_of, tiles
from lmoe.kernels.gpu.tiles import cdiv, power_of_2

# --------------------------------------------------------------------------------------------------
# The choice


@triton.jit
def _choose(scores, ids, T, E, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    t, e = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BE)
    real = (t < T)[:, None] & (e < E)[None, :]
    score = tl.load(scores + offsets(t, e, E), mask=real, other=0.0) + 0.0  # no -0.0
    # In the order of the scores, NaN above all; of equal ones the lower index is the greater key.
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(score != score, 0x7FFFFFFF, bits)
    key = bits.to(tl.int64) * 4294967296 + (BE - e)[None, :]
    nothing = tl.full([BT, BE], -9223372036854775808, tl.int64)
    key = tl.where(real, key, nothing)
    taken = tl.zeros([BT, BE], tl.int32)
    for _ in range(K):
        best = key == tl.max(key, 1)[:, None]
        taken = tl.where(best, 1, taken)
        key = tl.where(best, nothing, key)
    place = tl.cumsum(taken, 1) - 1
    at = ids + t.to(tl.int64)[:, None] * K + place
    tl.store(at, tl.zeros([BT, BE], tl.int64) + e[None, :], mask=real & (taken > 0))


def choose(scores, K):
    """The K highest of scores [T, E] -> ids [T, K] int64, ascending in a row; of equal scores the
    lower index."""
    scores = scores.contiguous()
    T, E = scores.shape
    ids = scores.new_empty(T, K, dtype=torch.int64)
    BE = max(2, power_of_2(E))
    BT = max(1, 1024 // BE)
    if T:
        _choose[(cdiv(T, BT),)](scores, ids, T, E, K=K, BT=BT, BE=BE, num_warps=4)
    return ids


# --------------------------------------------------------------------------------------------------
# The plan: count each block's choices, add up the blocks of each expert, place every choice


@triton.jit
def chosen(ids, first, S, E, B: tl.constexpr, BE: tl.constexpr):
    """This block's choices: (their numbers [B], which of them are here [B], a 1 in the column of
    their expert [B, BE])."""
    s = tl.program_id(0) * B + tl.arange(0, B)
    e = tl.load(ids + s, mask=s < S, other=-1).to(tl.int32) - first
    here = (s < S) & (e >= 0) & (e < E)
    hot = here[:, None] & (e[:, None] == tl.arange(0, BE)[None, :])
    return s, here, hot


@triton.jit
def _count(ids, counts, first, S, E, NB, B: tl.constexpr, BE: tl.constexpr):
    s, here, hot = chosen(ids, first, S, E, B, BE)
    e = tl.arange(0, BE)
    tl.store(counts + e * NB + tl.program_id(0), tl.sum(hot.to(tl.int32), 0), mask=e < E)


@triton.jit
def _add_up(counts, totals, NB, BN: tl.constexpr):
    """Turn an expert's counts into the sums before them."""
    at = counts + tl.program_id(0) * NB
    before = tl.zeros([], tl.int32)
    for start in range(0, NB, BN):
        n = start + tl.arange(0, BN)
        count = tl.load(at + n, mask=n < NB, other=0)
        tl.store(at + n, before + tl.cumsum(count, 0) - count, mask=n < NB)
        before += tl.sum(count, 0)
    tl.store(totals + tl.program_id(0), before)


@triton.jit
def _place(
    ids, counts, totals, rows, places, ends, first, S, E, NB, B: tl.constexpr, BE: tl.constexpr
):
    s, here, hot = chosen(ids, first, S, E, B, BE)
    e = tl.arange(0, BE)
    total = tl.load(totals + e, mask=e < E, other=0)
    end = tl.cumsum(total, 0)
    before = tl.load(counts + e * NB + tl.program_id(0), mask=e < E, other=0)
    # Of this expert's choices in this block those before this one; the first stands at 0.
    inside = tl.cumsum(hot.to(tl.int32), 0) - 1
    place = tl.sum(tl.where(hot, inside + (end - total + before)[None, :], 0), 1)
    tl.store(places + s, tl.where(here, place, -1), mask=s < S)
    tl.store(rows + place, s, mask=here)
    if tl.program_id(0) == 0:
        tl.store(ends + e, end, mask=e < E)


def sort_by_expert(ids, experts, first):
    ids = ids.contiguous()
    S = ids.numel()
    new = ids.new_empty
    # Zero where there is no choice: portable gathers read these, too.
    rows = ids.new_zeros(ids.shape[0] * min(ids.shape[1], experts), dtype=torch.int32)
    places = new(ids.shape, dtype=torch.int32)
    ends = new(experts, dtype=torch.int32)
    BE = max(2, power_of_2(experts))
    B = min(1024, max(16, 8192 // BE))
    NB = max(1, cdiv(S, B))
    counts = new(experts, NB, dtype=torch.int32)
    totals = new(experts, dtype=torch.int32)
    sizes = {"first": first, "S": S, "E": experts, "NB": NB, "B": B, "BE": BE, "num_warps": 4}
    _count[(NB,)](ids, counts, **sizes)
    _add_up[(experts,)](counts, totals, NB, BN=1024, num_warps=4)
    _place[(NB,)](ids, counts, totals, rows, places, ends, **sizes)
    return rows, places, ends


# --------------------------------------------------------------------------------------------------
# Gather and combine


@triton.jit
def _gather(
    x,
    weights,
    rows,
    ends,
    y,
    R,
    D,
    E,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    r, c = tile_of(D, BT, BC)
    there = r < tl.minimum(R, tl.load(ends + E - 1))
    choice = tl.load(rows + r, mask=there, other=0)
    mask = there[:, None] & (c < D)[None, :]
    tile = tl.load(x + offsets(choice // K, c, D), mask=mask, other=0.0)
    if WEIGHTED:
        w = tl.load(weights + choice, mask=there, other=0.0)
        tile = (tile.to(tl.float32) * w[:, None]).to(y.dtype.element_ty)
    tl.store(y + offsets(r, c, D), tile, mask=mask)


def gather_rows(x, rows, ends, K, weights=None):
    x, weights = ready(x=x, weights=weights)
    R, D = len(rows), x.shape[1]
    y = x.new_empty(R, D)
    if R:
        BT, BC, programs = tiles(R, D, 1024, 4096)
        _gather[(programs,)](
            x,
            weights,
            rows,
            ends,
            y,
            R,
            D,
            len(ends),
            K=K,
            WEIGHTED=weights is not None,
            BT=BT,
            BC=BC,
            num_warps=4,
        )
    return y


@triton.jit
def _combine(
    rows,
    weights,
    places,
    y,
    T,
    D,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    t, c = tile_of(D, BT, BC)
    total = tl.zeros([BT, BC], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + t * K + k, mask=t < T, other=-1)
        row = load_fp32(rows + offsets(place, c, D), (place >= 0)[:, None] & (c < D)[None, :])
        if WEIGHTED:
            row *= tl.load(weights + t * K + k, mask=t < T, other=0.0)[:, None]
        total += row
    tl.store(y + offsets(t, c, D), total, mask=(t < T)[:, None] & (c < D)[None, :])


def combine_rows(rows, weights, places):
    rows, weights, places = ready(rows=rows, weights=weights) + [places.contiguous()]
    (T, K), D = places.shape, rows.shape[1]
    y = rows.new_empty(T, D)
    if T:
        BT, BC, programs = tiles(T, D, 1024, 2048)
        _combine[(programs,)](
            rows,
            weights,
            places,
            y,
            T,
            D,
            K=K,
            WEIGHTED=weights is not None,
            BT=BT,
            BC=BC,
            num_warps=4,
        )
    return y


# --------------------------------------------------------------------------------------------------
# SwiGLU


@triton.jit
def _swiglu(h, ends, a, R, C, E, BT: tl.constexpr, BC: tl.constexpr):
    r, c = tile_of(C, BT, BC)
    mask = (r < tl.minimum(R, tl.load(ends + E - 1)))[:, None] & (c < C)[None, :]
    at = offsets(r, c, 2 * C)
    gate, up = load_fp32(h + at, mask), load_fp32(h + at + C, mask)
    tl.store(a + offsets(r, c, C), activate(gate, True) * up, mask=mask)


def swiglu_rows(h, ends, a):
    """a = swiglu of the halves of h [R, 2 C] -> [R, C]."""
    (h,) = ready(h=h)
    R, C = a.shape
    if R:
        BT, BC, programs = tiles(R, C, 512, 2048)
        _swiglu[(programs,)](h, ends, a, R, C, len(ends), BT=BT, BC=BC, num_warps=4)


@triton.jit
def _swiglu_backward(
    a,
    h,
    weights,
    rows,
    ends,
    dh,
    dweights,
    R,
    C: tl.constexpr,
    E,
    WEIGHTED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    r = tl.program_id(0) * BT + tl.arange(0, BT)
    there = r < tl.minimum(R, tl.load(ends + E - 1))
    dot = tl.zeros([BT], tl.float32)
    if WEIGHTED:
        choice = tl.load(rows + r, mask=there, other=0)
        w = tl.load(weights + choice, mask=there, other=0.0)[:, None]
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        mask = there[:, None] & (c < C)[None, :]
        at = offsets(r, c, 2 * C)
        dA = load_fp32(a + offsets(r, c, C), mask)
        gate, up = load_fp32(h + at, mask), load_fp32(h + at + C, mask)
        silu = activate(gate, True)
        A = silu * up
        if WEIGHTED:
            dot += tl.sum(dA * A, 1)
            dA *= w
            A *= w
        tl.store(dh + at, dA * up * activate_slope(gate, True), mask=mask)
        tl.store(dh + at + C, dA * silu, mask=mask)
        tl.store(a + offsets(r, c, C), A, mask=mask)
    if WEIGHTED:
        tl.store(dweights + choice, dot, mask=there)


def swiglu_rows_bwd(a, h, weights, rows, ends, dh, dweights):
    h, weights = ready(h=h, weights=weights)
    R, C = a.shape
    # The widest part of C without a rest: 128 of 896.
    BC = min(512, C & -C)
    BC = BC if BC >= 64 else min(512, power_of_2(C))
    BT = max(1, 2048 // BC)
    if R:
        _swiglu_backward[(cdiv(R, BT),)](
            a,
            h,
            weights,
            rows,
            ends,
            dh,
            dweights,
            R,
            C=C,
            E=len(ends),
            WEIGHTED=weights is not None,
            BT=BT,
            BC=BC,
            num_warps=4,
        )
