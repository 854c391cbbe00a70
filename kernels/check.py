"""Check that this machine computes the kernels rightly, before a run trusts them: scans on two
chunks against the recurrence in float64, the Triton utilities (norms, convolution, elementwise
work, cross-entropy) against their portable forms in float64. Scans are checked with the channels,
the dtypes and the gates that a run has: a compiler may be wrong about one size alone.

A verdict is remembered in $XDG_CACHE_HOME/lmoe (else ~/.cache/lmoe) for the versions of Triton and
PyTorch, the GPU, the sources and the scans that it was passed on.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from lmoe.kernels import choice, conv, experts, norm, pointwise
from lmoe.kernels.cross_entropy import IGNORE, linear_cross_entropy
from lmoe.kernels.families import FAMILIES
from lmoe.kernels.family import Family, Scan

UTILITIES = "utilities"  # checked as one more family
CHUNK = 64
HEADS = 1
VALUE_HEADS = 2
CHANNELS = {torch.bfloat16: 64, torch.float32: 32}  # of a check that no run asks for
WITHOUT_GRADIENT = ("gamma", "positions", "labels")
LOGITS = {"tau": "gk"}  # number: the argument that is no log decay beside it
# The others are gradients of a scan's gates and of weights, sums that cancel.
ROUNDED = ("o", "dq", "dk", "dv", "dx", "dgate")


def limit(name, dtype):
    """The largest root mean square of the error relative to the value's that rounding explains."""
    if dtype == torch.bfloat16:
        return 5e-3 if name in ROUNDED else 2e-2
    return 1e-5 if name == "o" else 1e-4


@dataclass(frozen=True)
class Case:
    """A scan to check: its gates (one of Family.gates, or another such list), channels of K and V,
    the dtype of q, k and logits, that of v, and whether value heads share q and k."""

    family: Family
    gates: str
    K: int
    V: int
    dtype: torch.dtype
    v_dtype: torch.dtype
    grouped: bool = False

    def __str__(self):
        dtypes = dict.fromkeys(str(x).removeprefix("torch.") for x in (self.dtype, self.v_dtype))
        heads = f"{self.K} and {self.V} channels" + ", grouped heads" * self.grouped
        return f"{self.family.name} ({self.gates or 'no gates'}, {heads}, {' and '.join(dtypes)})"


def every_case(family: Family, dtypes) -> list[Case]:
    """List the cases of a family: every kind of gates, in heads of one size."""
    found = []
    for dtype in dtypes:
        for gates in family.gates:
            for grouped in (False, True) if family.grouped else (False,):
                size = CHANNELS[dtype]
                found.append(Case(family, gates, size, size, dtype, dtype, grouped))
    return found


def named(gates: str) -> dict[str, str]:
    """Read a kind of gates, "beta g:1": {argument or number: which of its shapes, "" for the
    first}."""
    return dict(x.partition(":")[::2] for x in gates.split())


def logits(gates: str) -> set[str]:
    """Name the arguments that stand beside the number for which they are logits."""
    return {argument for number, argument in LOGITS.items() if number in named(gates)}


def sample(family: Family, gates: str, lead, sizes, generator, dtype=torch.float32):
    """Make the arguments of a family with a kind of gates, q among them: (tensors by name, numbers
    by name). lead: the tokens' dims; sizes: of the other letters, 4 where it has none."""
    given = named(gates)
    tensors = {}
    for argument in family.arguments:
        if argument.name not in ("q", "k", "v", *given):
            continue
        shape = argument.shapes[int(given.get(argument.name) or 0)]
        shape = [sizes.get(letter, 4) for letter in shape if letter != "T"]
        shape = [*lead, *shape] if argument.per_token else shape
        x = torch.randn(shape, generator=generator, dtype=dtype)
        if argument.name in family.samples and argument.name not in logits(gates):
            x = family.samples[argument.name](x)
        tensors[argument.name] = x
    return tensors, {name: family.samples[name] for name in family.numbers if name in given}


