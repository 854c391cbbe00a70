"""The one place that fixes the order: recomputation -> compile -> FSDP2 -> materialise -> initialise."""

import torch
import torch.distributed as dist

from lmoe.model.init import init_weights, materialise
from lmoe.parallel.compat import all_reduce_in_graph
from lmoe.parallel.fsdp import PlainGradients, apply_fsdp
from lmoe.parallel.recompute import apply_recompute

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class DataWorld:
    """What a MoE layer asks of the ranks that hold other tokens."""

    def sum_counts(self, counts):
        """counts [E] summed over the data-parallel ranks; no gradient flows through counts."""
        return all_reduce_in_graph(counts.detach()) if dist.get_world_size() > 1 else counts


def parallelize(model, config, dims):
    """Turn a model on the meta device into one that trains on this rank. Returns forward_backward(microbatches, normaliser)."""
    dtype = DTYPES[config.training.dtype]
    if dtype == torch.float64:
        model.to(torch.float64)
    if config.activation_checkpoint.mode != "none":
        for block in model.blocks:
            apply_recompute(block, config.activation_checkpoint.mode)
    if config.compile.enable:
        # torch counts the graphs of all blocks together: each kind of block x training and validation x sizes seen before they are dynamic.
        # At its limit of 8, fullgraph=True would end the run.
        torch.compiler.config.recompile_limit = 16 * len(model.blocks)
        torch.compiler.config.accumulated_recompile_limit = 64 * len(model.blocks)
        for block in model.blocks:
            # The function, not the module: FSDP's hooks stay outside the compiled region and names stay what they are.
            block.forward = torch.compile(block.forward, fullgraph=True, backend=config.compile.backend)
    for layer in model.moe_layers():
        layer.world = DataWorld()
    apply_fsdp(model, dims.mesh, dtype, config.parallel.reshard_after_forward)
    materialise(model, dims.device)
    init_weights(model, config.job.seed)
    return forward_backward(model)


def forward_backward(model):
    """The step's forward and backward passes: microbatches -> list of Output (detached), gradients summed over all ranks in .grad."""
    plain = PlainGradients(model)

    def run(microbatches, normaliser):
        """microbatches: (tokens, labels, seq) each; normaliser: valid labels of the whole step, over all ranks."""
        outputs = []
        for tokens, labels, seq in microbatches:
            output = model(tokens, seq, labels, normaliser)
            (output.loss + output.z_loss).backward()
            outputs.append(output._replace(loss=output.loss.detach(), z_loss=output.z_loss.detach()))
        plain.reduce()
        return outputs

    return run
