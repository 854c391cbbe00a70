"""Describe a batch to the layers.

Training, validation and prefill see a stream of T tokens in which documents are packed without
padding (SeqInfo). Decoding sees one token for each of N sequences (StepInfo). Both are made of what
the host knows, once per microbatch, with shapes that do not change from step to step, so that
nothing recompiles and nothing waits for the device.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe.kernels.family import Scan


class LocalContext:
    """Answer what a layer asks of the tokens outside this rank's stream, when there are none.
    Context parallelism installs one that talks to other ranks."""

    def left_context(self, x: Tensor, rows: int) -> Tensor | None:
        """Return the `rows` rows [rows, ..] before the stream x [T, ..], None where it starts."""
        return None

    def lookahead(self, x: Tensor) -> Tensor:
        """Exchange x [1, ..], made of the first token, for that of the stream after this one; zeros
        where this one is the last."""
        return torch.zeros_like(x)

    def start(self, scans: list[Scan], seq: "SeqInfo"):
        """Send the states of the scans on their way; what comes back goes to `finish`."""
        return scans

    def finish(self, pending) -> list:
        """Return what enters this stream, one entry a scan; the state [N, H, ..] before the stream,
        or None where it starts here."""
        return [None] * len(pending)

    def scan(
        self, scan: Scan, q: Tensor, entering, seq: "SeqInfo", final: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run a scan with q [T, H, K] and what enters it: (o [T, HV, V], if `final` the state at
        the end of every document [N, HV, ..])."""
        borders = seq.cu_seqlens if scan.cu_seqlens is None else scan.cu_seqlens
        return scan.family.run(scan, q, entering, final, borders)

    def attend(
        self, kernel: Callable, q: Tensor, kv: tuple, seq: "SeqInfo", window: int, heads=slice(None)
    ) -> Tensor:
        """Run softmax attention over all that the queries may see. q [T, H, d], kv: tensors
        [T, ..] of the keys and values, or of what the kernel makes them from -> [T, H, V].

        kernel(q [B, Tq, H, d], kv [B, Tk, ..], AttentionMask, window, heads) -> [B, Tq, H, V].
        heads: those of the caller's q that the kernel gets.
        """
        masks = seq.mask(window)
        # A mask over rows of row_len tokens is rows times smaller than one over the stream.
        rows = seq.rows if masks[0].cu_seqlens_q is None else 1
        q, *kv = (t.unflatten(0, (rows, -1)) for t in (q, *kv))
        if len(masks) == 1:
            return kernel(q, kv, masks[0], window, heads).flatten(0, 1)
        lengths = [mask.max_seqlen_q for mask in masks]
        prompts = zip(masks, *(t.split(lengths, 1) for t in (q, *kv)), strict=True)
        o = [kernel(q, kv, mask, window, heads) for mask, q, *kv in prompts]
        return torch.cat(o, 1).flatten(0, 1)

    def gather_sequence(self, x):
        """Gather x [T, ..] of the whole stream."""
        return x

    def last_token_state(self, x, seq):
        """Take x [N, ..] of every document from the rank that holds its last token."""
        return x


@dataclass
class LossWeights:
    """Weights of the auxiliary losses, Python floats fixed for a run (all 0 where nothing is
    trained).

    sequence: 1 / (global_batch_size x MoE layers), per row; token: 1 / (tokens of a step x MoE
    layers); microbatch: rows of a microbatch / global_batch_size.
    """

    sequence: float = 0.0
    token: float = 0.0
    microbatch: float = 0.0


@dataclass
class AttentionMask:
    """Which keys each query may attend to. dense [B, 1, Tq, Tk] bool (SDPA); or cu_seqlens_q, _k
    [N+1] int32, the borders of the documents among queries and keys, with upper bounds on their
    lengths (variable-length attention; a document's last query stands at its last key); or neither:
    every query sees the keys up to its own place."""

    dense: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


@dataclass
class SeqInfo:
    """A packed stream of T tokens.

    cu_seqlens [N+1] int32: borders of the documents, the last entry repeated up to a fixed bound
    (so some documents are empty). positions [T] int64: of each token in its document. masks: for
    every window of a softmax layer one AttentionMask, or one for each piece of the queries. rows,
    row_len: the microbatch is `rows` rows of `row_len` tokens, and no document crosses a row's end
    (a stream that is not made of rows is one row). row_of [T'] int64: the row of each token that
    this rank's feed-forward layers see, or None where they see all rows. Under context parallelism
    the stream is this rank's slice of the microbatch; starts_with_document [1] bool; whole: the
    SeqInfo of the microbatch, where ranks share heads.
    """

    cu_seqlens: Tensor
    positions: Tensor
    masks: dict[int, list[AttentionMask]]
    rows: int
    row_len: int
    row_of: Tensor | None = None
    starts_with_document: Tensor | None = None
    whole: "SeqInfo | None" = None
    weights: LossWeights = field(default_factory=LossWeights)
    mixer_weights: LossWeights = field(default_factory=LossWeights)
    context: LocalContext = field(default_factory=LocalContext)
    decoding = False

    def mask(self, window: int) -> list[AttentionMask]:
        """The masks of a softmax layer with this window (tokens; 0: no limit)."""
        assert window in self.masks, f"no mask was built for window = {window}"
        return self.masks[window]


@dataclass
class StepInfo:
    """One token of each of N sequences. positions [N] int64: of this token in its sequence."""

    positions: Tensor
    weights: LossWeights = field(default_factory=LossWeights)
    context: LocalContext = field(default_factory=LocalContext)
    decoding = True


def document_ids(cu_seqlens, tokens):
    """[T] index of each token's document; cu_seqlens [N+1] exact or padded."""
    return torch.searchsorted(
        cu_seqlens[1:].long(), torch.arange(tokens, device=cu_seqlens.device), right=True
    )


