"""Every private torch API that kernels use, each with its reason."""

import torch


def below_autograd():
    """A context in which ops run without their autograd: what an op's own autograd enters. C++ has
    it as at::AutoDispatchBelowAutograd."""
    return torch._C._AutoDispatchBelowAutograd()


def aliased(inputs, outputs):
    """Tell whether one of the tensors `outputs` has the memory of another or of one of `inputs`,
    which the dispatcher takes for granted that no op's has: what torch.library.custom_op checks
    too, 1 us a call, and public nowhere."""
    return torch._C._any_output_is_alias_to_input_or_output(inputs, {}, outputs)


def above_autograd():
    """A context in which autograd records again, inside an op that was entered below it."""
    key = torch._C.DispatchKey.AutogradFunctionality
    return torch._C._SetExcludeDispatchKeyGuard(key, False)


def assert_all(true, message):
    """Raise a RuntimeError where a tensor is not true throughout: on the CPU at once, on a GPU, for
    which the host does not wait, at the next synchronisation. Nothing public does so."""
    torch._assert_async(true.all(), message)
