"""Samples -> the batch that the model side reads: one stream of tokens, documents packed without
padding."""

from typing import NamedTuple

import numpy as np
import torch

from lmoe.kernels.cross_entropy import IGNORE


class Row(NamedTuple):
    """One sample. tokens (the inputs), labels [seq_len] (of each input: the token that follows,
    IGNORE where none is asked for) and starts [n], ascending: where further documents begin inside
    the row, 0 left out."""

    tokens: np.ndarray
    labels: np.ndarray
    starts: np.ndarray


class HostBatch(NamedTuple):
    """A microbatch on the host. tokens, labels [T] int64 with T = rows * seq_len; cu_seqlens [N +
    1] int32, exact: the N documents are [cu_seqlens[n], cu_seqlens[n + 1]), none empty, and a row's
    start is always a border."""

    tokens: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    seq_len: int

    @property
    def num_valid(self) -> int:
        """Count the labels that are not IGNORE."""
        return int((self.labels != IGNORE).sum())

    def pin_memory(self):
        """Copy the tensors to memory that the GPU can read while the host goes on."""
        *tensors, seq_len = self
        return HostBatch(*(tensor.pin_memory() for tensor in tensors), seq_len)


def stream_row(stream, seq_len, eos, start):
    """Row of a piece of a stream of documents that each end in eos: stream [n + 1], the first token
    only as an input, each other one a label.

    The input before a document's first token is `start`. Where n < seq_len, `start` without labels
    fills up the row, as a document of its own.
    """
    begins = stream[:-1] == eos
    row = Row(np.where(begins, start, stream[:-1]), stream[1:], np.flatnonzero(begins[1:]) + 1)
    n = len(row.labels)
    if n == seq_len:
        return row
    fill = padding_row(seq_len - n, start)
    return Row(*map(np.append, row, fill._replace(starts=n)))


def padding_row(seq_len, token):
    """A row without a label, which fills a rank's last batch."""
    return Row(
        np.full(seq_len, token, np.int64), np.full(seq_len, IGNORE, np.int64), np.zeros(0, np.int64)
    )


def check_ids(row, size, name):
    """Refuse a Row of the source `name` with a token or a label outside [0, size); ValueError."""
    for ids in row.tokens, row.labels[row.labels != IGNORE]:
        wrong = ids[(ids < 0) | (ids >= size)]
        if len(wrong):
            raise ValueError(f"data: {name} gives token {wrong[0]}; the tokenizer has {size}")


def pack(rows):
    """Rows of equal length -> HostBatch."""
    seq_len = len(rows[0].tokens)
    assert all(len(r.tokens) == len(r.labels) == seq_len for r in rows)
    borders = [np.concatenate([[0], row.starts]) + k * seq_len for k, row in enumerate(rows)]
    cu_seqlens = np.concatenate([*borders, [len(rows) * seq_len]]).astype(np.int32)
    tokens = np.concatenate([row.tokens for row in rows]).astype(np.int64)
    labels = np.concatenate([row.labels for row in rows]).astype(np.int64)
    return HostBatch(*map(torch.from_numpy, (tokens, labels, cu_seqlens)), seq_len)