def positions_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[T] int64 position of each of the stream's first tokens in its document."""
    starts = cu_seqlens.long()[document_ids(cu_seqlens, tokens)]
    return torch.arange(tokens, device=cu_seqlens.device) - starts


def dense_mask(queries: Tensor, positions: Tensor, keys: Tensor, window: int) -> Tensor:
    """Compare places: causal, within a document, at most `window` tokens back (itself included; 0:
    no limit). queries [.., Tq], keys [.., Tk]: their places in the stream; positions [.., Tq]: of
    the queries in their documents -> [.., Tq, Tk] bool."""
    back = positions.clamp(max=window - 1) if window else positions
    last = queries[..., None]
    keys = keys[..., None, :]
    return (keys <= last) & (keys >= last - back[..., None])


class SeqBuilder:
    """Makes a microbatch for the layers on `device`.

    The number of document borders is padded to a power of two, at least 64, that never shrinks:
    shapes settle after the first steps. dense_mask: build dense attention masks (SDPA);
    variable-length attention needs none. windows: those of the model's softmax layers
    (attention_windows); none, no masks. weights: LossWeights of feed-forward layers' routers and of
    mixers'.
    """

    def __init__(
        self, device, *, dense_mask: bool, windows: Iterable[int] = (), weights=(None, None)
    ):
        self.device = torch.device(device)
        self.dense_mask = dense_mask
        self.windows = windows
        self.weights, self.mixer_weights = (given or LossWeights() for given in weights)
        self.bound = 64
        self.copies = None  # the CUDA stream of the copies to the device

    def __call__(self, batch):
        """Move this rank's slice of a HostBatch (lmoe/data/packing.py) to the device -> (tokens
        [T], labels [T], SeqInfo)."""
        rows = len(batch.tokens) // batch.seq_len
        ids = (self.slice(batch.tokens), self.slice(batch.labels))
        borders = self.padded(batch.cu_seqlens, len(batch.tokens))
        borders, tokens, labels = self.move(borders, *ids)
        return tokens.long(), labels.long(), self.describe(borders, rows, batch.seq_len)

    def slice(self, stream):
        """Cut this rank's slice from the values [T, ..] of a microbatch's tokens: all of them."""
        return stream

    def seq_info(self, cu_seqlens: Tensor, rows: int, row_len: int) -> SeqInfo:
        """Describe a stream of `rows` rows; cu_seqlens [N+1]: on the host, exact."""
        return self.describe(*self.move(self.padded(cu_seqlens, rows * row_len)), rows, row_len)

    def describe(self, borders: Tensor, rows: int, row_len: int) -> SeqInfo:
        """Work the SeqInfo out on the device, from the padded borders there."""
        positions = positions_of(borders, rows * row_len)
        seq = SeqInfo(borders.clone(), positions, {}, rows, row_len)
        seq.weights = self.weights
        seq.mixer_weights = self.mixer_weights
        seq.masks = {window: self.masks(seq, window) for window in self.windows}
        return seq

    def masks(self, seq: SeqInfo, window: int) -> list[AttentionMask]:
        """Build the mask of one window over the rows of the whole stream, or give its borders."""
        if not self.dense_mask:
            borders = seq.cu_seqlens
            return [AttentionMask(None, borders, borders, seq.row_len, seq.row_len)]
        places = torch.arange(len(seq.positions), device=self.device)
        places, positions = (t.view(seq.rows, -1) for t in (places, seq.positions))
        return [AttentionMask(dense_mask(places, positions, places, window)[:, None])]

    def padded(self, cu_seqlens, tokens):
        """Repeat the last border up to the bound, which grows where it must."""
        assert int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == tokens
        while self.bound < len(cu_seqlens) - 1:
            self.bound *= 2
        rest = self.bound + 1 - len(cu_seqlens)
        return F.pad(cu_seqlens, (0, rest), value=tokens)

    def move(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Copy host tensors [n] of whole numbers to the device, in one copy beside what runs there
        and for which the host does not wait -> views of one int32 tensor."""
        sizes = [len(part) for part in parts]
        on_gpu = self.device.type == "cuda"
        # Torch keeps pinned memory, and gives a piece out again once its copies are done.
        packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=on_gpu)
        torch.cat(parts, out=packed)
        if not on_gpu:
            return packed.to(self.device).split(sizes)
        compute = torch.cuda.current_stream(self.device)
        self.copies = self.copies or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self.copies):
            packed = packed.to(self.device, non_blocking=True)
        compute.wait_stream(self.copies)
        packed.record_stream(compute)  # which reads it after the host has let go of it
        return packed.split(sizes)


def prompt_info(
    lengths: list[int], device, *, dense_mask: bool, windows: Iterable[int] = ()
) -> SeqInfo:
    """The SeqInfo of N prompts of the given lengths, packed into one stream (prefill)."""
    borders = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
    mask = AttentionMask(None, borders, borders, max(lengths), max(lengths))
    masks = {w: prompt_masks(lengths, device, w) if dense_mask else [mask] for w in windows}
    return SeqInfo(borders, positions_of(borders, sum(lengths)), masks, 1, sum(lengths))


def prompt_masks(lengths, device, window) -> list[AttentionMask]:
    """Build a mask for each prompt, causal alone or, where the window is shorter than a prompt,
    dense: that of the longest prompt begins with all others."""
    if not 0 < window < max(lengths):
        return [AttentionMask(max_seqlen_q=n) for n in lengths]
    places = torch.arange(max(lengths), device=device)
    dense = dense_mask(places, places, places, window)[None, None]
    return [AttentionMask(dense[..., :n, :n], max_seqlen_q=n) for n in lengths]
