"""Look at the tokens just before each one: short convolutions and token shifts, with
the decode states that they keep."""

import torch
from torch import Tensor, nn

from lmoe.kernels.conv import short_conv, short_conv_step
from lmoe.kernels.pointwise import token_shift
from lmoe.model.init import local


def write_state(state: Tensor, value: Tensor):
    """Write value [N', ..] over a decode state [N, ..] in place; documents beyond N are empty."""
    state.copy_(value[: len(state)])


def keep_inputs(window: Tensor | None, x, left, seq):
    """Write the last inputs of every document of the stream x [T, C], and of the rows `left` before
    it, to a decode state [N, rows, C], if there is one."""
    if window is not None:
        last = last_inputs(x, left, seq, window.shape[1])
        write_state(window, seq.context.last_token_state(last, seq))


class ShortConv(nn.Module):
    """Depthwise causal convolution over the stream, restarting at every document: x [T, C] -> [T,
    C], then SiLU."""

    def __init__(self, channels, width=4, bias=False, backend="auto"):
        super().__init__()
        self.width = width
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_parameter(self, name, tensor, generator):
        # Weights and bias, as those of nn.Conv1d.
        tensor.uniform_(-(self.width**-0.5), self.width**-0.5, generator=generator)

    def forward(self, x, left, seq, window):
        """left [width-1, C] or None: the inputs before x. window [N, width-1, C] or None: the
        last inputs of every sequence, written by prefill and advanced by decoding, in place."""
        weight = local(self.weight)
        bias = local(self.bias)
        if seq.decoding:
            return short_conv_step(x, window, weight, bias, "silu", self.backend)
        keep_inputs(window, x, left, seq)
        return short_conv(x, weight, bias, seq.positions, left, "silu", self.backend)

    def window_shape(self):
        """(rows, channels) of the decode state."""
        return self.width - 1, self.weight.shape[0]

    def flops_per_token(self):
        return 2 * self.weight.numel()


def convolve(linear, conv, x, left, seq, window):
    """Project x [T, D] and convolve it: [T, C]. The rows `left` before it, if any, are projected
    here too, so that a mixer with several convolutions exchanges them once."""
    return conv(linear(x), None if left is None else linear(left), seq, window)


class TokenShift(nn.Module):
    """x [T, D] of the token before each one, zero at a document's start (arXiv 2404.05892, section
    4.1)."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x, left, seq, window):
        """As ShortConv: left [1, D] or None; window [N, 1, D] or None."""
        if seq.decoding:
            before = window.squeeze(1).to(x.dtype, copy=True)
            window.copy_(x.unsqueeze(1))
            return before
        keep_inputs(window, x, left, seq)
        return token_shift(x, seq.positions, left)

    def window_shape(self):
        return 1, self.dim


def last_inputs(x, left, seq, rows):
    """Take the last `rows` rows of each document that ends in the stream x [T, C], zeros before its
    start: [N, rows, C]."""
    ends = seq.cu_seqlens[1:].long()
    back = torch.arange(-rows, 0, device=x.device)
    # Of the last token's place in its document: a document may have begun before this stream.
    length = seq.positions[(ends - 1).clamp(min=0)] + 1
    length = length.masked_fill(seq.cu_seqlens.diff() == 0, 0)
    inside = length[:, None] + back >= 0
    before = 0 if left is None else rows
    x = x if left is None else torch.cat([left, x])
    return x[(ends[:, None] + back + before).clamp(min=0)] * inside[..., None]
