"""Context parallelism: a microbatch's stream cut into equal slices of neighbouring tokens, one for
each rank of cp.

lasp2 (arXiv 2502.07563; lasp2.py). Ranks exchange the states of their slices; the projections of q
and the gate hide that. Softmax layers gather keys and values instead (LASP-2H, section 3.5), and
rank r swaps the second half of its queries with rank cp-1-r: later tokens see more keys, and so all
ranks do the same work. With a sliding window the last rows of the rank before suffice.

all_to_all (arXiv 2309.14509). The ranks exchange tokens for heads: each runs the whole stream for
its share of the heads, and back.

auto takes lasp2 where the segments of a scan compose, and all_to_all elsewhere.

Only a rank's first document can have begun before its slice, and only its last can go on after it.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from lmoe.kernels.transition import masked
from lmoe.model.batch import (
    AttentionMask,
    LocalContext,
    SeqBuilder,
    SeqInfo,
    dense_mask,
)
from lmoe.model.build import attention_windows, layer_mixers
from lmoe.model.mixers import MIXERS
from lmoe.parallel import lasp2
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

METHODS = ("auto", "lasp2", "all_to_all")


def make_builder(config, dims, *, dense_mask, weights=(None, None)) -> SeqBuilder:
    """Make the SeqBuilder of this run's layout."""
    windows = attention_windows(config)
    common = {"dense_mask": dense_mask, "windows": windows, "weights": weights}
    if dims.cp * dims.tp == 1:
        return SeqBuilder(dims.device, **common)
    ranks = Ranks.of(dims.group("cp"))
    context = LocalContext()
    if dims.cp > 1:
        method = config.parallel.cp_method
        names = layer_mixers(config.model)
        share_heads = any(shares_heads(MIXERS[name], method) for name in names)
        context = ContextParallel(ranks, method, share_heads)
    common |= {"ranks": ranks, "context": context, "tp": dims.tp, "tp_index": dims.index("tp")}
    return SliceBuilder(dims.device, **common)


# --------------------------------------------------------------------------------------------------
# The batch


class SliceBuilder(SeqBuilder):
    """Makes this rank's slice of a microbatch. With tensor parallelism feed-forward layers see a
    tp-th of that slice."""

    def __init__(self, device, *, ranks, context, tp, tp_index, **common):
        super().__init__(device, **common)
        self.ranks = ranks
        self.context = context
        self.tp = tp
        self.tp_index = tp_index

    def span(self, tokens):
        """Find this rank's slice of so many tokens: (start, size)."""
        size = tokens // self.ranks.size
        assert size * self.ranks.size == tokens and size % self.tp == 0
        return self.ranks.index * size, size

    def slice(self, stream):
        start, size = self.span(len(stream))
        return stream[start : start + size].clone()

    def describe(self, borders, rows, row_len):
        start, size = self.span(rows * row_len)
        share = size // self.tp
        seen = start + self.tp_index * share + torch.arange(share, device=self.device)
        whole = super().describe(borders, rows, row_len)
        whole.row_of = seen // row_len
        if self.ranks.size == 1:
            return whole
        positions = self.slice(whole.positions)
        return replace(
            whole,
            # Clamped: documents elsewhere are empty here, and keep their number.
            cu_seqlens=(borders - start).clamp(0, size),
            positions=positions,
            starts_with_document=positions[:1] == 0,
            whole=whole if self.context.share_heads else None,
            context=self.context,
        )

    def masks(self, seq: SeqInfo, window: int) -> list[AttentionMask]:
        """Build those of attention over gathered keys, all in reach: those of the window before
        this slice and its own; or, for each half of the queries, all keys. seq: of the whole
        stream."""
        if self.ranks.size == 1 or self.context.method == "all_to_all":
            return super().masks(seq, window)
        stream = len(seq.positions)
        start, size = self.span(stream)
        spans = [(start, start + size)]
        keys = (start - (window - 1), start + size)
        if not 0 < window <= size + 1:  # the window reaches further than the slice before
            half = size // 2
            mirror = stream - start - size
            spans = [(start, start + half), (mirror + half, mirror + size)]
            keys = 0, stream
        return [self.span_mask(seq, span, keys, window) for span in spans]

    def span_mask(self, seq, queries, keys, window) -> AttentionMask:
        """Build the mask of the queries and keys at these spans of the stream; keys before the
        stream are there, but nobody sees them."""
        (q0, q1), (k0, k1) = queries, keys
        if self.dense_mask:
            q, k = (torch.arange(*span, device=self.device) for span in (queries, keys))
            return AttentionMask(dense_mask(q, seq.positions[q0:q1], k, window)[None, None])
        # A document's keys end at its last query. Those before the first document and after the
        # last query belong to documents without queries, so that their gradients are written.
        borders = seq.cu_seqlens
        cu_q = F.pad(borders.clamp(q0, q1) - q0, (1, 1))
        cu_k = F.pad(borders.clamp(k0, min(k1, q1)) - k0, (1, 1))
        cu_q[-1], cu_k[-1] = q1 - q0, k1 - k0
        max_q = min(seq.row_len, q1 - q0)
        max_k = max(seq.row_len, k1 - k0)
        return AttentionMask(None, cu_q, cu_k, max_q, max_k)


