"""Short causal depthwise convolution over a packed stream (the local mixing before linear mixers:
arXiv 2312.00752, 2406.06484)."""

import torch
import torch.nn.functional as F

from lmoe.kernels.choice import on_gpu
from lmoe.kernels.norm import cast, compute_dtype


def _triton(backend, *tensors):
    """A convolution keeps its kernel in compiled code: what Inductor makes of the portable form
    reads x once a tap."""
    return backend in ("auto", "triton") and on_gpu(*tensors, pointwise=False)


def is_silu(activation) -> bool:
    if activation not in (None, "silu"):
        raise ValueError(f"activation: no {activation!r}; there are None and silu")
    return activation == "silu"


def short_conv(x, weight, bias, positions, halo=None, activation=None, backend="auto"):
    """y_t = act(bias + sum_{d < W} weight[:, W-1-d] x_{t-d}), the tap d only where positions[t] >=
    d: documents never mix.

    x [T, C]; weight [C, W]; bias [C] or None; positions [T]: place of each token in its document;
    halo [W-1, C]: the stream's rows before x, where x is a later piece of it (None at the stream's
    start); activation: None or "silu". backend: a scan's; "chunk" and "reference" are portable.
    Sums in fp32 (float64 for float64); returns [T, C] in x's dtype.
    """
    silu = is_silu(activation)
    if _triton(backend, x, weight, bias, halo):
        from lmoe.kernels.gpu import conv as gpu

        return gpu.short_conv(x, weight, bias, positions, halo, activation)
    return _ShortConv.apply(x, weight, bias, positions, halo, silu)


def _taps(x, halo, W):
    """The stream d tokens earlier, for d = 0 .. W-1: views [T, C] of x with its halo."""
    T = x.shape[0]
    padded = torch.cat([x.new_zeros(W - 1, x.shape[1]) if halo is None else halo.to(x.dtype), x])
    return [padded[W - 1 - d : W - 1 - d + T] for d in range(W)]


def _within(x, positions, d):
    """x [T, C] without the rows whose tap d would lie in the document before."""
    return x if d == 0 else x.masked_fill(positions[:, None] < d, 0)


def _linear(taps, weight, bias, positions):
    z = taps[0] * weight[:, -1]
    for d, tap in enumerate(taps[1:], 1):
        z = torch.addcmul(z, _within(tap, positions, d).to(z.dtype), weight[:, -1 - d])
    return z if bias is None else z + bias.to(z.dtype)


class _ShortConv(torch.autograd.Function):
    """By hand, because autograd would keep a masked copy of x for every tap."""

    @staticmethod
    def forward(ctx, x, weight, bias, positions, halo, silu):
        ctx.save_for_backward(x, weight, bias, positions, halo)
        ctx.silu = silu
        taps = _taps(x, halo, weight.shape[1])
        z = _linear(taps, weight.to(compute_dtype(x)), bias, positions)
        return cast(F.silu(z) if silu else z, x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, positions, halo = ctx.saved_tensors
        (T, C), W, dtype = x.shape, weight.shape[1], compute_dtype(x)
        w = weight.to(dtype)
        taps = _taps(x, halo, W)
        dz = dy.to(dtype)
        if ctx.silu:
            z = _linear(taps, w, bias, positions)
            s = torch.sigmoid(z)
            dz = dz * (s * (1 + z * (1 - s)))
        padded = dz.new_zeros(W - 1 + T, C)
        dw = []
        for d, tap in enumerate(taps):
            dz_d = _within(dz, positions, d)
            padded[W - 1 - d : W - 1 - d + T].addcmul_(dz_d, w[:, -1 - d])
            dw.append((dz_d * tap).sum(0))
        return (
            padded[W - 1 :].to(x.dtype),
            torch.stack(dw[::-1], dim=1).to(weight.dtype),
            None if bias is None else dz.sum(0).to(bias.dtype),
            None,
            None if halo is None else padded[: W - 1].to(halo.dtype),
            None,
        )


def short_conv_step(x, window, weight, bias, activation=None, backend="auto"):
    """One token of `short_conv` for each of N sequences: x [N, C]; window [N, W-1, C], the inputs
    before it (zeros at a document's start), shifted in place.
    """
    if _triton(backend, x, window, weight, bias):
        from lmoe.kernels.gpu import conv as gpu

        return gpu.short_conv_step(x, window, weight, bias, activation)
    silu = is_silu(activation)
    dtype = compute_dtype(x)
    rows = torch.cat([window.to(dtype), x.to(dtype)[:, None]], 1)
    y = (rows * weight.to(dtype).T).sum(1)
    if bias is not None:
        y = y + bias.to(dtype)
    window.copy_(rows[:, 1:])
    return (F.silu(y) if silu else y).to(x.dtype)
