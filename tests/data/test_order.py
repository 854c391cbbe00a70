import hashlib

import numpy as np
import pytest

from lmoe.data.order import SampleOrder, key_of, permute


@pytest.mark.parametrize("n", [*range(1, 40), 64, 65, 255, 1000, 4097])
def test_permutation_is_one(n):
    seen = [permute(np.arange(n), n, key_of(key)) for key in range(3)]
    for image in seen:
        assert sorted(image.tolist()) == list(range(n))
    if n > 10:
        assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()
    keys = np.array([key_of(k % 3) for k in range(n)])
    assert permute(np.arange(n), n, keys).tolist() == [int(seen[k % 3][k]) for k in range(n)]


def test_permutation_reaches_every_place_about_equally():
    n, keys = 7, 3000
    images = np.array([permute(np.arange(n), n, key_of("u", k)) for k in range(keys)])
    for x in range(n):
        counts = np.bincount(images[:, x], minlength=n)
        assert abs(counts - keys / n).max() < 5 * (keys / n) ** 0.5


def test_large_range_in_constant_memory():
    n = 10**15
    image = permute(np.arange(1000), n, key_of(0))
    assert (
        len(set(image.tolist())) == 1000
        and image.min() >= 0
        and image.max() < n
        and image.max() > n // 2
    )


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [0.9, 0.05, 0.04, 0.01], [5, 0.005]])
def test_mixture_weights(weights):
    order = SampleOrder([str(i) for i in range(len(weights))], [10**6] * len(weights), weights, 1)
    places = order.take(10**6)
    share = np.array(weights) / sum(weights)
    for s, w in enumerate(share):
        given = np.cumsum(places[:, 0] == s)
        assert abs(given[-1] / 10**6 - w) < 1e-3
        assert (
            abs(given - w * np.arange(1, 10**6 + 1)).max() < 8
        )  # and never far from it on the way
        assert order.consumed[s] == given[-1]
        assert (places[places[:, 0] == s, 1] == np.arange(given[-1])).all()


def test_order_does_not_depend_on_steps():
    def make():
        return SampleOrder(["a", "b"], [7, 11], [0.6, 0.4], 3)

    whole = make().take(500)
    order, parts = make(), []
    for n in (1, 2, 3, 94, 200, 200):
        parts.append(order.take(n))
    assert (np.concatenate(parts) == whole).all()
    skipped = make()
    skipped.skip(300, block=77)
    assert (skipped.take(200) == whole[300:]).all()


def test_epochs_cover_each_sample_once_in_another_order():
    order = SampleOrder(["a"], [50], [1.0], 3)
    places = order.locate(order.take(150)).reshape(3, 50, 3)
    for epoch in range(3):
        assert (places[epoch, :, 1] == epoch).all()
        assert sorted(places[epoch, :, 2].tolist()) == list(range(50))
    assert (places[0, :, 2] != places[1, :, 2]).any()


def test_seed_and_name_matter():
    def first(seed, name):
        order = SampleOrder([name], [1000], [1.0], seed)
        return order.locate(order.take(20))[:, 2].tolist()

    assert len({tuple(first(s, n)) for s in (1, 2) for n in ("a", "b")}) == 4


def test_order_is_pinned():
    """The order is part of what a checkpoint promises: another value here means that old runs
    cannot be resumed bitwise."""
    order = SampleOrder(["stdlib", "mqar"], [12345, 77], [0.7, 0.3], 1)
    digest = hashlib.sha256(order.locate(order.take(1000)).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "196fc123c4b6ee63"
