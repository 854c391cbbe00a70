"""The grid of chunks: which tokens sit in which chunk, and the chain of states from chunk to chunk.

A chunk holds up to C neighbouring tokens of one document, never of two; the last chunk of a
document may be partly empty. All work inside chunks is batched over them; only the chain of states
is sequential. It advances in steps of `widths` chunks:
- sizes known on the host (rows of equal length, or cu_seqlens on the CPU): chunk j of every
  document that has one is one step. Chunks are stored step by step, longest documents first, so
  that a step's chunks and their predecessors are both contiguous.
- cu_seqlens on a GPU: its values must not be waited for, so chunks lie in stream order, as many as
  there could be at most, one to a step. Where a document ends, the step carries nothing over
  (`same` is False) and the next chunk starts from its own document's initial state. Chunks beyond
  the last token count as its document's: empty, they hand its state on unchanged, forwards and
  backwards, so that the chain begins in the first token's document and ends in the last token's,
  wherever cu_seqlens has empty ones.
"""

import torch
import torch.nn.functional as F


def chunk_bound(B, T, cu_seqlens, C):
    """Chunks that B rows of T tokens, or the documents of one, can need."""
    return B * ((T + C - 1) // C) if cu_seqlens is None else T // C + len(cu_seqlens) - 1


def document_of(cu_seqlens, positions):
    """The document of each position of the stream. Empty documents own no position."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def document(cu_seqlens, position: int):
    """The document [1] that a token is in; all rows where there are no documents."""
    if cu_seqlens is None:
        return slice(None)
    return document_of(cu_seqlens, cu_seqlens.new_full((1,), position))


def sequences(v, cu_seqlens) -> int:
    """The number N of states: rows of v [B, ..], or documents."""
    return v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def boundary(states):
    """(the state [1, ..] at the stream's border or None, the states [N, ..] of all documents or
    None): one of them is `states`."""
    return (states, None) if states is not None and len(states) == 1 else (None, states)


class Grid:
    """
    C: tokens per chunk; M: chunks
    tokens [M, C]   row of the flattened [B*T] tokens at each slot; any row where `empty`
    empty [M, C]    slots without a token (None: there are none)
    chunk, place [B*T]   of each token: its chunk, its place in there
    first, last [N] chunks of each document, 0 for one without tokens
    vacant [N]      documents without tokens (None: there are none)
    widths          chunks per step of the chain
    same [M], docs [M]   stream order only (else None): whether the next chunk continues the
                         document; the chunk's document
    order           rows of the documents' states that the first step's chunks start from
    """

    def __init__(self, B, T, cu_seqlens, C, device, stream_order=False):
        self.C = C
        self.B = B
        self.T = T
        place = torch.arange(C, device=device)
        self.same = self.docs = self.vacant = None
        self.order = slice(None)
        if cu_seqlens is None:
            n = (T + C - 1) // C
            chunks = torch.arange(n, device=device)
            rows = torch.arange(B, device=device)
            inside = chunks[:, None, None] * C + place  # [n, 1, C]
            self.tokens = (rows[:, None] * T + inside.clamp(max=T - 1)).view(n * B, C)
            self.empty = None if T % C == 0 else (inside >= T).expand(n, B, C).reshape(n * B, C)
            t = torch.arange(T, device=device)
            self.chunk = (t // C * B + rows[:, None]).view(B * T)
            self.place = (t % C).repeat(B)
            self.first = rows
            self.last = (n - 1) * B + rows
            self.widths = [B] * n
        elif stream_order or device.type != "cpu":
            self._in_stream_order(cu_seqlens.to(device=device, dtype=torch.int64), place)
        else:
            self._step_by_step(cu_seqlens.to(torch.int64), place)
        self.M = self.tokens.shape[0]

    def _step_by_step(self, cu, place):
        if cu[0] != 0 or cu[-1] != self.T or (cu.diff() < 0).any():
            raise ValueError(
                f"cu_seqlens: should ascend from 0 to the {self.T} tokens, repeating the last entry"
                f" for padding; got {cu.tolist()}"
            )
        counts = (cu.diff() + self.C - 1) // self.C
        order = counts.argsort(descending=True, stable=True)
        rank = order.argsort()
        widths = (counts[:, None] > torch.arange(int(counts.max()))).sum(0)
        offsets = widths.cumsum(0) - widths
        step = torch.repeat_interleave(widths)
        docs = order[torch.arange(len(step)) - offsets[step]]
        of_token, number = self._fill(cu, place, docs, step)
        self.chunk = offsets[number] + rank[of_token]
        if not self.empty.any():
            self.empty = None
        last = offsets[(counts - 1).clamp(min=0)] + rank
        self._ends(counts, rank, last)
        self.widths, self.order = widths.tolist(), order[: int(widths[0])]

    def _fill(self, cu, place, docs, number):
        """Lay out the chunks, of which each is number [M] of its document, docs [M]: (each token's
        document, the number of its chunk in there)."""
        tokens = (cu[docs] + number * self.C)[:, None] + place
        self.empty = tokens >= cu[docs + 1][:, None]
        self.tokens = tokens.clamp(max=self.T - 1)
        t = torch.arange(self.T, device=cu.device)
        of_token = document_of(cu, t)
        inside = t - cu[of_token]
        self.place = inside % self.C
        return of_token, inside // self.C

    def _ends(self, counts, first, last):
        self.vacant = counts == 0
        self.first, self.last = (x.masked_fill(self.vacant, 0) for x in (first, last))

    def _in_stream_order(self, cu, place):
        counts = (cu.diff() + self.C - 1) // self.C
        ends = counts.cumsum(0)
        M = chunk_bound(1, self.T, cu, self.C)
        chunks = torch.arange(M, device=cu.device)
        docs = torch.searchsorted(ends, chunks, right=True)
        docs = torch.where(docs == len(counts), document(cu, self.T - 1), docs)
        first = ends - counts
        of_token, number = self._fill(cu, place, docs, chunks - first[docs])
        self.chunk = first[of_token] + number
        self._ends(counts, first, ends - 1)
        self.same = F.pad(docs[1:] == docs[:-1], (0, 1))
        self.docs = docs
        self.order = docs[:1]
        self.widths = [1] * M

    def gather(self, x, heads, dtype):
        """[B, T, H, D] -> [M, heads, C, D] in dtype, zero in empty slots. Head h reads the head h
        // (heads / H) of x."""
        B, T, H, D = x.shape
        head = torch.arange(heads, device=x.device) // (heads // H)
        index = self.tokens[:, None, :] * H + head[:, None]
        y = x.reshape(B * T * H, D).index_select(0, index.view(-1))
        y = y.view(self.M, heads, self.C, D).to(dtype)
        return y if self.empty is None else y.masked_fill_(self.empty[:, None, :, None], 0)

    def scatter(self, y, dtype):
        """[M, H, C, D] -> [B, T, H, D]: the inverse of gather, a gather too and so
        deterministic."""
        M, H, C, D = y.shape
        index = (self.chunk[:, None] * H + torch.arange(H, device=y.device)) * C
        index += self.place[:, None]
        x = y.reshape(M * H * C, D).index_select(0, index.view(-1))
        return x.view(self.B, self.T, H, D).to(dtype)

    def _carry_over(self, same, decay, local, restart):
        """In stream order: changes (decay, local) so that a step from a document to another one
        yields the other's own state."""
        other = ~same.view(-1, 1, 1, 1)
        decay.masked_fill_(other, 0)
        if restart is None:
            local.masked_fill_(other, 0)
        else:
            torch.where(other, restart, local, out=local)

    def chain(self, step, decay, local, initial, out, finals):
        """Writes the states before every chunk to out [M, H, K, V]: each is decay . state + local
        (`step`) of the one before it.

        A document starts from initial [N, H, K, V], or zero; initial [1, H, K, V] is of the first
        token's document, the others start from zero. Returns the states after the last chunks [N,
        H, K, V], if `finals`. Spoils decay and local.
        """
        ends = (local[self.last], decay[self.last]) if finals else None
        entering, initial = boundary(initial)
        out[: self.widths[0]] = 0 if initial is None else initial[self.order]
        if entering is not None:
            out[self.chunk[:1]] = entering
        if self.same is not None:
            restart = None if initial is None else initial[self.docs.roll(-1)]
            self._carry_over(self.same, decay, local, restart)
        here = 0
        for width, after in zip(self.widths, self.widths[1:]):
            there = here + width
            rows = slice(here, here + after)
            step(local[rows], decay[rows], out[rows], out=out[there : there + after])
            here = there
        return self._documents(step, ends, out[self.last], initial) if finals else None

    def chain_reverse(self, step, decay, local, final, initials):
        """The gradients of the states after every chunk: each is decay . gradient + local of the
        next chunk; local: what its outputs add.

        A document ends with final [N, H, K, V], or zero; final [1, H, K, V] is of the last token's
        document, the others end with zero. Returns them [M, H, K, V] and, if `initials`, those of
        the states before the first chunks [N, H, K, V]. Spoils decay and local.
        """
        ends = (local[self.first], decay[self.first]) if initials else None
        out = torch.zeros_like(local)
        leaving, final = boundary(final)
        if leaving is not None:
            out[self.chunk[-1:] if self.same is None else slice(-1, None)] = leaving
        if final is not None:
            if self.same is not None:
                out[-1:] = final[self.docs[-1:]]
            else:
                real = slice(None) if self.vacant is None else ~self.vacant
                out[self.last[real]] = final[real]
        if self.same is not None:
            # Row c + 1 of decay and local leads to chunk c, so `same` and the restart are those of
            # the row before.
            restart = None if final is None else final[self.docs.roll(1)]
            self._carry_over(self.same.roll(1), decay, local, restart)
        there = self.M
        for width, after in zip(self.widths[-2::-1], self.widths[:0:-1]):
            there -= after
            here = there - width
            rows = slice(there, there + after)
            step(local[rows], decay[rows], out[rows], out=out[here : here + after])
        return out, self._documents(step, ends, out[self.first], final) if initials else None

    def _documents(self, step, ends, state, otherwise):
        """One more step from `state` for every document: [N, H, K, V]; for those without tokens
        `otherwise`, or zero."""
        result = torch.empty_like(state)
        step(*ends, state, out=result)
        if self.vacant is None:
            return result
        otherwise = torch.zeros_like(result[:1]) if otherwise is None else otherwise
        return torch.where(self.vacant.view(-1, 1, 1, 1), otherwise, result)
