"""Which form of a utility (norms, short convolution, elementwise work, cross-entropy) runs: its
Triton kernel or portable PyTorch."""

import contextlib
import importlib.util

import torch
from torch.distributed.tensor import DTensor

DTYPES = (torch.bfloat16, torch.float32)  # that the Triton utilities take
WIDEST = 16384  # row of a norm that they take
INSTALLED = importlib.util.find_spec("triton") is not None
_forced = None


def on_gpu(x, *others, pointwise=True, width=0):
    """Tell whether the Triton form serves for these tensors (others may be None) and rows of
    `width` channels. The meta device, where memory is planned, stands for a GPU.

    pointwise: not in compiled code, where Inductor fuses the portable form into its neighbours.
    """
    tensors = [t for t in (x, *others) if t is not None]
    if width > WIDEST or any(t.dtype not in DTYPES or isinstance(t, DTensor) for t in tensors):
        return False
    if _forced is not None:
        return _forced == "triton"
    return (
        INSTALLED
        and x.device.type in ("cuda", "meta")
        and not (pointwise and torch.compiler.is_compiling())
    )


@contextlib.contextmanager
def forced(form):
    """Inside, "portable" or "triton" wherever the tensors allow it, whatever the device: for tests,
    and to find a kernel that is wrong."""
    global _forced
    assert form in ("portable", "triton")
    before = _forced
    _forced = form
    try:
        yield
    finally:
        _forced = before
