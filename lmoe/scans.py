"""The scans that a run of a configuration does, found by letting its mixers run on the meta
device."""

import torch

from lmoe.kernels import choice
from lmoe.kernels.check import UTILITIES, Case
from lmoe.kernels.choice import INSTALLED
from lmoe.kernels.family import Scan
from lmoe.model.batch import LocalContext, SeqInfo
from lmoe.model.build import every_mixer, on_meta
from lmoe.model.init import narrow
from lmoe.model.mixers import MIXERS
from lmoe.parallel.parallelize import DTYPES


class Recorder(LocalContext):
    """Notes the scans, and runs none."""

    def __init__(self):
        self.scans = []

    def scan(self, scan, q, entering, seq, final):
        self.scans.append(scan)
        return torch.empty_like(scan.inputs["v"]), None


def scans_of(config, name: str, options) -> list[Scan]:
    """Record the scans of a mixer, with tensors [T, ..] on the meta device in the dtypes of
    training."""
    dtype = DTYPES[config.training.dtype]
    T = 128
    with on_meta(config), torch.no_grad():
        mixer = MIXERS[name](config.model, options, layer=config.model.layers - 1)
        narrow(mixer, dtype)
        recorder = Recorder()
        borders = torch.empty(2, dtype=torch.int32)
        positions = torch.empty(T, dtype=torch.int64)
        seq = SeqInfo(borders, positions, {}, 1, T, context=recorder)
        residuals = {
            key: torch.empty(T, *shape, dtype=dtype) for key, shape in mixer.residual_shapes.items()
        }
        mixer(torch.empty(T, config.model.dim, dtype=dtype), seq, None, residuals)
    return recorder.scans


def case_of(scan: Scan) -> Case:
    """Say what the check of kernels is to compare for a scan."""
    gates = []
    for argument in scan.family.arguments:
        x = (scan.inputs | scan.constants).get(argument.name)
        if x is not None and argument.name not in ("k", "v"):
            which = [len(shape) for shape in argument.shapes].index(x.ndim)
            gates.append(f"{argument.name}:{which}" if which else argument.name)
    gates += [name for name in scan.family.numbers if scan.constants.get(name)]
    k = scan.inputs["k"]
    v = scan.inputs["v"]
    grouped = k.shape[-2] != v.shape[-2]
    return Case(scan.family, " ".join(gates), k.shape[-1], v.shape[-1], k.dtype, v.dtype, grouped)


def triton_cases(config, device: torch.device) -> dict:
    """List what the check before a run compares, {family: cases}, of the Triton kernels that it
    uses; on a GPU every run uses the utilities."""
    dtype = DTYPES[config.training.dtype]
    cases = {}
    if device.type == "cuda" and INSTALLED and dtype in choice.DTYPES:
        cases[UTILITIES] = [dtype]
    for name, options in every_mixer(config).items():
        if not any("triton" in family.forms for family in MIXERS[name].families()):
            continue
        for scan in scans_of(config, name, options):
            backend = scan.backend
            k = scan.inputs["k"]
            v = scan.inputs["v"]
            if device.type == "cuda":  # for which the meta device of these tensors stands
                backend = scan.family.resolve(backend, k, v, scan.chunk_size)
            if backend == "triton":
                cases.setdefault(scan.family.name, []).append(case_of(scan))
    return {family: list(dict.fromkeys(of)) for family, of in cases.items()}
