"""Initial weights that do not depend on the layout.

Every parameter is drawn whole, in fp32 on the CPU, from a generator keyed by (seed, fully qualified
name), and then cut to the shard that this rank holds: one GPU, eight GPUs, any sharding and any
device start from the same bits.

A module that owns parameters defines
    init_parameter(self, name, tensor, generator): fill the full-size fp32 CPU tensor in place
and a module that owns buffers defines
    reset_buffers(self): write every buffer (after to_empty they hold garbage).
Marks are attributes that parameters keep (MARKS): `keep_fp32`, must stay fp32 in mixed precision;
`no_decay`, takes no weight decay though it is no vector; `every_stage`, held by all stages of a
pipeline.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor


def clean_name(fqn):
    """The name of a parameter without what recomputation and compilation wrap around modules."""
    return fqn.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


MARKS = ("keep_fp32", "no_decay", "every_stage")


def marked(parameter, *marks):
    """The parameter, with these marks."""
    for name in marks:
        assert name in MARKS
        setattr(parameter, name, True)
    return parameter


def marks(parameter):
    return [name for name in MARKS if getattr(parameter, name, False)]


def fp32_parameter(*shape, marks=()):
    """Make a parameter that mixed precision must leave in fp32, with other marks."""
    return marked(nn.Parameter(torch.empty(shape)), "keep_fp32", *marks)


def fp32_parameters(module):
    """The parameters that mixed precision must not round."""
    return {p for p in module.parameters() if getattr(p, "keep_fp32", False)}


def narrow(module, dtype):
    """Round the parameters of a module without shards as mixed precision does for a pass."""
    for p in {*module.parameters()} - fp32_parameters(module):
        p.data = p.data.to(dtype)


def local(parameter):
    """The part of a parameter (or None) that this rank computes with: under tensor and expert
    parallelism it is a DTensor, else all of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Linear(nn.Linear):
    """nn.Linear whose weights start from N(0, std), or as `draw(tensor, generator=)` fills them,
    and whose bias starts from zero."""

    draw = None

    def __init__(self, in_features, out_features, bias=False, *, std):
        super().__init__(in_features, out_features, bias=bias)
        self.std = std

    def reset_parameters(self):
        pass  # init_weights draws them, independently of the layout

    def init_parameter(self, name, tensor, generator):
        if name == "bias":
            tensor.zero_()
        elif self.draw is not None:
            self.draw(tensor, generator=generator)
        else:
            tensor.normal_(0.0, self.std, generator=generator)

    def shards(self, dim):
        """Return {parameter: dim} of what tensor parallelism cuts, for outputs (0) or inputs
        (1)."""
        if dim == 0:
            return {name: 0 for name, _ in self.named_parameters(recurse=False)}
        assert self.bias is None, "ranks that share the inputs would each add the bias"
        return {"weight": 1}

    def forward(self, x):
        return F.linear(x, local(self.weight), local(self.bias))

    def flops_per_token(self):
        return 2 * self.in_features * self.out_features


def orthogonal(tensor, gain, generator):
    """Fill a matrix with orthonormal rows or columns times gain. In float64: what the number of
    threads, which layouts differ in, moves of a QR factorisation is lost in the rounding."""
    wide = nn.init.orthogonal_(tensor.double(), gain, generator=generator)
    tensor.copy_(wide)


def output_std(std, layers):
    """Standard deviation of projections that write to the residual stream: std / sqrt(2 layers)."""
    return std / math.sqrt(2 * layers)


def materialise(model, device):
    """Give a model on the meta device memory on `device`; the marks on its parameters survive."""
    before = {name: marks(p) for name, p in model.named_parameters()}
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        marked(p, *before[name])


def _generator(seed, name):
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def reset_buffers(model):
    """Write every buffer: constants, and what training moves, at its start."""
    for module in model.modules():
        if list(module.buffers(recurse=False)):
            module.reset_buffers()


def cut(full, parameter):
    """This rank's part of a whole tensor that is laid out like `parameter`: all of it, or, of a
    DTensor, a view.

    The last axis of the mesh (tp or ep) cuts first, as FSDP2 shards what tensor and expert
    parallelism left of a parameter.
    """
    if not isinstance(parameter, DTensor):
        return full
    mesh = parameter.device_mesh
    for axis in reversed(range(mesh.ndim)):
        placement = parameter.placements[axis]
        if not placement.is_replicate():
            pieces = full.chunk(mesh.size(axis), placement.dim)
            place = mesh.get_local_rank(axis)
            full = pieces[place] if place < len(pieces) else full.narrow(placement.dim, 0, 0)
    return full


@torch.no_grad()
def init_weights(model, seed):
    """Fill every parameter and buffer of a materialised model (plain or DTensor parameters)."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            fqn = clean_name(f"{prefix}.{name}" if prefix else name)
            full = torch.empty(parameter.shape, dtype=torch.float32)
            module.init_parameter(name, full, _generator(seed, fqn))
            local(parameter).copy_(cut(full, parameter))
    reset_buffers(model)
