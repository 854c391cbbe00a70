"""The order of samples as a pure function: a keyed permutation per epoch, and a mixture without
chance.

Position n of a run's global sample order belongs to the source that holds the fraction n * phi (mod
1) of the unit interval cut by the weights: a Kronecker sequence, whose counts stay within a few
samples of weight * n. The k-th sample that a source gives is number k mod M of epoch k // M, under
the permutation of (seed, source, epoch); a source's key is the fingerprint of its content.
"""

import copy
import hashlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
ROUNDS = 6


def key_of(*parts):
    """A 64-bit key from anything that prints."""
    return np.uint64(
        int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")
    )


def below(fraction):
    """The 64-bit number below which lies this fraction of all."""
    return np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))


def mix(x):
    """A bijection of uint64 arrays that scatters neighbours (the finaliser of splitmix64)."""
    x = np.asarray(x, np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(x, n, key):
    """The place of each x (array of ints in [0, n)) under the permutation of [0, n) that `key`
    (uint64, scalar or like x) chooses.

    A Feistel network over the next power of four, walked until it falls below n: no table, any n.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    x, key = np.broadcast_arrays(
        np.atleast_1d(np.asarray(x, np.uint64)), np.asarray(key, np.uint64)
    )
    x, outside = x.copy(), np.ones(x.shape, bool)
    while outside.any():
        y = x[outside]
        k = key[outside]
        left = y >> half
        right = y & mask
        for r in range(1, ROUNDS + 1):
            left, right = right, left ^ (mix(right + k + np.array([r], np.uint64) * GOLDEN) & mask)
        x[outside] = (left << half) | right
        outside &= x >= n
    return x.astype(np.int64)


class SampleOrder:
    """Walks the global order from `position`. keys: what chooses each source's permutations; sizes:
    samples per epoch of each source; consumed: samples that each has given before."""

    def __init__(self, keys, sizes, weights, seed):
        self.keys = keys
        self.sizes = sizes
        self.seed = seed
        cumulative = np.cumsum(np.asarray(weights, np.float64)) / np.sum(weights)
        self.thresholds = np.array([below(c) for c in cumulative[:-1]], np.uint64)
        self.position = 0
        self.consumed = np.zeros(len(keys), np.int64)

    def copy(self):
        return copy.deepcopy(self)

    def take(self, n):
        """The next n places as [n, 2] int64: (source, which sample that source gives: 0, 1, 2, ...
        over all epochs)."""
        places = np.arange(self.position, self.position + n, dtype=np.uint64) * GOLDEN
        source = np.searchsorted(self.thresholds, places, side="right")
        count = np.empty(n, np.int64)
        for s in range(len(self.keys)):
            mine = source == s
            given = int(mine.sum())
            count[mine] = np.arange(self.consumed[s], self.consumed[s] + given)
            self.consumed[s] += given
        self.position += n
        return np.stack([source.astype(np.int64), count], 1)

    def skip(self, n, block=1 << 20):
        """Move n places on."""
        while n > 0:
            self.take(min(n, block))
            n -= block

    def locate(self, places):
        """Places [n, 2] of take -> [n, 3] int64: (source, epoch, sample of that source)."""
        out = np.empty((len(places), 3), np.int64)
        source = places[:, 0]
        count = places[:, 1]
        for s in np.unique(source):
            mine = source == s
            epoch, within = np.divmod(count[mine], self.sizes[s])
            epochs, which = np.unique(epoch, return_inverse=True)
            keys = np.array([key_of(self.seed, self.keys[s], e) for e in epochs.tolist()])
            sample = permute(within, self.sizes[s], keys[which])
            out[mine] = np.stack([np.full_like(epoch, s), epoch, sample], 1)
        return out
