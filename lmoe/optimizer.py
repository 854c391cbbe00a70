"""AdamW with its groups, the learning-rate schedules, and gradient clipping that leaves nothing
behind on a non-finite step."""

import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lmoe.model.init import local


def decays(parameter):
    """Weight decay is for matrices: not for norms, biases and the gates' parameters, which are
    vectors or marked."""
    return parameter.ndim >= 2 and not getattr(parameter, "no_decay", False)


def build_optimizer(config, model):
    """Fused AdamW over the groups {plain, sharded over one mesh, over another ..} x {decay, no
    decay}."""
    groups = {}
    for parameter in model.parameters():
        mesh = (
            " ".join(parameter.device_mesh.mesh_dim_names) if isinstance(parameter, DTensor) else ""
        )
        groups.setdefault((mesh, decays(parameter)), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": config.weight_decay if decay else 0.0}
        for (_, decay), parameters in sorted(groups.items())
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True
    )
    return optimizer


def learning_rate(config, peak, step, steps):
    """The learning rate of step `step` (counted from 1) of `steps`; a pure function, so a resumed
    run needs no state.

    Linear warm-up, then constant; or to min_lr_ratio x peak at the last step: linear, cosine; or
    wsd: constant, then linear over the last decay_steps (arXiv 2404.06395).
    """
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


def wsd_decay_steps(config, steps):
    return config.decay_steps or max(1, steps // 10)


@torch.no_grad()
def total_norm(parameters, stage_world=None):
    """The global 2-norm of the gradients, from one all-reduce over all ranks: each adds its part of
    every gradient, divided by the number of ranks that hold the same part. So it has the same bits
    everywhere: with a sum for each group of shards, the replicas' clip factors, and then their
    weights, could drift apart.

    stage_world: ranks that hold the same layers (default: all).
    """
    world, held = dist.get_world_size(), {}
    for p in parameters:
        if p.grad is None:
            continue
        parts = 1
        if isinstance(p.grad, DTensor):
            mesh = p.grad.device_mesh
            parts = math.prod(
                mesh.size(axis)
                for axis, place in enumerate(p.grad.placements)
                if not place.is_replicate()
            )
        holders = world if getattr(p, "every_stage", False) else stage_world or world
        held.setdefault(holders // parts, []).append(local(p.grad))
    square = sum(
        torch.stack(torch._foreach_norm(grads)).square().sum() / copies
        for copies, grads in held.items()
    )
    if world > 1:
        dist.all_reduce(square)
    return square.sqrt()


@torch.no_grad()
def clip_and_step(optimizer, norm, max_norm):
    """One optimizer step with the gradients scaled to at most max_norm (0: as they are).

    A non-finite norm changes no weight, moment or step count. Returns 1.0 where the step was
    skipped, as a device tensor: the verdict never reaches the host.
    """
    skip = (~norm.isfinite()).to(torch.float32)
    scale = (norm / max_norm).clamp(min=1.0) if max_norm else torch.ones_like(norm)
    optimizer.grad_scale = torch.where(norm.isfinite(), scale, torch.ones_like(scale)).to(
        torch.float32
    )
    optimizer.found_inf = skip
    optimizer.step()
    return skip
