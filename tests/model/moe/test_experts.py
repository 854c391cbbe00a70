import pytest
import torch

from lmoe.kernels.experts import sort_by_expert
from lmoe.model.config import MoEConfig
from lmoe.model.moe.experts import Experts, loop_experts, swiglu_experts
from tests.model.moe.choices import choose, choose_counts
from tests.model.moe.test_dispatch import plain_experts

# name -> (choices, experts here, the first of them)
CASES = {
    "uneven": (choose_counts([3, 0, 5, 1]), 4, 0),
    "one hot": (choose_counts([0, 0, 13, 0]), 4, 0),
    "first and last empty": (choose_counts([0, 7, 4, 0]), 4, 0),
    "one row": (choose_counts([0, 0, 0, 1]), 4, 0),
    "no rows": (choose_counts([0, 0, 0, 0]), 4, 0),
    "many": (choose_counts([130, 1, 67, 259]), 4, 0),
    "three each": (choose(40, 3, 6), 6, 0),
    "all of them": (choose(7, 4, 4), 4, 0),
    "some here": (choose(40, 3, 6), 2, 3),
    "fewer than choices": (choose(40, 3, 6), 1, 5),
    "none chosen": (choose(9, 2, 4), 3, 4),
}
IMPLEMENTATIONS = [loop_experts, swiglu_experts]
cases = pytest.mark.parametrize("case", CASES)
weighted = pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])


def make_inputs(case, weighted=True, dim=16, hidden=24, dtype=torch.float64, device="cpu"):
    """(x, weights or None, plan, w13, w2, gradient of the output)."""
    ids, held, first = CASES[case] if isinstance(case, str) else case
    shapes = [len(ids), dim], [held, 2, hidden, dim], [held, dim, hidden]
    x, w13, w2 = (
        (torch.randn(shape) / (shape[-1] ** 0.5 if n else 1)).to(device, dtype)
        for n, shape in enumerate(shapes)
    )
    weights = torch.rand(ids.shape).to(device, torch.promote_types(dtype, torch.float32))
    dy = torch.randn(len(ids), dim).to(device, dtype)
    plan = sort_by_expert(ids.to(device), held, first)
    return x, weights if weighted else None, plan, w13, w2, dy


def run(fn, x, weights, plan, w13, w2, dy, dtype=None):
    """Output and all gradients of fn, computed in `dtype`."""
    wide = torch.promote_types(dtype or x.dtype, torch.float32)
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, w13, w2)]
    weights = None if weights is None else weights.detach().to(wide).requires_grad_()
    y = fn(leaves[0], weights, plan, *leaves[1:])
    leaves += [] if weights is None else [weights]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@cases
