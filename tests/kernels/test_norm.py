import pytest
import torch

from lmoe import kernels


def test_l2norm():
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0
    y = kernels.l2norm(x)
    torch.testing.assert_close(y, x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    assert (y[0, 0] == 0).all()
    # Exact gradient with eps: rstd (dy - y (y . dy)).
    x.requires_grad_()
    dy = torch.randn_like(x)
    rstd = (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    (dx,) = torch.autograd.grad(kernels.l2norm(x), x, dy)
    torch.testing.assert_close(dx, rstd * (dy - y * (y * dy).sum(-1, keepdim=True)))


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_rms_norm(activation):
    generator = torch.Generator().manual_seed(0)
    o, gate = torch.randn(2, 4, 6, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(8, dtype=torch.float64, generator=generator)
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    factor = torch.sigmoid(gate) * (gate if activation == "silu" else 1)
    torch.testing.assert_close(
        kernels.gated_rms_norm(o, weight, gate, 1e-5, activation), normed * factor
    )
    torch.testing.assert_close(kernels.gated_rms_norm(o, weight, None, 1e-5), normed)
    torch.testing.assert_close(kernels.rms_norm(o, weight, 1e-5), normed)
    # Statistics and gate in fp32: a bf16 result is the rounded float64 one (1 unit in the last
    # place for the fp32 in between).
    low = [t.bfloat16() for t in (o, gate)]
    got = kernels.gated_rms_norm(low[0] * 300, weight.float(), low[1], 1e-5, activation)
    want = kernels.gated_rms_norm(low[0].double() * 300, weight, low[1].double(), 1e-5, activation)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=1e-6)
