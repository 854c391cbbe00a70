"""LASP-2 (arXiv 2502.07563): a scan over a stream that context parallel ranks share.

Every rank reduces its slice to a segment, a state and a transition (kernels/transition.py), all
ranks gather all segments, and each folds those before it into the state that enters its slice.
Backward likewise with the gradients of the states, from the other end. One collective a layer and
direction, of a size that does not depend on the length. A family of kernels brings its segments and
transitions, and this one implementation serves all of them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lmoe.kernels import transition
from lmoe.kernels.family import REGISTERED, Call, Scan
from lmoe.kernels.op import op
from lmoe.parallel import compat
from lmoe.parallel.collectives import Ranks, all_gather


class Layout(NamedTuple):
    """Where a row of gathered segments holds one: its first element, the shapes of its state and
    transition."""

    start: int
    state: list[int]
    decay: list[int]

    def unpack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Take the transitions [size, *decay] and states [size, *state] of all ranks."""
        middle = self.start + math.prod(self.state)
        U = rows[:, self.start : middle]
        A = rows[:, middle : middle + math.prod(self.decay)]
        return A.unflatten(1, self.decay), U.unflatten(1, self.state)


class Segment(NamedTuple):
    """A scan whose segment is on its way, and then (state) what enters it."""

    call: Call
    layout: Layout
    cache: Tensor
    gathered: Tensor
    state: Tensor | None = None


@op("all_gather_states")
def all_gather_states(x: Tensor, size: int, group: str) -> Tensor:
    """Start to gather the rows [size, ..] of all ranks: nobody may read them but through
    prefix_state. Recomputation keeps them."""
    return compat.start_all_gather(x, size, group)


@all_gather_states.register_fake
def _(x, size, group):
    return x.new_empty(size * x.shape[0], *x.shape[1:])


@op("prefix_state")
def prefix_state(
    gathered: Tensor,
    sent: Tensor,
    start: int,
    state: list[int],
    decay: list[int],
    family: str,
    rank: int,
) -> Tensor:
    """Fold the segments before `rank` into the state [1, H, ..] that enters it. `sent`, this rank's
    row, is here so that its memory lives until all have it."""
    A, U = Layout(start, state, decay).unpack(compat.wait(gathered))
    return transition.prefix(REGISTERED[family].transition, A, U, rank)


@prefix_state.register_fake
def _(gathered, sent, start, state, decay, family, rank):
    return gathered.new_empty(state)


def start(scans: list[Scan], seq, ranks: Ranks):
    """Send the segments of scans, in one gather. What comes back goes to `finish`."""
    packed = []
    parts = []
    first = 0
    for scan in scans:
        call = scan.family.call(scan, seq.cu_seqlens)
        tensors = [None if x is None else x.detach() for x in call.tensors]
        U, A, cache = call._replace(tensors=tensors).state()
        A = scan.family.transition.reset(A, seq.starts_with_document)
        packed += [U.flatten(), A.flatten()]
        parts.append((call, Layout(first, list(U.shape), list(A.shape)), cache))
        first += U.numel() + A.numel()
    sent = torch.cat(packed)[None]
    gathered = all_gather_states(sent, ranks.size, ranks.name)
    return [Segment(*part, gathered) for part in parts], sent, seq.starts_with_document


def finish(pending, ranks: Ranks) -> list[Segment]:
    """Receive what enters each scan."""
    segments, sent, starts = pending
    received = []
    for segment in segments:
        family = segment.call.family.name
        S = prefix_state(segment.gathered, sent, *segment.layout, family, ranks.index)
        received.append(segment._replace(state=transition.masked(S, starts, 0)))
    return received


def run(segment: Segment, scan: Scan, q: Tensor, seq, final: bool, ranks: Ranks):
    """Run a scan over this rank's slice: (o [T, HV, V], final states [N, HV, ..], empty without
    `final`)."""
    call = scan.family.with_q(segment.call, scan, q)
    rest = call.family.name, call.scale, call.chunk_size, call.backend, final
    starts = seq.starts_with_document
    received = segment.state, segment.cache, segment.gathered, call.cu_seqlens, starts
    o, S = _Run.apply(rest, ranks, segment.layout, *received, *call.tensors)
    return o.squeeze(0), S


def _call(rest, tensors, cu_seqlens):
    name, scale, C, backend, final = rest
    return Call(REGISTERED[name], list(tensors), scale, cu_seqlens, C, backend), final


class _Run(torch.autograd.Function):
    """Forward and backward of a scan with the state that enters the slice, and the gradient of the
    one that leaves it."""

    @staticmethod
    def forward(ctx, rest, ranks, layout, S_in, cache, gathered, cu_seqlens, starts, *tensors):
        call, final = _call(rest, tensors, cu_seqlens)
        o, S_out, kept, S = call.fwd(S_in, cache if cache.numel() else None, final)
        ctx.rest = rest
        ctx.ranks = ranks
        ctx.layout = layout
        kept = kept if kept.numel() else cache
        ctx.save_for_backward(kept, S, cache, gathered, cu_seqlens, starts, *tensors)
        ctx.mark_non_differentiable(S_out)
        return o, S_out

    @staticmethod
    def backward(ctx, do, _):
        kept, S, cache, gathered, cu_seqlens, starts, *tensors = ctx.saved_tensors
        call, _ = _call(ctx.rest, tensors, cu_seqlens)
        do = do.contiguous()
        G = call.dstate(do, cache if cache.numel() else None)
        G = all_gather(transition.masked(G, starts, 0)[None], ctx.ranks)
        A, _ = ctx.layout.unpack(gathered)
        dS = transition.suffix(call.family.transition, A, G, ctx.ranks.index)
        *grads, _ = call.bwd(kept, S, do, dS, False)
        grads = [None if x is None else g for x, g in zip(tensors, grads)]
        return *[None] * 8, *grads
