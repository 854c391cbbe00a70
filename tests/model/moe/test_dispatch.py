import pytest
import torch

from lmoe.kernels.experts import combine_rows, gather_rows, sort_by_expert
from lmoe.model.moe.dispatch import LocalDispatch
from lmoe.model.moe.experts import IMPLEMENTATIONS, swiglu_experts
from tests.harness.compare import differences, run_layout
from tests.harness.layouts import words
from tests.model.moe.choices import choose

T, K, E, D = 23, 3, 8, 5
HERE = {"all": (8, 0), "some": (3, 4), "one": (1, 7)}  # (experts here, the first of them)


@pytest.mark.parametrize("held, first", HERE.values(), ids=HERE)
def test_rows_are_sorted_by_expert_and_then_by_token(held, first):
    ids = choose(T, K, E)
    plan = sort_by_expert(ids, held, first)
    here = [(e - first, c) for c, e in enumerate(ids.flatten().tolist()) if 0 <= e - first < held]
    rows = [choice for _, choice in sorted(here)]
    assert plan.rows[: len(rows)].tolist() == rows and len(plan.rows) == T * min(K, held)
    expected = torch.full((T * K,), -1, dtype=torch.int32)
    expected[rows] = torch.arange(len(rows), dtype=torch.int32)
    assert torch.equal(plan.places, expected.view(T, K))
    assert plan.counts.tolist() == [sum(e == n for e, _ in here) for n in range(held)]
    assert {t.dtype for t in plan[:3]} == {torch.int32}


@pytest.mark.parametrize(
    "ids",
    [torch.full((6, 1), 5), torch.zeros(0, 2, dtype=torch.int64)],
    ids=["one hot", "no tokens"],
)
def test_counts_of_one_hot_and_of_nothing(ids):
    plan = sort_by_expert(ids, E)
    assert plan.counts.sum() == ids.numel() and plan.places.shape == ids.shape
    assert (plan.counts > 0).sum() == (1 if ids.numel() else 0)


@pytest.mark.parametrize("held, first", HERE.values(), ids=HERE)
def test_gather_and_combine_equal_indexing_with_all_gradients(held, first):
    ids = choose(T, K, E)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(E, dtype=torch.float64)  # a different "expert" for every row
    plan = sort_by_expert(ids, held, first)
    rows = gather_rows(x, plan)
    y = combine_rows(rows * scale[ids.flatten()[plan.rows.long()]][:, None], weights, plan)
    here = (ids >= first) & (ids < first + held)
    expected = ((weights * scale[ids] * here)[..., None] * x[:, None]).sum(1)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-14)
    dy = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (x, weights), dy), torch.autograd.grad(expected, (x, weights), dy)
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("held, first", HERE.values(), ids=HERE)
def test_gradcheck(held, first):
    plan = sort_by_expert(choose(5, K, E), held, first)
    rows = len(plan.rows)
    x, y = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (5, rows))
    weights = torch.rand(5, K, dtype=torch.float64, requires_grad=True)
    there = torch.arange(rows)[:, None] < plan.ends[-1]
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, plan) * there, (x,))
    for w in (weights, None):
        # Rows beyond those of choices have no gradient that anyone reads.
        f = lambda y, w=w: combine_rows(y * there, w, plan)  # noqa: E731
        assert torch.autograd.gradcheck(f, (y,))
    assert torch.autograd.gradcheck(lambda w: combine_rows(y.detach(), w, plan), (weights,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_permutation_goes_back_unrounded(dtype):
    plan = sort_by_expert(torch.randint(0, E, (T, 1)), E)
    x = torch.randn(T, D).to(dtype).requires_grad_()
    rows = gather_rows(x, plan)
    drows = torch.randn(T, D).to(dtype)
    (dx,) = torch.autograd.grad(rows, x, drows)
    order = plan.rows.long()
    assert torch.equal(rows, x[order]) and torch.equal(dx[order], drows)
    assert torch.equal(combine_rows(drows, None, plan)[order], drows)


def plain_experts(x, weights, plan, w13, w2):
    """One choice at a time, in plain autograd."""
    y = [x[0] * 0 for _ in x] if len(x) else []
    ends = plan.ends.tolist()
    for row, choice in enumerate(plan.rows[: ends[-1]].tolist()):
        e = next(e for e, end in enumerate(ends) if row < end)
        t, k = divmod(choice, plan.places.shape[1])
        h = torch.nn.functional.silu(w13[e, 0] @ x[t]) * (w13[e, 1] @ x[t])
        out = w2[e] @ h
        y[t] = y[t] + (out if weights is None else weights[t, k] * out)
    # What nobody used has gradients of zero too.
    unused = w13.sum() + w2.sum() + (0 if weights is None else weights.sum())
    return (torch.stack(y) if y else x) + 0 * unused


def run_with_plain_indexing(layout):
    """run_layout with experts that take one choice at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPLEMENTATIONS, "loop", plain_experts)
        return run_layout(layout, steps=1)


LAYOUTS = [
    {"dp_shard": 2},
    {"tp": 2},
    {"tp": 2, "ep": 1},
    {"ep": 2},
    {"ep": 2, "ep_method": "all_to_all"},
]


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_dispatch_brings_what_plain_indexing_needs(pools, layout):
    layout = words(layout)
    found = pools(2).run(run_layout, layout, 1)
    plain = pools(2).run(run_with_plain_indexing, layout)
    for a, b in zip(found, plain, strict=True):
        assert max(differences(a, b).values()) < 1e-9


def test_bfloat16_sums_round_once():
    """Both directions: the sum over K is taken in fp32 and rounded at the end, and weights'
    gradients stay fp32."""
    plan = sort_by_expert(choose(64, 8, 16), 16)
    copies = plan.places.long()
    rows, weights, dy = (
        torch.randn(512, 32).bfloat16(),
        torch.rand(64, 8),
        torch.randn(64, 32).bfloat16(),
    )
    exact = (rows.double()[copies] * weights.double()[..., None]).sum(1)
    assert (combine_rows(rows, weights, plan) - exact).abs().max() <= exact.abs().max() * 2**-8
    exact = rows.double()[copies].sum(1)
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    (dx,) = torch.autograd.grad(gather_rows(x, plan), x, rows)
    assert torch.equal(dx, exact.float().bfloat16())
    rows.requires_grad_(), weights.requires_grad_()
    y = combine_rows(rows, weights, plan)
    drows, dweights = torch.autograd.grad(y, (rows, weights), dy)
    assert drows.dtype == torch.bfloat16 and dweights.dtype == torch.float32
    exact = (rows.detach().double()[copies] * dy.double()[:, None]).sum(2)
    torch.testing.assert_close(dweights.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_same_bits_and_no_wait_on_a_gpu():
    ids = choose(4096, 8, 64).cuda()
    x, dy = (torch.randn(4096, 256, device="cuda").bfloat16() for _ in range(2))
    weights = torch.rand(4096, 8, device="cuda")
    w13, w2 = (torch.randn(64, *shape, device="cuda") for shape in ((2, 128, 256), (256, 128)))
    leaves = [t.requires_grad_() for t in (x, weights, w13.bfloat16(), w2.bfloat16())]
    dispatch = LocalDispatch(64)

    def run():
        def experts(x, weights, plan):
            return swiglu_experts(x, weights, plan, *leaves[2:])

        y = dispatch.run(experts, *leaves[:2], dispatch.begin(ids))
        return [y, *torch.autograd.grad(y, leaves, dy)]

    first = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
