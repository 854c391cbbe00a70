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
from torch.distributed.tensor import DTensor

from lmoe.model.init import cut, local
from lmoe.parallel.dims import Dims


class UnshardedGradients:
    """fp32_params: left out by FSDP, summed over the ranks of a pipeline stage; pp_shared: those
    among them that every stage holds, summed over all ranks; tp_replicated: FSDP's, but whole on
    every tensor parallel rank, summed over these."""

    def __init__(self, model: nn.Module, dims: Dims):
        self.stage = dims.stage_group
        self.tp = dims.group("tp") if dims.tp > 1 else None
        self.fp32_params, self.tp_replicated, self.pp_shared = [], [], []
        for p in model.parameters():
            if not p.requires_grad:
                continue
            if not getattr(p, "keep_fp32", False):
                if not {"tp", "ep"} & set(p.device_mesh.mesh_dim_names):
                    self.tp_replicated.append(p)
            elif getattr(p, "every_stage", False) and dims.pp > 1:
                self.pp_shared.append(p)
            else:
                self.fp32_params.append(p)

    @torch.no_grad()
    def reduce(self) -> None:
        """Replace each parameter's .grad by its sum over the ranks; call it once a step."""
        for p in (*self.fp32_params, *self.pp_shared, *self.tp_replicated):
            if p.grad is None:  # the same bucket on every rank, whatever each one used
                p.grad = torch.zeros_like(p)
        if self.stage is not None and self.fp32_params:
            # A part of a tensor that is cut over tp goes as the whole tensor, zero elsewhere: they
            # are small, and one bucket serves all.
            self._sum_whole(self.fp32_params, self.stage)
        if self.pp_shared:
            self._sum_whole(self.pp_shared, dist.group.WORLD)
        if self.tp is not None and self.tp_replicated:
            grads = [local(p.grad) for p in self.tp_replicated]
            for grad, total in zip(grads, self._sum(grads, self.tp), strict=True):
                grad.copy_(total)

    @staticmethod
    def _sum(grads: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
        bucket = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(bucket, group=group)
        parts = bucket.split([grad.numel() for grad in grads])
        return [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)]

    @staticmethod
    def _whole(p: nn.Parameter) -> Tensor:
        if not isinstance(p, DTensor):
            return p.grad
        full = p.grad.to_local().new_zeros(p.shape)
        cut(full, p).copy_(p.grad.to_local())
        return full

    def _sum_whole(self, parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        totals = self._sum([self._whole(p) for p in parameters], group)
        for p, total in zip(parameters, totals, strict=True):
            local(p.grad).copy_(cut(total, p) if isinstance(p, DTensor) else total)
