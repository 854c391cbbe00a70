"""Triton norms, convolution and elementwise kernels against the portable functions in float64; on
the CPU through Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined
pytest.importorskip("triton")

from lmoe.kernels import conv, norm  # noqa: E402
from lmoe.kernels import pointwise as portable  # noqa: E402
from lmoe.kernels.gpu import conv as gpu_conv  # noqa: E402
from lmoe.kernels.gpu import norm as gpu_norm  # noqa: E402
from lmoe.kernels.gpu import pointwise  # noqa: E402
from lmoe.model.norm import HeadGroupNorm, WideRMSNorm  # noqa: E402
from lmoe.model.rope import rope  # noqa: E402
from tests.kernels.ops import error, randn  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 16), (2, 300), (17, 60), (130, 100), (17, 128)]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 5e-3)}


def agree(got, want, inputs, dtype=torch.float32, wide=()):
    """Outputs and all gradients of got(**inputs) in `dtype` against want(**inputs) in float64.

    inputs: float64 tensors, integer tensors and None by name; those in `wide` stay fp32.
    """
    results, dy = [], None
    for f, target in ((want, torch.float64), (got, dtype)):
        leaves = {}
        for name, x in inputs.items():
            if x is not None and x.is_floating_point():
                # Rounded for both, so that only the arithmetic differs; transposed, so that the
                # strides are odd.
                x = x.to(DEVICE).to(torch.float32 if name in wide else dtype)
                x = (
                    x.to(torch.promote_types(target, x.dtype))
                    .transpose(0, -1)
                    .contiguous()
                    .transpose(0, -1)
                    .requires_grad_()
                )
            leaves[name] = x if x is None else x.to(DEVICE)
        y = f(**leaves)
        if dy is None:
            dy = randn(torch.Generator().manual_seed(9), *y.shape).to(DEVICE).to(dtype).double()
        wanted = [x for x in leaves.values() if x is not None and x.requires_grad]
        results.append([y, *torch.autograd.grad(y, wanted, dy.to(y.dtype), allow_unused=True)])
    assert results[1][0].shape == results[0][0].shape and results[1][0].is_contiguous()
    for i, (b, a) in enumerate(zip(*results)):
        if b is None or not b.numel() or not b.any():
            assert a is None or not a.any()
        else:
            assert error(a, b) < LIMITS[dtype][i > 0], (i, error(a, b))
    assert results[1][0].dtype == dtype


def documents(T, cuts):
    """positions [T] of documents that start at 0 and at `cuts`; a first cut of -n: n tokens of the
    first document came before."""
    before = -cuts[0] if cuts and cuts[0] < 0 else 0
    starts = [-before, *(c for c in cuts if 0 < c < T), T]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(starts, starts[1:])])
    return positions[before:]


NORMS = {
    "plain": (norm.rms_norm, gpu_norm.rms_norm, {}),
    "weightless": (norm.rms_norm, gpu_norm.rms_norm, {}),
    "silu": (norm.gated_rms_norm, gpu_norm.gated_rms_norm, {"activation": "silu"}),
    "sigmoid": (norm.gated_rms_norm, gpu_norm.gated_rms_norm, {"activation": "sigmoid"}),
    "ungated": (norm.gated_rms_norm, gpu_norm.gated_rms_norm, {}),
}


def check_norm(kind, T, D, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T + D)
    want, got, options = NORMS[kind]
    x, gate, weight = randn(generator, T, 2, D) * 3, randn(generator, T, 2, D), randn(generator, D)
    inputs = {
        "x" if want is norm.rms_norm else "o": x,
        "weight": None if kind == "weightless" else weight,
    }
    if want is norm.gated_rms_norm:
        inputs["gate"] = None if kind == "ungated" else gate
    agree(
        lambda **t: got(**t, eps=1e-5, **options),
        lambda **t: want(**t, eps=1e-5, **options),
        inputs,
        dtype,
        ("weight",),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", NORMS)
def test_rms_norm(kind, shape):
    check_norm(kind, *shape)


def check_wide(gate_first, gated, groups, activation, dtype=torch.float32, T=17, H=6, V=20):
    generator = torch.Generator().manual_seed(groups)
    module = WideRMSNorm(H * V, 1e-5, activation, groups, gate_first)

    def want(o, weight, gate):
        return torch.func.functional_call(module, {"weight": weight}, (o, gate))

    def got(o, weight, gate):
        return gpu_norm.wide_rms_norm(
            o, weight, gate, 1e-5, H * V // groups, activation, gate_first
        )

    inputs = {
        "o": randn(generator, T, H, V),
        "weight": randn(generator, H * V),
        "gate": randn(generator, T, H, V) if gated else None,
    }
    agree(got, want, inputs, dtype, ("weight",))


@pytest.mark.parametrize(
    "gate_first, gated, groups, activation",
    [
        (True, True, 1, "silu"),
        (True, True, 3, "silu"),
        (True, True, 2, "sigmoid"),
        (False, True, 2, "silu"),
        (False, True, 1, "sigmoid"),
        (True, False, 3, "silu"),
    ],
)
def test_wide_rms_norm(gate_first, gated, groups, activation):
    check_wide(gate_first, gated, groups, activation)


def check_head_group(T, H, V, activation, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T + V)
    module = HeadGroupNorm(H * V, 64e-5, activation)

    def want(o, weight, bias, gate):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (o, gate))

    inputs = {"o": 2 + randn(generator, T, H, V), "gate": randn(generator, T, H, V)}
    inputs |= {"weight": randn(generator, H * V), "bias": randn(generator, H * V)}
    agree(
        lambda **t: gpu_norm.head_group_norm(**t, eps=64e-5, activation=activation),
        want,
        inputs,
        dtype,
        ("weight", "bias"),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_head_group_norm(shape, activation):
    check_head_group(shape[0], 3, shape[1], activation)


@pytest.mark.parametrize("shape", SHAPES)
def test_l2norm(shape):
    x = randn(torch.Generator().manual_seed(1), shape[0], 2, shape[1])
    x[0, 0] = 0
    agree(gpu_norm.l2norm, norm.l2norm, {"x": x})
    low = x.to(DEVICE, torch.bfloat16)
    assert (
        gpu_norm.l2norm(low, wide=True).dtype == norm.l2norm(low, wide=True).dtype == torch.float32
    )
    assert error(gpu_norm.l2norm(low, wide=True), norm.l2norm(low.double(), wide=True)) < 1e-5


def test_norm_programs_with_several_blocks(monkeypatch):
    """Of very uneven numbers of blocks, the last one partial."""
    monkeypatch.setattr(gpu_norm, "PROGRAMS", 3)
    check_norm("silu", 45, 300)
    check_wide(True, True, 2, "silu", T=85, H=2, V=128)
    check_head_group(85, 2, 128, "silu")


def check_conv(T, C, W, cuts, halo, biased, activation, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T + C + W)
    inputs = {
        "x": randn(generator, T, C),
        "weight": randn(generator, C, W),
        "bias": randn(generator, C) if biased else None,
    }
    inputs |= {
        "positions": documents(T, cuts),
        "halo": randn(generator, W - 1, C) if halo else None,
    }
    agree(
        lambda **t: gpu_conv.short_conv(**t, activation=activation),
        lambda **t: conv.short_conv(**t, activation=activation),
        inputs,
        dtype,
    )


CONVS = [
    # T, C, W, starts of documents, halo, bias, activation
    (1, 16, 4, [], False, True, "silu"),
    (1, 16, 4, [-2], True, False, "silu"),
    (2, 300, 4, [-9], True, True, "silu"),
    (2, 60, 4, [-1], False, True, None),
    (17, 60, 1, [5], True, True, "silu"),
    (17, 60, 2, [1, 2, 9], True, False, None),
    (17, 128, 3, [-1, 3, 4, 6, 16], True, True, "silu"),
    (130, 100, 4, [-50, 1, 2, 4, 7, 32, 63, 64, 65, 127, 128, 129], True, True, "silu"),
    (130, 100, 4, [31, 66], False, False, "silu"),
    (130, 16, 4, [], False, True, None),
    (130, 16, 5, [-130], True, True, "silu"),
]


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_short_conv(case):
    check_conv(*case)


def test_borders_at_every_place():
    """Of the convolution and the token shift: all borders, then one border at each place, around
    which nothing may leak."""
    for cut in range(1, 9):
        check_conv(9, 16, 4, [-2, cut], True, True, "silu")
        check_shift(9, 16, [-2, cut], True)
    check_conv(9, 16, 4, list(range(1, 9)), True, True, "silu")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_conv_leaks_nothing():
    """Not even what is no number any more: in another document, or in the halo, which here belongs
    to none of these."""
    shapes = [(15, 20), (20, 4), (20,), (15, 20), (3, 20)]
    x, weight, bias, dy, halo = (
        randn(torch.Generator().manual_seed(i), *s).float().to(DEVICE) for i, s in enumerate(shapes)
    )
    positions, others, results = documents(15, [4, 9]).to(DEVICE), [*range(4), *range(9, 15)], []
    for inside in (0.5, torch.inf):
        x[4:9] = inside
        leaf = x.clone().requires_grad_()
        y = gpu_conv.short_conv(leaf, weight, bias, positions, halo * inside, "silu")
        results.append([t[others] for t in (y, *torch.autograd.grad(y, leaf, dy))])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results))
    leaves = [t.requires_grad_() for t in (torch.ones_like(x), weight, bias, halo * torch.inf)]
    *used, dhalo = torch.autograd.grad(
        gpu_conv.short_conv(*leaves[:3], positions, leaves[3], "silu"), leaves, dy
    )
    assert all(t.isfinite().all() for t in used) and not dhalo.any()


@pytest.mark.parametrize(
    "W, biased, activation", [(4, True, "silu"), (2, False, None), (1, True, "silu")]
)
def test_short_conv_step(W, biased, activation):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        randn(generator, 5, 3, 60).float().to(DEVICE),
        randn(generator, 60, W).to(DEVICE),
        randn(generator, 60).to(DEVICE),
    )
    bias = bias if biased else None
    for odd in (False, True):
        want_window, window = (
            torch.zeros(3, W - 1, 60, dtype=torch.float64, device=DEVICE),
            torch.zeros(3, W - 1, 60, device=DEVICE),
        )
        window = window.transpose(0, 2).contiguous().transpose(0, 2) if odd else window
        for token in x:
            y = gpu_conv.short_conv_step(
                token, window, weight.float(), None if bias is None else bias.float(), activation
            )
            assert (
                error(
                    y,
                    conv.short_conv_step(
                        token.double(),
                        want_window,
                        weight.float().double(),
                        None if bias is None else bias.float().double(),
                        activation,
                    ),
                )
                < 1e-5
            )
        assert torch.equal(window.double(), want_window)


def check_rope(T, H, D, dtype=torch.float32):
    inputs = {
        "x": randn(torch.Generator().manual_seed(D), T, H, D),
        "positions": documents(T, [-4000, T // 3, T // 2]),
    }
    agree(
        lambda **t: pointwise.rope(**t, theta=10000),
        lambda **t: rope(**t, theta=10000),
        inputs,
        dtype,
    )


@pytest.mark.parametrize(
    "shape", [(1, 1, 16), (2, 3, 300), (17, 5, 60), (130, 4, 100), (17, 9, 128)]
)
def test_rope(shape):
    check_rope(*shape)


def test_rope_far_out():
    """Angles stay exact where fp32 can't hold them."""
    x, positions = (
        randn(torch.Generator().manual_seed(0), 3, 1, 64),
        torch.tensor([10**5 + 1, 10**6 + 3, 2**30 + 1]),
    )
    assert (
        error(
            pointwise.rope(x.float().to(DEVICE), positions.to(DEVICE), 5e5).cpu(),
            rope(x, positions, 5e5),
        )
        < 1e-6
    )


