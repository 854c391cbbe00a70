"""Every private or version-bound torch API that lmoe uses, each with its reason."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol


def record_cuda_memory(enabled):
    """Start or stop recording CUDA allocations: documented for users, yet only under a private name."""
    torch.cuda.memory._record_memory_history(enabled="all" if enabled else None, **({"max_entries": 100_000} if enabled else {}))


def dump_cuda_memory(path):
    """Write the recorded allocations; private as above."""
    torch.cuda.memory._dump_snapshot(str(path))


def all_reduce_in_graph(tensor):
    """The sum over all ranks, out of place: the only form that torch.compile keeps in a graph has a private module."""
    return funcol.all_reduce(tensor, "sum", dist.group.WORLD)