def make_inputs(case: Case, T: int):
    """Make (q, Scan, gradient of the output) from a fixed seed, on the CPU; what stays in fp32
    beside bf16 does."""
    generator = torch.Generator().manual_seed(0)
    family = case.family
    sizes = {"H": HEADS, "HV": VALUE_HEADS if case.grouped else HEADS, "K": case.K, "V": case.V}
    tensors, numbers = sample(family, case.gates, (1, T), sizes, generator)
    dtypes = dict.fromkeys(("q", "k", *logits(case.gates)), case.dtype) | {"v": case.v_dtype}
    tensors = {name: x.to(dtypes.get(name, torch.float32)) for name, x in tensors.items()}
    do = torch.randn(tensors["v"].shape, generator=generator).to(case.v_dtype)
    return tensors.pop("q"), Scan(family, tensors, numbers, CHUNK), do


def results(f, inputs, do, *options):
    """o = f(*inputs, *options) and the gradients by name, in float64 on the CPU."""
    inputs = {name: x.detach() for name, x in inputs.items()}
    wanted = {"d" + name: x for name, x in inputs.items() if name not in WITHOUT_GRADIENT}
    leaves = [x.requires_grad_() for x in wanted.values()]
    with torch.enable_grad():
        o = f(*inputs.values(), *options)
        found = {"o": o.detach()}
        if o.requires_grad:
            found |= zip(wanted, torch.autograd.grad(o, leaves, do.to(o).view_as(o)))
    return {name: x.double().cpu() for name, x in found.items()}


def widened(x):
    return x.double() if x.is_floating_point() else x


def run(case, convert, cu_seqlens, backend):
    """Run a case with its tensors converted: results of the scan."""
    q, scan, do = make_inputs(case, 2 * CHUNK)
    inputs = {name: convert(x) for name, x in {"q": q, **scan.inputs}.items()}

    def function(q, *tensors):
        tensors = dict(zip(scan.inputs, tensors))
        made = replace(scan, inputs=tensors, backend=backend)
        return case.family.run(made, q, cu_seqlens=convert(cu_seqlens))[0]

    return results(function, inputs, do)


def compare(case: Case, device, backend: str):
    """Run a case: (its name, results in float64, those of the backend)."""
    cu_seqlens = torch.tensor([0, CHUNK + 3, 2 * CHUNK])  # a border just off the chunk's
    want = run(case, widened, cu_seqlens, "reference")
    return str(case), want, run(case, lambda x: x.to(device), cu_seqlens, backend)


def _wide_rms_norm(x, weight, gate, eps, size, *_):  # Mamba2's: the gate first
    groups = (x * F.silu(gate)).flatten(1).unflatten(1, (-1, size))
    return (F.rms_norm(groups, (size,), eps=eps).flatten(1) * weight).view_as(x)


def _head_group_norm(x, weight, bias, gate, eps):
    return F.group_norm(x.flatten(1), x.shape[1], weight, bias, eps).view_as(x) * F.silu(gate)


def _rope(x, positions, theta):
    a, b = x.chunk(2, dim=-1)
    frequencies = theta ** (-torch.arange(a.shape[-1], dtype=x.dtype) / a.shape[-1])
    angles = positions[:, None, None] * frequencies
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _choices(tokens):
    """Four experts, of which every token chooses two."""
    return torch.tensor([[0, 1], [1, 3], [0, 3]]).repeat(tokens, 1)[:tokens]


def _experts(x, weight, w13, w2):
    ids = _choices(len(x))
    gate, up = torch.einsum("tkzid,td->ztki", w13[ids], x)
    out = torch.einsum("tkdi,tki->tkd", w2[ids], F.silu(gate) * up)
    return (weight[..., None] * out).sum(1)


def _gpu_experts(x, weight, w13, w2):
    with choice.forced("triton"):
        plan = experts.sort_by_expert(_choices(len(x)).to(x.device), len(w13))
        return experts.swiglu_experts(x, weight, plan, w13, w2)


