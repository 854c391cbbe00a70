"""Packed documents with a state of their own each: what training does not need, but prefill and whoever carries states on.

The stream is laid out anew, so that every document fills whole chunks, with an empty chunk before it and one after. Its initial state
enters with the chunk before, and the state after its last token is that before the chunk after; backwards it is the other way round. So the
kernels know nothing of it but that the state pass adds something after some chunks.
"""

import torch

from lmoe.kernels.grid import document_of


def wanted(S_in, cu_seqlens, final):
    """Whether documents have states of their own: not where only the stream's border has one, nor where there is one document."""
    return cu_seqlens is not None and len(cu_seqlens) > 2 and (final or (S_in is not None and len(S_in) > 1))


def laid_out_chunks(T, N, C):
    return T // C + 3 * N


class Documents:
    """before, after [chunks] int32: the document whose empty chunk this is, or -1. starts: as of document_starts, in the new layout."""

    def __init__(self, cu_seqlens, T, C):
        cu = cu_seqlens.long()
        self.cu, self.N, self.T, self.C = cu, len(cu) - 1, T, C
        self.chunks = laid_out_chunks(T, self.N, C)
        counts = (cu.diff() + C - 1) // C + 2
        self.first = counts.cumsum(0) - counts
        self.last = self.first + counts - 1
        t = torch.arange(T, device=cu.device)
        docs = document_of(cu, t)
        self.place = (self.first[docs] + 1) * C + t - cu[docs]
        chunk = torch.arange(self.chunks, device=cu.device)
        owner = torch.searchsorted(self.last, chunk).clamp(max=self.N - 1)
        start = torch.where(chunk > self.last[owner], chunk * 0 + self.last[-1] + 1, self.first[owner]) * C
        self.starts = start.to(torch.int32).repeat_interleave(C)
        self.before = torch.where(chunk == self.first[owner], owner, -1).to(torch.int32)
        self.after = torch.where(chunk == self.last[owner], owner, -1).to(torch.int32)

    def spread(self, *tensors):
        """Tensors [1, T, ..] in the new layout, zeros elsewhere; None for None."""
        out = []
        for x in tensors:
            if x is not None:
                x = x.new_zeros(1, self.chunks * self.C, *x.shape[2:]).index_copy_(1, self.place, x)
            out.append(x)
        return out

    def collect(self, *tensors):
        """The tokens of tensors [1, T', ..] in the new layout: [1, T, ..]; None for None."""
        return [None if x is None else x.index_select(1, self.place) for x in tensors]

    def every(self, S, token):
        """States [N, ..] of all documents, of states [N, ..] or of one [1, ..] of the document that holds this token (others: zero)."""
        if S is None or len(S) == self.N:
            return S
        out = S.new_zeros(self.N, *S.shape[1:])
        out[document_of(self.cu, self.cu.new_full((1,), token))] = S
        return out


def of_documents(G, cu_seqlens):
    """The gradient of the stream's incoming state as that of the first token's document, zero for the others: [N, HV, K, V]."""
    if len(cu_seqlens) == 2:
        return G
    out = G.new_zeros(len(cu_seqlens) - 1, *G.shape[1:])
    out[document_of(cu_seqlens, cu_seqlens.new_zeros(1))] = G
    return out
