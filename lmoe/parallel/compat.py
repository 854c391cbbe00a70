"""Every private or version-bound torch API that lmoe uses, each with its reason."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401  the only way to see the operations of a backward pass

_c10d = torch.ops._c10d_functional


def record_cuda_memory(enabled):
    """Start or stop recording CUDA allocations: documented for users, yet only under a private
    name."""
    torch.cuda.memory._record_memory_history("all" if enabled else None, max_entries=100_000)


def dump_cuda_memory(path):
    """Write the recorded allocations; private as above."""
    torch.cuda.memory._dump_snapshot(str(path))


def scaled_step(optimizer, scale, skip):
    """Step a fused optimizer with its gradients divided by `scale`, or, where `skip` is 1, leave
    weights, moments and step counts alone. Both 0-dim fp32 on the device, so the host never waits:
    torch.amp.GradScaler hands them over in these attributes, and nothing else can."""
    optimizer.grad_scale = scale
    optimizer.found_inf = skip
    optimizer.step()


# Collectives out of place, as torch.compile keeps them in a graph and overlaps them: public only
# under private names. Each returns at once; wait(result) orders what follows behind it. `group` is
# the name of a process group.


def start_all_reduce(x, op, group):
    return _c10d.all_reduce(x.contiguous(), op, group)


def start_all_gather(x, size, group):
    return _c10d.all_gather_into_tensor(x.contiguous(), size, group)


def start_reduce_scatter(x, size, group):
    return _c10d.reduce_scatter_tensor(x.contiguous(), "sum", size, group)


def start_all_to_all(x, received, sent, group):
    return _c10d.all_to_all_single(x.contiguous(), received, sent, group)


def overlap_tensor_parallel(group):
    """Have inductor split matrix products so that they overlap with the exchanges of tokens around
    them; it has no public switch."""
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(group)


def wait(x):
    return _c10d.wait_tensor(x)
