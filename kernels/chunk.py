"""The chunk forms in PyTorch: any device, fp32 inside (float64 for float64), forward and hand-written backward.

Inside a chunk of C tokens everything is matrix products; between chunks the state is carried by Grid.chain. With G_t the log decays
summed from the chunk's start to token t, the weight of token i in the output at t is q_t . k_i e^(G_t - G_i). Factored over t and i it
overflows, and formed for every pair it is a [C, C, K] tensor. Both are avoided by halving: token pairs are grouped by the smallest
aligned block of 2b tokens that holds both, so that i lies in its first half and t in its second. Then G_t - G_i = (from i to the middle)
+ (from the middle to t): two sums of decays, both <= 0, whose exponentials are the factors of one [b, K] x [K, b] product. A sum is built
from the sums of its halves, never as a difference, so that strong decays (down to -inf) cost no precision in the weak ones beside them.
(Arrived at from the two-level blocks of GLA, arXiv 2312.06635, section 4.3, by carrying them on.)

`pre` [.., C, K]: decay from the start of the token's block to the token (inclusive; without the token itself where outputs read the state
before it), `suf`: from after the token to the end of its block, `total` [.., C / b, K]: of the whole block. At b = C they lead from and
to the chunk's borders.

Below, n = M H: chunks times heads in one batch dim. q comes multiplied by `scale`.
"""

from functools import cached_property

import torch

from lmoe.kernels.grid import Grid, chunk_bound, document_of
from lmoe.kernels.norm import compute_dtype

# ----------------------------------------------------------------------------------------------------------------------------------------
# Halving


