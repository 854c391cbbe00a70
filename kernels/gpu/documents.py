"""A stream of packed documents, as the kernels see it.

In training no document has an incoming state, and whoever asks for states at all asks for those of
the stream's borders. Prefill, and whoever carries states on, has one per document: then the stream
is laid out anew, so that every document fills whole chunks, with an empty chunk before it and one
after. Its initial state enters with the chunk before, and the state after its last token is that
before the chunk after; backwards it is the other way round. So the kernels know nothing of it but
that the state pass adds something after some chunks.
"""

import torch

from lmoe.kernels.gpu.common import document_starts
from lmoe.kernels.grid import document, document_of


def wanted(S_in, cu_seqlens, final):
    """Tell whether documents have states of their own: not where only the stream's border has one,
    nor where there is one document."""
    # In this order: in training no compiled graph depends on the number of documents.
    states = final or (S_in is not None and len(S_in) > 1)
    return states and cu_seqlens is not None and len(cu_seqlens) > 2


def laid_out_chunks(T, N, C):
    return T // C + 3 * N


def laid_out(k, v, S_in, final, cu_seqlens, C):
    """(k, v, whether documents have states of their own): only shapes and dtypes matter, of the new
    layout if there is one."""
    own = wanted(S_in, cu_seqlens, final)
    if own:
        T = laid_out_chunks(k.shape[1], len(cu_seqlens) - 1, C) * C
        k = k.new_empty(1, T, *k.shape[2:])
        v = v.new_empty(1, T, *v.shape[2:])
    return k, v, own


class Stream:
    """starts: where each token's document starts [T] int32, or None. own: whether documents have
    states of their own."""

    def __init__(self, cu_seqlens, T, C, own):
        self.cu = cu_seqlens
        self.T = T
        self.C = C
        self.own = own
        if own:
            self._lay_out(cu_seqlens.long(), T, C)
        else:
            self.starts = None if cu_seqlens is None else document_starts(cu_seqlens, T)

    def _lay_out(self, cu, T, C):
        """before, after [chunks] int32: the document whose empty chunk this is, or -1; first, last:
        these chunks' numbers."""
        N = len(cu) - 1
        self.chunks = laid_out_chunks(T, N, C)
        counts = (cu.diff() + C - 1) // C + 2
        self.first = counts.cumsum(0) - counts
        self.last = self.first + counts - 1
        t = torch.arange(T, device=cu.device)
        docs = document_of(cu, t)
        self.place = (self.first[docs] + 1) * C + t - cu[docs]
        chunk = torch.arange(self.chunks, device=cu.device)
        owner = torch.searchsorted(self.last, chunk).clamp(max=N - 1)
        start = torch.where(chunk > self.last[owner], self.last[-1] + 1, self.first[owner])
        self.starts = (start * C).to(torch.int32).repeat_interleave(C)
        self.before = torch.where(chunk == self.first[owner], owner, -1).to(torch.int32)
        self.after = torch.where(chunk == self.last[owner], owner, -1).to(torch.int32)

    def spread(self, *tensors):
        """Contiguous tensors [B, T, ..] in the kernels' layout, zeros where it has more tokens;
        None for None."""
        out = []
        for x in tensors:
            if x is not None and self.own:
                x = x.new_zeros(1, self.chunks * self.C, *x.shape[2:]).index_copy_(1, self.place, x)
            out.append(None if x is None else x.contiguous())
        return out

    def collect(self, *tensors):
        """The tokens of tensors in the kernels' layout: [B, T, ..]; None for None."""
        return [x if x is None or not self.own else x.index_select(1, self.place) for x in tensors]

    def walk(self, plan, x, y, border, scale, reverse, far, **options):
        """Plan.walk with the documents' states: (states of chunks, final states), or reversed
        (gradients of these, of initial states).

        border: initial states (or gradients of final ones) [N, HV, K, V], or [1, HV, K, V] at the
        stream's border, or None. far: whether the second result is wanted; else it is None.
        """
        border = None if border is None else border.float().contiguous()
        if not self.own:
            states, end = plan.walk(x, y, border=border, scale=scale, reverse=reverse, **options)
            if reverse and far:
                end = self._of_document(end, 0)
            return states, end if far else None
        if border is not None:
            border = self._of_document(border, self.T - 1 if reverse else 0)
        options |= {"added": border, "added_at": self.after if reverse else self.before}
        states, _ = plan.walk(x, y, border=None, scale=scale, reverse=reverse, **options)
        return states, states[0][self.first if reverse else self.last].float() if far else None

    def _of_document(self, S, position):
        """States [N, HV, K, V] as they are; one [1, HV, K, V] as that of the document of a token,
        zero for the others."""
        if self.cu is None or len(S) == len(self.cu) - 1:
            return S
        every = S.new_zeros(len(self.cu) - 1, *S.shape[1:])
        every[document(self.cu, position)] = S
        return every
