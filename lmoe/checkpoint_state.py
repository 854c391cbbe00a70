"""The state of a running job for its checkpoints: named tensors of model and optimizers, copies of
them, and random generators."""

import random
import weakref

import numpy as np
import torch

from lmoe.model.init import clean_name, local


def model_tensors(model):
    """Parameters (sharded or plain) and persistent buffers: {"model.<name>": the tensor itself,
    detached}.

    FSDP2 leaves parameters whole after an evaluation, and whole ones are copies; its state_dict
    hook shards them again. So this comes before anything that looks at model.named_parameters().
    """
    stages = getattr(model, "stages", [model])
    return {
        f"model.{clean_name(name)}": tensor
        for stage in stages
        for name, tensor in stage.state_dict().items()
    }


def optimizer_tensors(model, optimizers):
    """{"optim.<parameter name>.<state>": tensor}. A parameter that never had a gradient has no
    state."""
    return {
        f"optim.{name}.{key}": tensor
        for optimizer, _, parameter, name in _optimized(model, optimizers)
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def _optimized(model, optimizers):
    names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer, group, parameter, names[id(parameter)]


@torch.no_grad()
def empty_optimizer_state(model, optimizers, saved):
    """Room for the optimizer state in a checkpoint: [(optimizer, parameter, name, {key: tensor})],
    laid out as the optimizer would.

    A state of the parameter's shape is sharded like it; anything else is plain. torch keeps `step`
    on the CPU unless the update is fused or capturable.
    """
    by_name = {}
    for key, entry in saved.items():
        if key.startswith("optim."):
            name, _, state = key.removeprefix("optim.").rpartition(".")
            by_name.setdefault(name, {})[state] = entry
    states = []
    for optimizer, group, parameter, name in _optimized(model, optimizers):
        step_device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
        state = {}
        for key, entry in by_name.get(name, {}).items():
            dtype = entry.properties.dtype
            device = parameter.device
            if key != "step" and entry.size == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=dtype)
            else:
                device = step_device if key == "step" else device
                state[key] = torch.empty(entry.size, dtype=dtype, device=device)
        if state:
            states.append((optimizer, parameter, name, state))
    return states


class HostMemory:
    """Copies of a rank's tensors in one block of host memory, kept from save to save and pinned
    where there is a GPU.

    Not allocated with pin_memory=True, which rounds up to a power of two, up to twice the model and
    optimizer.
    """

    def __init__(self):
        self.block = np.empty(0, np.uint8)

    @torch.no_grad()
    def copy(self, state):
        """{key: CPU copy of this rank's part}, contiguous; valid until the next call."""
        parts = {key: local(tensor) for key, tensor in state.items()}
        starts = {}
        size = 0
        for key, part in parts.items():
            starts[key] = size
            size += -(-part.nbytes // 64) * 64
        if self.block.size < size:
            self.block = None  # before there are two
            self.block = np.empty(size, np.uint8)
            if torch.cuda.is_available():
                pointer = self.block.ctypes.data
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(pointer, size, 0))
                release = torch.cuda.cudart().cudaHostUnregister
                weakref.finalize(self.block, release, pointer).atexit = False
        copies = {}
        for key, part in parts.items():
            # frombuffer and not a view: the writer would clone a tensor that is only a piece of its
            # storage, and keep the clone.
            place = {"dtype": part.dtype, "count": part.numel(), "offset": starts[key]}
            flat = torch.frombuffer(self.block, **place) if part.numel() else part.cpu()
            copies[key] = flat.view(part.shape).copy_(part, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def rng_state():
    """This rank's generators, as tensors and plain numbers (so that loading runs no pickled
    code)."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": (version, torch.tensor(numbers, dtype=torch.int64), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state):
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
