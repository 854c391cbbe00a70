"""Whether this machine computes the kernels rightly: a family on two chunks against the recurrence in float64, before a run trusts it.

A verdict is remembered in $XDG_CACHE_HOME/lmoe (else ~/.cache/lmoe) for the versions of Triton and PyTorch, the GPU and the sources that
it was passed on.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from lmoe.kernels import ops
from lmoe.kernels.families import FOLDERS
from lmoe.kernels.norm import compute_dtype

CHUNK, HEADS, VALUE_HEADS = 64, 1, 2
CHANNELS = {torch.bfloat16: 64, torch.float32: 32}  # in fp32, 64 are more than the shared memory of a small GPU
# family -> the kinds of gates that it has, as extra inputs.
KINDS = {
    "ssd": ((), ("g",), ("gamma",), ("g", "diag")),
    "gla": ((), ("gk",), ("gv",), ("gk", "gv"), ("gk", "u")),
    "delta": (("beta",), ("beta", "g"), ("beta", "channel g")),
}
DECAYS, WITHOUT_GRADIENT = ("g", "gamma", "gk", "gv", "channel g"), ("gamma",)
ROUNDED = ("o", "dq", "dk", "dv")  # the others are gradients of gates, sums that cancel


def limit(name, dtype):
    """The largest root mean square of the error relative to the value's that rounding explains."""
    if dtype == torch.bfloat16:
        return 5e-3 if name in ROUNDED else 2e-2
    return 1e-5 if name == "o" else 1e-4


def make_inputs(family, kind, dtype, T):
    """(inputs by name, gradient of the output) from a fixed seed, on the CPU; what stays in fp32 beside bf16 does."""
    generator = torch.Generator().manual_seed(0)
    heads, D = VALUE_HEADS if family != "gla" else HEADS, CHANNELS[dtype]
    shapes = {
        "q": (1, T, HEADS, D), "k": (1, T, HEADS, D), "v": (1, T, heads, D), "g": (1, T, heads), "channel g": (1, T, heads, D),
        "gk": (1, T, HEADS, D), "gv": (1, T, heads, D), "u": (HEADS, D), "diag": (1, T, heads), "gamma": (heads,),
        "beta": (1, T, heads),
    }  # fmt: skip
    inputs = {}
    for name in ("q", "k", "v", *kind):
        x = torch.randn(shapes[name], generator=generator)
        if name in DECAYS:
            x = torch.nn.functional.logsigmoid(3 * x + 1)
        if name == "beta":
            x = 2 * x.sigmoid()
        narrow = name in ("q", "k", "v", "u")
        inputs[name.removeprefix("channel ")] = x.to(dtype if narrow else compute_dtype(x))
    return inputs, torch.randn(shapes["v"], generator=generator).to(dtype)


def run(family, inputs, do, cu_seqlens, backend):
    """o and the gradients by name, in float64 on the CPU."""
    inputs = {name: x.detach().requires_grad_(name not in WITHOUT_GRADIENT) for name, x in inputs.items()}
    options = {"qk_l2norm": True} if family == "delta" else {}
    with torch.enable_grad():
        o, _ = getattr(ops, family)(**inputs, **options, cu_seqlens=cu_seqlens, chunk_size=CHUNK, backend=backend)
        wanted = {"d" + name: x for name, x in inputs.items() if x.requires_grad}
        results = {"o": o.detach()} | dict(zip(wanted, torch.autograd.grad(o, list(wanted.values()), do)))
    return {name: x.double().cpu() for name, x in results.items()}


def first_error(family, device, backend):
    """What is wrong with a family, or None."""
    cu_seqlens = torch.tensor([0, CHUNK + 3, 2 * CHUNK])  # a border just off the chunk's
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        for kind in KINDS[family]:
            inputs, do = make_inputs(family, kind, dtype, 2 * CHUNK)
            want = run(family, {name: x.double() for name, x in inputs.items()}, do.double(), cu_seqlens, "reference")
            got = run(family, {name: x.to(device) for name, x in inputs.items()}, do.to(device), cu_seqlens.to(device), backend)
            for name, x in want.items():
                error = ((got[name] - x).square().mean().sqrt() / x.square().mean().sqrt()).item()
                if not error <= limit(name, dtype):  # NaN is no better
                    inputs = f"{' '.join(kind) or 'no gates'}, {str(dtype).removeprefix('torch.')}"
                    return f"{name} of {family} ({inputs}) is off by {error:.1e}, more than {limit(name, dtype):.0e}"
    return None


def versions(device):
    """(Triton's version, name of the GPU, its architecture)"""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "absent"
    if device.type != "cuda":
        return version, "no GPU", "the interpreter"
    return version, torch.cuda.get_device_name(device), "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def sources(backend):
    here = Path(__file__).resolve().parent
    return sorted([*here.glob("*.py"), *(here / FOLDERS[backend]).glob("*.py")])


def cache_file():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmoe" / "kernels.json"


def _remembered():
    try:
        known = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(key, message):
    """In one step, as ranks do it at the same time; a folder that can't be written costs the next run a check."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_suffix(f".{os.getpid()}")
        mine.write_text(json.dumps(_remembered() | {key: message}, indent=1))
        mine.replace(path)
    except OSError:
        pass


def verdict(family, device, backend="triton"):
    """(whether the backend computes this family rightly on the device, what is wrong or "")."""
    device = torch.device(device)
    triton, gpu, architecture = versions(device)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources(backend))).hexdigest()
    key = " / ".join((family, backend, f"triton {triton}", f"torch {torch.__version__}", gpu, digest))
    message = _remembered().get(key)
    if message is None:
        try:
            wrong = first_error(family, device, backend)
        except Exception as error:  # whatever a compiler or a driver says; not remembered, as another program's memory may have been why
            lines = str(error).strip().splitlines() or [""]
            return False, _advice(f"{family} fails with {type(error).__name__}: {lines[-1].strip()}", backend, triton, architecture)
        message = _advice(wrong, backend, triton, architecture) if wrong else ""
        _remember(key, message)
    return not message, message


def _advice(wrong, backend, triton, architecture):
    works = "take mixer.backend = chunk, or another version of Triton" if backend == "triton" else "take another version of PyTorch"
    return f"mixer.backend = {backend}: {wrong}, with Triton {triton} on {architecture}; {works}"


def check_kernels(families, device):
    """ValueError for the first of the families that the Triton kernels compute wrongly on the device."""
    for family in families:
        right, message = verdict(family, device)
        if not right:
            raise ValueError(message)