@weighted
@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
def test_equals_one_choice_at_a_time_in_float64(fn, case, weighted):
    inputs = make_inputs(case, weighted)
    for actual, expected in zip(run(fn, *inputs), run(plain_experts, *inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def agree(case, weighted, dtype, bound, **sizes):
    """Both against float64: grouped may be no worse than the loop by more than a tenth, and within
    a few roundings of the truth."""
    inputs = make_inputs(case, weighted, dtype=dtype, **sizes)
    truth = run(loop_experts, *inputs, dtype=torch.float64)
    loop, grouped = (run(fn, *inputs) for fn in IMPLEMENTATIONS)
    for n, (expected, a, b) in enumerate(zip(truth, loop, grouped, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        error = relative_error(b, expected)
        if n == 4:  # the weights' gradient: inner products, of which terms may cancel
            assert error <= 5 * bound
            continue
        assert error <= bound and error <= 1.1 * relative_error(a, expected) + bound / 10


@cases
@weighted
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_grouped_equals_loop(case, weighted, dtype, bound):
    agree(case, weighted, dtype, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
def test_gradients_are_whole_contiguous_and_zero_for_empty_experts(fn, dtype):
    """Also for an expanded gradient, which torch's grouped_mm itself refuses."""
    x, weights, plan, w13, w2, _ = make_inputs((choose_counts([5, 0, 4, 0]), 4, 0), dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, w13, w2)]
    fn(x, weights, plan, w13, w2).sum().backward()
    for p in leaves:
        assert p.grad.is_contiguous() and p.grad.shape == p.shape and p.grad.isfinite().all()
    for p in (w13, w2):
        assert (p.grad[plan.counts == 0] == 0).all() and (
            p.grad[plan.counts > 0].flatten(1).abs().sum(1) > 0
        ).all()


@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
def test_frozen_weights_and_inputs_get_no_gradient(fn):
    x, weights, plan, w13, w2, dy = make_inputs("three each")
    everything = run(fn, x, weights, plan, w13, w2, dy)[1:]
    for number, leaf in enumerate((x, w13, w2, weights)):
        leaf.requires_grad_()
        fn(x, weights, plan, w13, w2).backward(dy)
        torch.testing.assert_close(leaf.grad, everything[number])
        assert sum(t.grad is not None for t in (x, w13, w2, weights)) == 1
        leaf.requires_grad_(False).grad = None


@pytest.mark.parametrize("fn", IMPLEMENTATIONS)
def test_gradcheck(fn):
    case = choose(5, 2, 4), 2, 1
    x, weights, plan, w13, w2, _ = make_inputs(case, dim=3, hidden=2)
    leaves = [t.requires_grad_() for t in (x, weights, w13, w2)]
    assert torch.autograd.gradcheck(lambda x, w, *rest: fn(x, w, plan, *rest), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["three each", "some here", "no rows"])
def test_registered_ops(dtype, case):
    """Schema, fake implementation, autograd registration and tracing, as torch checks them."""
    x, weights, plan, w13, w2, dy = make_inputs(case, dtype=dtype)
    ops = torch.ops.lmoe
    plan, kept = plan[:3], plan.kept
    y = torch.randn(len(plan[0]), x.shape[1]).to(dtype)
    h = ops.experts.default(x, None, *plan, w13, w2, kept)[1]
    # Rows beyond those of choices are never written, so no two runs agree there.
    whole = ("test_schema", "test_faketensor", "test_autograd_registration")
    tests = whole if case == "some here" else (*whole, "test_aot_dispatch_static")
    ids, held, first = CASES[case]
    lx, lweights, lw13, lw2 = (t.detach().requires_grad_() for t in (x, weights, w13, w2))
    every = [True] * 3
    for op, arguments in (
        (ops.sort_by_expert, (ids, held, first)),
        (ops.gather_rows, (lx, *plan)),
        (ops.combine_rows, (y, lweights, *plan)),
        (ops.combine_rows, (y, None, *plan)),
        (ops.experts, (lx, lweights, *plan, lw13, lw2, kept)),
        (ops.experts, (lx, None, *plan, lw13, lw2, kept)),
        (ops.experts_bwd, (dy, x, weights, *plan, w13, w2, h, every)),
        (ops.experts_bwd, (dy, x, None, *plan, w13, w2, h, [False, True, False])),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=tests, rtol=0.02, atol=0.02)


def for_rows_kept(case, **options):
    """(how many rows are kept, results) for some numbers, all of them first."""
    x, weights, plan, *rest = make_inputs(case, **options)
    for kept in [len(plan.rows), 0, 1, int(plan.ends[0]), len(plan.rows) // 2, plan.kept]:
        yield kept, run(swiglu_experts, x, weights, plan._replace(kept=kept), *rest)


@pytest.mark.parametrize("case", ["three each", "some here", "many", "none chosen"])
def test_how_many_rows_are_kept_changes_nothing(case):
    (_, expected), *others = for_rows_kept(case)
    for kept, found in others:
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=str(kept))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_many_rows_are_kept_changes_no_bit_on_a_gpu(dtype):
    sizes = {"dim": 256, "hidden": 128, "device": "cuda", "dtype": dtype}
    (_, expected), *others = for_rows_kept((choose(4096, 8, 64), 16, 16), **sizes)
    for kept, found in others:
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), kept


def test_what_is_kept():
    """x, the plan, the weights and h; of h a quarter more than the rows of equally popular
    experts."""
    x, weights, _, w13, w2, _ = make_inputs("three each")
    ids = choose(64, 3, 8)
    x, weights = torch.randn(64, 16, dtype=torch.float64), torch.rand(64, 3, dtype=torch.float64)
    plan = sort_by_expert(ids, 2, 4, 8)
    assert len(plan.rows) == 2 * 64 and plan.kept == 1.25 * 64 * 3 / 4
    sizes = []

    def pack(t):
        sizes.append(t.numel())
        return t

    leaves = [t.requires_grad_() for t in (x, weights, w13[:2].detach(), w2[:2].detach())]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        swiglu_experts(*leaves[:2], plan, *leaves[2:])
    kept = [t.numel() for t in (*leaves, *plan[:3])] + [plan.kept * 2 * 24]
    assert sorted(sizes) == sorted(kept)


def test_same_inputs_same_bits():
    inputs = make_inputs("three each", dtype=torch.float32)
    first, second = run(swiglu_experts, *inputs), run(swiglu_experts, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dim, hidden, key", [(12, 16, "model.dim"), (16, 20, "moe.hidden")])
def test_sizes_that_grouped_mm_cannot_take_are_refused(dim, hidden, key):
    with pytest.raises(ValueError, match=f"moe.impl.*{key}"):
        Experts(dim, MoEConfig(hidden=hidden), std=0.1, layers=1)
    Experts(dim, MoEConfig(hidden=hidden, impl="loop"), std=0.1, layers=1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, "large", "large zipf"])
@weighted
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_grouped_equals_loop_on_a_gpu(case, weighted, dtype, bound):
    large = {name: (choose(4096, 8, 64, zipf="zipf" in name), 64, 0) for name in (case,)}
    case = large[case] if case.startswith("large") else case
    agree(case, weighted, dtype, bound, dim=256, hidden=128, device="cuda")


@pytest.mark.gpu
def test_grouped_does_not_wait_for_the_gpu():
    inputs = make_inputs("some here", dim=256, hidden=128, device="cuda", dtype=torch.bfloat16)
    run(swiglu_experts, *inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(swiglu_experts, *inputs)
        with pytest.raises(RuntimeError):  # the check itself sees a synchronisation
            run(swiglu_experts, *inputs, dtype=torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
