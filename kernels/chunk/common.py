"""The chunk forms in PyTorch: any device, fp32 inside (float64 for float64), forward and
hand-written backward.

Inside a chunk of C tokens everything is matrix products; between chunks the state is carried by
Grid.chain. With G_t the log decays summed from the chunk's start to token t, the weight of token i
in the output at t is q_t . k_i e^(G_t - G_i). Factored over t and i it overflows, and formed for
every pair it is a [C, C, K] tensor. Both are avoided by halving: token pairs are grouped by the
smallest aligned block of 2b tokens that holds both, so that i lies in its first half and t in its
second. Then G_t - G_i = (from i to the middle) + (from the middle to t): two sums of decays, both
<= 0, whose exponentials are the factors of one [b, K] x [K, b] product. A sum is built from the
sums of its halves, never as a difference, so that strong decays (down to -inf) cost no precision in
the weak ones beside them. (Arrived at from the two-level blocks of GLA, arXiv 2312.06635, section
4.3, by carrying them on.)

`pre` [.., C, K]: decay from the start of the token's block to the token (inclusive; without the
token itself where outputs read the state before it), `suf`: from after the token to the end of its
block, `total` [.., C / b, K]: of the whole block. At b = C they lead from and to the chunk's
borders.

n = M H: chunks times heads in one batch dim. q is multiplied by `scale` first.
"""

from functools import cached_property

import torch

from lmoe.kernels.grid import Grid, chunk_bound, document
from lmoe.kernels.norm import compute_dtype


