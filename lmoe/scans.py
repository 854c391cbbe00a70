"""The scans that a run of a configuration does, found by letting its mixers run on the meta
device."""

import torch

from lmoe.kernels import choice, ops
from lmoe.kernels.check import UTILITIES, Scan
from lmoe.kernels.choice import INSTALLED
from lmoe.kernels.families import BACKENDS
from lmoe.model.batch import LocalContext, SeqInfo, Visible
from lmoe.model.build import layer_mixers, mixer_options
from lmoe.model.mixers import MIXERS
from lmoe.parallel.parallelize import DTYPES


class Recorder(LocalContext):
    """Notes the segments that are scanned, and scans nothing."""

    def __init__(self):
        self.segments = []

    def scan(self, segment, incoming, seq, wanted):
        self.segments.append(segment)
        return torch.empty_like(segment.inputs["v"]), None


def segments_of(config, name, options):
    """The segments [T, ..] that a mixer scans, as tensors on the meta device; the dtypes are those
    of training."""
    dtype, T = DTYPES[config.training.dtype], 128
    with torch.device("meta"), torch.no_grad():
        mixer = MIXERS[name](config.model, options, layer=config.model.layers - 1)
        for p in mixer.parameters():
            p.data = p.data.to(p.dtype if getattr(p, "keep_fp32", False) else dtype)
        recorder = Recorder()
        seq = SeqInfo(
            torch.empty(2, dtype=torch.int32),
            torch.empty(T, dtype=torch.int64),
            Visible(),
            1,
            T,
            context=recorder,
        )
        carried = {key: torch.empty(T, *shape, dtype=dtype) for key, shape in mixer.carries.items()}
        mixer(torch.empty(T, config.model.dim, dtype=dtype), seq, None, carried)
    return recorder.segments


def scan_of(segment):
    """What the check asks of a segment."""
    inputs, options = segment.inputs, segment.options
    gates = [
        name
        for name in (*inputs, *options)
        if name in ("g", "gamma", "gk", "gv", "u", "diag", "beta")
    ]
    kind = tuple("logits gk" if name == "gk" and "tau" in options else name for name in gates)
    k, v = inputs["k"], inputs["v"]
    return Scan(
        segment.family, kind, k.shape[-1], v.shape[-1], k.dtype, v.dtype, k.shape[-2] != v.shape[-2]
    )


def triton_cases(config, device):
    """{family: what the check before a run looks at} of the Triton kernels that this run uses; on a
    GPU every run uses the utilities."""
    dtype = DTYPES[config.training.dtype]
    cases = (
        {UTILITIES: [dtype]}
        if device.type == "cuda" and INSTALLED and dtype in choice.DTYPES
        else {}
    )
    for name in dict.fromkeys(layer_mixers(config.model)):
        if MIXERS[name].family not in BACKENDS["triton"]:
            continue
        for segment in segments_of(config, name, mixer_options(config, name)):
            backend = segment.backend
            if device.type == "cuda":  # for which the meta device of these tensors stands
                backend = ops.resolve(
                    backend,
                    segment.family,
                    segment.inputs["k"],
                    segment.inputs["v"],
                    segment.chunk_size,
                )
            if backend == "triton":
                cases.setdefault(segment.family, []).append(scan_of(segment))
    return {family: list(dict.fromkeys(of)) for family, of in cases.items()}
