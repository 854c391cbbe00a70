"""Find the memory that a piece of a model takes on the meta device: every tensor that is made is
put down."""

import contextlib
import weakref

import torch

from lmoe.kernels import experts
from lmoe.kernels.family import REGISTERED
from lmoe.parallel.compat import TorchDispatchMode

EXPERTS = {op._opoverload: op.run for op in (experts.forward, experts.backward)}


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def _without_launches(backend):
    if backend != "triton":
        return contextlib.nullcontext()
    from lmoe.kernels.gpu.common import without_launches

    return without_launches()


class Ledger(TorchDispatchMode):
    """Bytes of the tensors made under it: `live` now, `peak` the most so far. Tensors from before
    cost nothing."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.held = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors_in(args):
            self.put_down(tensor, 0)
        self.run_inside(func, args)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in([result]):
            self.put_down(tensor, tensor.untyped_storage().nbytes())
        return result

    def put_down(self, tensor, size):
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.held:
            return

        def free(_):
            self.live -= size
            del self.held[key]

        self.held[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

    def run_inside(self, func, args):
        """For its peak, what a mixer's op or the experts' does inside; on the meta device the op
        itself only makes its results."""
        if func.namespace != "lmoe":
            return
        if func in EXPERTS:
            with self, torch.no_grad(), _without_launches("triton"):
                EXPERTS[func](*args)
            return
        given = dict(zip([argument.name for argument in func._schema.arguments], args))
        family, _, name = func.__name__.split(".")[0].rpartition("_")
        backend = given.pop("backend", None)
        if backend is not None:
            with self, torch.no_grad(), _without_launches(backend):
                getattr(REGISTERED[family].form(backend), name)(*given.values())
