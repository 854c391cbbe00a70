"""Every recurrence one token at a time: the specification in code.

Plain PyTorch and plain autograd, in float64 if given float64. Row vectors q, k [K], v [V]; the
state S is [K, V]; `scale` defaults to K^-1/2.
"""

import torch

from lmoe.kernels.gates import log_decay
from lmoe.kernels.norm import compute_dtype


def ssd_token(S, q, k, v, g, diag, scale):
    """Scalar decay (Mamba2 arXiv 2405.21060; constant: RetNet 2307.08621): S = e^g S + k^T v, o =
    scale q S.

    g [..] or None. With diag [..], the token's own part of o is weighted by it (Mamba3, arXiv
    2603.15569). Returns (S, o).
    """
    S = S if g is None else S * g.exp()[..., None, None]
    kv = k[..., :, None] * v[..., None, :]
    read = S + (kv if diag is None else diag[..., None, None] * kv)
    return S + kv, scale * (q[..., None, :] @ read).squeeze(-2)


def gla_token(S, q, k, v, gk, gv, u, scale):
    """Gated linear attention (arXiv 2312.06635): S = diag(e^gk) S diag(e^gv) + k^T v, o = scale q
    S.

    With the bonus u, o reads the state before the token and the token itself weighted by u (RWKV6,
    arXiv 2404.05892). Shapes [.., K], [.., V], S [.., K, V]; gk, gv, u may be None. Returns (S, o).
    """
    kv = k[..., :, None] * v[..., None, :]
    before = S
    S = S if gk is None else S * gk.exp()[..., :, None]
    S = S if gv is None else S * gv.exp()[..., None, :]
    S = S + kv
    read = S if u is None else before + u[..., :, None] * kv
    return S, scale * (q[..., None, :] @ read).squeeze(-2)


def delta_token(S, q, k, v, beta, g, scale):
    """Gated delta rule (DeltaNet arXiv 2406.06484, Gated DeltaNet 2412.06464, KDA 2510.26692): S' =
    diag(e^g) S, S = S' + k^T beta (v - k S'), o = scale q S.

    g: None, [..] (one decay per head) or [.., K]; beta [..]. Returns (S, o).
    """
    if g is not None:
        S = S * (g[..., None, None] if g.ndim < k.ndim else g[..., :, None]).exp()
    error = beta[..., None] * (v - (k[..., None, :] @ S).squeeze(-2))
    S = S + k[..., :, None] * error[..., None, :]
    return S, scale * (q[..., None, :] @ S).squeeze(-2)


def spans(v, cu_seqlens):
    """List the sequences of v [B, T, ..] as (rows of their states, first token, end): all rows at
    once, or one document of cu_seqlens after another."""
    if cu_seqlens is None:
        return [(slice(0, v.shape[0]), 0, v.shape[1])]
    ends = cu_seqlens.tolist()
    return [(slice(n, n + 1), start, end) for n, (start, end) in enumerate(zip(ends, ends[1:]))]


def scan(token, q, k, v, others, initial_state, cu_seqlens):
    """Run token(S, *values at one position) over every sequence: rows of B, or the documents of
    cu_seqlens.

    q, k [B, T, H, K], repeated for the value heads that share one; v [B, T, HV, V]; others: tensors
    [B, T, ..] or None; initial_state [N, HV, K, V] or None. Returns (o [B, T, HV, V] in v's dtype,
    final states [N, HV, K, V]).
    """
    dtype = compute_dtype(q)
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    streams = [None if x is None else x.to(dtype) for x in (q, k, v, *others)]
    outputs = []
    finals = []
    for rows, start, end in spans(v, cu_seqlens):
        if initial_state is None:
            S = v.new_zeros(len(v), v.shape[2], q.shape[-1], v.shape[-1], dtype=dtype)
        else:
            S = initial_state[rows].to(dtype)
        for t in range(start, end):
            S, o = token(S, *(None if x is None else x[:, t] for x in streams))
            outputs.append(o)
        finals.append(S)
    return torch.stack(outputs, dim=1).to(v.dtype), torch.cat(finals)


def ssd(q, k, v, g, diag, scale, initial_state, cu_seqlens):
    g = None if g is None else g.expand(v.shape[:3])

    def token(S, q, k, v, g, diag):
        return ssd_token(S, q, k, v, g, diag, scale)

    return scan(token, q, k, v, (g, diag), initial_state, cu_seqlens)


def gla(q, k, v, gk, gv, u, tau, scale, initial_state, cu_seqlens):
    gk = log_decay(gk, tau)

    def token(S, *values):
        return gla_token(S, *values, None if u is None else u.to(S.dtype), scale)

    return scan(token, q, k, v, (gk, gv), initial_state, cu_seqlens)


def delta(q, k, v, beta, g, scale, initial_state, cu_seqlens):
    def token(S, q, k, v, beta, g):
        return delta_token(S, q, k, v, beta, g, scale)

    return scan(token, q, k, v, (beta, g), initial_state, cu_seqlens)