def halves(x, b):
    """Views of x [n, C, D]: first and second halves of the blocks of 2b rows, each [n, C / 2b, b,
    D]."""
    n, C, D = x.shape
    x = x.view(n, C // (2 * b), 2, b, D)
    return x[:, :, 0], x[:, :, 1]


def diagonal_blocks(A, b):
    """View of A [n, C, C]: its diagonal blocks of 2b, [n, C / 2b, 2b, 2b]."""
    n, C, _ = A.shape
    blocks = A.view(n, C // (2 * b), 2 * b, C // (2 * b), 2 * b).diagonal(dim1=1, dim2=3)
    return blocks.permute(0, 3, 1, 2)


def below(A, b):
    """View of A [n, C, C]: the quarters (second half, first half) of its diagonal blocks of 2b, [n,
    C / 2b, b, b]."""
    return diagonal_blocks(A, b)[..., b:, :b]


class Decays:
    """Log decays g [n, C, D] of the tokens of n chunks, or None."""

    def __init__(self, g, exclusive=False):
        self.g = g
        self.exclusive = exclusive

    def levels(self):
        """Yields (b, pre of second halves, suf of first halves) for b = 1, 2, .., C / 2."""
        C = self.g.shape[1]
        pre = torch.zeros_like(self.g) if self.exclusive else self.g.clone()
        suf = torch.zeros_like(self.g)
        total = self.g
        b = 1
        while b < C:
            P = halves(pre, b)[1]
            S = halves(suf, b)[0]
            yield b, P, S
            first, second = halves(total, 1)
            P += first
            S += second
            total = (first + second).squeeze(2)
            b *= 2
        if "whole" not in self.__dict__:
            self.whole = pre.exp(), suf.exp(), total.exp()

    @cached_property
    def whole(self):
        """Decays from the chunk's start to each token [n, C, D], from each token to its end [n, C,
        D], and over all of it [n, 1, D]."""
        for _ in self.levels():
            pass
        return self.__dict__["whole"]

    def to(self, x):
        """x [.., C, D] decayed from the chunk's start to its tokens."""
        return x if self.g is None else x * self.whole[0].view(*x.shape[:-1], -1)

    def fro(self, x):
        """x [.., C, D] decayed from its tokens to the chunk's end."""
        return x if self.g is None else x * self.whole[1].view(*x.shape[:-1], -1)

    @property
    def through(self):
        return self.whole[2]

    def weigh(self, x, y):
        """[n, C, C]: x_t . y_i, decayed from token i to t, for i < t."""
        if self.g is None:
            return (x @ y.mT).tril_(-1)
        A = x.new_zeros(*x.shape[:2], x.shape[1])
        for b, pre, suf in self.levels():
            below(A, b).copy_((halves(x, b)[1] * pre.exp()) @ (halves(y, b)[0] * suf.exp()).mT)
        return A

    def read(self, A, y, out):
        """Add the sum of A_ti y_i over i < t, decayed from i to t, to out_t; y, out [n, C, D]."""
        if self.g is None:
            return out.baddbmm_(A, y)
        for b, pre, suf in self.levels():
            halves(out, b)[1].add_((below(A, b) @ (halves(y, b)[0] * suf.exp())) * pre.exp())
        return out

    def write(self, A, x, out):
        """Add the sum of A_ti x_t over t > i, decayed from i to t, to out_i; x, out [n, C, D]."""
        if self.g is None:
            return out.baddbmm_(A.mT, x)
        for b, pre, suf in self.levels():
            halves(out, b)[0].add_((below(A, b).mT @ (halves(x, b)[1] * pre.exp())) * suf.exp())
        return out

    def pairs(self):
        """Decay from each token to every later one [n, C, C], 1 to itself, 0 to earlier ones; D =
        1."""
        n, C, _ = self.g.shape
        logs = self.g.new_full((n, C, C), -torch.inf)
        logs.diagonal(dim1=1, dim2=2).zero_()
        for b, pre, suf in self.levels():
            torch.add(pre, suf.mT, out=below(logs, b))
        return logs.exp_()


class Chunks:
    """Inputs gathered into chunks, in the dtype of computation: q [n, C, K], scaled (None without
    q), k and v [n, C, V], all of `heads` heads."""

    def __init__(self, q, k, v, heads, cu_seqlens, scale, C):
        self.dtype = compute_dtype(k)
        self.C = C
        self.K = k.shape[-1]
        self.V = v.shape[-1]
        self.H = heads
        self.grid = Grid(*k.shape[:2], cu_seqlens, C, k.device)
        self.q = None if q is None else self.take(q).mul_(scale)
        self.k = self.take(k)
        self.v = self.take(v)

    def take(self, x):
        """x [B, T, H, D] as [n, C, D]; None as it is."""
        if x is None:
            return None
        return self.grid.gather(x, self.H, self.dtype).view(-1, self.C, x.shape[-1])

    def chunks(self, x):
        """[n, ..] -> [M, H, ..]."""
        return x.view(self.grid.M, self.H, *x.shape[1:])

    def give(self, x, like):
        """The tokens of x [n, C, D] in the shape and dtype of `like`, summed over the value heads
        that share one of its heads, or None without it."""
        if like is None:
            return None
        x = self.chunks(x)
        if x.shape[1] != like.shape[2]:
            x = x.unflatten(1, (like.shape[2], -1)).sum(2)
        return self.grid.scatter(x, like.dtype).view_as(like)

    def padded(self, shape):
        """(buffer of the shape promised to the fake implementation, its rows in use)"""
        buffer = self.k.new_empty(shape)
        buffer[self.grid.M :].zero_()
        return buffer, buffer[: self.grid.M]


def suffix_sums(x):
    """Sums over the rows from each one to the end: [n, C, D]."""
    C = x.shape[1]
    ones = torch.ones(C, C, dtype=x.dtype, device=x.device).triu()
    return ones @ x


def diagonal_step(local, decay, state, out):
    torch.addcmul(local, decay, state, out=out)


def dense_step(local, decay, state, out):
    n, H, K, V = state.shape
    torch.baddbmm(
        local.reshape(n * H, K, V),
        decay.reshape(n * H, K, K),
        state.reshape(n * H, K, V),
        out=out.view(n * H, K, V),
    )


def kept_shapes(k, v, *others):
    """Return the shapes that forward keeps: of a matrix inside every chunk [M, HV, C, C], and of
    the states before chunks [M, HV, K, V]; their dtype."""
    *_, cu_seqlens, C = others
    B, T, HV, V = v.shape
    M = chunk_bound(B, T, cu_seqlens, C)
    return (M, HV, C, C), (M, HV, k.shape[-1], V), compute_dtype(k)


def segment(kind, U, A, cu_seqlens, T):
    """The state and the transition of every row [B, ..], from the states U [N, ..] that documents
    end with, and A as if no document began inside rows."""
    if cu_seqlens is None:
        return U, A
    first, last = (document(cu_seqlens, t) for t in (0, T - 1))
    return U[last], kind.reset(A, first != last)
