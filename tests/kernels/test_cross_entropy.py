import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from lmoe import kernels
from lmoe.kernels import cross_entropy
from lmoe.kernels.choice import forced
from lmoe.parallel.collectives import Ranks
from lmoe.parallel.tensor import Vocabulary
from tests.kernels.ops import error

T, D, V = 64, 24, 101
CHUNKS = [T, -(-T // 7), 1]  # rows for 1, 7 and 64 chunks


def make(dtype=torch.float64, device="cpu", shape=(T, D, V)):
    generator = torch.Generator().manual_seed(0)
    t, d, v = shape
    x = (
        torch.randn(t, d, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
    )
    weight = (
        (torch.randn(v, d, generator=generator, dtype=torch.float64) * 2 * d**-0.5)
        .to(device, dtype)
        .requires_grad_()
    )
    labels = torch.randint(v, (t,), generator=generator)
    labels[::5] = -100
    return x, weight, labels.to(device)


def naive(x, weight, labels, normaliser, z_coeff):
    logits = x @ weight.T
    loss = F.cross_entropy(logits, labels, reduction="sum") / normaliser
    z = z_coeff * (logits.logsumexp(-1).square() * (labels != -100)).sum() / normaliser
    return loss, z


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_coeff", [0.0, 1e-2])
def test_equals_float64(chunk, dtype, z_coeff):
    x, weight, labels = make(dtype)
    normaliser = torch.tensor(137.0)
    loss, z = kernels.linear_cross_entropy(
        x, weight, labels, normaliser, z_coeff=z_coeff, chunk=chunk
    )
    dx, dw = torch.autograd.grad((loss + z) * 3, [x, weight])
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    want_loss, want_z = naive(*wide, labels, 137.0, z_coeff)
    want_dx, want_dw = torch.autograd.grad((want_loss + want_z) * 3, wide)
    assert (
        loss.dtype == z.dtype == torch.promote_types(dtype, torch.float32)
        and loss.shape == z.shape == ()
    )
    assert dx.dtype == dw.dtype == dtype
    sums, gradients = {
        torch.float64: (1e-12, 1e-12),
        torch.float32: (1e-5, 1e-6),
        torch.bfloat16: (1e-4, 2.5e-3),
    }[dtype]
    assert abs(loss.item() - want_loss.item()) < sums and abs(z.item() - want_z.item()) < sums
    assert error(dx, want_dx) < gradients and error(dw, want_dw) < gradients


@pytest.mark.gpu
def test_the_gradient_s_factor_is_not_rounded():
    """bf16 would make 1.25 of this one."""
    x, weight, labels = make(torch.bfloat16, "cuda")
    loss, _ = kernels.linear_cross_entropy(x, weight, labels, 137.0)
    d = 1.2537
    once, scaled = (
        torch.autograd.grad(
            loss, [x, weight], torch.tensor(factor, device="cuda"), retain_graph=True
        )
        for factor in (1.0, d)
    )
    for a, b in zip(once, scaled):
        ratio = (a.double() * b.double()).sum() / a.double().square().sum()
        assert abs(ratio / d - 1) < 5e-4


@pytest.mark.parametrize("form", ["portable", "triton"])
def test_bf16_logits(form):
    """Their rounding shows in a token's loss and hardly in the mean."""
    device = "cpu"
    if form == "triton":
        pytest.importorskip("triton")
        device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, labels = make(torch.bfloat16, device, (60, D, 1000))
    labels = labels.clamp(min=0)

    def loss_of(rows, dtype):
        return kernels.linear_cross_entropy(x[rows], weight, labels[rows], 1.0, logits_dtype=dtype)[
            0
        ]

    with forced(form):
        by_token = [
            torch.stack([loss_of(slice(t, t + 1), dtype) for t in range(60)])
            for dtype in (torch.bfloat16, None)
        ]
        both = [loss_of(slice(None), dtype) for dtype in (torch.bfloat16, None)]
    off = by_token[0] - by_token[1]
    assert 1e-3 < off.square().mean().sqrt() < 7e-3 and off.mean().abs() < 1e-3
    torch.testing.assert_close(both[0], by_token[0].sum())
    dx, want = (torch.autograd.grad(loss, x)[0] for loss in both)
    # On a GPU the gradients of the logits are rounded too.
    assert 0 < error(dx, want) < (3e-3 if device == "cpu" else 5e-3)


def test_automatic_chunks():
    chunk = cross_entropy.automatic_chunk
    fp32, bf16, fp64 = torch.float32, torch.bfloat16, torch.float64
    assert chunk(151936, fp32) == chunk(151936, bf16) == chunk(64, fp64) == 4096
    assert chunk(151936, fp64) == 2176 and chunk(10**6, fp32) == 640 and chunk(10**6, bf16) == 1280
    assert chunk(10**8, fp32) == 128
    x, weight, labels = make()
    chosen = kernels.linear_cross_entropy(x, weight, labels, 9.0)[0]
    assert torch.equal(chosen, kernels.linear_cross_entropy(x, weight, labels, 9.0, chunk=T)[0])


def check_sums_of_products(device):
    """Sum bf16 products in fp32, inside the product and after it."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 50, generator=generator).to(device, torch.bfloat16) for n in (40, 30))
    want = torch.randn(40, 30, generator=generator).to(device)
    total = want.clone()
    want = want.double() + a.double() @ b.double().T
    assert cross_entropy._add_product(total, a, b.T, torch.float32) is total
    assert total.dtype == torch.float32 and error(total, want) < 1e-6


def test_sums_of_products():
    """A CPU refuses to add products of bf16 to an fp32 matrix."""
    assert not cross_entropy._adds_wide(torch.bfloat16, torch.device("cpu"))
    check_sums_of_products("cpu")


def test_gradient_of_loss_alone_holds_that_of_z():
    """As documented: one backward pass serves both, through the loss."""
    x, weight, labels = make()
    loss, z = kernels.linear_cross_entropy(x, weight, labels, 50.0, z_coeff=0.1)
    assert not z.requires_grad
    (dx,) = torch.autograd.grad(loss, x)
    (want,) = torch.autograd.grad(sum(naive(x, weight, labels, 50.0, 0.1)), x)
    assert error(dx, want) < 1e-12


def test_accumulates_over_uses_and_with_a_tied_embedding():
    x, weight, labels = make()
    halves = [(x[rows], weight, labels[rows]) for rows in (slice(0, 30), slice(30, None))]
    total = (
        sum(kernels.linear_cross_entropy(*half, 50.0, chunk=16)[0] for half in halves)
        + F.embedding(labels.clamp(min=0), weight).sin().sum()
    )
    total.backward()
    wide = [t.detach().requires_grad_() for t in (x, weight)]
    (
        naive(*wide, labels, 50.0, 0)[0] + F.embedding(labels.clamp(min=0), wide[1]).sin().sum()
    ).backward()
    assert error(x.grad, wide[0].grad) < 1e-12 and error(weight.grad, wide[1].grad) < 1e-12


def test_ignored_labels():
    x, weight, _ = make()
    labels = torch.full((T,), -100)
    loss, z = kernels.linear_cross_entropy(x, weight, labels, 1.0, z_coeff=0.1, chunk=10)
    dx, dw = torch.autograd.grad(loss, [x, weight])
    assert loss == 0 and z == 0 and not dx.any() and not dw.any()


def test_extreme_logits_are_finite():
    x, weight, labels = make(torch.float32)
    loss, _ = kernels.linear_cross_entropy(x * 1e4, weight, labels, 1.0)
    assert all(torch.isfinite(t).all() for t in (loss, *torch.autograd.grad(loss, [x, weight])))
    assert (
        abs(loss.item() / naive(x.double() * 1e4, weight.double(), labels, 1.0, 0)[0].item() - 1)
        < 1e-5
    )


def test_without_gradients_computes_none(monkeypatch):
    x, weight, labels = make()
    want = kernels.linear_cross_entropy(x, weight, labels, 9.0, chunk=16)[0]
    monkeypatch.setattr(
        torch.Tensor, "scatter_add_", None
    )  # the gradient of the logits would call it
    with torch.no_grad():
        loss, _ = kernels.linear_cross_entropy(x, weight, labels, 9.0, chunk=16)
    assert torch.equal(loss, want) and not loss.requires_grad
    # Only what is wanted is computed.
    monkeypatch.undo()
    (dx,) = torch.autograd.grad(kernels.linear_cross_entropy(x, weight.detach(), labels, 9.0)[0], x)
    assert error(dx, torch.autograd.grad(naive(x, weight, labels, 9.0, 0)[0], x)[0]) < 1e-12


class Vocab:
    """One of several threads, each a rank with some rows of the vocabulary."""

    def __init__(self, rank, start, barrier, slots):
        self.rank, self.start, self.barrier, self.slots = rank, start, barrier, slots
        self.calls = 0

    def gather_parts(self, t):
        self.calls += 1
        self.slots[self.rank] = t.clone()
        self.barrier.wait(60)
        result = torch.stack(self.slots)
        self.barrier.wait(60)
        return result


def on_ranks(ranks, x, weight, labels, normaliser, d=3, **options):
    """([(loss, z_loss)], [dx], [dw]) by rank; gradients of d times the sum of both losses."""
    barrier, slots = threading.Barrier(ranks), [None] * ranks
    shards = weight.detach().chunk(ranks)

    def rank(r):
        try:
            vocab = Vocab(r, sum(map(len, shards[:r])), barrier, slots)
            local_x, rows = x.detach().requires_grad_(), shards[r].clone().requires_grad_()
            loss, z = kernels.linear_cross_entropy(
                local_x, rows, labels, normaliser, vocab=vocab, **options
            )
            assert vocab.calls == -(-len(x) // options.get("chunk", 1024))
            return (loss.detach(), z), *torch.autograd.grad((loss + z) * d, [local_x, rows])
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return zip(*pool.map(rank, range(ranks)))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_sharded_vocabulary_equals_whole(ranks, chunk, dtype, size):
    """Parts of the losses and of dx add up to the whole, dw stacks to it; 101 words, so the last
    rank has fewer rows."""
    x, weight, labels = make(dtype)
    x = (x.detach() * size).requires_grad_()
    options = {"z_coeff": 1e-2 / size, "chunk": chunk}
    loss, z = kernels.linear_cross_entropy(x, weight, labels, 137.0, **options)
    whole = [loss, z, *torch.autograd.grad((loss + z) * 3, [x, weight])]
    losses, dx, dw = on_ranks(ranks, x, weight, labels, 137.0, **options)
    got = [sum(part) for part in (*zip(*losses), dx)] + [torch.cat(dw)]
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = naive(*wide, labels, 137.0, options["z_coeff"])
    want = [*want, *torch.autograd.grad(sum(want) * 3, wide)]
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for a, b, c in zip(got, whole, want):
        assert a.dtype == dtype and torch.isfinite(a).all()
        assert error(a, b) < limit and error(a, c) < limit


def test_sharded_vocabulary_counts_a_token_where_its_label_is():
    x, weight, labels = make()
    labels = labels.masked_fill((labels < 26) | (labels >= 52), -100)
    losses, *_ = on_ranks(4, x, weight, labels, 9.0, z_coeff=0.1, chunk=7)
    whole = kernels.linear_cross_entropy(x, weight, labels, 9.0, z_coeff=0.1)
    assert all(abs(part - want) < 1e-12 for part, want in zip(losses[1], whole)) and not any(
        map(any, (losses[0], *losses[2:]))
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sharded_vocabulary_without_valid_labels(ranks):
    x, weight, labels = make()
    losses, *grads = on_ranks(
        ranks, x, weight, torch.full_like(labels, -100), 1.0, z_coeff=0.1, chunk=10
    )
    assert all(loss == 0 and z == 0 for loss, z in losses) and not any(
        g.any() for gs in grads for g in gs
    )


@pytest.mark.parametrize("ranks", [0, 1, 2, 4])
@pytest.mark.parametrize("label", [V, -1, -99, -101, 1 << 40])
def test_labels_that_no_rank_has(ranks, label):
    """The same error with the whole vocabulary (0) and with a sharded one, on every rank."""
    x, weight, labels = make()
    labels[T // 2] = label
    barrier, slots = threading.Barrier(max(ranks, 1)), [None] * ranks
    shards = weight.detach().chunk(max(ranks, 1))

    def rank(r):
        vocab = Vocab(r, sum(map(len, shards[:r])), barrier, slots) if ranks else None
        with pytest.raises(RuntimeError, match="a label is no word of the vocabulary"):
            kernels.linear_cross_entropy(x, shards[r], labels, 9.0, vocab=vocab, chunk=7)

    with ThreadPoolExecutor() as pool:
        list(pool.map(rank, range(len(shards))))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("token", [8, -1, 1 << 40])
def test_tokens_that_no_rank_has(ranks, token):
    tokens = torch.tensor([3, token, 0, 7])
    for index in range(ranks):
        vocab = Vocabulary(Ranks("", ranks, index), 8)
        with pytest.raises(RuntimeError, match="a token is no word of the vocabulary"):
            vocab.embed(tokens, torch.ones(8 // ranks, 4))


def test_labels_are_checked_in_compiled_code():
    x, weight, labels = make()
    labels[0] = V
    compiled = torch.compile(kernels.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="a label is no word of the vocabulary"):
        compiled(x, weight, labels, 9.0)


def test_refusals():
    x, weight, labels = make()
    for message, args in (
        ("weight: shape", (x, weight[:, :3], labels)),
        ("weight: dtype", (x, weight.float(), labels)),
        ("labels: shape", (x, weight, labels[1:])),
        ("logits_dtype: torch.bfloat16 of x in torch.float64", (x, weight, labels)),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.linear_cross_entropy(*args, 1.0, logits_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="chunk: -1"):
        kernels.linear_cross_entropy(x, weight, labels, 1.0, chunk=-1)


@pytest.mark.gpu
def test_sums_of_products_on_a_gpu(monkeypatch):
    check_sums_of_products("cuda")
    monkeypatch.setattr(cross_entropy, "_adds_wide", lambda *_: False)
    check_sums_of_products("cuda")


@pytest.mark.gpu
def test_gpu_against_float64_and_memory():
    """A small case against float64, for 1, 7 and 64 chunks; 16k tokens, 151,936 words and width
    1024 in bf16 within 3 GiB."""
    for chunk in (512, 74, 8):
        x, weight, labels = make(torch.bfloat16, "cuda", (512, 128, 5000))
        loss, _ = kernels.linear_cross_entropy(x, weight, labels, 400.0, chunk=chunk)
        grads = torch.autograd.grad(loss, [x, weight])
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        want = naive(*wide, labels, 400.0, 0)[0]
        assert abs(loss.item() - want.item()) < 1e-4
        assert all(error(g, w) < 2.5e-3 for g, w in zip(grads, torch.autograd.grad(want, wide)))
    x = torch.randn(16384, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (
        torch.randn(151936, 1024, device="cuda", dtype=torch.bfloat16) * 0.02
    ).requires_grad_()
    labels, normaliser = (
        torch.randint(151936, (16384,), device="cuda"),
        torch.full((), 16384.0, device="cuda"),
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = kernels.linear_cross_entropy(x, weight, labels, normaliser, z_coeff=1e-4)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 3 * 2**30, peak