def halves(x, b):
    """Views of x [n, C, D]: first and second halves of the blocks of 2b rows, each [n, C / 2b, b, D]."""
    n, C, D = x.shape
    x = x.view(n, C // (2 * b), 2, b, D)
    return x[:, :, 0], x[:, :, 1]


def below(A, b):
    """View of A [n, C, C]: the blocks (second half, first half) of its diagonal blocks of 2b, [n, C / 2b, b, b]."""
    n, C, _ = A.shape
    blocks = A.view(n, C // (2 * b), 2 * b, C // (2 * b), 2 * b).diagonal(dim1=1, dim2=3)
    return blocks[:, b:, :b].permute(0, 3, 1, 2)


class Decays:
    """Log decays g [n, C, D] of the tokens of n chunks."""

    def __init__(self, g, exclusive=False):
        self.g, self.exclusive = g, exclusive

    def levels(self, exp=True):
        """Yields (b, e^pre of second halves, e^suf of first halves) for b = 1, 2, .., C / 2; without exp, pre and suf themselves."""
        n, C, D = self.g.shape
        pre = torch.zeros_like(self.g) if self.exclusive else self.g.clone()
        suf, total, b = torch.zeros_like(self.g), self.g, 1
        while b < C:
            P, S = halves(pre, b)[1], halves(suf, b)[0]
            yield (b, P.exp(), S.exp()) if exp else (b, P, S)
            first, second = halves(total, 1)
            P += first
            S += second
            total = (first + second).squeeze(2)
            b *= 2
        if "whole" not in self.__dict__:
            self.whole = pre.exp(), suf.exp(), total.exp()

    @cached_property
    def whole(self):
        """Decays from the chunk's start `to` each token [n, C, D], `fro` each token to its end [n, C, D], and `through` it [n, 1, D]."""
        for _ in self.levels(exp=False):
            pass
        return self.__dict__["whole"]

    @property
    def to(self):
        return self.whole[0]

    @property
    def fro(self):
        return self.whole[1]

    @property
    def through(self):
        return self.whole[2]


def times(x, factor):
    return x if factor is None else x * factor


def suffix_sums(x):
    """Sums over the rows from each one to the end: [n, C, D]."""
    C = x.shape[1]
    ones = torch.ones(C, C, dtype=x.dtype, device=x.device).triu()
    return ones @ x


def diagonal_step(local, decay, state, out):
    torch.addcmul(local, decay, state, out=out)


def dense_step(local, decay, state, out):
    n, H, K, V = state.shape
    torch.baddbmm(local.reshape(n * H, K, V), decay.reshape(n * H, K, K), state.reshape(n * H, K, V), out=out.view(n * H, K, V))


def padded(M, shape, like):
    """(buffer of the shape promised to the fake implementation, its rows in use)"""
    buffer = like.new_empty(shape)
    buffer[M:].zero_()
    return buffer, buffer[:M]


def per_stream(grid, cu_seqlens, x):
    """x [N, ..] of the document that holds a row's last token, [B, ..]."""
    return x if cu_seqlens is None else x[document_of(cu_seqlens, cu_seqlens.new_full((1,), grid.T - 1))]


def one_document(grid, cu_seqlens):
    """Whether the stream's last token belongs to its first token's document: bool [1], or None for rows that are one document each."""
    if cu_seqlens is None:
        return None
    docs = document_of(cu_seqlens, torch.arange(2, dtype=cu_seqlens.dtype, device=cu_seqlens.device) * (grid.T - 1))
    return docs[:1] == docs[1:]


# ----------------------------------------------------------------------------------------------------------------------------------------
# gla: S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t^T v_t, o_t = q_t S_t, or q_t (S_{t-1} + diag(u) k_t^T v_t) with the bonus u


def gla_shapes(q, v, cu_seqlens, C):
    """Shapes of what gla_fwd keeps: the weights A inside chunks [M, H, C, C], the states before chunks [M, H, K, V]."""
    B, T, H, K = q.shape
    M = chunk_bound(B, T, None if cu_seqlens is None else cu_seqlens.shape[0] - 1, C)
    return (M, H, C, C), (M, H, K, v.shape[-1])


class _Gla:
    """What forward and backward share: gathered inputs and their decays."""

    def __init__(self, q, k, v, gk, gv, u, cu_seqlens, scale, C):
        self.dtype = compute_dtype(k)
        B, T, self.H, self.K = k.shape
        self.V, self.C, self.scale = v.shape[-1], C, scale
        self.grid = Grid(B, T, cu_seqlens, C, k.device)
        self.q = None if q is None else self.take(q).mul_(scale)
        self.k, self.v = self.take(k), self.take(v)
        self.u = None if u is None else u.to(self.dtype)
        self.gk = None if gk is None else Decays(self.take(gk), u is not None)
        self.gv = None if gv is None else Decays(self.take(gv), u is not None)

    def take(self, x):
        return self.grid.gather(x, self.H, self.dtype).view(-1, self.C, x.shape[-1])

    def chunks(self, x):
        return x.view(self.grid.M, self.H, *x.shape[1:])

    def decayed_k(self):
        return times(self.k, self.gk and self.gk.fro)

    def decayed_v(self):
        return times(self.v, self.gv and self.gv.fro)

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


def gla_state(k, v, gk, gv, cu_seqlens, C):
    c = _Gla(None, k, v, gk, gv, None, cu_seqlens, 1.0, C)
    local = c.chunks(c.decayed_k().mT @ c.decayed_v())
    U = c.grid.chain(diagonal_step, c.decay(), local, None, torch.empty_like(local), True)
    B = k.shape[0]
    sums = [k.new_zeros(B, c.H, D, dtype=c.dtype) if g is None else g.to(c.dtype).sum(1) for g, D in ((gk, c.K), (gv, c.V))]
    A, whole = torch.cat(sums, -1), one_document(c.grid, cu_seqlens)
    if whole is not None:
        A = A.masked_fill(~whole[:, None, None], -torch.inf)
    return per_stream(c.grid, cu_seqlens, U), A


def gla_fwd(q, k, v, gk, gv, u, S_in, cu_seqlens, scale, C, output_final_state):
    c = _Gla(q, k, v, gk, gv, u, cu_seqlens, scale, C)
    grid, M = c.grid, c.grid.M
    A_buffer, A = padded(M, gla_shapes(q, v, cu_seqlens, C)[0], c.k)
    S_buffer, S = padded(M, gla_shapes(q, v, cu_seqlens, C)[1], c.k)
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

    local = c.chunks(c.decayed_k().mT @ c.decayed_v())
    S_out = grid.chain(diagonal_step, c.decay(), local, S_in, S, output_final_state)
    inter = times(c.q, c.gk and c.gk.to) @ S.view(-1, c.K, c.V)
    o += times(inter, c.gv and c.gv.to)
    return grid.scatter(c.chunks(o), v.dtype), S_out, A_buffer, S_buffer


def _gla_dstate(c, do):
    """(dS over the chunks' own outputs [M, H, K, V], do decayed from the chunk's start)"""
    do_in = times(do, c.gv and c.gv.to)
    return c.chunks(times(c.q, c.gk and c.gk.to).mT @ do_in), do_in


def gla_dstate(q, k, v, gk, gv, u, do, cu_seqlens, scale, C):
    c = _Gla(q, k, v, gk, gv, u, cu_seqlens, scale, C)
    local, _ = _gla_dstate(c, c.take(do))
    _, G = c.grid.chain_reverse(diagonal_step, c.decay(), local, None, True)
    return G if cu_seqlens is None else G[document_of(cu_seqlens, cu_seqlens.new_zeros(1))]


def gla_bwd(q, k, v, gk, gv, u, A, S, do, dS_out, cu_seqlens, scale, C, input_state_grad):
    c = _Gla(q, k, v, gk, gv, u, cu_seqlens, scale, C)
    grid, M, n = c.grid, c.grid.M, len(c.k)
    A, S = A[:M].view(n, C, C), S[:M]
    do = c.take(do)

    # Pairs inside the chunk, without a token's own output, whose decay is 1.
    own_grad = (do * c.v).sum(-1, keepdim=True)
    if c.gv:
        dA, dv, o = torch.empty_like(A), torch.zeros_like(c.v), torch.zeros_like(c.v)
        for b, to, fro in c.gv.levels():
            Ab, do_b, v_b = below(A, b), halves(do, b)[1] * to, halves(c.v, b)[0] * fro
            below(dA, b).copy_(do_b @ v_b.mT)
            halves(dv, b)[0].add_((Ab.mT @ do_b) * fro)
            halves(o, b)[1].add_((Ab @ v_b) * to)
    else:
        dA = do @ c.v.mT
    if c.gk:
        dq, dk = torch.zeros_like(c.q), torch.zeros_like(c.k)
        for b, to, fro in c.gk.levels():
            dAb = below(dA, b)
            halves(dq, b)[1].add_((dAb @ (halves(c.k, b)[0] * fro)) * to)
            halves(dk, b)[0].add_((dAb.mT @ (halves(c.q, b)[1] * to)) * fro)
    else:
        dA = dA.tril_(-1)
        dq, dk = dA @ c.k, dA.mT @ c.q

    local, do_in = _gla_dstate(c, do)
    dS, dS_in = grid.chain_reverse(diagonal_step, c.decay(), local, dS_out, input_state_grad)
    del local
    flat_S, flat_dS = S.reshape(n, c.K, c.V), dS.view(n, c.K, c.V)
    dk_out = times(c.decayed_v() @ flat_dS.mT, c.gk and c.gk.fro)
    dv_out = times(c.decayed_k() @ flat_dS, c.gv and c.gv.fro)
    dq += times(do_in @ flat_S.mT, c.gk and c.gk.to)
    dk += dk_out

    del do_in, dA
    # The gradient of a summed log decay G_t is q_t dq_t - k_t dk_t, each product over the decayed terms only; g_j acts on all G_t with t
    # >= j and on what leaves the chunk: the old state and the chunk's own tokens.
    if c.gk or c.gv:
        kept = dS.mul_(S).mul_(c.decay()).view(n, c.K, c.V)
        leaving_k, leaving_v = (c.k * dk_out).sum(1) + kept.sum(2), (c.v * dv_out).sum(1) + kept.sum(1)
        del kept
    del dk_out, dS, flat_dS
    dgk = dgv = None
    if c.gk:
        read = c.q * dq
        dgk = suffix_sums(read - c.k * dk) + leaving_k[:, None]
        dgk = dgk if u is None else dgk.sub_(read)
        del read
    if c.gv:
        o += times(times(c.q, c.gk and c.gk.to) @ flat_S, c.gv.to)
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
        shape, bonus = dq.shape, c.u[:, None]
        dq += own_grad * (c.chunks(c.k) * bonus).view(shape)
        dk += own_grad * (c.chunks(c.q) * bonus).view(shape)
        du = c.chunks(own_grad * c.q * c.k).sum((0, 2)).to(u.dtype)

    def give(x, like):
        return None if like is None else grid.scatter(c.chunks(x), like.dtype)

    return give(dq.mul_(scale), q), give(dk, k), give(dv, v), give(dgk, gk), give(dgv, gv), du, dS_in


def gla_step(q, k, v, gk, gv, u, state, scale):
    dtype = state.dtype
    q, k, v = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    kv = k[..., :, None] * v[..., None, :]
    o = None if u is None else (q[..., None, :] @ (state + u.to(dtype)[..., None] * kv)).squeeze(-2)
    if gk is not None:
        state *= gk.to(dtype).exp()[..., :, None]
    if gv is not None:
        state *= gv.to(dtype).exp()[..., None, :]
    state += kv
    return (q[..., None, :] @ state).squeeze(-2) if o is None else o


# ----------------------------------------------------------------------------------------------------------------------------------------
# delta: S' = diag(e^g_t) S_{t-1}, e_t = beta_t (v_t - k_t S'), S_t = S' + k_t^T e_t, o_t = q_t S_t
#
# In a chunk, with kappa_ti = k_t . k_i e^(G_t - G_i) for i < t, Aqk likewise for q_t and i <= t, and Y = (I + kappa diag(beta))^-1:
#     U = Y V, W = Y (K e^G), X = U - W S, E = diag(beta) X, o = (Q e^G) S + Aqk E, next state = diag(e^G_end) S + Kd^T E with Kd = K
# e^(G_end - G). The chunk is the dense transition P = diag(e^G_end) - Kd^T diag(beta) W, so the chain needs one product a chunk.


def delta_shapes(v, K, cu_seqlens, C):
    """Shapes of what delta_fwd keeps: the inverses Y inside chunks [M, HV, C, C], the states before chunks [M, HV, K, V]."""
    B, T, H, V = v.shape
    M = chunk_bound(B, T, None if cu_seqlens is None else cu_seqlens.shape[0] - 1, C)
    return (M, H, C, C), (M, H, K, V)


def unit_lower_inverse(L):
    """(I + L)^-1 for strictly lower triangular L [n, C, C], by halving: the block below the diagonal is -Y2 L21 Y1."""
    n, C, _ = L.shape
    Y = torch.zeros_like(L)
    Y.diagonal(dim1=1, dim2=2).fill_(1)
    b = 1
    while b < C:
        blocks = Y.view(n, C // (2 * b), 2 * b, C // (2 * b), 2 * b).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        below(Y, b).copy_((blocks[..., b:, b:] @ below(L, b) @ blocks[..., :b, :b]).neg_())
        b *= 2
    return Y


class _Delta:
    """What forward and backward share: gathered inputs over all value heads, and their decays."""

    def __init__(self, q, k, v, beta, g, cu_seqlens, scale, C):
        self.dtype = compute_dtype(k)
        B, T, self.Hk, self.K = k.shape
        self.H, self.V, self.C, self.scale = v.shape[2], v.shape[-1], C, scale
        self.grid = Grid(B, T, cu_seqlens, C, k.device)
        self.n = self.grid.M * self.H
        self.q = None if q is None else self.take(q).mul_(scale)
        self.k, self.v, self.beta = self.take(k), self.take(v), self.take(beta[..., None])
        self.scalar = g is None or g.ndim == 3
        self.decays = None if g is None else Decays(self.take(g[..., None] if g.ndim == 3 else g))
        self.D = None
        if g is not None and self.scalar:
            logs = self.k.new_full((self.n, C, C), -torch.inf)
            logs.diagonal(dim1=1, dim2=2).zero_()
            for b, pre, suf in self.decays.levels(exp=False):
                torch.add(pre, suf.mT, out=below(logs, b))
            self.D = logs.exp_()

    def take(self, x):
        return self.grid.gather(x, self.H, self.dtype).view(-1, self.C, x.shape[-1])

    def chunks(self, x):
        return x.view(self.grid.M, self.H, *x.shape[1:])

    def weights(self, queries=True, keys=True):
        """Aqk [n, C, C] with its diagonal, kappa strictly lower."""
        k, Aqk, kappa = self.k, None, None
        if self.scalar:
            if queries:
                Aqk = self.q @ k.mT
                Aqk = Aqk.tril_() if self.D is None else Aqk.mul_(self.D)
            if keys:
                kappa = k @ k.mT
                kappa = (kappa if self.D is None else kappa.mul_(self.D)).tril_(-1)
            return Aqk, kappa
        Aqk, kappa = k.new_zeros(self.n, self.C, self.C), k.new_zeros(self.n, self.C, self.C)
        for b, to, fro in self.decays.levels():
            early = (halves(k, b)[0] * fro).mT
            if queries:
                below(Aqk, b).copy_((halves(self.q, b)[1] * to) @ early)
            if keys:
                below(kappa, b).copy_((halves(k, b)[1] * to) @ early)
        if queries:
            Aqk.diagonal(dim1=1, dim2=2).copy_((self.q * k).sum(-1))
        return Aqk, kappa

    def to(self, x):
        return times(x, self.decays and self.decays.to)

    def fro(self, x):
        return times(x, self.decays and self.decays.fro)

    def through(self, S):
        """The decay of a whole chunk on states or their gradients [n, K, ..]."""
        return times(S, self.decays and self.decays.through.mT)

    def chain_operands(self, Y):
        """(W, U, transition P [M, H, K, K], diag(beta) Kd)"""
        W, U = Y @ self.to(self.k), Y @ self.v
        Kd = self.fro(self.k) * self.beta
        P = (Kd.mT @ W).neg_()
        P.diagonal(dim1=1, dim2=2).add_(1 if self.decays is None else self.decays.through[:, 0])
        return W, U, self.chunks(P), Kd

    def inverse(self, kappa):
        return unit_lower_inverse(kappa * self.beta.mT)


def delta_state(k, v, beta, g, cu_seqlens, C):
    c = _Delta(None, k, v, beta, g, cu_seqlens, 1.0, C)
    grid, K, V, H = c.grid, c.K, c.V, c.H
    buffer, Y = padded(grid.M, delta_shapes(v, K, cu_seqlens, C)[0], c.k)
    Y.copy_(c.chunks(c.inverse(c.weights(queries=False)[1])))
    _, U, P, Kd = c.chain_operands(Y.view(c.n, C, C))
    # The transition rides along as K more columns that start from the identity and to which chunks add nothing.
    local = torch.cat([c.chunks(Kd.mT @ U), Kd.new_zeros(grid.M, H, K, K)], -1)
    # With cu_seqlens only the first token's document starts from it: where the last token's is another one, the columns end as zeros.
    start = torch.cat([local.new_zeros(K, V), torch.eye(K, dtype=local.dtype, device=local.device)], -1).expand(k.shape[0], H, K, V + K)
    ends = grid.chain(dense_step, P, local, start, torch.empty_like(local), True)
    U, A = per_stream(grid, cu_seqlens, ends).split([V, K], -1)
    return U.contiguous(), A.contiguous(), buffer


def delta_fwd(q, k, v, beta, g, S_in, cu_seqlens, cache, scale, C, output_final_state):
    c = _Delta(q, k, v, beta, g, cu_seqlens, scale, C)
    grid, M, n = c.grid, c.grid.M, c.n
    Y_shape, S_shape = delta_shapes(v, c.K, cu_seqlens, C)
    S_buffer, S = padded(M, S_shape, c.k)
    Aqk, kappa = c.weights(keys=cache is None)
    if cache is None:
        Y_buffer, Y = padded(M, Y_shape, c.k)
        Y.copy_(c.chunks(c.inverse(kappa)))
    else:
        Y_buffer, Y = c.k.new_empty(0), cache[:M]
    W, U, P, Kd = c.chain_operands(Y.view(n, C, C))
    S_out = grid.chain(dense_step, P, c.chunks(Kd.mT @ U), S_in, S, output_final_state)
    del P
    flat = S.view(n, c.K, c.V)
    E = torch.baddbmm(U, W, flat, alpha=-1).mul_(c.beta)
    o = torch.baddbmm(c.to(c.q) @ flat, Aqk, E)
    return grid.scatter(c.chunks(o), v.dtype), S_out, Y_buffer, S_buffer


def _delta_dstate(c, Aqk, W, do):
    """(what each chunk's outputs add to the gradient of the state before it [M, H, K, V], dE of the chunk's own outputs)"""
    dE = Aqk.mT @ do
    return c.chunks(torch.baddbmm(c.to(c.q).mT @ do, (W * c.beta).mT, dE, alpha=-1)), dE


def delta_dstate(q, k, v, beta, g, do, cu_seqlens, cache, scale, C):
    c = _Delta(q, k, v, beta, g, cu_seqlens, scale, C)
    grid = c.grid
    W, _, P, _ = c.chain_operands(cache[: grid.M].view(c.n, C, C))
    local, _ = _delta_dstate(c, c.weights(keys=False)[0], W, c.take(do))
    _, G = grid.chain_reverse(dense_step, P.mT, local, None, True)
    return G if cu_seqlens is None else G[document_of(cu_seqlens, cu_seqlens.new_zeros(1))]


def delta_bwd(q, k, v, beta, g, Y, S, do, dS_out, cu_seqlens, scale, C, input_state_grad):
    c = _Delta(q, k, v, beta, g, cu_seqlens, scale, C)
    grid, M, n, K = c.grid, c.grid.M, c.n, c.K
    Y, S, do = Y[:M].view(n, C, C), S[:M].reshape(n, K, c.V), c.take(do)
    Aqk, kappa = c.weights()
    W, U, P, _ = c.chain_operands(Y)
    local, dE = _delta_dstate(c, Aqk, W, do)
    dS, dS_in = grid.chain_reverse(dense_step, P.mT, local, dS_out, input_state_grad)
    del P, local
    dS = dS.view(n, K, c.V)

    X = U.baddbmm_(W, S, alpha=-1)
    del W
    E = X * c.beta
    dE.baddbmm_(c.fro(c.k), dS)
    Z = Y.mT @ (dE * c.beta)  # the gradient of V
    dbeta = (X * torch.baddbmm(dE, kappa.mT, Z, alpha=-1)).sum(-1, keepdim=True)
    dAqk, dkappa = do @ E.mT, (Z @ E.mT).neg_()
    del X, U, dE, Y

    # Through the state: dq and dk as a reader of the state before the chunk (`late`), dk as a writer of the state after it (`early`).
    dq, late = c.to(do @ S.mT), c.to(Z @ S.mT).neg_()
    early = c.fro(E @ dS.mT)
    if g is not None:
        kept = c.through(dS.mul_(S)).sum(2)
        leaving = (c.k * early).sum(1) + kept
    del dS, E, do
    own = dAqk.diagonal(dim1=1, dim2=2)[..., None].clone()
    dg = None
    if c.scalar:
        dAqk, dkappa = dAqk.tril_(-1), dkappa.tril_(-1)
        if g is not None:
            pairs = dAqk * Aqk + dkappa * kappa
            through = (c.q * dq + c.k * (late - early)).sum(-1) + pairs.sum(2) - pairs.sum(1)
            dg = suffix_sums(through[..., None]) + leaving.sum(-1)[:, None, None]
            dAqk, dkappa = dAqk.mul_(c.D), dkappa.mul_(c.D)
        dq.baddbmm_(dAqk, c.k)
        late.baddbmm_(dkappa, c.k)
        early.baddbmm_(dAqk.mT, c.q).baddbmm_(dkappa.mT, c.k)
    else:
        del Aqk, kappa
        for b, to, fro in c.decays.levels():
            q2, k2, k1 = halves(c.q, b)[1] * to, halves(c.k, b)[1] * to, halves(c.k, b)[0] * fro
            a, kap = below(dAqk, b), below(dkappa, b)
            halves(dq, b)[1].add_((a @ k1) * to)
            halves(late, b)[1].add_((kap @ k1) * to)
            halves(early, b)[0].add_((a.mT @ q2 + kap.mT @ k2) * fro)
        dg = suffix_sums(c.q * dq + c.k * (late - early)) + leaving[:, None]
    dq, dk = dq.addcmul_(own, c.k), late.add_(early).addcmul_(own, c.q)

    def give(x, like, heads=c.H):
        x = c.chunks(x)
        if heads != c.H:
            x = x.view(M, heads, c.H // heads, C, -1).sum(2)
        return grid.scatter(x, like.dtype)

    dbeta = give(dbeta, beta)[..., 0]
    dg = None if dg is None else give(dg, g)[..., 0] if c.scalar else give(dg, g)
    return give(dq.mul_(scale), q, c.Hk), give(dk, k, c.Hk), give(Z, v), dbeta, dg, dS_in


def delta_step(q, k, v, beta, g, state, scale):
    dtype, group = state.dtype, v.shape[1] // q.shape[1]
    q, k = (x.to(dtype).repeat_interleave(group, dim=1) for x in (q, k))
    if g is not None:
        g = g.to(dtype).exp()
        state *= g[..., None, None] if g.ndim == 2 else g[..., None]
    error = beta.to(dtype)[..., None] * (v.to(dtype) - (k[..., None, :] @ state).squeeze(-2))
    state += k[..., :, None] * error[..., None, :]
    return scale * (q[..., None, :] @ state).squeeze(-2)