def check_shift(T, D, cuts, halo, dtype=torch.float32):
    generator = torch.Generator().manual_seed(T)
    inputs = {
        "x": randn(generator, T, D),
        "positions": documents(T, cuts),
        "halo": randn(generator, 2, D) if halo else None,
    }
    agree(pointwise.token_shift, portable.token_shift, inputs, dtype)


@pytest.mark.parametrize(
    "case",
    [
        (1, 16, [], False),
        (1, 16, [-3], True),
        (2, 300, [1], True),
        (17, 60, [-1, 8, 9], True),
        (130, 100, [-1, 7, 8, 64, 129], False),
        (130, 128, [7, 8, 20, 129], True),
    ],
    ids=str,
)
def test_token_shift(case):
    check_shift(*case)


def check_swiglu(shape, dtype=torch.float32):
    """Of two tensors, and of one that holds both."""
    a, b = randn(torch.Generator().manual_seed(0), 2, *shape)
    agree(pointwise.swiglu, portable.swiglu, {"a": a, "b": b}, dtype)
    agree(pointwise.swiglu, portable.swiglu, {"a": torch.cat([a, b], -1)}, dtype)


@pytest.mark.parametrize("shape", [(1, 16), (2, 3, 300), (17, 60), (130, 100), (3, 1030), (0, 16)])
def test_swiglu(shape):
    check_swiglu(shape)


