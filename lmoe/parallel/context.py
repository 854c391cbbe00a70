"""Context parallelism: a microbatch's stream cut into equal slices of neighbouring tokens, one for
each rank of cp.

lasp2 (arXiv 2502.07563). Every rank reduces its slice to a segment, a state and a transition
(kernels/transition.py), all ranks gather all segments, and each folds those before it into the
state that enters its slice. Backward likewise with the gradients of the states, from the other end.
One collective a layer and direction, of a size that does not depend on the length; the projections
of q and the gate hide the forward one. A family of kernels brings its segments and transitions, and
this one implementation serves all of them. Softmax layers gather keys and values instead (LASP-2H,
section 3.5), and rank r swaps the second half of its queries with rank cp-1-r: later tokens see
more keys, and so all ranks do the same work. With a sliding window the last rows of the rank before
suffice.

all_to_all (arXiv 2309.14509). The ranks exchange tokens for heads: each runs the whole stream for
its share of the heads, and back. For mixers whose state has no transition that composes, and to
check the other method by.

Only a rank's first document can have begun before its slice, and only its last can go on after it.
"""

import math

import torch
from torch import Tensor

from lmoe.kernels import ops, transition
from lmoe.kernels.op import op
from lmoe.model.batch import (
    AttentionMask,
    LocalContext,
    Segment,
    SeqBuilder,
    SeqInfo,
    dense_mask,
    positions_of,
)
from lmoe.model.mixers import MIXERS
from lmoe.model.model import attention_windows
from lmoe.parallel import compat
from lmoe.parallel.collectives import (
    Ranks,
    all_gather,
    all_reduce,
    all_to_all,
    gather_tokens,
    mirror_rows,
    next_rows,
    previous_rows,
)

METHODS = ("lasp2", "all_to_all")
KINDS = {kind.__name__: kind for kind in (transition.Scalar, transition.Diagonal, transition.Dense)}


def make_builder(config, dims, *, dense_mask, weights=None):
    """The SeqBuilder of this run's layout."""
    windows = attention_windows(config)
    common = {"dense_mask": dense_mask, "windows": windows, "weights": weights}
    if dims.cp * dims.tp == 1:
        return SeqBuilder(dims.device, **common)
    ranks = Ranks.of(dims.group("cp"))
    context = (
        LocalContext()
        if dims.cp == 1
        else {"lasp2": Lasp2, "all_to_all": AllToAll}[config.parallel.cp_method](ranks)
    )
    return SliceBuilder(
        dims.device, **common, ranks=ranks, context=context, tp=dims.tp, tp_index=dims.index("tp")
    )


# --------------------------------------------------------------------------------------------------
# The batch


