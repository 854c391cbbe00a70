"""What a layer may know of its batch.

Training, validation and prefill see a stream of T tokens in which documents are packed without padding (SeqInfo). Decoding sees
one token for each of N sequences (StepInfo). Both are made on the host, once per microbatch, with shapes that do not change from
step to step, so that nothing recompiles and nothing waits for the device.
"""

from dataclasses import dataclass, field

import torch


class LocalContext:
    """What lies outside this rank's stream, when nothing does. Context parallelism installs one that talks to its neighbours."""

    def halo(self, x, rows):
        """The `rows` rows before this stream, [rows, ...], or None where the stream starts here."""
        return None

    def begin(self, mixer, inputs):
        """Send this segment's state on its way; what comes back goes to `finish`."""
        return None

    def finish(self, pending):
        """The state that enters this stream, or None where it starts here."""
        return None


@dataclass
class LossWeights:
    """Weights of the auxiliary losses, Python floats fixed for a run (all 0 where nothing is trained).

    sequence: 1 / (global_batch_size x MoE layers), per row; token: 1 / (tokens of a step x MoE layers);
    microbatch: rows of a microbatch / global_batch_size.
    """

    sequence: float = 0.0
    token: float = 0.0
    microbatch: float = 0.0


@dataclass
class SeqInfo:
    """A packed stream of T tokens.

    cu_seqlens [N+1] int32: borders of the documents, the last entry repeated up to a fixed bound (so some documents are empty).
    positions [T] int64: of each token in its document. max_seqlen: an upper bound on the length of a document.
    rows, row_len: the stream is `rows` rows of `row_len` tokens, and no document crosses a row's end (a stream that is not made of
    rows is one row). mask [rows, 1, row_len, row_len] bool or None: who may attend to whom, where SDPA serves.
    """

    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    max_seqlen: int
    rows: int
    row_len: int
    mask: torch.Tensor | None = None
    weights: LossWeights = field(default_factory=LossWeights)
    context: LocalContext = field(default_factory=LocalContext)
    decoding = False

    def halo(self, x, rows):
        return self.context.halo(x, rows)

    def begin(self, mixer, inputs):
        return self.context.begin(mixer, inputs)

    def finish(self, pending):
        return self.context.finish(pending)


@dataclass
class StepInfo:
    """One token of each of N sequences. positions [N] int64: of this token in its sequence."""

    positions: torch.Tensor
    weights: LossWeights = field(default_factory=LossWeights)
    rows = 1
    decoding = True

    @property
    def row_len(self):
        return self.positions.shape[0]

    def begin(self, mixer, inputs):
        return None

    def finish(self, pending):
        return None


def document_ids(cu_seqlens, tokens):
    """[T] index of each token's document; cu_seqlens [N+1] exact or padded."""
    return torch.searchsorted(cu_seqlens[1:].long(), torch.arange(tokens, device=cu_seqlens.device), right=True)


def attention_mask(documents, rows, row_len, window=0):
    """[rows, 1, row_len, row_len] bool: causal, within a document, and at most `window` tokens back (itself included; 0: no limit)."""
    ids = documents.view(rows, row_len)
    index = torch.arange(row_len, device=documents.device)
    distance = index[:, None] - index[None, :]
    near = distance >= 0
    if window:
        near &= distance < window
    return ((ids[:, :, None] == ids[:, None, :]) & near).unsqueeze(1)


class SeqBuilder:
    """Makes the SeqInfo of each microbatch on `device`.

    The number of document borders is padded to a power of two, at least 64, that never shrinks: shapes settle after the first steps.
    dense_mask: build the attention mask (SDPA); variable-length attention needs none.
    """

    def __init__(self, device, *, dense_mask, window=0, weights=None, context=None):
        self.device, self.dense_mask, self.window = torch.device(device), dense_mask, window
        self.weights, self.context = weights or LossWeights(), context or LocalContext()
        self.bound = 64

    def __call__(self, cu_seqlens, rows, row_len):
        """cu_seqlens: host int32 tensor [n+1], the exact borders, among them every row's start."""
        tokens = rows * row_len
        assert int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == tokens
        while self.bound < len(cu_seqlens) - 1:
            self.bound *= 2
        documents = document_ids(cu_seqlens, tokens)
        positions = torch.arange(tokens) - cu_seqlens.long()[documents]
        mask = attention_mask(documents, rows, row_len, self.window) if self.dense_mask else None
        padded = torch.full((self.bound + 1,), tokens, dtype=torch.int32)
        padded[: len(cu_seqlens)] = cu_seqlens

        def move(tensor):
            if tensor is None or self.device.type == "cpu":
                return tensor
            return tensor.pin_memory().to(self.device, non_blocking=True)

        return SeqInfo(move(padded), move(positions), row_len, rows, row_len, move(mask), self.weights, self.context)


def prompt_info(lengths, device, *, dense_mask, window=0):
    """The SeqInfo of N prompts of the given lengths, packed into one stream (prefill)."""
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = int(cu_seqlens[-1])
    documents = document_ids(cu_seqlens, tokens)
    positions = torch.arange(tokens) - cu_seqlens.long()[documents]
    mask = attention_mask(documents, 1, tokens, window).to(device) if dense_mask else None
    return SeqInfo(cu_seqlens.to(device), positions.to(device), max(lengths), 1, tokens, mask)
