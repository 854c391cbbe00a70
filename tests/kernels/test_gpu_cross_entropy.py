"""Triton cross-entropy of a chunk's logits against the portable functions in float64; on the CPU
through Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
pytest.importorskip("triton")

from lmoe.kernels import cross_entropy as portable  # noqa: E402
from lmoe.kernels import linear_cross_entropy  # noqa: E402
from lmoe.kernels.choice import forced  # noqa: E402
from lmoe.kernels.gpu import cross_entropy as gpu  # noqa: E402
from tests.kernels.ops import error  # noqa: E402
from tests.kernels.test_cross_entropy import make, naive  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP32 = torch.bfloat16, torch.float32
# Of words: less than a block, one, and several, the last one not whole; odd, and multiples of 4.
WORDS = [1, 101, 1000, 4096, 8201, 9000]


def rows(V, dtype, n=7):
    """(logits [n, V], labels, share): large, far below 0 and far apart ones; labels that are the
    first and the last word, another rank's, and none."""
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(n, V, generator=generator) * 3
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2] *= 3e3
    label = torch.randint(V, (n,), generator=generator)
    label[3:7] = torch.tensor([0, V - 1, -1, -1])
    share = torch.full((n,), 1 / 7)
    share[6] = 0
    return logits.to(DEVICE, dtype), label.to(DEVICE), share.to(DEVICE)


def combined(module, shards, labels, share, z, dtype):
    """([parts], [terms], the whole gradient) of logits that lie on ranks."""
    shards = [x.clone() for x in shards]
    parts = [module.parts(x, label) for x, label in zip(shards, labels)]
    results = [
        module.terms(x, label, own, torch.stack(parts), share, z, dtype)
        for x, label, own in zip(shards, labels, parts)
    ]
    return parts, [found for found, _ in results], torch.cat([d for _, d in results], 1)


@pytest.mark.parametrize("V", WORDS)
@pytest.mark.parametrize("logits, dtype", [(FP32, FP32), (FP32, BF16), (BF16, BF16), (BF16, FP32)])
def test_equals_float64(V, logits, dtype):
    x, label, share = rows(V, logits)
    z = 1e-3 * (V > 101)
    results = [
        combined(portable, [x.double()], [label], share.double(), z, torch.float64),
        combined(gpu, [x], [label], share, z, dtype),
    ]
    for want, got in zip(*(result[0] + result[1] for result in results)):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)
    want, got = (result[2] for result in results)
    # The interpreter cuts bf16 off, where a GPU rounds.
    limit = {FP32: 1e-5, BF16: 3e-3 if DEVICE == "cuda" else 8e-3}[dtype]
    assert got.dtype == dtype and error(got, want) < limit
    assert not got[6].any()  # of a token without a label


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one(ranks):
    x, label, share = rows(8200, FP32)
    want = combined(gpu, [x], [label], share, 1e-3, FP32)
    shards = [shard.contiguous() for shard in x.tensor_split(ranks, 1)]
    start, labels = 0, []
    for shard in shards:
        here = (label >= start) & (label < start + shard.shape[1])
        labels.append((label - start).masked_fill(~here, -1))
        start += shard.shape[1]
    _, found, gradient = combined(gpu, shards, labels, share, 1e-3, FP32)
    torch.testing.assert_close(sum(found), want[1][0], rtol=1e-5, atol=1e-5)
    assert error(gradient, want[2]) < 1e-5


@pytest.mark.parametrize("V", [1000, 1002])
def test_the_gradient_takes_the_place_of_the_logits(V):
    """Where its rows are aligned there; without one the logits stay."""
    for logits, dtype, there in ((FP32, FP32, True), (FP32, BF16, V % 4 == 0), (BF16, FP32, False)):
        x, label, share = rows(V, logits)
        before = x.clone()
        own = gpu.parts(x, label)
        assert gpu.terms(x, label, own, own[None], share, 0.0, None)[1] is None
        assert torch.equal(x, before)
        gradient = gpu.terms(x, label, own, own[None], share, 0.0, dtype)[1]
        assert (
            (gradient.data_ptr() == x.data_ptr()) == there == portable.lies_over(V, logits, dtype)
        )
        assert there or torch.equal(x, before)


