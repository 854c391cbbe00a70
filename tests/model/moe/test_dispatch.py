import pytest
import torch

from lmoe.model.moe.dispatch import (
    Combine,
    LocalDispatch,
    RowIndex,
    gather_rows,
    invert,
    sort_by_expert,
    sum_copies,
)
from lmoe.model.moe.experts import IMPLEMENTATIONS, loop_experts
from tests.harness.compare import differences, run_layout
from tests.harness.layouts import words

T, K, E, D = 23, 3, 8, 5


def make_ids(tokens=T, experts=E, k=K):
    return torch.rand(tokens, experts).topk(k, dim=1).indices.sort(1).values


def test_rows_are_sorted_by_expert_and_then_by_token():
    ids = make_ids()
    permutation, inverse, counts = sort_by_expert(ids, E)
    rows = [(ids.flatten()[choice].item(), choice // K) for choice in permutation.tolist()]
    assert rows == sorted(rows)
    assert torch.equal(permutation[inverse.flatten()], torch.arange(T * K))
    assert torch.equal(counts, ids.flatten().bincount(minlength=E)) and counts.dtype == torch.int64


@pytest.mark.parametrize(
    "ids",
    [torch.full((6, 1), 5), torch.zeros(0, 2, dtype=torch.int64)],
    ids=["one hot", "no tokens"],
)
def test_counts_of_one_hot_and_of_nothing(ids):
    _, inverse, counts = sort_by_expert(ids, E)
    assert counts.sum() == ids.numel() and inverse.shape == ids.shape
    assert (counts > 0).sum() == (1 if ids.numel() else 0)


def test_dispatch_and_combine_equal_indexing_with_all_gradients():
    ids = make_ids()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(E, 1, dtype=torch.float64)  # a different "expert" for every row
    dispatch = LocalDispatch(E)
    plan = dispatch.begin(ids)
    source, index, counts = dispatch.dispatch(x, plan)
    rows = gather_rows(source, index)
    assert torch.equal(rows, source[index.rows])
    y = dispatch.combine(rows * scale.repeat_interleave(counts, 0), index, weights, plan)

    flat = torch.argsort(ids.flatten(), stable=True)
    plain = x.index_select(0, flat // K) * scale[ids.flatten()[flat]]
    expected = torch.zeros_like(x).index_add(0, flat // K, plain * weights.flatten()[flat, None])
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-14)
    dy = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (x, weights), dy), torch.autograd.grad(expected, (x, weights), dy)
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    plan = sort_by_expert(make_ids(5), E)
    x, rows = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (5, 5 * K))
    weights = torch.rand(5, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, plan.index), (x,))
    assert torch.autograd.gradcheck(
        lambda rows, weights: Combine.apply(rows, weights, *plan[:2]), (rows, weights)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_permutation_goes_back_unrounded(dtype):
    order = torch.randperm(T)
    source = torch.randn(T, D).to(dtype).requires_grad_()
    rows = gather_rows(source, RowIndex(order, invert(order)[:, None]))
    drows = torch.randn(T, D).to(dtype)
    (dsource,) = torch.autograd.grad(rows, source, drows)
    assert torch.equal(rows, source[order]) and torch.equal(dsource[order], drows)


def run_with_plain_indexing(layout):
    """run_layout with experts that index their source in plain autograd."""

    def plain(source, index, counts, w13, w2):
        same = torch.arange(len(index.rows))
        return loop_experts(source[index.rows], RowIndex(same, same[:, None]), counts, w13, w2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPLEMENTATIONS, "loop", plain)
        return run_layout(layout)


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize("axis", ["dp_shard", "tp", "ep"])
def test_every_dispatch_gives_a_source_and_an_index(pools, axis):
    layout = words({axis: 2})
    gathered, plain = (pools(2).run(f, layout) for f in (run_layout, run_with_plain_indexing))
    for a, b in zip(gathered, plain, strict=True):
        assert max(differences(a, b).values()) < 1e-9


def test_bfloat16_sums_round_once():
    """Both directions: the sum over K is taken in fp32 and rounded at the end, and weights'
    gradients stay fp32."""
    ids = make_ids(64, 16, 8)
    plan = sort_by_expert(ids, 16)
    copies = plan.inverse_permutation
    rows, weights, dy = (
        torch.randn(512, 32).bfloat16(),
        torch.rand(64, 8),
        torch.randn(64, 32).bfloat16(),
    )
    exact = (rows.double()[copies] * weights.double()[..., None]).sum(1)
    assert (sum_copies(rows, copies, weights) - exact).abs().max() <= exact.abs().max() * 2**-8
    exact = rows.double()[copies].sum(1)
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    (dx,) = torch.autograd.grad(gather_rows(x, plan.index), x, rows)
    assert torch.equal(dx, exact.float().bfloat16())
    rows.requires_grad_(), weights.requires_grad_()
    drows, dweights = torch.autograd.grad(
        Combine.apply(rows, weights, *plan[:2]), (rows, weights), dy
    )
    assert drows.dtype == torch.bfloat16 and dweights.dtype == torch.float32
    exact = (rows.detach().double()[copies] * dy.double()[:, None]).sum(2)
    torch.testing.assert_close(dweights.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_same_bits_and_no_wait_on_a_gpu():
    ids = make_ids(4096, 64, 8).cuda()
    x = torch.randn(4096, 256, device="cuda").bfloat16().requires_grad_()
    weights = torch.rand(4096, 8, device="cuda").requires_grad_()
    dispatch, dy = LocalDispatch(64), torch.randn(4096, 256, device="cuda").bfloat16()

    def run():
        plan = dispatch.begin(ids)
        source, index, _ = dispatch.dispatch(x, plan)
        y = dispatch.combine(gather_rows(source, index), index, weights, plan)
        return [y, *torch.autograd.grad(y, (x, weights), dy)]

    first = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