def every_function():
    """A function of (x, z [T, H, V], weight [V], w [C, 4], bias [C], halo) that uses every kernel,
    and its arguments."""
    positions = documents(7, [3]).to(DEVICE)
    shapes = [(7, 2, 16), (7, 2, 16), (16,), (32, 4), (32,), (3, 32)]
    args = [
        randn(torch.Generator().manual_seed(i), *s).float().to(DEVICE).requires_grad_()
        for i, s in enumerate(shapes)
    ]

    def f(x, z, weight, w, bias, halo):
        x = gpu_conv.short_conv(x.flatten(1), w, bias, positions, halo, "silu")
        x = pointwise.token_shift(x, positions, halo).view_as(z) + gpu_norm.l2norm(
            pointwise.rope(z, positions, 1e4)
        )
        x = gpu_norm.gated_rms_norm(gpu_norm.rms_norm(x, weight, 1e-5), weight, z, 1e-5)
        x = gpu_norm.head_group_norm(x, bias, bias, z, 1e-5)
        return pointwise.swiglu(x, z) + pointwise.swiglu(torch.cat([z, x], -1))

    return f, args


def test_compiles_to_the_same_bits():
    f, args = every_function()
    y = f(*args)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, args, dy)
    z = torch.compile(f, backend="aot_eager", fullgraph=True)(*args)
    for again in (z, f(*args)):
        assert torch.equal(y, again)
        assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(again, args, dy)))


