"""Sum the gradients that FSDP2 does not: of parameters that it leaves out, and, under tensor
parallelism, of those that are whole on every tensor parallel rank.

Every rank's gradient is a part: each token, head, hidden unit and layer is worked on once. So a
parameter's gradient is the plain sum over all ranks that hold the same part of it, and over which
FSDP has not summed already. Two all-reduces of one bucket each, once a step, and a third where
layers on several stages share a parameter. Frozen parameters have no gradient.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmoe.model.init import cut, local
from lmoe.parallel.dims import Dims


class UnshardedGradients:
    """Buckets of parameters: left out by FSDP, summed over the ranks of a pipeline stage; those
    among them that every stage holds, summed over all ranks; and FSDP's, but whole on every tensor
    parallel rank, summed over these."""

    def __init__(self, model: nn.Module, dims: Dims):
        fp32_params = []
        pp_shared = []
        tp_replicated = []
        for p in model.parameters():
            if not p.requires_grad:
                continue
            if not getattr(p, "keep_fp32", False):
                if not {"tp", "ep"} & set(p.device_mesh.mesh_dim_names):
                    tp_replicated.append(p)
            elif getattr(p, "every_stage", False) and dims.pp > 1:
                pp_shared.append(p)
            else:
                fp32_params.append(p)
        tp = dims.group("tp") if dims.tp > 1 else None
        # (parameters, group or None, whether they may be cut over tp)
        self.buckets = [
            (fp32_params, dims.stage_group, True),
            (pp_shared, dist.group.WORLD, True),
            (tp_replicated, tp, False),
        ]

    @torch.no_grad()
    def reduce(self) -> None:
        """Replace each parameter's .grad by its sum over the ranks; call it once a step."""
        for parameters, group, cut_over_tp in self.buckets:
            for p in parameters:
                if p.grad is None:  # the same bucket on every rank, whatever each one used
                    p.grad = torch.zeros_like(p)
            if parameters and group is not None:
                self._sum(parameters, group, cut_over_tp)

    @staticmethod
    def _sum(parameters: list[nn.Parameter], group: dist.ProcessGroup, cut_over_tp: bool) -> None:
        # A part of a tensor that is cut over tp goes as the whole tensor, zero elsewhere: they are
        # small, and one bucket serves all.
        grads = [_whole(p) if cut_over_tp else local(p.grad) for p in parameters]
        bucket = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(bucket, group=group)
        totals = bucket.split([grad.numel() for grad in grads])
        for p, grad, total in zip(parameters, grads, totals, strict=True):
            total = total.view_as(grad)
            local(p.grad).copy_(cut(total, p) if cut_over_tp else total)


def _whole(p: nn.Parameter) -> Tensor:
    full = local(p.grad).new_zeros(p.shape)
    cut(full, p).copy_(local(p.grad))
    return full
