"""What a layer may know of its batch.

Training, validation and prefill see a stream of T tokens in which documents are packed without
padding (SeqInfo). Decoding sees one token for each of N sequences (StepInfo). Both are made on the
host, once per microbatch, with shapes that do not change from step to step, so that nothing
recompiles and nothing waits for the device.
"""

from dataclasses import dataclass, field

import torch

from lmoe.kernels import ops


@dataclass
class Segment:
    """One recurrence over this rank's stream. inputs: the family's per-token tensors by name, [T,
    H, ..], without q where only the state is wanted; options: further keyword arguments of the
    family's op; chunk_size, backend: its own."""

    family: str
    inputs: dict
    options: dict
    chunk_size: int
    backend: str


class LocalContext:
    """What lies outside this rank's stream, when nothing does. Context parallelism installs one
    that talks to other ranks."""

    def halo(self, x, rows):
        """The `rows` rows before this stream, [rows, ...], or None where the stream starts here."""
        return None

    def following(self, x):
        """Of x [1, ..], made of the first token, the one that the stream after this one has; zeros
        where this one is the last."""
        return torch.zeros_like(x)

    def begin(self, segments, seq):
        """Send the states of the Segments on their way; what comes back goes to `finish`."""
        return None

    def finish(self, pending):
        """What enters this stream, one entry per Segment for `scan`, or None where the stream
        starts here."""
        return None

    def scan(self, segment, incoming, seq, final):
        """Run a Segment with its q: (o [T, H, V], the state at the end of every document [N, H, K,
        V], or None unless `final`)."""
        inputs = {name: tensor.unsqueeze(0) for name, tensor in segment.inputs.items()}
        o, S = getattr(ops, segment.family)(
            **inputs,
            **segment.options,
            initial_state=incoming,
            output_final_state=final,
            cu_seqlens=seq.cu_seqlens,
            chunk_size=segment.chunk_size,
            backend=segment.backend,
        )
        return o.squeeze(0), S

    def attend(self, attend, q, k, v, seq, window):
        """Softmax attention: attend(q, k, v, visible, window) over all that the queries may see."""
        visible = seq.visible
        if visible.mask is None:
            return attend(q, k, v, visible, window)
        # A mask over rows of row_len tokens is rows times smaller than one over the stream.
        q, k, v = (t.unflatten(0, (seq.rows, seq.row_len)) for t in (q, k, v))
        return attend(q, k, v, visible, window).flatten(0, 1)

    def whole(self, x):
        """x [T, ..] of the whole stream."""
        return x

    def last(self, x, seq):
        """x [N, ..] of every document, from the rank that holds its last token."""
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
class Visible:
    """Who may attend to whom: a mask [B, 1, Tq, Tk] bool (SDPA), or the borders of the documents
    among queries and keys (variable-length attention; the last query of a document stands at its
    last key), int32 [N+1], and upper bounds on their lengths."""

    mask: torch.Tensor | None = None
    cu_q: torch.Tensor | None = None
    cu_k: torch.Tensor | None = None
    max_q: int = 0
    max_k: int = 0


class _Batch:
    """The questions that a layer asks of its context."""

    def halo(self, x, rows):
        return self.context.halo(x, rows)

    def begin(self, segments):
        return self.context.begin(segments, self)

    def finish(self, pending):
        return self.context.finish(pending)


@dataclass
class SeqInfo(_Batch):
    """A packed stream of T tokens.

    cu_seqlens [N+1] int32: borders of the documents, the last entry repeated up to a fixed bound
    (so some documents are empty). positions [T] int64: of each token in its document. visible: for
    softmax attention. rows, row_len: the microbatch is `rows` rows of `row_len` tokens, and no
    document crosses a row's end (a stream that is not made of rows is one row). row_of [T'] int64:
    the row of each token that this rank's feed-forward layers see, or None where they see all rows.
    Under context parallelism the stream is this rank's slice of the microbatch; starts [1] bool:
    whether it begins with a document.
    """

    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    visible: Visible
    rows: int
    row_len: int
    row_of: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    weights: LossWeights = field(default_factory=LossWeights)
    context: LocalContext = field(default_factory=LocalContext)
    decoding = False


