"""The routed experts: E SwiGLU networks over rows sorted by expert.

An implementation maps (source [S, D], index of R rows in it, counts [E], w13, w2) to the experts'
outputs [R, D]. counts: int64 rows per expert, whose sum is R; zeros and R = 0 are legal.

Weights are stacked as w13 [E, 2, I, D] (gate, then up) and w2 [E, D, I], so that a shard of whole
experts, or of I, is a contiguous slice of the tensor or of each expert.

loop     one expert after the other; the reference, in plain autograd. It reads the counts on the
         host.
grouped  two grouped GEMMs (kernels/grouped.py); in bfloat16 nothing waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe.kernels.grouped import ALIGNMENT, grouped_mm
from lmoe.kernels.pointwise import swiglu
from lmoe.model.config import MoEConfig
from lmoe.model.init import local, output_std
from lmoe.model.moe.dispatch import LocalDispatch, RowIndex, gather_rows


def loop_experts(
    source: Tensor, index: RowIndex, counts: Tensor, w13: Tensor, w2: Tensor
) -> Tensor:
    rows = gather_rows(source, index).split(counts.tolist())
    out = []
    for x, (gate, up), down in zip(rows, w13.unbind(), w2.unbind()):
        # An empty expert too: its gradient is zero, not None.
        out.append(F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down))
    return torch.cat(out)


def grouped_experts(
    source: Tensor, index: RowIndex, counts: Tensor, w13: Tensor, w2: Tensor
) -> Tensor:
    rows = gather_rows(source, index)
    ends = counts.cumsum(0, dtype=torch.int32)
    return grouped_mm(swiglu(grouped_mm(rows, w13.flatten(1, 2), ends)), w2, ends)


IMPLEMENTATIONS = {"loop": loop_experts, "grouped": grouped_experts}


class Experts(nn.Module):
    """E stacked experts with their dispatch.

    std: of the initial w13; w2 writes to the residual stream of a model of `layers` blocks.
    """

    def __init__(self, dim: int, cfg: MoEConfig, *, std: float, layers: int):
        super().__init__()
        for key, size in (("model.dim", dim), ("moe.hidden", cfg.hidden)):
            if cfg.impl == "grouped" and size % ALIGNMENT:
                raise ValueError(
                    f"moe.impl = 'grouped' needs {key} to be a multiple of {ALIGNMENT}, not {size};"
                    " or use moe.impl = 'loop'"
                )
        self.top_k = cfg.top_k
        self.std = std
        self.out_std = output_std(std, layers)
        self.run = IMPLEMENTATIONS[cfg.impl]
        self.dispatch = LocalDispatch(cfg.experts)
        self.w13 = nn.Parameter(torch.empty(cfg.experts, 2, cfg.hidden, dim))
        self.w2 = nn.Parameter(torch.empty(cfg.experts, dim, cfg.hidden))

    def init_parameter(self, name, tensor, generator):
        tensor.normal_(0.0, self.std if name == "w13" else self.out_std, generator=generator)

    def forward(self, x: Tensor, weights: Tensor, pending) -> Tensor:
        """Run every token through its experts. x [T, D], weights [T, K], `pending` of
        dispatch.begin -> y [T, D]."""
        source, index, counts = self.dispatch.dispatch(x, pending)
        w13 = local(self.w13).to(x.dtype)
        w2 = local(self.w2).to(x.dtype)
        rows = self.run(source, index, counts, w13, w2)
        return self.dispatch.combine(rows, index, weights, pending)

    def flops_per_token(self):
        """Count the forward FLOPs of a token's K experts."""
        _, _, hidden, dim = self.w13.shape
        return 2 * self.top_k * 3 * hidden * dim
