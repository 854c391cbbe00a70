import numpy as np
import pytest
import torch

from lmoe.data.packing import IGNORE, pack, padding_row, stream_row

EOS = 99
BOS = 98
# Empty ones, alone and two in a row, of one token, and longer than several samples.
LENGTHS = [0, 0, 5, 1, 0, 130, 2, 0, 1, 1]


def rows_of(documents, seq_len, start):
    stream = np.array([EOS] + [t for text in documents for t in [*text, EOS]])
    cuts = range(0, len(stream) - seq_len, seq_len)
    return [stream_row(stream[a : a + seq_len + 1], seq_len, EOS, start) for a in cuts]


def brute_force(documents, seq_len, i, start):
    """Sample i written out token by token: (inputs, labels, document of each)."""
    pairs = [
        (token, label, d)
        for d, text in enumerate(documents)
        for token, label in zip([start, *text], [*text, EOS], strict=True)
    ]
    return zip(*pairs[i * seq_len : (i + 1) * seq_len], strict=True)


@pytest.mark.parametrize("start", [EOS, BOS])
@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 16, 50])
def test_against_brute_force(seq_len, start):
    rng = np.random.default_rng(seq_len)
    lengths = [*LENGTHS, *rng.integers(0, 30, 20), 0]
    documents = [rng.integers(0, 90, n).tolist() for n in lengths]
    rows = rows_of(documents, seq_len, start)
    batch = pack(rows)
    tokens, labels, borders = [], [], [0]
    for i in range(len(rows)):
        t, l, owner = brute_force(documents, seq_len, i, start)
        tokens, labels = tokens + [*t], labels + [*l]
        borders += [i * seq_len + p for p in range(1, seq_len) if owner[p] != owner[p - 1]] + [
            (i + 1) * seq_len
        ]
    assert len(rows) == sum(n + 1 for n in lengths) // seq_len
    assert batch.tokens.tolist() == tokens and batch.labels.tolist() == labels
    assert batch.cu_seqlens.tolist() == borders
    assert (batch.tokens.dtype, batch.labels.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    assert batch.seq_len == seq_len and batch.num_valid == len(tokens)


@pytest.mark.parametrize("start", [EOS, BOS])
def test_labels_never_cross_a_border(start):
    rng = np.random.default_rng(0)
    batch = pack([stream_row(rng.choice([1, 2, EOS], 33), 32, EOS, start) for _ in range(20)])
    ends = batch.cu_seqlens[1:].long() - 1
    inside = torch.ones(len(batch.tokens), dtype=bool)
    inside[ends] = False
    assert (batch.labels[:-1][inside[:-1]] == batch.tokens[1:][inside[:-1]]).all()
    # A document begins at each start, and at a row's; an eos ends it.
    assert (batch.tokens[inside.roll(1)] != start).all() and (batch.labels[inside] != EOS).all()
    assert start == EOS or (batch.tokens != EOS).all()


def test_padding_row():
    batch = pack([stream_row(np.arange(5), 4, EOS, BOS), padding_row(4, EOS)])
    assert batch.labels.tolist() == [1, 2, 3, 4] + [IGNORE] * 4 and batch.num_valid == 4
    assert batch.cu_seqlens.tolist() == [0, 4, 8]


@pytest.mark.parametrize("n", [1, 2, 6, 7])
def test_a_row_that_is_filled_up(n):
    stream = np.array([EOS, 5, 6, EOS, EOS, 7, 8, 9])[: n + 1]
    batch = pack([stream_row(stream, 7, EOS, BOS)])
    assert batch.tokens.tolist() == [BOS, 5, 6, BOS, BOS, 7, 8][:n] + [BOS] * (7 - n)
    assert batch.labels.tolist() == stream[1:].tolist() + [IGNORE] * (7 - n)
    assert batch.cu_seqlens.tolist() == [b for b in (0, 3, 4) if b < n] + [n] * (n < 7) + [7]
