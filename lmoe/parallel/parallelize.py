"""The one place that fixes the order: pipeline split -> tensor and expert parallel -> recomputation
-> compile -> FSDP2 -> materialise -> initialise. Context parallelism changes no module: it lives in
the batch (parallel/context.py)."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from lmoe.model.init import init_weights, materialise
from lmoe.parallel.collectives import sum_over_ranks
from lmoe.parallel.compat import overlap_tensor_parallel
from lmoe.parallel.expert import apply_expert_parallel
from lmoe.parallel.fsdp import Accumulation, apply_fsdp
from lmoe.parallel.gradients import UnshardedGradients
from lmoe.parallel.pipeline import Pipeline, split_stages
from lmoe.parallel.recompute import apply_recompute
from lmoe.parallel.tensor import apply_tensor_parallel

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class Parallel(NamedTuple):
    """A model's passes on this rank.

    forward_backward(microbatches, normaliser): (tokens, labels, seq) each, and the valid labels of
    the whole step over all ranks -> list of Output (detached): this rank's parts of the losses,
    which add up to the whole over ranks and microbatches. The gradients of FSDP's parameters are
    left summed over all ranks in .grad; unsharded.reduce() sums the others. evaluate(tokens,
    labels, seq) -> this rank's part of the sum of the loss over valid tokens.
    """

    forward_backward: Callable
    unsharded: UnshardedGradients
    evaluate: Callable


def units(block):
    """(owner, method, compiles): what is recomputed and compiled as one. FSDP's hooks stay outside
    of every unit: what they do differs between a forward pass and its repetition. So do reads of
    sizes on the host outside of compiled regions."""
    experts = block.ffn.experts if block.has_experts else None
    if experts is None or not (experts.dispatch.reads_sizes or experts.fsdp == "apart"):
        return [(block, "forward", True)]
    return [
        (block, "mix", True),
        (block, "route", True),
        (block.ffn, "shared_expert", True),
        (experts, "forward", not experts.dispatch.reads_sizes),
    ]


def apply_compile(owner, method, backend):
    # The function, not the module: FSDP's hooks stay outside the compiled region and names stay
    # what they are.
    setattr(owner, method, torch.compile(getattr(owner, method), fullgraph=True, backend=backend))


def parallelize(model, config, dims):
    """Turn a model on the meta device into one that trains on this rank. Returns Parallel."""
    build(model, config, dims)
    materialise(model, dims.device)
    init_weights(model, config.job.seed)
    unsharded = UnshardedGradients(model, dims)
    if dims.pp > 1:
        pipeline = Pipeline(model, config, dims)
        return Parallel(pipeline.forward_backward, unsharded, pipeline.evaluate)
    return Parallel(forward_backward(model), unsharded, evaluate(model))


def build(model, config, dims):
    """All of `parallelize` that needs no memory for weights: the model stays on the meta device."""
    dtype = DTYPES[config.training.dtype]
    if dtype == torch.float64:
        model.to(torch.float64)
    if dims.pp > 1:
        split_stages(model, config, dims)
    split_layers(model, config, dims)
    if config.parallel.async_tp:
        overlap_tensor_parallel(dims.group("tp").group_name)
    mode = config.activation_checkpoint.mode
    for block in model.blocks:
        for owner, method, compiles in units(block):
            if mode != "none":
                apply_recompute(owner, method, mode)
            if config.compile.enable and compiles:
                apply_compile(owner, method, config.compile.backend)
    if config.compile.enable:
        # torch counts the graphs of all blocks together: each kind of block x training and
        # validation x sizes seen before they are dynamic. At its limit of 8, fullgraph=True would
        # end the run.
        torch.compiler.config.recompile_limit = 32 * len(model.blocks)
        torch.compiler.config.accumulated_recompile_limit = 128 * len(model.blocks)
    for stage in model.stages:
        apply_fsdp(stage, dims, dtype, config.parallel.reshard_after_forward)


def split_layers(model, config, dims):
    """Tensor and expert parallelism of a model on the meta device, and what its MoE layers know of
    other ranks."""
    if dims.tp > 1:
        apply_tensor_parallel(model, config, dims)
    if dims.ep > 1:
        apply_expert_parallel(model, config, dims)
    for layer in model.moe_layers():
        layer.balance_group = BalanceGroup(dims)


class BalanceGroup:
    """Sums over the ranks that hold other tokens, for the balance losses of a MoE layer."""

    def __init__(self, dims):
        self.stage, self.sequence = (
            None if g is None else g.group_name for g in (dims.stage_group, dims.sequence_group)
        )

    def sum_counts(self, counts):
        """counts [E] summed over all ranks of this pipeline stage; no gradient flows through
        counts."""
        return self.sum(counts, self.stage)

    def sum_rows(self, counts):
        """counts [rows, E] of the rows of this microbatch, summed over the ranks that its tokens
        are split over."""
        return self.sum(counts, self.sequence)

    @staticmethod
    def sum(counts, group):
        """Sum over the group of this name; None: of this rank alone."""
        return counts if group is None else sum_over_ranks(counts.detach(), group)


def forward_backward(model):
    """The step's forward and backward passes, one microbatch after the other."""

    accumulation = Accumulation(model)

    def run(microbatches, normaliser):
        outputs = []
        for number, (tokens, labels, seq) in enumerate(microbatches, 1):
            accumulation.begin(last=number == len(microbatches))
            output = model(tokens, seq, labels, normaliser)
            (output.loss + output.z_loss).backward()
            outputs.append(output.detach())
        return outputs

    return run


def evaluate(model):
    return lambda tokens, labels, seq: model(tokens, seq, labels, 1.0).loss
