"""Initial weights that do not depend on the layout.

Every parameter is drawn whole, in fp32 on the CPU, from a generator keyed by (seed, fully qualified name), and then cut to the
shard that this rank holds: one GPU, eight GPUs, any sharding and any device start from the same bits.

A module that owns parameters defines
    init_parameter(self, name, tensor, generator): fill the full-size fp32 CPU tensor in place
and a module that owns buffers defines
    reset_buffers(self): write every buffer (after to_empty they hold garbage).
Parameters that must stay fp32 in mixed precision carry the attribute `keep_fp32 = True`.
"""

import hashlib
import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def clean_name(fqn):
    """The name of a parameter without what recomputation and compilation wrap around modules."""
    return fqn.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def keep_fp32(parameter):
    """Mark a parameter that mixed precision must leave in fp32, and return it."""
    parameter.keep_fp32 = True
    return parameter


class Linear(nn.Linear):
    """nn.Linear whose weights start from N(0, std) and whose bias starts from zero."""

    def __init__(self, in_features, out_features, bias=False, *, std):
        super().__init__(in_features, out_features, bias=bias)
        self.std = std

    def reset_parameters(self):
        pass  # init_weights draws them, independently of the layout

    def init_parameter(self, name, tensor, generator):
        if name == "bias":
            tensor.zero_()
        else:
            tensor.normal_(0.0, self.std, generator=generator)

    def flops_per_token(self):
        return 2 * self.in_features * self.out_features


def output_std(std, layers):
    """Standard deviation of projections that write to the residual stream: std / sqrt(2 layers)."""
    return std / math.sqrt(2 * layers)


def materialise(model, device):
    """Give a model on the meta device memory on `device`; the marks on its parameters survive."""
    marked = {name for name, p in model.named_parameters() if getattr(p, "keep_fp32", False)}
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        if name in marked:
            keep_fp32(p)


def _generator(seed, name):
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def reset_buffers(model):
    """Write every buffer: constants, and what training moves, at its start."""
    for module in model.modules():
        if next(module.buffers(recurse=False), None) is not None:
            module.reset_buffers()


@torch.no_grad()
def init_weights(model, seed):
    """Fill every parameter and buffer of a materialised model (plain or DTensor parameters)."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            fqn = clean_name(f"{prefix}.{name}" if prefix else name)
            full = torch.empty(parameter.shape, dtype=torch.float32)
            module.init_parameter(name, full, _generator(seed, fqn))
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                value = full.to(device=parameter.device, dtype=parameter.dtype)
                parameter.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
            else:
                parameter.copy_(full)
    reset_buffers(model)
