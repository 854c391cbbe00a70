"""gla: S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t^T v_t, o_t = q_t S_t, or q_t (S_{t-1} +
diag(u) k_t^T v_t) with the bonus u"""

import torch

from lmoe.kernels.chunk.common import (
    Chunks,
    Decays,
    below,
    diagonal_step,
    halves,
    kept_shapes,
    padded,
    segment,
    suffix_sums,
    times,
)
from lmoe.kernels.gates import log_decay, logit_gradient
from lmoe.kernels.grid import document
from lmoe.kernels.transition import Diagonal

shapes = kept_shapes  # the weights A, the states


class _Gla(Chunks):
    """Share between forward and backward: gathered inputs and their decays."""

    def __init__(self, q, k, v, gk, gv, u, cu_seqlens, scale, C):
        super().__init__(q, k, v, k.shape[2], cu_seqlens, scale, C)
        self.u = None if u is None else u.to(self.dtype)
        self.gk = None if gk is None else Decays(self.take(gk), u is not None)
        self.gv = None if gv is None else Decays(self.take(gv), u is not None)

    def to_k(self, x):
        """x [n, C, K] decayed from the chunk's start to its tokens; fro: from them to its end."""
        return times(x, self.gk and self.gk.to)

    def fro_k(self, x):
        return times(x, self.gk and self.gk.fro)

    def to_v(self, x):
        return times(x, self.gv and self.gv.to)

    def fro_v(self, x):
        return times(x, self.gv and self.gv.fro)

    def decay(self):
        """Decay of the state over each chunk, broadcastable to [M, H, K, V]."""
        decay = self.k.new_ones(len(self.k), 1, 1)
        if self.gk:
            decay = decay * self.gk.through.mT
        if self.gv:
            decay = decay * self.gv.through
        return self.chunks(decay)

    def own(self):
        """The weight of a token in its own output, [n, C, 1]."""
        uk = self.k if self.u is None else (self.chunks(self.k) * self.u[:, None]).view_as(self.k)
        return (self.q * uk).sum(-1, keepdim=True)


def state(k, v, gk, gv, u, tau, cu_seqlens, C):
    gk = log_decay(gk, tau)
    c = _Gla(None, k, v, gk, gv, None, cu_seqlens, 1.0, C)
    local = c.chunks(c.fro_k(c.k).mT @ c.fro_v(c.v))
    U = c.grid.chain(diagonal_step, c.decay(), local, None, torch.empty_like(local), True)
    B, T = k.shape[:2]
    sums = [
        k.new_zeros(B, c.H, D, dtype=c.dtype) if g is None else g.to(c.dtype).sum(1)
        for g, D in ((gk, c.K), (gv, c.V))
    ]
    return *segment(Diagonal, U, torch.cat(sums, -1), cu_seqlens, T), None


def fwd(q, k, v, gk, gv, u, tau, S_in, cu_seqlens, cache, scale, C, output_final_state):
    c = _Gla(q, k, v, log_decay(gk, tau), gv, u, cu_seqlens, scale, C)
    grid = c.grid
    M = c.grid.M
    (A_buffer, A), (S_buffer, S) = (
        padded(M, shape, c.k) for shape in shapes(k, v, cu_seqlens, C)[:2]
    )
    A_flat = A.view(-1, C, C)
    if c.gk:
        A.zero_()
        for b, to, fro in c.gk.levels():
            below(A_flat, b).copy_((halves(c.q, b)[1] * to) @ (halves(c.k, b)[0] * fro).mT)
    else:
        torch.tril(c.q @ c.k.mT, -1, out=A_flat)
    own = c.own()
    A_flat.diagonal(dim1=1, dim2=2).copy_(own.squeeze(-1))
    if c.gv:
        o = own * c.v
        for b, to, fro in c.gv.levels():
            halves(o, b)[1].add_((below(A_flat, b) @ (halves(c.v, b)[0] * fro)) * to)
    else:
        o = A_flat @ c.v

    local = c.chunks(c.fro_k(c.k).mT @ c.fro_v(c.v))
    S_out = grid.chain(diagonal_step, c.decay(), local, S_in, S, output_final_state)
    o += c.to_v(c.to_k(c.q) @ S.view(-1, c.K, c.V))
    return grid.scatter(c.chunks(o), v.dtype), S_out, A_buffer, S_buffer


def _dstate(c, do):
    """(dS over the chunks' own outputs [M, H, K, V], do decayed from the chunk's start)"""
    do_in = c.to_v(do)
    return c.chunks(c.to_k(c.q).mT @ do_in), do_in


def dstate(q, k, v, gk, gv, u, tau, do, cu_seqlens, cache, scale, C):
    c = _Gla(q, k, v, log_decay(gk, tau), gv, u, cu_seqlens, scale, C)
    local, _ = _dstate(c, c.take(do))
    _, G = c.grid.chain_reverse(diagonal_step, c.decay(), local, None, True)
    return G[document(cu_seqlens, 0)]


