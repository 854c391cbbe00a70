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

from lmoe.kernels.grid import chunk_bound, document_of
from lmoe.kernels.norm import compute_dtype


def halves(x, b):
    """Views of x [n, C, D]: first and second halves of the blocks of 2b rows, each [n, C / 2b, b,
    D]."""
    n, C, D = x.shape
    x = x.view(n, C // (2 * b), 2, b, D)
    return x[:, :, 0], x[:, :, 1]


def below(A, b):
    """View of A [n, C, C]: the blocks (second half, first half) of its diagonal blocks of 2b, [n, C
    / 2b, b, b]."""
    n, C, _ = A.shape
    blocks = A.view(n, C // (2 * b), 2 * b, C // (2 * b), 2 * b).diagonal(dim1=1, dim2=3)
    return blocks[:, b:, :b].permute(0, 3, 1, 2)


class Decays:
    """Log decays g [n, C, D] of the tokens of n chunks."""

    def __init__(self, g, exclusive=False):
        self.g, self.exclusive = g, exclusive

    def levels(self, exp=True):
        """Yields (b, e^pre of second halves, e^suf of first halves) for b = 1, 2, .., C / 2;
        without exp, pre and suf themselves."""
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
        """Decays from the chunk's start `to` each token [n, C, D], `fro` each token to its end [n,
        C, D], and `through` it [n, 1, D]."""
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
    torch.baddbmm(
        local.reshape(n * H, K, V),
        decay.reshape(n * H, K, K),
        state.reshape(n * H, K, V),
        out=out.view(n * H, K, V),
    )


def kept_shapes(k, v, *others):
    """Of what forward keeps: the shape of a matrix inside every chunk [M, HV, C, C], and of the
    states before chunks [M, HV, K, V]; their dtype."""
    *_, cu_seqlens, C = others
    (B, T, HV, V), N = v.shape, None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    M = chunk_bound(B, T, N, C)
    return (M, HV, C, C), (M, HV, k.shape[-1], V), compute_dtype(k)


def padded(M, shape, like):
    """(buffer of the shape promised to the fake implementation, its rows in use)"""
    buffer = like.new_empty(shape)
    buffer[M:].zero_()
    return buffer, buffer[:M]


def per_stream(grid, cu_seqlens, x):
    """x [N, ..] of the document that holds a row's last token, [B, ..]."""
    return (
        x
        if cu_seqlens is None
        else x[document_of(cu_seqlens, cu_seqlens.new_full((1,), grid.T - 1))]
    )


def one_document(grid, cu_seqlens):
    """Whether the stream's last token belongs to its first token's document: bool [1], or None for
    rows that are one document each."""
    if cu_seqlens is None:
        return None
    docs = document_of(
        cu_seqlens, torch.arange(2, dtype=cu_seqlens.dtype, device=cu_seqlens.device) * (grid.T - 1)
    )
    return docs[:1] == docs[1:]
