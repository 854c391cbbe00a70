"""AdamW with its groups, the learning-rate schedules, and gradient clipping that leaves nothing
behind on a non-finite step."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lmoe.config.sections import OptimizerConfig, ScheduleConfig
from lmoe.model.init import local
from lmoe.model.model import Model
from lmoe.model.moe.router import update_bias
from lmoe.parallel.compat import scaled_step


def decays(parameter: nn.Parameter) -> bool:
    """Leave weight decay to matrices: norms, biases and the gates' parameters are vectors or
    marked."""
    return parameter.ndim >= 2 and not getattr(parameter, "no_decay", False)


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.AdamW:
    """Build fused AdamW over the groups {plain, sharded over one mesh, over another ..} x {decay,
    no decay} of the parameters that are not frozen."""
    by_kind = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            names = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else ()
            by_kind.setdefault((" ".join(names), decays(parameter)), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": config.weight_decay if decay else 0.0}
        for (_, decay), parameters in sorted(by_kind.items())
    ]
    # A pipeline stage may have frozen parameters only: a group without any.
    groups = groups or [{"params": []}]
    betas = tuple(config.betas)
    return torch.optim.AdamW(groups, config.lr, betas, config.eps, fused=True)


def learning_rate(config: ScheduleConfig, peak: float, step: int, steps: int) -> float:
    """Compute the learning rate of step `step` (counted from 1) of a schedule of `steps`, beyond
    which it stays; a pure function, so a resumed run needs no state.

    Linear warm-up, then constant; or to min_lr_ratio x peak at the last step: linear, cosine; or
    wsd: constant, then linear over the last decay_steps (arXiv 2404.06395).
    """
    step = min(step, steps)
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    low = config.min_lr_ratio
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.kind == "constant":
        factor = 1.0
    elif config.kind == "linear":
        factor = 1 - (1 - low) * progress
    elif config.kind == "cosine":
        factor = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = wsd_decay_steps(config, steps)
        factor = 1 - (1 - low) * max(0, step - (steps - decay)) / decay
    return peak * factor


def wsd_decay_steps(config: ScheduleConfig, steps: int) -> int:
    return config.decay_steps or max(1, steps // 10)


@torch.no_grad()
def total_norm(parameters: Iterable[nn.Parameter], stage_world: int | None = None) -> Tensor:
    """Compute the global 2-norm of the gradients (0-dim), in one all-reduce over all ranks: each
    adds its part of every gradient, divided by the number of ranks that hold the same part. So it
    has the same bits everywhere: with a sum for each group of shards, the replicas' clip factors,
    and then their weights, could drift apart.

    stage_world: ranks that hold the same layers (default: all).
    """
    parameters = list(parameters)
    world = dist.get_world_size()
    held = {}
    for p in parameters:
        if p.grad is None:
            continue
        parts = 1
        if isinstance(p.grad, DTensor):
            for size, place in zip(p.grad.device_mesh.shape, p.grad.placements):
                parts *= 1 if place.is_replicate() else size
        holders = world if getattr(p, "every_stage", False) else stage_world or world
        held.setdefault(holders // parts, []).append(local(p.grad))
    square = local(parameters[0]).new_zeros(())  # all that a rank with frozen parameters adds
    for copies, grads in held.items():
        square += torch.stack(torch._foreach_norm(grads)).square().sum() / copies
    if world > 1:
        dist.all_reduce(square)
    return square.sqrt()


@torch.no_grad()
def clip_and_step(
    optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float, lr: float
) -> Tensor:
    """Step the optimizer with the gradients scaled to a norm of at most max_norm (0: as they are).

    A non-finite norm changes no weight, moment or step count. Returns 1.0 where the step was
    skipped, 0-dim on the device: the verdict never reaches the host.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    skip = (~norm.isfinite()).float()
    scale = (norm / max_norm).clamp(min=1.0) if max_norm else torch.ones_like(norm)
    scaled_step(optimizer, torch.where(norm.isfinite(), scale, 1.0).float(), skip)
    return skip


def update_router_biases(
    model: Model, counts: dict[str, Tensor], rate: float, skipped: Tensor
) -> None:
    """Move the bias of every router of experts on this rank against its load; call it once a step.

    counts: {name in model.routers: [E] tokens of the step over all ranks}; rate: by how much (0:
    not at all); skipped: as clip_and_step returned it.
    """
    for number, block in model.blocks.named_children() if rate else ():
        if block.has_experts:
            update_bias(block.ffn.router.bias, counts[f"{number}.ffn"], rate, skipped)
