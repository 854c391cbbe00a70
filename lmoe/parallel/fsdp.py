"""FSDP2 and HSDP: sharded weights, gradients as pure sums, fp32 parameters left alone."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def fp32_parameters(module):
    """The parameters that mixed precision must not round: they stay plain tensors, the same on every rank."""
    return {p for p in module.parameters() if getattr(p, "keep_fp32", False)}


def apply_fsdp(model, mesh, dtype, reshard_after_forward):
    """Shard every block, the head and the rest as units over `mesh` (dp_replicate, dp_shard); a world of one as well, for the dtypes.

    dtype: compute dtype; gradients are reduced in the dtype of the master weights.
    """
    master = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=master, cast_forward_inputs=False)

    def shard(module, reshard):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=fp32_parameters(module))

    for block in model.blocks:
        shard(block, reshard_after_forward)
    if model.head.weight is not None:
        shard(model.head, False)  # the backward pass begins with it
    shard(model, False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the step's number of labels: gradients are summed. Gloo has no scaled sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


class PlainGradients:
    """Sums the gradients of the fp32 parameters, which FSDP leaves out, over all ranks: one all-reduce of one bucket per step."""

    def __init__(self, model):
        self.parameters = [p for p in model.parameters() if getattr(p, "keep_fp32", False)]

    @torch.no_grad()
    def reduce(self):
        if dist.get_world_size() == 1 or not self.parameters:
            return
        for p in self.parameters:
            if p.grad is None:  # the same bucket on every rank, whatever each one used
                p.grad = torch.zeros_like(p)
        bucket = torch.cat([p.grad.flatten() for p in self.parameters])
        dist.all_reduce(bucket)
        for p, grad in zip(self.parameters, bucket.split([p.numel() for p in self.parameters]), strict=True):
            p.grad.copy_(grad.view_as(p))
