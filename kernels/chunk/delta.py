"""delta: S' = diag(e^g_t) S_{t-1}, e_t = beta_t (v_t - k_t S'), S_t = S' + k_t^T e_t, o_t = q_t S_t

In a chunk, with kappa_ti = k_t . k_i e^(G_t - G_i) for i < t, Aqk likewise for q_t and i <= t, and
Y = (I + kappa diag(beta))^-1:
    U = Y V, W = Y (K e^G), X = U - W S, E = diag(beta) X, o = (Q e^G) S + Aqk E, next state =
    diag(e^G_end) S + Kd^T E with Kd = K
e^(G_end - G). The chunk is the dense transition P = diag(e^G_end) - Kd^T diag(beta) W, so the chain
needs one product a chunk.
"""

import torch
import torch.nn.functional as F

from lmoe.kernels.chunk.common import (
    Chunks,
    Decays,
    below,
    dense_step,
    diagonal_blocks,
    halves,
    kept_shapes,
    suffix_sums,
)
from lmoe.kernels.grid import document

shapes = kept_shapes  # the inverses Y, the states


def unit_lower_inverse(L):
    """(I + L)^-1 for strictly lower triangular L [n, C, C], by halving: the block below the
    diagonal is -Y2 L21 Y1."""
    Y = torch.zeros_like(L)
    b = 1
    Y.diagonal(dim1=1, dim2=2).fill_(1)
    while b < L.shape[1]:
        blocks = diagonal_blocks(Y, b)
        below(Y, b).copy_((blocks[..., b:, b:] @ below(L, b) @ blocks[..., :b, :b]).neg_())
        b *= 2
    return Y


class _Delta(Chunks):
    """Share between forward and backward: gathered inputs over all value heads, and their
    decays."""

    def __init__(self, q, k, v, beta, g, cu_seqlens, scale, C):
        super().__init__(q, k, v, v.shape[2], cu_seqlens, scale, C)
        self.beta = self.take(beta[..., None])
        self.scalar = g is None or g.ndim == 3
        self.D = None
        if g is not None:
            g = self.take(g[..., None] if self.scalar else g)
        self.decays = Decays(g)
        if g is not None and self.scalar:
            self.D = self.decays.pairs()

    def weights(self, x):
        """[n, C, C]: x_t . k_i, decayed from i to t, for i <= t."""
        if self.scalar:
            A = x @ self.k.mT
            return A.tril_() if self.D is None else A.mul_(self.D)
        A = self.decays.weigh(x, self.k)
        A.diagonal(dim1=1, dim2=2).copy_((x * self.k).sum(-1))
        return A

    def kappa(self):
        return self.weights(self.k).tril_(-1)

    def inverse(self):
        """Y [M, H, C, C]"""
        return self.chunks(unit_lower_inverse(self.kappa() * self.beta.mT))

    def chain_operands(self, Y):
        """(W, U, transition P [M, H, K, K], diag(beta) Kd)"""
        Y = Y.view(-1, self.C, self.C)
        W = Y @ self.decays.to(self.k)
        U = Y @ self.v
        Kd = self.decays.fro(self.k) * self.beta
        P = (Kd.mT @ W).neg_()
        P.diagonal(dim1=1, dim2=2).add_(1 if self.decays.g is None else self.decays.through[:, 0])
        return W, U, self.chunks(P), Kd


def state(k, v, beta, g, cu_seqlens, C):
    c = _Delta(None, k, v, beta, g, cu_seqlens, 1.0, C)
    grid, K, V, (B, T, H) = c.grid, c.K, c.V, v.shape[:3]
    buffer, Y = c.padded(shapes(k, v, cu_seqlens, C)[0])
    _, U, P, Kd = c.chain_operands(Y.copy_(c.inverse()))
    # The transition rides along as K more columns that start from the identity and to which chunks
    # add nothing.
    local = F.pad(c.chunks(Kd.mT @ U), (0, K))
    # With cu_seqlens only the first token's document starts from it: where the last token's is
    # another one, the columns end as zeros.
    start = F.pad(torch.eye(K, dtype=c.dtype, device=k.device), (V, 0)).expand(B, H, K, V + K)
    ends = grid.chain(dense_step, P, local, start, torch.empty_like(local), True)
    U, A = ends[document(cu_seqlens, T - 1)].split([V, K], -1)
    return U.contiguous(), A.contiguous(), buffer


def fwd(q, k, v, beta, g, S_in, cu_seqlens, cache, scale, C, output_final_state):
    c = _Delta(q, k, v, beta, g, cu_seqlens, scale, C)
    Y_shape, S_shape, _ = shapes(k, v, cu_seqlens, C)
    S_buffer, S = c.padded(S_shape)
    Y_buffer = None
    if cache is None:
        Y_buffer, Y = c.padded(Y_shape)
        Y.copy_(c.inverse())
    else:
        Y = cache[: c.grid.M]
    W, U, P, Kd = c.chain_operands(Y)
    S_out = c.grid.chain(dense_step, P, c.chunks(Kd.mT @ U), S_in, S, output_final_state)
    del P
    flat = S.view(-1, c.K, c.V)
    E = torch.baddbmm(U, W, flat, alpha=-1).mul_(c.beta)
    o = torch.baddbmm(c.decays.to(c.q) @ flat, c.weights(c.q), E)
    return c.give(o, v), S_out, Y_buffer, S_buffer


