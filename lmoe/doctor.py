"""Tell what this machine offers, and whether it computes the kernels rightly: python -m
lmoe.doctor. The exit code is 1 if a kernel fails."""

import argparse
import platform
import shutil
import subprocess
import sys

import torch
import torch.distributed as dist

from lmoe.command import end_with_reader
from lmoe.kernels import check
from lmoe.kernels.choice import INSTALLED
from lmoe.kernels.families import FAMILIES
from lmoe.kernels.family import BACKENDS


def driver():
    """The version of NVIDIA's driver, or why it is not known."""
    if not shutil.which("nvidia-smi"):
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown (nvidia-smi fails)"


def devices():
    """A line for each device."""
    if not torch.cuda.is_available():
        return ["cpu (no GPU that PyTorch sees)"]
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        f"cuda:{index} {at.name}, sm_{at.major}{at.minor}, {at.total_memory / 2**30:.0f} GiB"
        for index, at in enumerate(found)
    ]


def communication():
    """Which of the backends of torch.distributed are there."""
    answers = {True: "yes", False: "no"}
    return ", ".join(f"{x} {answers[dist.is_backend_available(x)]}" for x in ("nccl", "gloo"))


def kernels(device):
    """A line for each family of each backend, and whether none failed."""
    lines = []
    fine = True
    missing = ""
    if device.type != "cuda":
        missing = "there is no GPU"
    elif not INSTALLED:
        missing = "Triton is not installed"
    pairs = [(backend, name) for backend in BACKENDS for name in FAMILIES]
    pairs = [(backend, name) for backend, name in pairs if backend in FAMILIES[name].forms]
    for backend, family in [*pairs, ("triton", check.UTILITIES)]:
        if backend == "triton" and missing:
            serves = "portable PyTorch" if family == check.UTILITIES else "mixer.backend = chunk"
            lines.append(f"{backend} {family}: not checked, {missing}; {serves} serves")
            continue
        wrong = check.verdict(family, device, backend)
        lines.append(f"{backend} {family}: {wrong or 'right'}")
        fine = fine and not wrong
    return lines, fine


def main(argv=None):
    argparse.ArgumentParser(
        prog="python -m lmoe.doctor", description=__doc__.split(":")[0] + "."
    ).parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = [
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("cuda", torch.version.cuda or "none"),
        ("triton", check.versions(device)[0]),
        ("driver", driver()),
        *(("device", line) for line in devices()),
        ("groups", communication()),
    ]
    for name, value in facts:
        print(f"{name:8}{value}", flush=True)
    lines, fine = kernels(device)
    for line in lines:
        print(f"{'kernel':8}{line}")
    return 0 if fine else 1


if __name__ == "__main__":
    end_with_reader()
    sys.exit(main())