def exchange_rows(exchange, tensors, *arguments):
    """Exchange rows of tensors [T, ..], all those of one dtype at a time. exchange(x [T, C],
    *arguments) -> [T', C]."""
    out = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):  # in an order that all ranks share
        flat = {i: t.flatten(1) for i, t in enumerate(tensors) if t.dtype == dtype}
        got = exchange(torch.cat(list(flat.values()), 1), *arguments)
        out |= zip(flat, got.split([t.shape[1] for t in flat.values()], 1))
    return [out[i].unflatten(1, t.shape[1:]) for i, t in enumerate(tensors)]


# --------------------------------------------------------------------------------------------------
# The context


class ContextParallel(LocalContext):
    """Context parallel ranks as a layer asks for them. method: lasp2, all_to_all, or auto, which
    takes lasp2 for scans whose segments compose and all-to-all for others."""

    def __init__(self, ranks: Ranks, method: str, share_heads: bool = False):
        """share_heads: whether some scan or layer goes over heads, and asks for seq.whole."""
        self.ranks = ranks
        self.method = method
        self.share_heads = share_heads or method == "all_to_all"

    def composes(self, scan) -> bool:
        return self.method != "all_to_all" and scan.family.transition is not None

    def left_context(self, x, rows):
        return previous_rows(x[len(x) - rows :], self.ranks) if rows else None

    def lookahead(self, x):
        return next_rows(x, self.ranks)

    def start(self, scans, seq):
        composing = [scan for scan in scans if self.composes(scan)]
        sent = lasp2.start(composing, seq, self.ranks) if composing else None
        return [self.composes(scan) for scan in scans], sent

    def finish(self, pending):
        composing, sent = pending
        received = iter(lasp2.finish(sent, self.ranks) if sent else ())
        return [next(received) if composes else None for composes in composing]

    def scan(self, scan, q, entering, seq, final):
        if entering is None:
            return self.scan_over_heads(scan, q, seq, final)
        o, S = lasp2.run(entering, scan, q, seq, final, self.ranks)
        return o, self.last_token_state(S, seq) if final else None

    def scan_over_heads(self, scan, q, seq, final):
        """Exchange tokens for heads, run the whole stream for this rank's heads, and back."""
        size = self.ranks.size
        heads = scan.inputs["v"].shape[1]
        given = {"q": q, **scan.inputs}
        constants = dict(scan.constants)
        exchanged = {}
        for argument in scan.family.arguments:
            name = argument.name
            dim = argument.head_dim()
            x = given.get(name)
            if x is not None and dim is None:
                given[name] = gather_tokens(x, self.ranks)
            elif x is not None:
                # Of q and k that several heads share, but too few for all ranks, each gets a copy.
                few = x.shape[1] % size
                exchanged[name] = x.repeat_interleave(heads // x.shape[1], 1) if few else x
            elif constants.get(name) is not None and dim is not None:
                constants[name] = constants[name].chunk(size, dim)[self.ranks.index]
        given |= zip(exchanged, self.to_heads(list(exchanged.values())))
        q = given.pop("q")
        whole = replace(scan, inputs=given, constants=constants)
        o, S = super().scan(whole, q, None, seq.whole, final)
        if final:
            S = all_gather(S.transpose(0, 1), self.ranks).transpose(0, 1)
        return self.to_tokens(o), S

    def attend(self, kernel, q, kv, seq, window):
        if self.method == "all_to_all":
            return self.attend_over_heads(kernel, q, kv, seq, window)
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
        arguments = zip(pieces, masks, strict=True)
        out = [kernel(q[None], kv, mask, window, slice(None))[0] for q, mask in arguments]
        if len(out) == 2:
            out[1] = mirror_rows(out[1], self.ranks, after=pieces[1])
        return torch.cat(out)

    def attend_over_heads(self, kernel, q, kv, seq, window):
        """Exchange what has heads for heads, gather what has none."""
        headed = iter(self.to_heads([q, *(t for t in kv if t.ndim > 2)]))
        shared = iter(exchange_rows(gather_tokens, [t for t in kv if t.ndim == 2], self.ranks))
        q = next(headed)
        kv = [next(headed if t.ndim > 2 else shared) for t in kv]
        first = self.ranks.index * q.shape[1]
        heads = slice(first, first + q.shape[1])
        return self.to_tokens(super().attend(kernel, q, kv, seq.whole, window, heads))

    def to_heads(self, tensors):
        """[T, H, ..] each -> [T cp, H / cp, ..] each: the whole stream for this rank's heads. One
        exchange for tensors of one dtype."""
        size = self.ranks.size
        tensors = [t.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1) for t in tensors]
        return exchange_rows(self.exchange, tensors)

    def to_tokens(self, o):
        """[T cp, H / cp, V] -> [T, H, V]."""
        got = self.exchange(o.flatten(1)).unflatten(1, o.shape[1:])
        return got.unflatten(0, (self.ranks.size, -1)).transpose(0, 1).flatten(1, 2)

    def exchange(self, x):
        """Send each rank an equal part of the rows of x [T cp, C], in the order of the ranks."""
        rows = [len(x) // self.ranks.size] * self.ranks.size
        return all_to_all(x, rows, rows, self.ranks)

    def gather_sequence(self, x):
        return all_gather(x, self.ranks)

    def last_token_state(self, x, seq):
        """Only the rank with a document's last token has its state; the others add nothing."""
        # A document goes on after this slice if it reaches its end and the next rank does not start
        # with another. The first rank, next of the last one, does.
        begins = all_gather(seq.starts_with_document, self.ranks).roll(-1)[self.ranks.index]
        inside = seq.cu_seqlens[1:] < len(seq.positions)
        ends = (seq.cu_seqlens.diff() > 0) & (inside | begins)
        return all_reduce(masked(x.detach(), ~ends, 0), self.ranks)


# --------------------------------------------------------------------------------------------------
# Refusals


def shares_heads(mixer, method: str) -> bool:
    """Tell whether cp ranks share the heads of a mixer class (all-to-all), not its tokens."""
    return method == "all_to_all" or any(family.transition is None for family in mixer.families())


def check_context_parallel(config, cp, options):
    """Refuse what cannot be split over cp ranks. options: {name of every mixer in the model: its
    options}."""
    method = config.parallel.cp_method
    size = config.training.batch_size * config.data.seq_len // cp
    for name, chosen in options.items():
        mixer = MIXERS[name]
        rows = getattr(chosen, "conv_size", 1) - 1  # a token shift looks back one: always there
        if size < rows:
            raise ValueError(
                f"parallel.cp = {cp} leaves {size} tokens a rank, fewer than the {rows} that {name}"
                " looks back: lower parallel.cp"
            )
        if not mixer.splits_sequence:
            raise ValueError(
                f"parallel.cp = {cp}: ranks cannot share the stream of {name}; set parallel.cp = 1"
            )
        if mixer.softmax or method == "all_to_all":
            continue
        composing = [family for family in mixer.families() if family.transition is not None]
        if method == "lasp2" and shares_heads(mixer, method):
            raise ValueError(
                f"parallel.cp_method = lasp2: states of {name} have no transition that composes; "
                "set parallel.cp_method = auto"
            )
        if composing and chosen.backend == "reference":
            raise ValueError(
                "mixer.backend = reference knows no segments: under parallel.cp set mixer.backend ="
                " auto"
            )
