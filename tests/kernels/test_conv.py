import pytest
import torch

from lmoe import kernels
from tests.kernels.ops import error, randn


def make(lengths, C=5, W=4, first=0, seed=0, dtype=torch.float64):
    """x, weight, bias, positions and halo for documents of these lengths; the first one began
    `first` tokens before the stream."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([torch.arange(n) for n in lengths])
    positions[: lengths[0]] += first
    tensors = [
        randn(generator, *shape)
        for shape in ((len(positions), C), (C, W), (C,), (W - 1, C), (len(positions), C))
    ]
    x, weight, bias, halo, dy = (t.to(dtype).requires_grad_() for t in tensors)
    return x, weight, bias, positions, halo, dy.detach()


def recurrence(x, weight, bias, positions, halo, activation):
    """Causal depthwise convolution, y_t = act(bias + sum_d weight[:, W-1-d] x_{t-d}), over the taps
    d <= positions[t], one token at a time."""
    W = weight.shape[1]
    padded = torch.cat([x.new_zeros(W - 1, x.shape[1]) if halo is None else halo, x])
    rows = []
    for t, position in enumerate(positions.tolist()):
        taps = range(min(W, position + 1))
        y = sum(weight[:, W - 1 - d] * padded[W - 1 + t - d] for d in taps)
        rows.append(y if bias is None else y + bias)
    y = torch.stack(rows)
    return torch.nn.functional.silu(y) if activation == "silu" else y


@pytest.mark.parametrize(
    "lengths, first", [([17], 0), ([1, 2, 3, 4, 9], 0), ([5, 1, 7], 1), ([5, 8], 2), ([2, 8], 90)]
)
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_reference(lengths, first, W, activation, biased):
    x, weight, bias, positions, halo, dy = make(lengths, W=W, first=first)
    bias, halo = bias if biased else None, halo if first else None
    leaves = [t for t in (x, weight, bias, halo) if t is not None]
    results = []
    for conv in (kernels.short_conv, recurrence):
        y = conv(x, weight, bias, positions, halo, activation)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(error(got, want) < 1e-12 or not want.numel() for got, want in zip(*results))


def test_pieces_of_a_stream_equal_the_whole():
    """The halo's gradient goes back to the piece before."""
    x, weight, bias, positions, _, dy = make([6, 9, 5])
    whole = kernels.short_conv(x, weight, bias, positions, None, "silu")
    want = torch.autograd.grad(whole, [x, weight, bias], dy)
    for cut in (1, 2, 5, 6, 7, 8, 14, 19):
        halo = torch.cat([x.new_zeros(3, 5), x])[cut : cut + 3]
        y = torch.cat(
            [
                kernels.short_conv(x[:cut], weight, bias, positions[:cut], None, "silu"),
                kernels.short_conv(x[cut:], weight, bias, positions[cut:], halo, "silu"),
            ]
        )
        assert (
            error(y, whole) < 1e-14
        )  # not bitwise: exp differs in the last bit with the place in a vector register
        assert all(
            error(a, b) < 1e-12 for a, b in zip(torch.autograd.grad(y, [x, weight, bias], dy), want)
        )


def test_nothing_leaks_between_documents():
    x, weight, bias, positions, _, dy = make([4, 5, 6])
    y = kernels.short_conv(x, weight, bias, positions, None, "silu")
    dx = torch.autograd.grad(y, x, dy)[0]
    changed = x.detach().clone()
    changed[4:9] = torch.inf  # not even what multiplies a zero
    changed.requires_grad_()
    later = kernels.short_conv(changed, weight, bias, positions, None, "silu")
    later_dx = torch.autograd.grad(later, changed, dy)[0]
    others = [*range(4), *range(9, 15)]
    assert torch.equal(y[others], later[others]) and torch.equal(dx[others], later_dx[others])


def test_steps_equal_forward():
    x, weight, bias, positions, *_ = make([9])
    with torch.no_grad():
        y = kernels.short_conv(x, weight, bias, positions, None, "silu")
        window = x.new_zeros(2, 3, 5)
        for t in range(9):
            out = kernels.short_conv_step(x[t].expand(2, 5), window, weight, bias, "silu")
            assert error(out[1], y[t]) < 1e-12
    assert torch.equal(window[0], x[-3:])


def test_compiles_and_sums_in_fp32():
    x, weight, bias, positions, halo, dy = make([9, 30], first=2, dtype=torch.bfloat16)

    def f(*args):
        return kernels.short_conv(*args, positions, halo, "silu")

    args = (x, weight, bias)
    y, z = f(*args), torch.compile(f, backend="aot_eager", fullgraph=True)(*args)
    assert y.dtype == torch.bfloat16 and torch.equal(y, z)
    assert all(
        torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(y, args, dy), torch.autograd.grad(z, args, dy))
    )
    wide = recurrence(x.double(), weight.double(), bias.double(), positions, halo.double(), "silu")
    assert torch.equal(y, wide.bfloat16())


def test_refuses_unknown_activation():
    x, weight, bias, positions, *_ = make([3])
    with pytest.raises(ValueError, match="activation: no 'relu'"):
        kernels.short_conv(x, weight, bias, positions, None, "relu")
    window = x.new_zeros(3, 3, 5)
    with pytest.raises(ValueError, match="activation: no 'relu'"):
        kernels.short_conv_step(x, window, weight, bias, "relu")
    assert not window.any()
