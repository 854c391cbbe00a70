"""One token for each of N sequences, the states updated in place: what decoding does. The states
are read and written once."""

import torch
import triton
import triton.language as tl

from lmoe.kernels.gpu.common import contiguous, load_fp32
from lmoe.kernels.gpu.tiles import cdiv, tile


@triton.jit
def _step(
    q,
    k,
    v,
    g,
    gk,
    gv,
    u,
    diag,
    S,
    o,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    G: tl.constexpr,
    GK: tl.constexpr,
    GV: tl.constexpr,
    U: tl.constexpr,
    DIAG: tl.constexpr,
):
    VT: tl.constexpr = (V + BV - 1) // BV
    i_v, n, h = tl.program_id(0) % VT, tl.program_id(0) // VT // HV, tl.program_id(0) // VT % HV
    hk = h // (HV // H)
    ks, vs = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    in_k, in_v = ks < K, vs < V
    inside = in_k[:, None] & in_v[None, :]
    at_k, at_v = (n * H + hk).to(tl.int64) * K + ks, (n * HV + h).to(tl.int64) * V + vs
    at = S + (n * HV + h).to(tl.int64) * K * V + ks[:, None] * V + vs[None, :]
    state = load_fp32(at, inside)
    Q = load_fp32(q + at_k, in_k)
    Kt = load_fp32(k + at_k, in_k)
    new = Kt[:, None] * load_fp32(v + at_v, in_v)[None, :]
    read = state
    if U:  # what is read has not decayed yet
        read += load_fp32(u + h * K + ks, in_k)[:, None] * new
    if G == 1:
        state *= tl.exp(tl.load(g + n * HV + h).to(tl.float32))
    if G == 2:
        state *= tl.exp(tl.load(g + h).to(tl.float32))
    if GK:
        state *= tl.exp(load_fp32(gk + at_k, in_k))[:, None]
    if GV:
        state *= tl.exp(load_fp32(gv + at_v, in_v))[None, :]
    state += new
    if not U:
        read = state
        if DIAG:
            read += (tl.load(diag + n * HV + h).to(tl.float32) - 1.0) * new
    out = tl.sum(Q[:, None] * read, 0) * scale
    tl.store(o + at_v, out, mask=in_v)
    tl.store(at, state, mask=inside)


def step(q, k, v, state, scale, g=None, gk=None, gv=None, u=None, diag=None):
    """q, k, gk [N, H, K], v, gv [N, HV, V], g [N, HV] or [HV], diag [N, HV], u [H, K]; state [N,
    HV, K, V]. Returns o [N, HV, V]."""
    (N, H, K), (HV, V) = q.shape, v.shape[1:]
    q, k, v, g, gk, gv, u, diag = contiguous(q, k, v, g, gk, gv, u, diag)
    S = state.contiguous()
    o = torch.empty_like(v)
    BK = tile(K, 256)
    BV = tile(V, 32)
    _step[(cdiv(V, BV) * N * HV,)](
        q,
        k,
        v,
        g,
        gk,
        gv,
        u,
        diag,
        S,
        o,
        scale,
        H=H,
        HV=HV,
        K=K,
        V=V,
        BK=BK,
        BV=BV,
        G=0 if g is None else 3 - g.ndim,
        GK=gk is not None,
        GV=gv is not None,
        U=u is not None,
        DIAG=diag is not None,
        num_warps=4,
    )
    if S is not state:
        state.copy_(S)
    return o
