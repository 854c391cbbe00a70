"""The decay of Mamba2 and what followed it."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lmoe.model.init import keep_fp32, local


def initial_dt_bias(tensor, generator):
    """softplus of it log-uniform in [1e-3, 0.1], as in Mamba (arXiv 2312.00752, section 3.6)."""
    dt = (
        tensor.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_().clamp_(min=1e-4)
    )
    tensor.copy_(dt + torch.log(-torch.expm1(-dt)))


class Decay(nn.Module):
    """dt_t = softplus(a_t + dt_bias), log alpha_t = -exp(A_log) dt_t per head, fp32: a [T, H] ->
    (log alpha, dt) [T, H] each."""

    def __init__(self, heads):
        super().__init__()
        self.A_log = keep_fp32(nn.Parameter(torch.empty(heads)))
        self.dt_bias = keep_fp32(nn.Parameter(torch.empty(heads)))

    def init_parameter(self, name, tensor, generator):
        if name == "A_log":  # A from U(1, 16): from 0 it could start at -inf
            tensor.uniform_(1.0, 16.0, generator=generator).log_()
        else:
            initial_dt_bias(tensor, generator)

    def forward(self, a):
        wide = torch.promote_types(a.dtype, torch.float32)
        dt = F.softplus(a.to(wide) + local(self.dt_bias))
        return -local(self.A_log).exp() * dt, dt
