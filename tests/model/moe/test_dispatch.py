import pytest
import torch

from lmoe.model.moe.dispatch import Combine, LocalDispatch, Permute, gather_sum, sort_slots

T, K, E, D = 23, 3, 8, 5


def make_ids(tokens=T, experts=E, k=K):
    return torch.rand(tokens, experts).topk(k, dim=1).indices.sort(1).values


def test_rows_are_sorted_by_expert_and_then_by_token():
    ids = make_ids()
    order, slots, counts = sort_slots(ids, E)
    rows = [(ids.flatten()[slot].item(), slot // K) for slot in order.tolist()]
    assert rows == sorted(rows)
    assert torch.equal(order[slots.flatten()], torch.arange(T * K))
    assert torch.equal(counts, ids.flatten().bincount(minlength=E)) and counts.dtype == torch.int64


@pytest.mark.parametrize(
    "ids",
    [torch.full((6, 1), 5), torch.zeros(0, 2, dtype=torch.int64)],
    ids=["one hot", "no tokens"],
)
def test_counts_of_one_hot_and_of_nothing(ids):
    order, slots, counts = sort_slots(ids, E)
    assert (
        counts.sum() == ids.numel()
        and slots.shape == ids.shape
        and (counts > 0).sum() == (1 if ids.numel() else 0)
    )


def test_dispatch_and_combine_equal_indexing_with_all_gradients():
    ids = make_ids()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(E, 1, dtype=torch.float64)  # a different "expert" for every row
    dispatch = LocalDispatch(E)
    rows, counts, handle = dispatch.dispatch(x, weights, dispatch.begin(ids))
    y = dispatch.combine(rows * scale.repeat_interleave(counts, 0), handle)

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
    order, slots, _ = sort_slots(make_ids(5), E)
    x, rows = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (5, 5 * K))
    weights = torch.rand(5, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Permute.apply(x, order, slots), (x,))
    assert torch.autograd.gradcheck(
        lambda rows, weights: Combine.apply(rows, weights, order, slots), (rows, weights)
    )


def test_bfloat16_sums_round_once():
    """Both directions: the sum over K is taken in fp32 and rounded at the end, and weights'
    gradients stay fp32."""
    ids = make_ids(64, 16, 8)
    order, slots, _ = sort_slots(ids, 16)
    rows, weights, dy = (
        torch.randn(512, 32).bfloat16(),
        torch.rand(64, 8),
        torch.randn(64, 32).bfloat16(),
    )
    exact = (rows.double()[slots] * weights.double()[..., None]).sum(1)
    assert (gather_sum(rows, slots, weights) - exact).abs().max() <= exact.abs().max() * 2**-8
    exact = rows.double()[slots].sum(1)
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    (dx,) = torch.autograd.grad(Permute.apply(x, order, slots), x, rows)
    assert torch.equal(dx, exact.float().bfloat16())
    rows.requires_grad_(), weights.requires_grad_()
    drows, dweights = torch.autograd.grad(
        Combine.apply(rows, weights, order, slots), (rows, weights), dy
    )
    assert drows.dtype == torch.bfloat16 and dweights.dtype == torch.float32
    exact = (rows.detach().double()[slots] * dy.double()[:, None]).sum(2)
    torch.testing.assert_close(dweights.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_same_bits_and_no_wait_on_a_gpu():
    ids = make_ids(4096, 64, 8).cuda()
    x = torch.randn(4096, 256, device="cuda").bfloat16().requires_grad_()
    weights = torch.rand(4096, 8, device="cuda").requires_grad_()
    dispatch, dy = LocalDispatch(64), torch.randn(4096, 256, device="cuda").bfloat16()

    def run():
        rows, _, handle = dispatch.dispatch(x, weights, dispatch.begin(ids))
        y = dispatch.combine(rows, handle)
        return [y, *torch.autograd.grad(y, (x, weights), dy)]

    first = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
