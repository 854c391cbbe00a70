"""Every private or version-bound torch API that lmoe uses, each with its reason."""

import torch


def record_cuda_memory(enabled):
    """Start or stop recording CUDA allocations: documented for users, yet only under a private name."""
    torch.cuda.memory._record_memory_history(enabled="all" if enabled else None, **({"max_entries": 100_000} if enabled else {}))


def dump_cuda_memory(path):
    """Write the recorded allocations; private as above."""
    torch.cuda.memory._dump_snapshot(str(path))
