import numpy as np
import pytest
import torch

from lmoe.data.packing import IGNORE, pack, padding_row, stream_row

EOS = 99


def brute_force(documents, seq_len, i):
    """Sample i written out token by token: (tokens, labels, document of each token)."""
    stream = [(token, d) for d, text in enumerate(documents) for token in [*text, EOS]]
    tokens, labels, owner = [], [], []
    for p in range(i * seq_len, (i + 1) * seq_len):
        token, d = stream[p]
        follows = stream[p + 1] if p + 1 < len(stream) else (None, None)
        tokens.append(token)
        labels.append(follows[0] if follows[1] == d else IGNORE)
        owner.append(d)
    return tokens, labels, owner


@pytest.mark.parametrize("seq_len", [1, 2, 3, 7, 16, 50])
def test_against_brute_force(seq_len):
    rng = np.random.default_rng(seq_len)
    lengths = [
        0,
        0,
        5,
        1,
        0,
        130,
        2,
        0,
        *rng.integers(0, 30, 20).tolist(),
        0,
    ]  # empty, and longer than two samples
    documents = [rng.integers(0, 90, n).tolist() for n in lengths]
    stream = np.array([t for text in documents for t in [*text, EOS]])
    total = len(stream) // seq_len
    stream = np.append(stream, EOS)
    rows = [stream_row(stream[i * seq_len : (i + 1) * seq_len + 1], EOS) for i in range(total)]
    batch = pack(rows)
    tokens, labels, borders = [], [], [0]
    for i in range(total):
        t, l, owner = brute_force(documents, seq_len, i)
        tokens, labels = tokens + t, labels + l
        borders += [i * seq_len + p for p in range(1, seq_len) if owner[p] != owner[p - 1]] + [
            (i + 1) * seq_len
        ]
    assert batch.tokens.tolist() == tokens and batch.labels.tolist() == labels
    assert batch.cu_seqlens.tolist() == borders
    assert (batch.tokens.dtype, batch.labels.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    assert batch.seq_len == seq_len


def test_labels_never_cross_a_border():
    rng = np.random.default_rng(0)
    rows = [stream_row(rng.choice([1, 2, EOS], 33), EOS) for _ in range(20)]
    batch = pack(rows)
    ends = batch.cu_seqlens[1:].long() - 1
    inside = torch.ones(len(batch.tokens), dtype=bool)
    inside[ends] = False
    assert (batch.labels[:-1][inside[:-1]] == batch.tokens[1:][inside[:-1]]).all()
    assert (batch.labels[batch.tokens == EOS] == IGNORE).all()


def test_padding_row():
    batch = pack([stream_row(np.arange(5), EOS), padding_row(4, EOS)])
    assert batch.labels.tolist() == [1, 2, 3, 4] + [IGNORE] * 4 and batch.num_valid == 4
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
