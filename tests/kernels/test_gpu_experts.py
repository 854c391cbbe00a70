"""Triton kernels around the experts' products against the portable form, on the CPU through
Triton's interpreter."""

import contextlib
import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
pytest.importorskip("triton")

from lmoe.kernels import experts  # noqa: E402
from lmoe.kernels.choice import forced  # noqa: E402
from tests.model.moe.choices import choose  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (tokens, choices, experts in all, here, the first of these, width, hidden width)
SIZES = [
    (23, 3, 8, 8, 0, 16, 24),
    (70, 8, 64, 32, 16, 40, 72),
    (20, 4, 200, 200, 0, 8, 136),
    (10, 1, 4, 1, 3, 8, 8),
    (5, 2, 4, 1, 2, 16, 8),
    (0, 2, 4, 4, 0, 16, 8),
]
LARGE = [
    (4096, 8, 64, 64, 0, 1024, 896),
    (16384, 8, 64, 16, 16, 256, 128),
    (2048, 8, 512, 512, 0, 256, 128),
]


@contextlib.contextmanager
def of_form(form):
    """Take a form; of the kernels with every empty tensor filled with NaN: rows that nobody writes
    must not be read."""
    torch.use_deterministic_algorithms(form == "triton")
    try:
        with forced(form):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def results(form, sizes, dtype, weighted, wide=None):
    """The plan, y and all gradients; dtype: what inputs are rounded to, wide: what they are
    computed in."""
    tokens, k, every, here, first, dim, hidden = sizes
    torch.manual_seed(0)
    ids = choose(tokens, k, every, zipf=True)
    shapes = (tokens, dim), (here, 2, hidden, dim), (here, dim, hidden), (tokens, dim)
    wide = wide or dtype
    x, w13, w2, dy = (torch.randn(s).to(DEVICE, dtype).to(wide) for s in shapes)
    weights = torch.rand(tokens, k).to(DEVICE, torch.promote_types(wide, torch.float32))
    leaves = [x, w13, w2] + [weights] * weighted
    leaves = [t.requires_grad_() for t in leaves]
    with of_form(form):
        plan = experts.sort_by_expert(ids.to(DEVICE), here, first, every)
        y = experts.swiglu_experts(x, weights if weighted else None, plan, w13, w2)
        return plan, [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def compare(sizes, dtype, weighted, bound):
    plan, found = results("triton", sizes, dtype, weighted)
    expected, truth = results("portable", sizes, dtype, weighted, wide=torch.float64)
    _, other = results("portable", sizes, dtype, weighted)
    again = results("triton", sizes, dtype, weighted)[1] if DEVICE == "cuda" else found
    rows = int(plan.ends[-1])
    assert torch.equal(plan.rows[:rows], expected.rows[:rows])
    assert torch.equal(plan.places, expected.places) and torch.equal(plan.ends, expected.ends)
    for a, b, want, same in zip(found, other, truth, again, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, same)
        error = relative_error(a, want)
        assert error <= bound and error <= 1.1 * relative_error(b, want) + bound / 10


@pytest.mark.parametrize(
    "sizes, weighted", [*((sizes, True) for sizes in SIZES), (SIZES[0], False)], ids=str
)
def test_kernels(sizes, weighted):
    compare(sizes, torch.float32, weighted, 2e-6 if DEVICE == "cpu" else 1e-5)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_of_their_own(sizes):
    """Gather and combine, with and without weights, both ways."""
    tokens, k, every, here, first, dim, _ = sizes
    ids = choose(tokens, k, every).to(DEVICE)
    given = torch.randn(tokens, dim), torch.rand(tokens, k), torch.randn(tokens, dim)
    results = []
    for form in ("portable", "triton"):
        with of_form(form):
            plan = experts.sort_by_expert(ids, here, first)
            x, weights, dy = (t.to(DEVICE).requires_grad_() for t in given)
            rows = experts.gather_rows(x, plan)
            for w in (weights, None):
                y = experts.combine_rows(rows, w, plan)
                leaves = [x] if w is None else [x, weights]
                gradients = torch.autograd.grad(y, leaves, dy, retain_graph=True)
                results.append([y.detach(), *gradients])
    for want, got in zip(results[:2], results[2:], strict=True):
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("T, E, K", [(37, 8, 2), (1, 3, 3), (9, 64, 8), (5, 200, 1), (0, 8, 2)])
def test_the_choice_of_experts(T, E, K):
    scores = torch.randn(T, E)
    scores[::2] = scores[::2].round()  # ties
    scores[1::4, ::2] = -torch.inf
    scores[2::4, 1] = torch.inf
    scores[3::4, :2] = torch.tensor([torch.nan, -torch.nan])
    scores[4::5] = torch.tensor([0.0, -0.0]).repeat(E)[:E]
    with forced("portable"):
        want = experts.choose(scores, K)
    with forced("triton"):
        assert torch.equal(experts.choose(scores.to(DEVICE), K).cpu(), want)


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("sizes", SIZES + LARGE, ids=str)
def test_kernels_in_bf16(sizes, weighted):
    compare(sizes, torch.bfloat16, weighted, 1e-2)
