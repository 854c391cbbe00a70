import pytest
import torch
import torch.nn.functional as F

from lmoe.kernels.grouped import grouped_mm
from lmoe.model.config import MoEConfig
from lmoe.model.moe.experts import Experts, grouped_experts, loop_experts

COUNTS = {
    "uneven": [3, 0, 5, 1],
    "one hot": [0, 0, 13, 0],
    "first and last empty": [0, 7, 4, 0],
    "one row": [0, 0, 0, 1],
    "no rows": [0, 0, 0, 0],
    "many": [130, 1, 67, 259],
}


def make_inputs(counts, dim=16, hidden=24, dtype=torch.float64, device="cpu"):
    E, R = len(counts), sum(counts)
    inputs = [
        torch.randn(R, dim),
        torch.randn(E, 2, hidden, dim) / dim**0.5,
        torch.randn(E, dim, hidden) / hidden**0.5,
    ]
    rows, w13, w2 = (t.to(device, dtype).requires_grad_() for t in inputs)
    return rows, torch.tensor(counts, device=device), w13, w2, torch.randn(R, dim).to(device, dtype)


def run(fn, rows, counts, w13, w2, dy, dtype=None):
    """Output and all gradients of fn, computed in `dtype`."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (rows, w13, w2)]
    y = fn(leaves[0], counts, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def naive(rows, counts, w13, w2):
    """One row at a time."""
    out, expert = [], torch.arange(len(counts)).repeat_interleave(counts)
    for x, e in zip(rows, expert.tolist()):
        out.append(w2[e] @ (F.silu(w13[e, 0] @ x) * (w13[e, 1] @ x)))
    return torch.stack(out) if out else rows[:0] * w13.sum() * w2.sum()


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("fn", [loop_experts, grouped_experts])
def test_equals_one_row_at_a_time_in_float64(fn, counts):
    inputs = make_inputs(counts)
    for actual, expected in zip(run(fn, *inputs), run(naive, *inputs)):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_grouped_equals_loop(counts, dtype, bound):
    """Both against float64: grouped may be no worse than the loop by more than a tenth, and within
    a few roundings of the truth."""
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in make_inputs(counts)]
    truth = run(loop_experts, *inputs, dtype=torch.float64)
    loop, grouped = run(loop_experts, *inputs), run(grouped_experts, *inputs)
    for expected, a, b in zip(truth, loop, grouped):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape
        error = relative_error(b, expected)
        assert error <= bound and error <= 1.1 * relative_error(a, expected) + bound / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fn", [loop_experts, grouped_experts])
def test_gradients_are_whole_contiguous_and_zero_for_empty_experts(fn, dtype):
    """Also for an expanded gradient, which grouped_mm itself refuses."""
    rows, counts, w13, w2, _ = make_inputs([5, 0, 4, 0], dtype=dtype)
    fn(rows, counts, w13, w2).sum().backward()
    for p in (rows, w13, w2):
        assert p.grad.is_contiguous() and p.grad.shape == p.shape and p.grad.isfinite().all()
    for p in (w13, w2):
        assert (p.grad[counts == 0] == 0).all() and (
            p.grad[counts > 0].flatten(1).abs().sum(1) > 0
        ).all()


def test_gradcheck():
    rows, counts, w13, w2, _ = make_inputs([2, 0, 1], dim=3, hidden=2)
    for fn in (loop_experts, grouped_experts):
        assert torch.autograd.gradcheck(
            lambda *leaves, fn=fn: fn(leaves[0], counts, *leaves[1:]), (rows, w13, w2)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 0]])
def test_registered_ops(dtype, counts):
    """Schema, fake implementation, autograd registration and tracing, as torch checks them."""
    x, w = (
        torch.randn(sum(counts), 16, dtype=dtype, requires_grad=True),
        torch.randn(3, 8, 16, dtype=dtype, requires_grad=True),
    )
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.lmoe.grouped_mm.default, (x, w, ends, True), rtol=0.02, atol=0.02
    )
    torch.library.opcheck(
        torch.ops.lmoe.grouped_mm.default, (x.detach()[:, :8], w, ends, False), rtol=0.02, atol=0.02
    )
    torch.library.opcheck(
        torch.ops.lmoe.grouped_outer.default,
        (torch.randn(sum(counts), 8, dtype=dtype), x.detach(), ends),
    )


def test_same_inputs_same_bits():
    inputs = make_inputs(COUNTS["many"], dtype=torch.float32)
    first, second = run(grouped_experts, *inputs), run(grouped_experts, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dim, hidden, key", [(12, 16, "model.dim"), (16, 20, "moe.hidden")])
def test_sizes_that_grouped_mm_cannot_take_are_refused(dim, hidden, key):
    with pytest.raises(ValueError, match=f"moe.impl.*{key}"):
        Experts(dim, MoEConfig(hidden=hidden), std=0.1, layers=1)
    Experts(dim, MoEConfig(hidden=hidden, impl="loop"), std=0.1, layers=1)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [*COUNTS.values(), [2048] * 8], ids=[*COUNTS, "large"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_grouped_equals_loop_on_a_gpu(counts, dtype, bound):
    inputs = make_inputs(counts, dim=256, hidden=128, device="cuda", dtype=dtype)
    truth = run(loop_experts, *inputs, dtype=torch.float64)
    loop, grouped = run(loop_experts, *inputs), run(grouped_experts, *inputs)
    for expected, a, b in zip(truth, loop, grouped):
        error = relative_error(b, expected)
        assert error <= bound and error <= 1.1 * relative_error(a, expected) + bound / 10


@pytest.mark.gpu
def test_grouped_does_not_wait_for_the_gpu():
    inputs = make_inputs(
        [2048, 0, 7, 300], dim=256, hidden=128, device="cuda", dtype=torch.bfloat16
    )
    run(grouped_experts, *inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(grouped_experts, *inputs)
        ends = inputs[1].cumsum(0, dtype=torch.int32)
        with pytest.raises(RuntimeError):  # the check itself sees a synchronisation
            grouped_mm(inputs[0].float(), inputs[2].flatten(1, 2).float(), ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
