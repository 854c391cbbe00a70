"""Grouped matrix products: rows sorted by group, one weight matrix per group. The products of an
expert layer.

Two registered ops, so that a compiled region and recomputation see one node each:
    lmoe::grouped_mm     y_r = W_g x_r for every row r of group g (and, transposed, the gradient of
                         its input)
    lmoe::grouped_outer  dW_g = sum over the rows r of group g of dy_r x_r^T (the gradient of its
                         weight)

bfloat16 goes to torch.nn.functional.grouped_mm, which leaves the sizes of the groups on the device.
Every other dtype takes one mm per group: it must read the sizes, which costs nothing on a CPU and a
wait for the device on CUDA (fp32 there is for checking).
"""

import torch
import torch.nn.functional as F

from lmoe.kernels.op import op

ALIGNMENT = 8  # torch's grouped_mm wants row strides that are multiples of 16 bytes


def grouped_mm(x, w, ends):
    """y [R, N] with y_r = w_g x_r, where g is the group of row r.

    x [R, D]: rows sorted by group. w [E, N, D], of x's dtype. ends [E] int32: where each group's
    rows end (inclusive cumulative sum of the group sizes; empty groups are legal; the last entry
    must be R, for rows beyond it would be left unwritten). Differentiable in x and w; sums in fp32
    at least; gradients come back contiguous, zero for the weights of an empty group.
    """
    return _grouped_mm(x, w, ends, True)


def _groups(ends):
    start = 0
    for group, end in enumerate(ends.tolist()):
        yield group, slice(start, end)
        start = end


@op("grouped_mm")
def _grouped_mm(
    x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, transpose: bool
) -> torch.Tensor:
    """transpose: w [E, N, D] maps D -> N (y = x w^T); else N -> D (y = x w)."""
    x = x.contiguous()
    w = w.contiguous()
    if transpose:
        w = w.transpose(1, 2)
    if x.dtype == torch.bfloat16 and x.shape[0]:
        return F.grouped_mm(x, w, offs=ends)
    y = x.new_empty(x.shape[0], w.shape[2])
    for group, rows in _groups(ends):
        torch.mm(x[rows], w[group], out=y[rows])
    return y


@_grouped_mm.register_fake
def _(x, w, ends, transpose):
    return x.new_empty(x.shape[0], w.shape[1 if transpose else 2])


@op("grouped_outer")
def _grouped_outer(dy: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[E, N, D] from dy [R, N] and x [R, D]."""
    dy = dy.contiguous()
    x = x.contiguous()
    if x.dtype == torch.bfloat16 and x.shape[0]:
        return F.grouped_mm(dy.t(), x, offs=ends)
    dw = x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])
    for group, rows in _groups(ends):
        torch.mm(dy[rows].t(), x[rows], out=dw[group])
    return dw


@_grouped_outer.register_fake
def _(dy, x, ends):
    return x.new_empty(ends.shape[0], dy.shape[1], x.shape[1])


def _setup_mm(ctx, inputs, output):
    x, w, ends, ctx.transpose = inputs
    ctx.save_for_backward(x, w, ends)


def _backward_mm(ctx, dy):
    x, w, ends = ctx.saved_tensors
    dx = _grouped_mm(dy, w, ends, not ctx.transpose) if ctx.needs_input_grad[0] else None
    dw = None
    if ctx.needs_input_grad[1]:
        dw = _grouped_outer(dy, x, ends) if ctx.transpose else _grouped_outer(x, dy, ends)
    return dx, dw


_grouped_mm.register_autograd(_backward_mm, setup_context=_setup_mm)