def _step(step):
    """A convolution's step as a function: its output next to the shifted window."""

    @functools.wraps(step)
    @torch.no_grad()
    def both(x, window, *others):
        window = window.clone()
        return torch.cat([step(x, window, *others), window.flatten(1)], dim=1)

    return both


def _cross_entropy(x, head, labels, logits_dtype):
    """The loss, once for every element of x; in float64 it is portable, and no logits rounded."""
    rounded = logits_dtype if x.dtype != torch.float64 else None
    rest = {"z_coeff": 1e-2, "chunk": 20, "logits_dtype": rounded}
    with choice.forced("triton"):
        return linear_cross_entropy(x.flatten(1), head, labels, 7.0, **rest)[0].expand(x.shape)


def utilities(dtype, device):
    """As `compare`, of every Triton utility. The portable forms of the model's own are spelled out
    above: imports point the other way."""
    from lmoe.kernels.gpu import conv as gpu_conv
    from lmoe.kernels.gpu import norm as gpu_norm
    from lmoe.kernels.gpu import pointwise as gpu_pointwise

    T = 37
    H = 6
    D = 64
    W = 4
    eps = 1e-5
    generator = torch.Generator().manual_seed(0)
    shapes = *[(T, H, D)] * 3, *[(H * D,)] * 2, (H * D, W), (W - 1, H * D), (T, W - 1, H * D)
    shapes += (T, 2), (4, 2, 16, H * D), (4, H * D, 16)
    x, gate, do, weight, bias, w, halo, window, scores, w13, w2 = (
        torch.randn(shape, generator=generator) for shape in shapes
    )
    # Two documents, the first one begun before.
    positions = torch.cat([torch.arange(2, 21), torch.arange(T - 19)])
    flat = {"x": x.flatten(1)}
    gated = {"x": x, "weight": weight, "gate": gate}
    placed = {"positions": positions, "halo": halo}
    head = gated | {"weight": weight[:D]}
    shifted = {"x": x, "weight": weight, "bias": bias, "gate": gate}
    token = flat | {"window": window, "w": w, "b": bias}
    # More words than a block of the kernel has.
    words = torch.randn(5000, H * D, generator=generator) / 16
    labels = torch.randint(5000, (T,), generator=generator)
    labels[::5] = IGNORE
    projected = {"x": x, "head": words, "labels": labels}
    steps = _step(conv.short_conv_step), _step(gpu_conv.short_conv_step)
    table = [
        (norm.rms_norm, gpu_norm.rms_norm, flat | {"weight": weight}, eps),
        (norm.gated_rms_norm, gpu_norm.gated_rms_norm, head, eps, "sigmoid"),
        (_wide_rms_norm, gpu_norm.wide_rms_norm, gated, eps, H * D // 2, "silu", True),
        (_head_group_norm, gpu_norm.head_group_norm, shifted, eps),
        (norm.l2norm, gpu_norm.l2norm, {"x": x}, 1e-6, True),
        (conv.short_conv, gpu_conv.short_conv, flat | {"w": w, "b": bias} | placed, "silu"),
        (*steps, token, "silu"),
        (pointwise.swiglu, gpu_pointwise.swiglu, {"x": x, "gate": gate}),
        (pointwise.swiglu, gpu_pointwise.swiglu, {"x": torch.cat([x, gate], dim=-1)}),
        (_rope, gpu_pointwise.rope, {"x": x, "positions": positions}, 1e4),
        (pointwise.token_shift, gpu_pointwise.token_shift, flat | placed),
        (_experts, _gpu_experts, flat | {"weight": scores, "w13": w13, "w2": w2}),
        *(
            (_cross_entropy, _cross_entropy, projected, of)
            for of in dict.fromkeys((torch.float32, dtype))
        ),
    ]
    for portable, triton, inputs, *options in table:
        name = f"{portable.__name__.removeprefix('_')} ({str(dtype).removeprefix('torch.')})"
        # Weights of norms stay in fp32, as in the models.
        inputs = {
            key: t if key in ("weight", "bias") or not t.is_floating_point() else t.to(dtype)
            for key, t in inputs.items()
        }
        exact = {key: widened(t) for key, t in inputs.items()}
        try:
            want = results(portable, exact, do.to(dtype), *options)
            inputs = {key: t.to(device) for key, t in inputs.items()}
            got = results(triton, inputs, do.to(dtype), *options)
        except Exception as error:
            error.kernel = name
            raise
        yield name, want, got


def first_error(family, device, backend, cases):
    """Find what is wrong with a family, or "". cases: Cases, or the dtypes of utilities."""
    for case in cases:
        if family == UTILITIES:
            dtype = case
            found = utilities(case, device)
        else:
            rounds = torch.bfloat16 in (case.dtype, case.v_dtype)
            dtype = torch.bfloat16 if rounds else torch.float32
            found = [compare(case, device, backend)]
        for of, want, got in found:
            for name, x in want.items():
                error = ((got[name] - x).square().mean().sqrt() / x.square().mean().sqrt()).item()
                if not error <= limit(name, dtype):  # NaN is no better
                    most = f"{limit(name, dtype):.0e}"
                    return f"{name} of {of} is off by {error:.1e}, more than {most}"
    return ""


def versions(device):
    """(Triton's version, name of the GPU, its architecture)"""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "absent"
    if device.type != "cuda":
        return version, "no GPU", "the interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return version, torch.cuda.get_device_name(device), f"sm_{major}{minor}"


def sources():
    return sorted(Path(__file__).resolve().parent.rglob("*.py"))


def cache_file():
    """The file of verdicts, or None where no home folder is known."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if cache.startswith("~") else Path(cache) / "lmoe" / "kernels.json"


def _remembered():
    """{key: message}; nothing where the file can't be read or holds anything else."""
    path = cache_file()
    try:
        known = json.loads(path.read_bytes()) if path and path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: message for key, message in known.items() if isinstance(message, str)}