@dataclass
class StepInfo(_Batch):
    """One token of each of N sequences. positions [N] int64: of this token in its sequence."""

    positions: torch.Tensor
    weights: LossWeights = field(default_factory=LossWeights)
    context: LocalContext = field(default_factory=LocalContext)
    rows = 1
    row_of = None
    decoding = True

    @property
    def row_len(self):
        return self.positions.shape[0]


def document_ids(cu_seqlens, tokens):
    """[T] index of each token's document; cu_seqlens [N+1] exact or padded."""
    return torch.searchsorted(
        cu_seqlens[1:].long(), torch.arange(tokens, device=cu_seqlens.device), right=True
    )


def attention_mask(documents, rows, row_len, window=0):
    """[rows, 1, row_len, row_len] bool: causal, within a document, and at most `window` tokens back
    (itself included; 0: no limit)."""
    ids = documents.view(rows, row_len)
    index = torch.arange(row_len, device=documents.device)
    distance = index[:, None] - index[None, :]
    near = distance >= 0
    if window:
        near &= distance < window
    return ((ids[:, :, None] == ids[:, None, :]) & near).unsqueeze(1)


class SeqBuilder:
    """Makes a microbatch for the layers on `device`.

    The number of document borders is padded to a power of two, at least 64, that never shrinks:
    shapes settle after the first steps. dense_mask: build the attention mask (SDPA);
    variable-length attention needs none.
    """

    def __init__(self, device, *, dense_mask, window=0, weights=None):
        self.device, self.dense_mask, self.window = torch.device(device), dense_mask, window
        self.weights = weights or LossWeights()
        self.bound = 64

    def __call__(self, batch):
        """Move this rank's slice of a HostBatch (lmoe/data/packing.py) to the device -> (tokens
        [T], labels [T], SeqInfo)."""
        rows = len(batch.tokens) // batch.seq_len
        seq = self.seq_info(batch.cu_seqlens, rows, batch.seq_len)
        return self.move(self.slice(batch.tokens)), self.move(self.slice(batch.labels)), seq

    def slice(self, stream):
        """Cut this rank's slice from the values [T, ..] of a microbatch's tokens: all of them."""
        return stream

    def seq_info(self, cu_seqlens, rows, row_len):
        documents, positions = self.locate(cu_seqlens, rows * row_len)
        padded = self.pad(cu_seqlens)
        if self.dense_mask:
            visible = Visible(self.move(attention_mask(documents, rows, row_len, self.window)))
        else:
            visible = Visible(None, padded, padded, row_len, row_len)
        return SeqInfo(padded, self.move(positions), visible, rows, row_len, weights=self.weights)

    def locate(self, cu_seqlens, tokens):
        """(document, position in it) of every token."""
        assert int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == tokens
        documents = document_ids(cu_seqlens, tokens)
        return documents, torch.arange(tokens) - cu_seqlens.long()[documents]

    def pad(self, cu_seqlens):
        """The borders on the device, the last one repeated up to the bound."""
        while self.bound < len(cu_seqlens) - 1:
            self.bound *= 2
        padded = cu_seqlens[-1].expand(self.bound + 1).clone()
        padded[: len(cu_seqlens)] = cu_seqlens
        return self.move(padded)

    def move(self, tensor):
        if self.device.type == "cpu":
            return tensor
        tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def prompt_info(lengths, device, *, dense_mask, window=0):
    """The SeqInfo of N prompts of the given lengths, packed into one stream (prefill)."""
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = int(cu_seqlens[-1])
    documents = document_ids(cu_seqlens, tokens)
    positions = torch.arange(tokens) - cu_seqlens.long()[documents]
    borders = cu_seqlens.to(device)
    if dense_mask:
        visible = Visible(attention_mask(documents, 1, tokens, window).to(device))
    else:
        visible = Visible(None, borders, borders, max(lengths), max(lengths))
    return SeqInfo(borders, positions.to(device), visible, 1, tokens)
