"""The gradients that FSDP2 does not sum: of parameters that it leaves out, and, under tensor
parallelism, of those that are whole on every tensor parallel rank.

Every rank's gradient is a part: each token, head, hidden unit and layer is worked on once. So a
parameter's gradient is the plain sum over all ranks that hold the same part of it, and over which
FSDP has not summed already. Two all-reduces of one bucket each, once a step, and a third where
layers on several stages share a parameter.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lmoe.model.init import cut, local


class LooseGradients:
    def __init__(self, model, dims):
        self.stage = dims.stage_group
        self.tp = dims.group("tp") if dims.tp > 1 else None
        kept = [p for p in model.parameters() if getattr(p, "keep_fp32", False)]
        marked = {id(p) for p in kept}
        self.shared = [p for p in kept if getattr(p, "every_stage", False) and dims.pp > 1]
        shared = {id(p) for p in self.shared}
        self.left_out = [p for p in kept if id(p) not in shared]
        self.whole = [
            p
            for p in model.parameters()
            if id(p) not in marked and not {"tp", "ep"} & set(p.device_mesh.mesh_dim_names)
        ]

    @torch.no_grad()
    def reduce(self):
        for p in (*self.left_out, *self.shared, *self.whole):
            if p.grad is None:  # the same bucket on every rank, whatever each one used
                p.grad = torch.zeros_like(p)
        if self.stage is not None and self.left_out:
            # A part of a tensor that is cut over tp goes as the whole tensor, zero elsewhere: they
            # are small, and one bucket serves all.
            self._sum_left_out(self.left_out, self.stage)
        if self.shared:
            self._sum_left_out(self.shared, dist.group.WORLD)
        if self.tp is not None and self.whole:
            for p, total in zip(
                self.whole, self._sum([local(p.grad) for p in self.whole], self.tp), strict=True
            ):
                local(p.grad).copy_(total)

    @staticmethod
    def _sum(grads, group):
        bucket = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(bucket, group=group)
        return [
            part.view_as(grad)
            for part, grad in zip(
                bucket.split([grad.numel() for grad in grads]), grads, strict=True
            )
        ]

    @staticmethod
    def _whole(p):
        if not isinstance(p, DTensor):
            return p.grad
        full = p.grad.to_local().new_zeros(p.shape)
        cut(full, p).copy_(p.grad.to_local())
        return full

    def _sum_left_out(self, parameters, group):
        for p, total in zip(
            parameters, self._sum([self._whole(p) for p in parameters], group), strict=True
        ):
            local(p.grad).copy_(cut(total, p) if isinstance(p, DTensor) else total)