def _remember(key, message):
    """In one step, as ranks do it at the same time; a folder that can't be written costs the next
    run a check."""
    path = cache_file()
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not of this process's number: nodes may share the folder.
        descriptor, mine = tempfile.mkstemp(dir=path.parent)
        try:
            with open(descriptor, "w") as file:
                json.dump(_remembered() | {key: message}, file, indent=1)
            os.replace(mine, path)
        except OSError:
            os.unlink(mine)


def verdict(family, device, backend="triton", cases=None):
    """Check a family, by name, on a device: what the backend computes wrongly, "" where nothing.

    cases: Cases, or for the utilities dtypes; None: every kind of gates, in every dtype that the
    device has kernels for.
    """
    device = torch.device(device)
    if cases is None:
        dtypes = [torch.bfloat16, torch.float32] if device.type == "cuda" else [torch.float32]
        cases = dtypes if family == UTILITIES else every_case(FAMILIES[family], dtypes)
    triton, gpu, architecture = versions(device)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources())).hexdigest()
    built = f"triton {triton}", f"torch {torch.__version__}", gpu, digest
    key = " / ".join((family, backend, *built, *map(str, cases)))
    message = _remembered().get(key)
    if message is not None:
        return message
    failed = False
    try:
        wrong = first_error(family, device, backend, cases)
    except Exception as error:
        failed = True
        *_, line = "", *str(error).strip().splitlines()
        kernel = getattr(error, "kernel", family)
        wrong = f"{kernel} fails with {type(error).__name__}: {line.strip()}"
    where = f"mixer.backend = {backend}"
    works = "take another version of PyTorch"
    if family == UTILITIES:
        where = "Triton utilities"
        works = "take another version of Triton"
    elif backend == "triton":
        works = "take mixer.backend = chunk, or another version of Triton"
    message = wrong and f"{where}: {wrong}, with Triton {triton} on {architecture}; {works}"
    # A failure is a compiler's or a driver's: another program's memory may be why.
    if not failed:
        _remember(key, message)
    return message


def check_kernels(cases, device):
    """ValueError for the first of the families that the Triton kernels compute wrongly on the
    device. cases: {family: see verdict}."""
    for family, of in cases.items():
        if message := verdict(family, device, cases=of):
            raise ValueError(message)
