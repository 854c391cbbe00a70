"""Transitions of a recurrent state over a segment of tokens: S_out = A . S_in + U.

A segment is the pair (A, U): its transition and the state it ends with when it starts from zero.
Pairs compose associatively, so the state that enters the segment r of a sequence follows from the
pairs of the segments before it (LASP-2, arXiv 2502.07563; for dense A as in DeltaNet, arXiv
2406.06484). The gradient of the state runs the other way through the transposes.

States are [..., K, V]; A depends on the kind:
    Scalar    log decay [...] or broadcastable (zeros for plain linear attention)     S -> e^A S
    Diagonal  log decays [..., K+V], of the rows and then of the columns              S ->
              diag(e^Ak) S diag(e^Av)
    Dense     matrix [..., K, K]                                                      S -> A S
Later segments multiply on the left. `forget(A, where)` gives the transition of a segment that keeps
nothing of the state before it: one inside which, or at whose start, a document begins.
"""

import torch


class Scalar:
    @staticmethod
    def apply(A, S):
        return A.exp()[..., None, None] * S

    transposed = apply

    @staticmethod
    def compose(later, earlier):
        return later + earlier

    @staticmethod
    def forget(A, where):
        """A, with the decay to nothing for the entries of dim 0 that `where` (bool [n]) names."""
        return A.masked_fill(where.reshape(-1, *[1] * (A.ndim - 1)), -torch.inf)


class Diagonal(Scalar):
    @staticmethod
    def apply(A, S):
        Ak, Av = A.split(S.shape[-2:], dim=-1)
        # Two products: the sum of the logs could round differently from the kernels, which decay
        # one side after the other.
        return Ak.exp()[..., :, None] * S * Av.exp()[..., None, :]

    transposed = apply


class Dense:
    @staticmethod
    def apply(A, S):
        return A @ S

    @staticmethod
    def transposed(A, S):
        return A.mT @ S

    @staticmethod
    def compose(later, earlier):
        return later @ earlier

    @staticmethod
    def forget(A, where):
        return A.masked_fill(where.reshape(-1, *[1] * (A.ndim - 1)), 0)


def combine(kind, later, earlier):
    """The segment made of two neighbours, each (A, U)."""
    (A2, U2), (A1, U1) = later, earlier
    return kind.compose(A2, A1), kind.apply(A2, U1) + U2


def fold(kind, A, U, rank, S=None):
    """The state that enters segment `rank`, from the sequences A and U of all segments' pairs; S:
    the state before segment 0 (None: zero).
    """
    S = torch.zeros_like(U[0]) if S is None else S
    for j in range(rank):
        S = kind.apply(A[j], S) + U[j]
    return S


def fold_reverse(kind, A, G, rank, dS=None):
    """The gradient of the state that leaves segment `rank`.

    G[j]: gradient of the state entering segment j when nothing flows back into its end; dS:
    gradient of the state after the last segment (None: zero).
    """
    dS = torch.zeros_like(G[0]) if dS is None else dS
    for j in reversed(range(rank + 1, len(G))):
        dS = kind.transposed(A[j], dS) + G[j]
    return dS