class SliceBuilder(SeqBuilder):
    """Makes this rank's slice of a microbatch. With tensor parallelism feed-forward layers see a
    tp-th of that slice."""

    def __init__(self, device, *, ranks, context, tp, tp_index, **common):
        super().__init__(device, **common)
        self.ranks, self.context, self.tp, self.tp_index = ranks, context, tp, tp_index

    def __call__(self, tokens, labels, cu_seqlens, rows, row_len):
        size = len(tokens) // self.ranks.size
        assert size * self.ranks.size == len(tokens) and size % self.tp == 0
        mine = slice(self.ranks.index * size, (self.ranks.index + 1) * size)
        return (
            self.move(tokens[mine].clone()),
            self.move(labels[mine].clone()),
            self.seq_info(cu_seqlens, rows, row_len),
        )

    def seq_info(self, cu_seqlens, rows, row_len):
        stream = rows * row_len
        size = stream // self.ranks.size
        start, share = self.ranks.index * size, size // self.tp
        seen = start + self.tp_index * share + torch.arange(share)
        whole = super().seq_info(cu_seqlens, rows, row_len)
        whole.row_of = self.move(seen // row_len)
        if self.ranks.size == 1:
            return whole
        positions = whole.positions[start : start + size].clone()
        # Clamped: documents elsewhere are empty here, and keep their number.
        seq = SeqInfo(
            self.pad((cu_seqlens - start).clamp(0, size)),
            positions,
            whole.masks,
            rows,
            row_len,
            row_of=whole.row_of,
            starts=positions[:1] == 0,
            weights=self.weights,
            context=self.context,
        )
        if isinstance(self.context, AllToAll):
            seq.whole = whole
        return seq

    def masks(self, seq: SeqInfo, cu_seqlens: Tensor, window: int) -> list[AttentionMask]:
        """Build those of lasp2, of all keys in reach: those of the window before this slice and its
        own; or, for each half of the queries, all keys. seq: of the whole stream."""
        if not isinstance(self.context, Lasp2):
            return super().masks(seq, cu_seqlens, window)
        stream = len(seq.positions)
        size = stream // self.ranks.size
        start, half = self.ranks.index * size, size // 2
        spans = [(start, start + size)]
        keys = start - (window - 1), start + size
        if not 0 < window <= size + 1:  # the window reaches further than the slice before
            mirror = stream - start - size
            spans = [(start, start + half), (mirror + half, mirror + size)]
            keys = 0, stream
        return [self.span_mask(cu_seqlens, span, keys, seq.row_len, window) for span in spans]

    def span_mask(self, cu_seqlens, queries, keys, row_len, window) -> AttentionMask:
        """Build the mask of the queries and keys at these spans of the stream; keys before the
        stream are there, but nobody sees them."""
        (q0, q1), (k0, k1) = queries, keys
        if self.dense_mask:
            q, k = torch.arange(q0, q1), torch.arange(k0, k1)
            positions = positions_of(cu_seqlens, q1)[q0:]
            return AttentionMask(self.move(dense_mask(q, positions, k, window)[None, None]))
        # A document's keys end at its last query. Those before the first document and after the
        # last query belong to documents without queries, so that their gradients are written.
        edge = torch.tensor([1], dtype=cu_seqlens.dtype)
        borders = torch.full((self.bound + 1,), int(cu_seqlens[-1]), dtype=cu_seqlens.dtype)
        borders[: len(cu_seqlens)] = cu_seqlens
        cu_q = torch.cat([0 * edge, borders.clamp(q0, q1) - q0, (q1 - q0) * edge])
        cu_k = torch.cat([0 * edge, borders.clamp(k0, min(k1, q1)) - k0, (k1 - k0) * edge])
        max_q, max_k = min(row_len, q1 - q0), max(row_len, k1 - k0)
        return AttentionMask(None, self.move(cu_q), self.move(cu_k), max_q, max_k)


def exchange_rows(exchange, tensors, *arguments):
    """Exchange rows of tensors [T, ..], all those of one dtype at a time. exchange(x [T, C],
    *arguments) -> [T', C]."""
    out = [None] * len(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):  # in an order that all ranks share
        which = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        got = exchange(torch.cat([tensors[i].flatten(1) for i in which], 1), *arguments)
        widths = [math.prod(tensors[i].shape[1:]) for i in which]
        for i, part in zip(which, got.split(widths, 1), strict=True):
            out[i] = part.unflatten(1, tensors[i].shape[1:])
    return out


# --------------------------------------------------------------------------------------------------
# LASP-2


@op("start_gather")
def start_gather(x: Tensor, size: int, group: str) -> Tensor:
    """The rows [size, ..] of all ranks, on their way: nobody may read them but through
    fold_segments. Recomputation keeps them."""
    return compat.start_all_gather(x, size, group)


@start_gather.register_fake
def _(x, size, group):
    return x.new_empty(size * x.shape[0], *x.shape[1:])


@op("fold_segments")
def fold_segments(
    gathered: Tensor,
    sent: Tensor,
    start: int,
    state: list[int],
    decay: list[int],
    kind: str,
    rank: int,
) -> Tensor:
    """The state [1, H, K, V] that enters segment `rank`. `sent`, this rank's row, is here so that
    its memory lives until all have it."""
    A, U = unpack(compat.wait(gathered), start, state, decay)
    return transition.fold(KINDS[kind], A, U, rank)


@fold_segments.register_fake
def _(gathered, sent, start, state, decay, kind, rank):
    return gathered.new_empty(state)


def unpack(gathered, start, state, decay):
    """(transitions, states) of all ranks, [size, *decay] and [size, *state], from packed rows: a
    segment's state, then its transition."""
    middle = start + math.prod(state)
    U, A = gathered[:, start:middle], gathered[:, middle : middle + math.prod(decay)]
    return A.unflatten(1, decay), U.unflatten(1, state)


class Lasp2(LocalContext):
    def __init__(self, ranks):
        self.ranks = ranks

    def halo(self, x, rows):
        return previous_rows(x[len(x) - rows :], self.ranks) if rows else None

    def following(self, x):
        return next_rows(x, self.ranks)

    def begin(self, segments, seq):
        packed, parts, start = [], [], 0
        for segment in segments:
            family = ops.FAMILIES[segment.family]
            inputs = {name: tensor.detach().unsqueeze(0) for name, tensor in segment.inputs.items()}
            options = {
                name: x.detach() if isinstance(x, Tensor) else x
                for name, x in segment.options.items()
            }
            tensors, _ = family.prepare(inputs, options)
            backend = ops.resolve(
                segment.backend, segment.family, *tensors[1:3], segment.chunk_size
            )
            U, A, cache = family.state(*tensors[1:], seq.cu_seqlens, segment.chunk_size, backend)
            A = family.transition.forget(A, seq.starts)
            packed += [U.flatten(), A.flatten()]
            parts.append((family.transition.__name__, start, list(U.shape), list(A.shape), cache))
            start += U.numel() + A.numel()
        sent = torch.cat(packed)[None]
        return start_gather(sent, self.ranks.size, self.ranks.name), sent, parts, seq.starts

    def finish(self, pending):
        gathered, sent, parts, starts = pending
        incoming = []
        for kind, start, state, decay, cache in parts:
            S = fold_segments(gathered, sent, start, state, decay, kind, self.ranks.index)
            S = S.masked_fill(starts.view(-1, 1, 1, 1), 0)
            incoming.append((S, cache, gathered, start, state, decay))
        return incoming

    def scan(self, segment, incoming, seq, final):
        family = ops.FAMILIES[segment.family]
        inputs = {name: tensor.unsqueeze(0) for name, tensor in segment.inputs.items()}
        tensors, scale = family.prepare(inputs, segment.options)
        S, cache, gathered, *layout = incoming
        backend = ops.resolve(segment.backend, segment.family, *tensors[1:3], segment.chunk_size)
        call = (segment.family, scale, segment.chunk_size, backend, final)
        o, S_out = _Scan.apply(
            call, self.ranks, layout, S, cache, gathered, seq.cu_seqlens, seq.starts, *tensors
        )
        return o.squeeze(0), self.last(S_out, seq) if final else None

    def attend(self, kernel, q, kv, seq, window):
        masks = seq.mask(window)
        if len(masks) == 1:  # the window reaches into the rank before, at most
            pieces = [q]
            if window > 1:
                tails = [t[len(t) - (window - 1) :] for t in kv]
                before = exchange_rows(previous_rows, tails, self.ranks)
                kv = [torch.cat(pair) for pair in zip(before, kv, strict=True)]
        else:
            kv = exchange_rows(gather_tokens, kv, self.ranks)
            half = len(q) // 2
            pieces = [q[:half], mirror_rows(q[half:], self.ranks, after=kv[-1])]
        kv = [t[None] for t in kv]
        out = [
            kernel(piece[None], kv, mask, window, slice(None))[0]
            for piece, mask in zip(pieces, masks, strict=True)
        ]
        if len(out) == 2:
            out[1] = mirror_rows(out[1], self.ranks, after=pieces[1])
        return torch.cat(out)

    def whole(self, x):
        return all_gather(x, self.ranks)

    def last(self, x, seq):
        """Only the rank with a document's last token has its state; the others add nothing."""
        ends = seq.cu_seqlens.diff() > 0
        # A document goes on after this slice if it reaches its end and the next rank does not start
        # with another.
        goes_on = all_gather(seq.starts, self.ranks).roll(-1)[self.ranks.index]
        goes_on = ~goes_on if self.ranks.index < self.ranks.size - 1 else torch.zeros_like(goes_on)
        ends = ends & ~(goes_on & (seq.cu_seqlens[1:] == len(seq.positions)))
        return all_reduce(
            x.detach().masked_fill(~ends.view(-1, *[1] * (x.ndim - 1)), 0), self.ranks
        )


class _Scan(torch.autograd.Function):
    """A family's forward and backward with the state that enters the slice, and the gradient of the
    one that leaves it."""

    @staticmethod
    def forward(ctx, call, ranks, layout, S_in, cache, gathered, cu_seqlens, starts, *tensors):
        name, scale, C, backend, final = call
        cached = cache if cache.numel() else None
        o, S_out, kept, S = ops.FAMILIES[name].fwd(
            *tensors, S_in, cu_seqlens, cached, scale, C, final, backend
        )
        ctx.call, ctx.ranks, ctx.layout = call, ranks, layout
        ctx.save_for_backward(
            kept if kept.numel() else cache, S, cache, gathered, cu_seqlens, starts, *tensors
        )
        ctx.mark_non_differentiable(S_out)
        return o, S_out

    @staticmethod
    def backward(ctx, do, _):
        kept, S, cache, gathered, cu_seqlens, starts, *tensors = ctx.saved_tensors
        (name, scale, C, backend, _), (start, state, decay) = ctx.call, ctx.layout
        family = ops.FAMILIES[name]
        do = do.contiguous()
        G = family.dstate(
            *tensors, do, cu_seqlens, cache if cache.numel() else None, scale, C, backend
        )
        G = all_gather(G.masked_fill(starts.view(-1, 1, 1, 1), 0)[None], ctx.ranks)
        A, _ = unpack(gathered, start, state, decay)
        dS = transition.fold_reverse(family.transition, A, G, ctx.ranks.index)
        *grads, _ = family.bwd(*tensors, kept, S, do, dS, cu_seqlens, scale, C, False, backend)
        grads = [None if x is None else g for x, g in zip(tensors, grads)]
        return *[None] * 8, *grads


# --------------------------------------------------------------------------------------------------
# All to all over heads


class AllToAll(LocalContext):
    def __init__(self, ranks):
        self.ranks = ranks

    def halo(self, x, rows):
        return previous_rows(x[len(x) - rows :], self.ranks) if rows else None

    following = Lasp2.following

    def scan(self, segment, incoming, seq, final):
        names, tensors = zip(*segment.inputs.items())
        heads, size = segment.inputs["v"].shape[1], self.ranks.size
        # q and k that several heads share, but too few for all ranks, go out once for each of those
        # heads.
        tensors = [
            x if x.shape[1] % size == 0 else x.repeat_interleave(heads // x.shape[1], dim=1)
            for x in tensors
        ]
        inputs = dict(zip(names, self.to_heads(tensors)))
        options = {
            key: x.chunk(size)[self.ranks.index] if isinstance(x, Tensor) else x
            for key, x in segment.options.items()
        }
        whole = Segment(segment.family, inputs, options, segment.chunk_size, segment.backend)
        o, S = super().scan(whole, None, seq.whole, final)
        return self.to_tokens(o), (
            all_gather(S.transpose(0, 1), self.ranks).transpose(0, 1) if final else None
        )

    def attend(self, kernel, q, kv, seq, window):
        """Exchange what has heads for heads, gather what has none."""
        q, *headed = self.to_heads([q, *(t for t in kv if t.ndim > 2)])
        shared = exchange_rows(gather_tokens, [t for t in kv if t.ndim == 2], self.ranks)
        kv = [(headed if t.ndim > 2 else shared).pop(0) for t in kv]
        first = self.ranks.index * q.shape[1]
        heads = slice(first, first + q.shape[1])
        return self.to_tokens(super().attend(kernel, q, kv, seq.whole, window, heads))

    def to_heads(self, tensors):
        """[T, H, ..] each -> [T cp, H / cp, ..] each: the whole stream for this rank's heads. One
        exchange for tensors of one dtype."""
        size = self.ranks.size
        rows = [len(tensors[0])] * size
        tensors = [t.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1) for t in tensors]
        return exchange_rows(all_to_all, tensors, rows, rows, self.ranks)

    def to_tokens(self, o):
        """[T cp, H / cp, V] -> [T, H, V]."""
        size, rows = self.ranks.size, len(o) // self.ranks.size
        got = all_to_all(o.flatten(1), [rows] * size, [rows] * size, self.ranks)
        return (
            got.unflatten(0, (size, rows)).unflatten(2, o.shape[1:]).transpose(0, 1).flatten(1, 2)
        )

    def whole(self, x):
        return all_gather(x, self.ranks)

    last = Lasp2.last


# --------------------------------------------------------------------------------------------------
# Refusals


def check_context_parallel(config, cp, options):
    """Refuse what cannot be split over cp ranks. options: {name of every mixer in the model: its
    options}."""
    size = config.training.batch_size * config.data.seq_len // cp
    for name, chosen in options.items():
        rows = (
            getattr(chosen, "conv_width", 1) - 1
        )  # a token shift looks back one, which is always there
        if size < rows:
            raise ValueError(
                f"parallel.cp = {cp} leaves {size} tokens a rank, fewer than the {rows} that {name}"
                " looks back: lower parallel.cp"
            )
        if MIXERS[name].softmax or config.parallel.cp_method == "all_to_all":
            continue
        if MIXERS[name].family not in ops.FAMILIES:
            raise ValueError(
                f"parallel.cp_method = lasp2: the state of {name} has no transition that composes;"
                " set parallel.cp_method = all_to_all"
            )
        if chosen.backend == "reference":
            raise ValueError(
                "mixer.backend = reference knows no segments: under parallel.cp set mixer.backend ="
                " auto"
            )
