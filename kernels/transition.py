"""Transitions of a recurrent state over a segment of tokens: S_out = A . S_in + U.

A segment is the pair (A, U): its transition and the state it ends with when it starts from zero.
Pairs compose associatively, so the state that enters the segment r of a sequence follows from the
pairs of the segments before it (LASP-2, arXiv 2502.07563; for dense A as in DeltaNet, arXiv
2406.06484). The gradient of the state runs the other way through the transposes.

A transition is a class of static functions, for one head's states S [..., K, V]:
    shape(state_shape) -> shape of A without its leading dims
    apply(A, S) and its transpose transposed(A, dS)
    reset(A, where [n]): of a segment that keeps nothing of the state before it, for the entries of
    dim 0 that `where` names: a document begins inside it or at its start
"""

import torch
from torch import Tensor


def masked(A: Tensor, where: Tensor, value: float) -> Tensor:
    """Fill the entries of dim 0 that `where` (bool [n]) names."""
    return A.masked_fill(where.reshape(-1, *[1] * (A.ndim - 1)), value)


class Scalar:
    """S -> e^A S, log decays A [...] (zeros for plain linear attention)."""

    @staticmethod
    def shape(state_shape):
        return ()

    @staticmethod
    def apply(A, S):
        return A.exp()[..., None, None] * S

    transposed = apply

    @staticmethod
    def reset(A, where):
        return masked(A, where, -torch.inf)


class Diagonal(Scalar):
    """S -> diag(e^Ak) S diag(e^Av), log decays A [..., K+V], of the rows and then of the
    columns."""

    @staticmethod
    def shape(state_shape):
        return (sum(state_shape),)

    @staticmethod
    def apply(A, S):
        Ak, Av = A.split(S.shape[-2:], dim=-1)
        # Two products: the sum of the logs could round differently from the kernels, which decay
        # one side after the other.
        return Ak.exp()[..., :, None] * S * Av.exp()[..., None, :]

    transposed = apply


class Dense:
    """S -> A S, matrices A [..., K, K]."""

    @staticmethod
    def shape(state_shape):
        return state_shape[0], state_shape[0]

    @staticmethod
    def apply(A, S):
        return A @ S

    @staticmethod
    def transposed(A, S):
        return A.mT @ S

    @staticmethod
    def reset(A, where):
        return masked(A, where, 0)


class Complex:
    """S -> diag(e^(a + i b)) S (S4, arXiv 2111.00396): complex states held as real ones [..., K, V,
    2]; A [..., K, 2] holds a, the log of the modulus, and the angle b."""

    @staticmethod
    def shape(state_shape):
        return state_shape[0], 2

    @staticmethod
    def rotate(A, S, sign):
        factor = torch.polar(A[..., 0].exp(), sign * A[..., 1])[..., None]
        return torch.view_as_real(factor * torch.view_as_complex(S.contiguous()))

    @staticmethod
    def apply(A, S):
        return Complex.rotate(A, S, 1)

    @staticmethod
    def transposed(A, S):
        return Complex.rotate(A, S, -1)

    @staticmethod
    def reset(A, where):
        modulus, angle = A.unbind(-1)
        return torch.stack([masked(modulus, where, -torch.inf), angle], -1)


def prefix(kind, A, U, rank: int, S: Tensor | None = None) -> Tensor:
    """Return the state that enters segment `rank`, from the sequences A and U of all segments; S:
    the state before segment 0, zero if None."""
    S = torch.zeros_like(U[0]) if S is None else S
    for j in range(rank):
        S = kind.apply(A[j], S) + U[j]
    return S


def suffix(kind, A, G, rank: int, dS: Tensor | None = None) -> Tensor:
    """Return the gradient of the state that leaves segment `rank`.

    G[j]: gradient of the state entering segment j when nothing flows back into its end; dS:
    gradient of the state after the last segment, zero if None.
    """
    dS = torch.zeros_like(G[0]) if dS is None else dS
    for j in reversed(range(rank + 1, len(G))):
        dS = kind.transposed(A[j], dS) + G[j]
    return dS
