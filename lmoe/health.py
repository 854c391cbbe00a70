"""Find the layer where a run that is lost, every step of it skipped, first leaves the range."""

import functools
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lmoe.config import Config
from lmoe.data.packing import HostBatch
from lmoe.evaluate import mean_loss
from lmoe.model.batch import SeqBuilder
from lmoe.model.build import layer_mixers
from lmoe.model.init import local
from lmoe.model.model import Model
from lmoe.parallel.dims import Dims
from lmoe.parallel.parallelize import Parallel


@torch.no_grad()
def gives_finite_loss(
    evaluate: Callable, batch: HostBatch, make_batch: SeqBuilder, dims: Dims
) -> bool:
    """Tell whether the weights as they are now give a finite loss: a step's gradient is finite that
    takes them out of range. evaluate, make_batch: as for validate. Collective."""
    with torch.compiler.set_stance("force_eager"):  # one batch is not worth a compilation
        return math.isfinite(mean_loss(evaluate, [batch], make_batch, dims))


def locate_non_finite(
    model: Model,
    parallel: Parallel,
    batches: list[tuple],
    num_valid: float,
    config: Config,
    dims: Dims,
) -> str:
    """Run the passes of a step again, uncompiled, and say where over all ranks an output or a
    gradient is not finite. Collective."""
    layers = [f"layer {n} ({name})" for n, name in enumerate(layer_mixers(config.model))]
    names = ["the embedding", *layers, "the head"]
    places = {0: model.embed, len(layers) + 1: model.head}
    places |= {int(number) + 1: block for number, block in model.blocks.named_children()}
    found = torch.zeros(2, len(names), device=dims.device)  # outputs, gradients
    hooks = [
        module.register_forward_hook(functools.partial(_look, found[:, place]))
        for place, module in places.items()
        if module is not None
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            parallel.forward_backward(batches, num_valid)
    finally:
        for hook in hooks:
            hook.remove()
    if dims.world > 1:
        dist.all_reduce(found)
    outputs, gradients = ([i for i, n in enumerate(row) if n] for row in found.tolist())
    if outputs:
        return f"the lowest layer whose output is not finite is {names[outputs[0]]}"
    if gradients:  # they come from above
        return (
            "all outputs are finite; the lowest layer whose gradient is not finite is"
            f" {names[gradients[0]]}, the first on the way back {names[gradients[-1]]}"
        )
    return "on the last batch every layer's output and its gradient is finite"


@torch.no_grad()
def _look(found: Tensor, module: nn.Module, given: tuple, output: object) -> None:
    """Forward hook: add 1 to found [2] for an output and, later, for its gradient not finite."""
    for x in output if isinstance(output, tuple) else (output,):
        if isinstance(x, Tensor) and x.is_floating_point():
            found[0] += _is_broken(x)
            if x.requires_grad:
                x.register_hook(functools.partial(_look_back, found))


def _look_back(found: Tensor, gradient: Tensor) -> None:
    found[1] += _is_broken(gradient)


def _is_broken(x: Tensor) -> Tensor:
    return (~local(x).isfinite()).any()