def bwd(q, k, v, gk, gv, u, tau, A, S, do, dS_out, cu_seqlens, scale, C, input_state_grad):
    c = _Gla(q, k, v, log_decay(gk, tau), gv, u, cu_seqlens, scale, C)
    grid = c.grid
    M = c.grid.M
    n = len(c.k)
    A = A[:M].view(n, C, C)
    S = S[:M]
    do = c.take(do)

    # Pairs inside the chunk, without a token's own output, whose decay is 1.
    own_grad = (do * c.v).sum(-1, keepdim=True)
    if c.gv:
        dA = torch.empty_like(A)
        dv = torch.zeros_like(c.v)
        o = torch.zeros_like(c.v)
        for b, to, fro in c.gv.levels():
            Ab = below(A, b)
            do_b = halves(do, b)[1] * to
            v_b = halves(c.v, b)[0] * fro
            below(dA, b).copy_(do_b @ v_b.mT)
            halves(dv, b)[0].add_((Ab.mT @ do_b) * fro)
            halves(o, b)[1].add_((Ab @ v_b) * to)
    else:
        dA = do @ c.v.mT
    if c.gk:
        dq = torch.zeros_like(c.q)
        dk = torch.zeros_like(c.k)
        for b, to, fro in c.gk.levels():
            dAb = below(dA, b)
            halves(dq, b)[1].add_((dAb @ (halves(c.k, b)[0] * fro)) * to)
            halves(dk, b)[0].add_((dAb.mT @ (halves(c.q, b)[1] * to)) * fro)
    else:
        dA = dA.tril_(-1)
        dq = dA @ c.k
        dk = dA.mT @ c.q

    local, do_in = _dstate(c, do)
    dS, dS_in = grid.chain_reverse(diagonal_step, c.decay(), local, dS_out, input_state_grad)
    del local
    flat_S = S.reshape(n, c.K, c.V)
    flat_dS = dS.view(n, c.K, c.V)
    dk_out = c.fro_k(c.fro_v(c.v) @ flat_dS.mT)
    dv_out = c.fro_v(c.fro_k(c.k) @ flat_dS)
    dq += c.to_k(do_in @ flat_S.mT)
    dk += dk_out

    del do_in, dA
    # The gradient of a summed log decay G_t is q_t dq_t - k_t dk_t, each product over the decayed
    # terms only; g_j acts on all G_t with t >= j and on what leaves the chunk: the old state and
    # the chunk's own tokens.
    if c.gk or c.gv:
        kept = dS.mul_(S).mul_(c.decay()).view(n, c.K, c.V)
        leaving_k = (c.k * dk_out).sum(1) + kept.sum(2)
        leaving_v = (c.v * dv_out).sum(1) + kept.sum(1)
        del kept
    del dk_out, dS, flat_dS
    dgk = dgv = None
    if c.gk:
        read = c.q * dq
        dgk = suffix_sums(read - c.k * dk) + leaving_k[:, None]
        dgk = dgk if u is None else dgk.sub_(read)
        del read
    if c.gv:
        o += c.to_v(c.to_k(c.q) @ flat_S)
        dv += dv_out
        read = o * do
        dgv = suffix_sums(read - c.v * dv) + leaving_v[:, None]
        dgv = dgv if u is None else dgv.sub_(read)
        dv += A.diagonal(dim1=1, dim2=2)[..., None] * do
    else:
        dv = dv_out.baddbmm_(A.mT, do)

    du = None
    if u is None:
        dq.addcmul_(own_grad, c.k)
        dk.addcmul_(own_grad, c.q)
    else:
        shape = dq.shape
        bonus = c.u[:, None]
        dq += own_grad * (c.chunks(c.k) * bonus).view(shape)
        dk += own_grad * (c.chunks(c.q) * bonus).view(shape)
        du = c.chunks(own_grad * c.q * c.k).sum((0, 2)).to(u.dtype)

    if c.gk:
        dgk = logit_gradient(c.give(dgk, c.k), gk, tau).to(gk.dtype)
    dq = c.give(dq.mul_(scale), q)
    dk = c.give(dk, k)
    dv = c.give(dv, v)
    dgv = c.give(dgv, gv)
    return dq, dk, dv, dgk, dgv, du, None, dS_in


def step(q, k, v, gk, gv, u, tau, state, scale):
    dtype = state.dtype
    gk = log_decay(gk, tau)
    q = q.to(dtype) * scale
    k = k.to(dtype)
    v = v.to(dtype)
    kv = k[..., :, None] * v[..., None, :]
    o = None if u is None else (q[..., None, :] @ (state + u.to(dtype)[..., None] * kv)).squeeze(-2)
    if gk is not None:
        state *= gk.to(dtype).exp()[..., :, None]
    if gv is not None:
        state *= gv.to(dtype).exp()[..., None, :]
    state += kv
    return (q[..., None, :] @ state).squeeze(-2) if o is None else o
