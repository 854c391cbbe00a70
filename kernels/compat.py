"""Every private torch API that kernels use, each with its reason."""

import torch


def below_autograd():
    """A context in which ops run without their autograd: what an op's own autograd enters. C++ has it as at::AutoDispatchBelowAutograd."""
    return torch._C._AutoDispatchBelowAutograd()
