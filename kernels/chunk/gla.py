"""gla: S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t^T v_t, o_t = q_t S_t, or q_t (S_{t-1} +
diag(u) k_t^T v_t) with the bonus u"""

import torch

from lmoe.kernels.chunk.common import (
    Chunks,
    Decays,
    diagonal_step,
    kept_shapes,
    segment,
    suffix_sums,
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
        self.gk, self.gv = (Decays(self.take(g), u is not None) for g in (gk, gv))

    def decay(self):
        """Decay of the state over each chunk, broadcastable to [M, H, K, V]."""
        decay = self.k.new_ones(len(self.k), 1, 1)
        if self.gk.g is not None:
            decay = decay * self.gk.through.mT
        if self.gv.g is not None:
            decay = decay * self.gv.through
        return self.chunks(decay)

    def bonus(self, x):
        """x [n, C, K] times the bonus."""
        return x if self.u is None else (self.chunks(x) * self.u[:, None]).view_as(x)


def state(k, v, gk, gv, u, tau, cu_seqlens, C):
    gk = log_decay(gk, tau)
    c = _Gla(None, k, v, gk, gv, None, cu_seqlens, 1.0, C)
    local = c.chunks(c.gk.fro(c.k).mT @ c.gv.fro(c.v))
    U = c.grid.chain(diagonal_step, c.decay(), local, None, torch.empty_like(local), True)
    B, T = k.shape[:2]
    sums = [
        k.new_zeros(B, c.H, D, dtype=c.dtype) if g is None else g.to(c.dtype).sum(1)
        for g, D in ((gk, c.K), (gv, c.V))
    ]
    return *segment(Diagonal, U, torch.cat(sums, -1), cu_seqlens, T), None


def fwd(q, k, v, gk, gv, u, tau, S_in, cu_seqlens, cache, scale, C, output_final_state):
    c = _Gla(q, k, v, log_decay(gk, tau), gv, u, cu_seqlens, scale, C)
    (A_buffer, A), (S_buffer, S) = map(c.padded, shapes(k, v, cu_seqlens, C)[:2])
    A = A.view(-1, C, C).copy_(c.gk.weigh(c.q, c.k))
    own = (c.q * c.bonus(c.k)).sum(-1, keepdim=True)  # a token's weight in its own output
    A.diagonal(dim1=1, dim2=2).copy_(own.squeeze(-1))
    o = A @ c.v if gv is None else c.gv.read(A, c.v, own * c.v)
    local = c.chunks(c.gk.fro(c.k).mT @ c.gv.fro(c.v))
    S_out = c.grid.chain(diagonal_step, c.decay(), local, S_in, S, output_final_state)
    o += c.gv.to(c.gk.to(c.q) @ S.view(-1, c.K, c.V))
    return c.give(o, v), S_out, A_buffer, S_buffer


def _dstate(c, do):
    """(dS over the chunks' own outputs [M, H, K, V], do decayed from the chunk's start)"""
    do_in = c.gv.to(do)
    return c.chunks(c.gk.to(c.q).mT @ do_in), do_in


def dstate(q, k, v, gk, gv, u, tau, do, cu_seqlens, cache, scale, C):
    c = _Gla(q, k, v, log_decay(gk, tau), gv, u, cu_seqlens, scale, C)
    local, _ = _dstate(c, c.take(do))
    _, G = c.grid.chain_reverse(diagonal_step, c.decay(), local, None, True)
    return G[document(cu_seqlens, 0)]


def bwd(q, k, v, gk, gv, u, tau, A, S, do, dS_out, cu_seqlens, scale, C, input_state_grad):
    c = _Gla(q, k, v, log_decay(gk, tau), gv, u, cu_seqlens, scale, C)
    grid = c.grid
    A = A[: grid.M].view(-1, C, C)
    S = S[: grid.M]
    do = c.take(do)

    # Pairs inside the chunk, without a token's own output, whose decay is 1.
    own_grad = (do * c.v).sum(-1, keepdim=True)
    dA = c.gv.weigh(do, c.v)
    dq = c.gk.read(dA, c.k, torch.zeros_like(c.q))
    dk = c.gk.write(dA, c.q, torch.zeros_like(c.k))

    local, do_in = _dstate(c, do)
    dS, dS_in = grid.chain_reverse(diagonal_step, c.decay(), local, dS_out, input_state_grad)
    del local
    flat_S = S.reshape(-1, c.K, c.V)
    flat_dS = dS.view(-1, c.K, c.V)
    dk_out = c.gk.fro(c.gv.fro(c.v) @ flat_dS.mT)
    dv_out = c.gv.fro(c.gk.fro(c.k) @ flat_dS)
    dq += c.gk.to(do_in @ flat_S.mT)
    dk += dk_out

    del do_in, dA
    # The gradient of a summed log decay G_t is q_t dq_t - k_t dk_t, each product over the decayed
    # terms only; g_j acts on all G_t with t >= j and on what leaves the chunk: the old state and
    # the chunk's own tokens.
    if gk is not None or gv is not None:
        kept = dS.mul_(S).mul_(c.decay()).view(-1, c.K, c.V)
        leaving_k = (c.k * dk_out).sum(1) + kept.sum(2)
        leaving_v = (c.v * dv_out).sum(1) + kept.sum(1)
        del kept
    del dk_out, dS, flat_dS
    dgk = dgv = None
    if gk is not None:
        read = c.q * dq
        dgk = suffix_sums(read - c.k * dk) + leaving_k[:, None]
        dgk = dgk if u is None else dgk.sub_(read)
        del read
    if gv is not None:
        o = c.gv.read(A, c.v, torch.zeros_like(c.v))
        o += c.gv.to(c.gk.to(c.q) @ flat_S)
        dv = c.gv.write(A, do, torch.zeros_like(c.v))
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
        dq += own_grad * c.bonus(c.k)
        dk += own_grad * c.bonus(c.q)
        du = c.chunks(own_grad * c.q * c.k).sum((0, 2)).to(u.dtype)

    if gk is not None:
        dgk = grid.scatter(c.chunks(dgk), c.dtype)
        dgk = logit_gradient(dgk, gk, tau).to(gk.dtype)
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