def test_ops_are_well_formed():
    """Schemas, fakes and aliases."""
    x, w, g, positions = (
        torch.randn(5, 16, device=DEVICE),
        torch.randn(16, device=DEVICE),
        torch.randn(5, 16, device=DEVICE),
        documents(5, [2]).to(DEVICE),
    )
    taps, halo, r = (
        torch.randn(16, 4, device=DEVICE),
        torch.randn(3, 16, device=DEVICE),
        torch.rand(5, device=DEVICE),
    )
    window, one = torch.randn(5, 3, 16, device=DEVICE), torch.randn(16, 1, device=DEVICE)
    ops = torch.ops.lmoe
    for op, *args in [
        (ops.gpu_rms_norm, x, w, None, g, 1e-5, 16, "silu", False),
        (ops.gpu_rms_norm, x, w, w, g, 1e-5, 16, "sigmoid", False),
        (ops.gpu_rms_norm, x, None, None, None, 1e-5, 8, "silu", False),
        (ops.gpu_rms_norm_bwd, x, w, w, g, r, g, 16, "silu", False),
        (ops.gpu_rms_norm_bwd, x, w, None, g, r, g, 16, "silu", True),
        (ops.gpu_rms_norm_bwd, x, None, None, None, r, g, 16, "silu", True),
        (ops.gpu_l2norm, x, 1e-6, True),
        (ops.gpu_l2norm_bwd, x, r, g),
        (ops.gpu_short_conv, x, taps, w, positions, halo, True),
        (ops.gpu_short_conv_bwd, x, taps, w, positions, halo, True, g),
        (ops.gpu_short_conv_bwd, x, one, None, positions, None, False, g),
        (ops.gpu_short_conv_step, x, window, taps, w, True),
        (ops.gpu_rope, x.view(5, 2, 8), positions, 1e4, False),
        (ops.gpu_token_shift, x, positions, halo),
        (ops.gpu_token_shift_bwd, positions, g),
        (ops.gpu_swiglu, x, g),
        (ops.gpu_swiglu, x, None),
        (ops.gpu_swiglu_bwd, x, g, g),
        (ops.gpu_swiglu_bwd, x, None, g[:, :8]),
    ]:
        torch.library.opcheck(
            op.default,
            tuple(args),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_refusals():
    x, positions = torch.randn(3, 16, device=DEVICE), torch.arange(3, device=DEVICE)
    with pytest.raises(ValueError, match="activation: no 'relu'"):
        gpu_conv.short_conv(x, x.new_zeros(16, 4), None, positions, None, "relu")
    with pytest.raises(ValueError, match="activation: no 'relu'"):
        gpu_norm.gated_rms_norm(x, x[0], x, 1e-5, "relu")
    with pytest.raises(ValueError, match="torch.float64"):
        pointwise.swiglu(x.double(), x.double())
    with pytest.raises(ValueError, match="rows of 20000"):
        gpu_norm.rms_norm(x.new_zeros(1, 20000), None, 1e-5)


@pytest.mark.gpu
@needs_gpu
def test_bf16():
    for kind in NORMS:
        check_norm(kind, 300, 128, torch.bfloat16)
    for gate_first in (False, True):
        check_wide(gate_first, True, 2, "silu", torch.bfloat16, T=4000, H=16, V=128)
    for T, C in ((130, 100), (5000, 512)):
        check_conv(T, C, 4, [-3, 64, 65, 128], True, True, "silu", torch.bfloat16)
        check_shift(T, C, [-3, 64, 65, 128], True, torch.bfloat16)
    check_head_group(4000, 16, 128, "silu", torch.bfloat16)
    check_rope(1000, 9, 128, torch.bfloat16)
    check_swiglu((999, 300), torch.bfloat16)


@pytest.mark.gpu
@needs_gpu
def test_same_bits_every_time():
    generator = torch.Generator().manual_seed(0)
    x, z, dy = (
        randn(generator, 20000, 4, 128).to(DEVICE, torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    weight, taps = (
        randn(generator, 128).to(DEVICE).float().requires_grad_(),
        randn(generator, 512, 4).to(DEVICE).float().requires_grad_(),
    )
    positions, first = documents(20000, [333, 9000]).to(DEVICE), None
    for _ in range(5):
        y = gpu_norm.gated_rms_norm(
            gpu_conv.short_conv(x.flatten(1), taps, None, positions, None, "silu").view_as(x),
            weight,
            z,
            1e-5,
        )
        results = [y, *torch.autograd.grad(y, [x, z, weight, taps], dy)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results))
