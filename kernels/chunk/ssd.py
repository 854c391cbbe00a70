"""ssd: S_t = e^g_t S_{t-1} + k_t^T v_t, o_t = q_t S_t, the decay one number per value head (or
constant, or absent)

With D_ti = e^(G_t - G_i) for i <= t: o = e^G q S + (q k^T * D) v, next state = e^G_end S + k^T
(e^(G_end - G) v). The products of q and k are made once for all value heads that share them. `diag`
replaces the ones on D's diagonal: the weight of a token in its own output.
"""

import torch

from lmoe.kernels.chunk.common import (
    Chunks,
    Decays,
    diagonal_step,
    kept_shapes,
    segment,
    suffix_sums,
)
from lmoe.kernels.grid import document
from lmoe.kernels.transition import Scalar


def shapes(k, v, *others):
    """Nothing but the states before chunks [M, HV, K, V] is kept; what lies inside chunks is made
    again."""
    return (0,), *kept_shapes(k, v, *others)[1:]


class _Ssd(Chunks):
    """Gathered inputs: q, k [M, H, 1, C, K]; v [M, H, r, C, V] with r value heads to each of q and
    k; decays per value head."""

    def __init__(self, q, k, v, g, diag, cu_seqlens, scale, C):
        self.HV = v.shape[2]
        super().__init__(q, k, v, k.shape[2], cu_seqlens, scale, C)
        if g is not None:
            g = self.take(g.expand(*v.shape[:2], -1)[..., None]).view(-1, C, 1)
        self.decays = Decays(g)
        self.diag = None if diag is None else self.take(diag[..., None])

    def take(self, x):
        return self.grid.gather(x, x.shape[2], self.dtype).unflatten(1, (self.H, -1))

    def grouped(self, x):
        """[n, ..] or [M, HV, ..] -> [M, H, r, ..]."""
        return x.view(self.grid.M, self.H, self.HV // self.H, *x.shape[-2:])

    def chunks(self, x):
        """[M, H, r, ..] -> [M, HV, ..]."""
        return x.flatten(1, 2)

    def decay(self):
        """Decay of the state over each chunk, broadcastable to [M, HV, K, V]."""
        if self.decays.g is None:
            return self.k.new_ones(self.grid.M, self.HV, 1, 1)
        return self.decays.through.reshape(self.grid.M, self.HV, 1, 1).clone()

    def weights(self):
        """D [M, H, r, C, C], or [C, C] where all heads share it."""
        if self.decays.g is None:
            D = self.k.new_ones(self.C, self.C).tril_()
        else:
            D = self.grouped(self.decays.pairs())
        if self.diag is not None:
            shape = *self.diag.shape[:3], self.C, self.C
            D = D.expand(shape).clone() if D.ndim == 2 else D
            D.diagonal(dim1=-2, dim2=-1).copy_(self.diag[..., 0])
        return D


def state(k, v, g, diag, cu_seqlens, C):
    c = _Ssd(None, k, v, g, None, cu_seqlens, 1.0, C)
    local = c.chunks(c.k.mT @ c.decays.fro(c.v))
    U = c.grid.chain(diagonal_step, c.decay(), local, None, torch.empty_like(local), True)
    B, T = k.shape[:2]
    A = k.new_zeros(B, c.HV, dtype=c.dtype) if g is None else g.to(c.dtype).expand(B, T, -1).sum(1)
    return *segment(Scalar, U, A, cu_seqlens, T), None


def fwd(q, k, v, g, diag, S_in, cu_seqlens, cache, scale, C, output_final_state):
    c = _Ssd(q, k, v, g, diag, cu_seqlens, scale, C)
    S_buffer, S = c.padded(shapes(k, v, cu_seqlens, C)[1])
    o = ((c.q @ c.k.mT) * c.weights()) @ c.v
    local = c.chunks(c.k.mT @ c.decays.fro(c.v))
    S_out = c.grid.chain(diagonal_step, c.decay(), local, S_in, S, output_final_state)
    o += c.decays.to(c.q @ c.grouped(S))
    return c.give(o, v), S_out, None, S_buffer


def dstate(q, k, v, g, diag, do, cu_seqlens, cache, scale, C):
    c = _Ssd(q, k, v, g, None, cu_seqlens, scale, C)
    local = c.chunks(c.q.mT @ c.decays.to(c.take(do)))
    _, G = c.grid.chain_reverse(diagonal_step, c.decay(), local, None, True)
    return G[document(cu_seqlens, 0)]


def bwd(q, k, v, g, diag, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad):
    c = _Ssd(q, k, v, g, diag, cu_seqlens, scale, C)
    grid = c.grid
    S = S[: c.grid.M]
    do = c.take(do)
    do_in = c.decays.to(do)
    local = c.chunks(c.q.mT @ do_in)
    dS, dS_in = grid.chain_reverse(diagonal_step, c.decay(), local, dS_out, input_state_grad)
    del local
    grouped_S = c.grouped(S)
    grouped_dS = c.grouped(dS)

    D = c.weights()
    qk = c.q @ c.k.mT
    dA = do @ c.v.mT
    A = qk * D
    dv_out = c.decays.fro(c.k @ grouped_dS)
    dv = A.mT @ do + dv_out
    dqk = (dA * D).sum(2, keepdim=True)
    dq = dqk @ c.k + (do_in @ grouped_S.mT).sum(2, keepdim=True)
    dk = dqk.mT @ c.q + (c.decays.fro(c.v) @ grouped_dS.mT).sum(2, keepdim=True)

    dg = ddiag = None
    if diag is not None:
        own = (c.q * c.k).sum(-1, keepdim=True) * (do * c.v).sum(-1, keepdim=True)
        ddiag = c.give(own, diag)
    if g is not None and g.ndim == 3:
        # G_t decays what token t reads and un-decays what it writes; a token's own output it leaves
        # alone. See gla_bwd.
        pairs = dA.mul_(A).tril_(-1)
        leaving = (c.v * dv_out).sum(-1)
        read = pairs.sum(-1) + (do_in * (c.q @ grouped_S)).sum(-1)
        end = c.grouped(dS.mul_(S).mul_(c.decay())).sum((-2, -1)) + leaving.sum(-1)
        through = (read - pairs.sum(-2) - leaving).view(-1, C, 1)
        dg = suffix_sums(through) + end.view(-1, 1, 1)
        dg = c.give(c.grouped(dg), g)
    return c.give(dq.mul_(scale), q), c.give(dk, k), c.give(dv, v), dg, ddiag, dS_in


def step(q, k, v, g, diag, state, scale):
    dtype = state.dtype
    group = v.shape[1] // q.shape[1]
    q, k = (x.to(dtype).repeat_interleave(group, dim=1) for x in (q, k))
    v = v.to(dtype)
    if g is not None:
        state *= g.to(dtype).exp()[..., None, None]
    state += k[..., :, None] * v[..., None, :]
    o = (q[..., None, :] @ state).squeeze(-2)
    if diag is not None:
        o += (diag.to(dtype) - 1)[..., None] * (q * k).sum(-1, keepdim=True) * v
    return scale * o
