"""FSDP2 and HSDP: sharded weights, gradients as pure sums, fp32 parameters left alone."""

from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from lmoe.model.init import fp32_parameters, local
from lmoe.model.moe.experts import Experts


def apply_fsdp(stage, dims, dtype, reshard_after_forward):
    """Shard every block, the head and the rest of a pipeline stage (or of the model) as units; a
    world of one as well, for the dtypes.

    dtype: compute dtype; gradients are reduced in the dtype of the master weights.
    """
    master = next(stage.parameters()).dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=master, cast_forward_inputs=False)
    # Without replicas a mesh of one dim: over two, FSDP2 would sum over replicas of one and keep a
    # second copy of the gradients for it.
    replicas = ("dp_replicate",) if dims.dp_replicate > 1 else ()
    dense = dims.dense[(*replicas, "fsdp")]
    sparse = dims.sparse[(*replicas, "efsdp")]

    def shard(module, mesh, reshard):
        alone = mesh.size() == 1
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            # There is nothing to gather: a second cast would only cost time.
            reshard_after_forward=reshard and not alone,
            ignored_params=left_out(module),
            shard_placement_fn=placement(module, mesh.size(-1)),
        )
        module.reduces_alone = alone
        if not alone:
            # The loss is already divided by the step's number of labels: gradients are summed. Gloo
            # has no scaled sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    for block in stage.blocks:
        if block.has_experts and block.ffn.experts.fsdp == "apart":
            shard(block.ffn.experts, sparse, reshard_after_forward)
        shard(block, dense, reshard_after_forward)
    if stage.head is not None and stage.head.weight is not None:
        shard(stage.head, dense, False)  # the backward pass begins with it
    shard(stage, dense, False)


class Accumulation:
    """Tells the FSDP2 units of a model which microbatch is the last of a step."""

    def __init__(self, model):
        self.model = model
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.alone = [module for module in units if module.reduces_alone]

    def begin(self, last: bool):
        """Begin a microbatch: gradients are summed over replicas once a step; and a unit of one
        rank, which has nothing to sum, adds them up as they are and keeps its weights till then."""
        self.model.set_requires_all_reduce(last)
        for module in self.alone:
            module.set_requires_gradient_sync(last, recurse=False)
            module.set_reshard_after_backward(last, recurse=False)


def left_out(module):
    """Find the parameters of a module that FSDP2 has nothing to do with: those that stay in fp32,
    and experts that no other rank holds."""
    alone = [m for m in module.modules() if isinstance(m, Experts) and m.fsdp == "not at all"]
    return fp32_parameters(module).union(*(m.parameters() for m in alone))


def placement(module, ranks):
    """Where FSDP cuts the parameters of `module` over so many ranks: dim 0, but the hidden dim of
    experts whose number does not divide, which would leave ranks without any."""
    experts = {
        p for m in module.modules() if isinstance(m, Experts) for p in m.parameters(recurse=False)
    }

    def place(parameter):
        if parameter not in experts:
            return None
        held = local(parameter)
        return Shard(2) if held.shape[0] % ranks and held.shape[2] % ranks == 0 else None

    return place
