"""The routed experts: E SwiGLU networks over rows sorted by expert.

Weights are stacked as w13 [E, 2, I, D] (gate, then up) and w2 [E, D, I], so that a shard of whole
experts, or of I, is a contiguous slice of the tensor or of each expert.

loop     one expert after the other; the reference, in plain autograd. It reads the counts on the
         host.
grouped  two grouped GEMMs (kernels/grouped.py); in bfloat16 nothing waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lmoe.kernels.grouped import ALIGNMENT, grouped_mm
from lmoe.kernels.pointwise import swiglu
from lmoe.model.init import local, output_std
from lmoe.model.moe.dispatch import LocalDispatch


def loop_experts(rows, counts, w13, w2):
    out = []
    for x, (gate, up), down in zip(rows.split(counts.tolist()), w13.unbind(), w2.unbind()):
        out.append(
            F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down)
        )  # an empty expert too: its gradient is zero, not None
    return torch.cat(out)


def grouped_experts(rows, counts, w13, w2):
    ends = counts.cumsum(0, dtype=torch.int32)
    return grouped_mm(swiglu(grouped_mm(rows, w13.flatten(1, 2), ends)), w2, ends)


IMPLEMENTATIONS = {"loop": loop_experts, "grouped": grouped_experts}


class Experts(nn.Module):
    """dispatch -> experts -> combine: x [T, D], weights [T, K] and the dispatch's plan -> y [T, D].

    std: of the initial w13; w2 writes to the residual stream of a model of `layers` blocks.
    """

    def __init__(self, dim, cfg, *, std, layers):
        super().__init__()
        for key, size in (("model.dim", dim), ("moe.hidden", cfg.hidden)):
            if cfg.impl == "grouped" and size % ALIGNMENT:
                raise ValueError(
                    f"moe.impl = 'grouped' needs {key} to be a multiple of {ALIGNMENT}, not {size};"
                    " or use moe.impl = 'loop'"
                )
        self.top_k, self.std, self.out_std = cfg.top_k, std, output_std(std, layers)
        self.run = IMPLEMENTATIONS[cfg.impl]
        self.dispatch = LocalDispatch(cfg.experts)
        self.w13 = nn.Parameter(torch.empty(cfg.experts, 2, cfg.hidden, dim))
        self.w2 = nn.Parameter(torch.empty(cfg.experts, dim, cfg.hidden))

    def init_parameter(self, name, tensor, generator):
        tensor.normal_(0.0, self.std if name == "w13" else self.out_std, generator=generator)

    def forward(self, x, weights, plan):
        rows, counts, handle = self.dispatch.dispatch(x, weights, plan)
        return self.dispatch.combine(self.products(rows, counts), handle)

    def products(self, rows, counts):
        """rows [R, D] sorted by expert, counts [E] int64 (sum R; zeros and R = 0 are legal) -> [R,
        D]."""
        return self.run(rows, counts, local(self.w13).to(rows.dtype), local(self.w2).to(rows.dtype))

    def flops_per_token(self):
        """Of the K experts that a token visits."""
        _, _, hidden, dim = self.w13.shape
        return 2 * self.top_k * 3 * hidden * dim