def errors(form, x, weight, labels, **options):
    """Compare loss and gradients with float64."""
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = sum(naive(*wide, labels, 137.0, options["z_coeff"]))
    with forced(form):
        got = sum(linear_cross_entropy(x, weight, labels, 137.0, **options))
    pairs = [(got, want)]
    pairs += zip(torch.autograd.grad(got, [x, weight]), torch.autograd.grad(want, wide))
    return [error(a.detach(), b) if b.any() else float(a.any()) for a, b in pairs]


@pytest.mark.parametrize("chunk", [1, 7, 4096])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("V, z_coeff", [(101, 0.0), (104, 1e-2)])
def test_errors_are_those_of_the_portable_form(chunk, dtype, V, z_coeff):
    """At most 1.1 times as large; all sums in fp32 have their noise."""
    x, weight, labels = make(dtype, DEVICE, (17, 24, V))
    options = {"chunk": chunk, "z_coeff": z_coeff}
    for scale in (1, 1e3):
        scaled = (x.detach() * scale).requires_grad_()
        want, got = (
            errors(form, scaled, weight, labels, **options) for form in ("portable", "triton")
        )
        assert all(b < 1.1 * a + 1e-6 for a, b in zip(want, got)), (want, got)


@pytest.mark.parametrize("T", [0, 5])
def test_without_labels(T):
    x, weight, _ = make(FP32, DEVICE, (T, 24, 101))
    labels = torch.full((T,), -100, device=DEVICE)
    assert errors("triton", x, weight, labels, z_coeff=0.1, chunk=2) == [0, 0, 0]


def test_without_gradients():
    x, weight, labels = make(FP32, DEVICE)
    with forced("triton"):
        want = linear_cross_entropy(x, weight, labels, 9.0, z_coeff=0.1, chunk=16)
        with torch.no_grad():
            got = linear_cross_entropy(x, weight, labels, 9.0, z_coeff=0.1, chunk=16)
    assert all(map(torch.equal, want, got)) and not got[0].requires_grad


@pytest.mark.skipif(DEVICE == "cuda", reason="the assertion would end the process's use of the GPU")
def test_a_label_that_is_no_word():
    x, weight, labels = make(FP32)
    labels[3] = len(weight)
    with forced("triton"), pytest.raises(RuntimeError, match="a label is no word"):
        linear_cross_entropy(x, weight, labels, 9.0, chunk=7)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_in_place_on_a_gpu(monkeypatch):
    """All warps of a program have loaded a block before one stores: the same bits as in memory of
    their own, and every time."""
    n, V = 2048, 151936
    logits = torch.randn(n, V, device=DEVICE) * 3
    label = torch.randint(V, (n,), device=DEVICE)
    share = torch.full((n,), 1 / 7, device=DEVICE)
    own = gpu.parts(logits, label)

    def gradient(x):
        return gpu.terms(x, label, own, own[None], share, 1e-3, BF16)[1]

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_place", lambda x, dtype: torch.empty_like(x, dtype=dtype))
        want = gradient(logits)
    for _ in range(5):
        x = logits.clone()
        assert torch.equal(gpu.parts(x, label), own)
        got = gradient(x)
        assert got.data_ptr() == x.data_ptr() and torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("chunk", [1, 7, 4096])
@pytest.mark.parametrize("V", [5000, 9001])
def test_bf16_errors_on_a_gpu(chunk, V):
    """At most 1.1 times those of the portable form, with products that add up into fp32."""
    x, weight, labels = make(BF16, DEVICE, (300, 128, V))
    options = {"chunk": chunk, "z_coeff": 1e-3}
    want, got = (errors(form, x, weight, labels, **options) for form in ("portable", "triton"))
    assert all(b < 1.1 * a + 1e-6 for a, b in zip(want, got)), (want, got)