def _dstate(c, Aqk, W, do):
    """(what each chunk's outputs add to the gradient of the state before it [M, H, K, V], dE of the
    chunk's own outputs)"""
    dE = Aqk.mT @ do
    return c.chunks(torch.baddbmm(c.decays.to(c.q).mT @ do, (W * c.beta).mT, dE, alpha=-1)), dE


def dstate(q, k, v, beta, g, do, cu_seqlens, cache, scale, C):
    c = _Delta(q, k, v, beta, g, cu_seqlens, scale, C)
    grid = c.grid
    W, _, P, _ = c.chain_operands(cache[: grid.M])
    local, _ = _dstate(c, c.weights(c.q), W, c.take(do))
    _, G = grid.chain_reverse(dense_step, P.mT, local, None, True)
    return G[document(cu_seqlens, 0)]


def bwd(q, k, v, beta, g, Y, S, do, dS_out, cu_seqlens, scale, C, input_state_grad):
    c = _Delta(q, k, v, beta, g, cu_seqlens, scale, C)
    grid = c.grid
    Y = Y[: grid.M].view(-1, C, C)
    S = S[: grid.M].reshape(-1, c.K, c.V)
    do = c.take(do)
    Aqk = c.weights(c.q)
    kappa = c.kappa()
    W, U, P, _ = c.chain_operands(Y)
    local, dE = _dstate(c, Aqk, W, do)
    dS, dS_in = grid.chain_reverse(dense_step, P.mT, local, dS_out, input_state_grad)
    del P, local
    dS = dS.view(-1, c.K, c.V)

    X = U.baddbmm_(W, S, alpha=-1)
    del W
    E = X * c.beta
    dE.baddbmm_(c.decays.fro(c.k), dS)
    Z = Y.mT @ (dE * c.beta)  # the gradient of V
    dbeta = (X * torch.baddbmm(dE, kappa.mT, Z, alpha=-1)).sum(-1, keepdim=True)
    dAqk = do @ E.mT
    dkappa = (Z @ E.mT).neg_()
    del X, U, dE, Y

    # Through the state: dq and dk as a reader of the state before the chunk (`late`), dk as a
    # writer of the state after it (`early`).
    dq = c.decays.to(do @ S.mT)
    late = c.decays.to(Z @ S.mT).neg_()
    early = c.decays.fro(E @ dS.mT)
    if g is not None:
        kept = (dS.mul_(S) * c.decays.through.mT).sum(2)
        leaving = (c.k * early).sum(1) + kept
    del dS, E, do
    own = dAqk.diagonal(dim1=1, dim2=2)[..., None].clone()
    dg = None
    if c.scalar:
        dAqk = dAqk.tril_(-1)
        dkappa = dkappa.tril_(-1)
        if g is not None:
            pairs = dAqk * Aqk + dkappa * kappa
            through = (c.q * dq + c.k * (late - early)).sum(-1) + pairs.sum(2) - pairs.sum(1)
            dg = suffix_sums(through[..., None]) + leaving.sum(-1)[:, None, None]
            dAqk = dAqk.mul_(c.D)
            dkappa = dkappa.mul_(c.D)
        dq.baddbmm_(dAqk, c.k)
        late.baddbmm_(dkappa, c.k)
        early.baddbmm_(dAqk.mT, c.q).baddbmm_(dkappa.mT, c.k)
    else:
        del Aqk, kappa
        c.decays.read(dAqk, c.k, dq)
        c.decays.read(dkappa, c.k, late)
        for b, pre, suf in c.decays.levels():
            q2 = halves(c.q, b)[1] * pre.exp()
            k2 = halves(c.k, b)[1] * pre.exp()
            both = below(dAqk, b).mT @ q2 + below(dkappa, b).mT @ k2
            halves(early, b)[0].add_(both * suf.exp())
        dg = suffix_sums(c.q * dq + c.k * (late - early)) + leaving[:, None]
    dq = dq.addcmul_(own, c.k)
    dk = late.add_(early).addcmul_(own, c.q)
    dq = c.give(dq.mul_(scale), q)
    dk = c.give(dk, k)
    return dq, dk, c.give(Z, v), c.give(dbeta, beta), c.give(dg, g), dS_in


def step(q, k, v, beta, g, state, scale):
    dtype = state.dtype
    group = v.shape[1] // q.shape[1]
    q, k = (x.to(dtype).repeat_interleave(group, dim=1) for x in (q, k))
    if g is not None:
        g = g.to(dtype).exp()
        state *= g[..., None, None] if g.ndim == 2 else g[..., None]
    error = beta.to(dtype)[..., None] * (v.to(dtype) - (k[..., None, :] @ state).squeeze(-2))
    state += k[..., :, None] * error[..., None, :]
    return scale * (q[..., None, :] @ state).squeeze(-2)
