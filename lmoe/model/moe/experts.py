"""The routed experts: E SwiGLU networks over the tokens that chose them.

An implementation maps (x [S, D], weights [S, k] or None, Plan, w13, w2) to y [S, D], the sum over
each token's choices that are here of weight times the expert's output. No rows, and an expert
without any, are legal.

Weights are stacked as w13 [E, 2, I, D] (gate, then up) and w2 [E, D, I], so that a shard of whole
experts, or of I, is a contiguous slice of the tensor or of each expert.

loop     one expert after the other; the reference, in plain autograd. It reads the counts on the
         host.
grouped  two grouped products (kernels/experts.py); in bfloat16 nothing waits for the device.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe.kernels.experts import ALIGNMENT, Plan, combine_rows, gather_rows, swiglu_experts
from lmoe.kernels.pointwise import swiglu
from lmoe.model.config import MoEConfig
from lmoe.model.init import local, output_std
from lmoe.model.moe.dispatch import LocalDispatch


def loop_experts(x: Tensor, weights: Tensor | None, plan: Plan, w13: Tensor, w2: Tensor) -> Tensor:
    counts = plan.counts.tolist()
    *rows, rest = gather_rows(x, plan).split([*counts, len(plan.rows) - sum(counts)])
    out = []
    for row, (gate, up), down in zip(rows, w13.unbind(), w2.unbind()):
        # An empty expert too: its gradient is zero, not None.
        out.append(F.linear(swiglu(F.linear(row, gate), F.linear(row, up)), down))
    return combine_rows(torch.cat([*out, rest]), weights, plan)


IMPLEMENTATIONS = {"loop": loop_experts, "grouped": swiglu_experts}


class Experts(nn.Module):
    """E stacked experts with their dispatch.

    fsdp: "with the block", "apart", as a unit over other ranks than the block's, or "not at all",
    where no other rank holds these experts; then their weights are cast here. std: of the initial
    w13; w2 writes to the residual stream of a model of `layers` blocks.
    """

    def __init__(self, dim: int, cfg: MoEConfig, *, std: float, layers: int):
        super().__init__()
        for key, size in (("model.dim", dim), ("moe.hidden", cfg.hidden)):
            if cfg.impl == "grouped" and size % ALIGNMENT:
                raise ValueError(
                    f"moe.impl = 'grouped' needs {key} to be a multiple of {ALIGNMENT}, not {size};"
                    " or use moe.impl = 'loop'"
                )
        self.fsdp = "with the block"
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
        w13 = local(self.w13).to(x.dtype)
        w2 = local(self.w2).to(x.dtype)
        experts = functools.partial(self.run, w13=w13, w2=w2)
        return self.dispatch.run(experts, x, weights, pending)

    def flops_per_token(self):
        """Count the forward FLOPs of a token's K experts."""
        _, _, hidden, dim = self.w13.shape
        return 2 * self.top_k * 3 * hidden * dim
