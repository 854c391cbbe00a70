"""Every Triton kernel compiles for every GPU it may meet, within its shared memory, without one of
them here."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmoe.kernels.families import FAMILIES
from tests.kernels.ops import OPS

pytest.importorskip("triton.backends.nvidia", exc_type=ImportError)
ROOT = Path(__file__).resolve().parents[2]
SHARED = {
    80: 163,
    86: 99,
    89: 99,
    90: 227,
    100: 227,
    120: 99,
}  # KB of shared memory that a block may take, by architecture
# Bytes a thread; registers that spill that much are a tile too large. ssd holds all of K: more than
# 128 channels are right, and slow.
STACK, WIDE_STACK = 1024, 8192


@functools.cache
def compiled(cases):
    """The results of compile_for for JSON cases."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_for", cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check(result, arch, dtype):
    """Products of fp32 are exact and slow in any case, so that only those of bf16 may not spill."""
    assert result["failed"] is None
    stack = lambda x: WIDE_STACK if x["tiles"].get("K", 0) > 128 else STACK  # noqa: E731
    over = [
        x
        for x in result["launches"]
        if x["shared"] > SHARED[arch] * 1024 or (x["stack"] > stack(x) and dtype == "bf16")
    ]
    assert not over, (
        f"more than {SHARED[arch] * 1024} bytes of shared memory or {STACK} of stack on sm_{arch}:"
        f" {over}"
    )


def dtype_of(case):
    return next(x for x in case if x in ("bf16", "fp32"))


def ops_of(family):
    """The ops of a family with the fewest and with the most gates."""
    ops = sorted(
        (op for op in OPS if op.family.name == family),
        key=lambda op: len(op.gates.split()),
    )
    return ops[0].name, ops[-1].name


# --------------------------------------------------------------------------------------------------
# The extremes: of ssd two for each architecture, two or three seconds each; of gla, whose kernels
# take half a minute, one, with all gates where shared memory is least. The slow suite has all.

LEAST, MOST = ops_of("ssd")
SMALL, SMALL_GATED = (LEAST, 16, 16, 64, "bf16", False), (MOST, 16, 16, 64, "bf16", True)
LARGE, LARGEST_PLAIN, LARGEST = (
    (MOST, 128, 128, 64, "bf16", True),
    (LEAST, 256, 256, 64, "bf16", False),
    (MOST, 256, 256, 64, "bf16", True),
)
# One process each.
EXTREMES = [
    [
        (80, SMALL),
        (80, LARGEST),
        (86, LARGE),
        (86, LARGEST_PLAIN),
        (89, SMALL_GATED),
        (89, LARGEST),
    ],
    [
        (90, SMALL),
        (90, LARGEST),
        (100, LARGE),
        (100, SMALL_GATED),
        (120, LARGEST_PLAIN),
        (120, LARGEST),
    ],
]


# Of the utilities, three heads a row: of a size that little divides, and of the largest there is.
EXTREMES.append([(80, ("utilities", 5460, "bf16")), (120, ("utilities", 20, "fp32"))])
EXTREMES.append([(86, (ops_of("gla")[1], 128, 128, 64, "bf16", True))])


def parameters(groups, name):
    """One parameter for each case; those of a group share a process."""
    return [
        pytest.param(
            tuple(group),
            i,
            id=f"sm_{arch}-{'-'.join(map(str, case))}",
            marks=pytest.mark.xdist_group(f"{name}{n}"),
        )
        for n, group in enumerate(groups)
        for i, (arch, case) in enumerate(group)
    ]


@pytest.mark.parametrize("group, i", parameters(EXTREMES, "extremes"))
def test_the_extremes_fit(group, i):
    (arch, case), result = group[i], compiled(json.dumps(group))[i]
    check(result, arch, dtype_of(case))
    if SHARED[arch] < 100 and case[1:3] == (256, 256):
        assert "256 channels a head do not fit 99 KB" in result["refused"]
    else:
        assert result["refused"] is None and result["launches"]


# --------------------------------------------------------------------------------------------------
# Everything: what a wrapper does not refuse must fit.

SHAPES = [
    (16, 16, 64),
    (64, 64, 64),
    (128, 128, 64),
    (256, 256, 64),
    (64, 256, 64),
    (256, 64, 64),
    (128, 128, 16),
    (128, 128, 128),
]
EVERYTHING = [
    [
        (arch, (op, *shape, dtype, op != ops_of(family)[0]))
        for shape in SHAPES
        for dtype in ("bf16", "fp32")
    ]
    for family in FAMILIES
    if "triton" in FAMILIES[family].forms
    for op in ops_of(family)
    for arch in SHARED
]
EVERYTHING += [
    [(arch, ("utilities", D, dtype)) for D in (20, 128, 5460) for dtype in ("bf16", "fp32")]
    for arch in SHARED
]


@pytest.mark.slow
@pytest.mark.parametrize("group, i", parameters(EVERYTHING, "everything"))
def test_everything_fits(group, i):
    (arch, case), result = group[i], compiled(json.dumps(group))[i]
    check(result, arch, dtype_of(case))
    assert result["refused"] or result["launches"]


@pytest.mark.xdist_group("extremes0")
def test_the_wrappers_launch_every_kernel():
    """What is compiled here is what runs: forward, backward, and the pass over states."""
    names = [x["kernel"] for x in compiled(json.dumps(EXTREMES[0]))[0]["launches"]]
    assert {"_walk", "_outputs", "_gradients", "_step"} <= set(names) and names.count("_walk") >= 4


@pytest.mark.xdist_group("extremes2")
def test_the_utilities_launch_every_kernel():
    names = {x["kernel"] for x in compiled(json.dumps(EXTREMES[2]))[0]["launches"]}
    assert names == {
        "_add_up",
        "_choose",
        "_combine",
        "_convolve",
        "_convolve_backward",
        "_convolve_step",
        "_count",
        "_gather",
        "_normalise",
        "_normalise_backward",
        "_parts",
        "_place",
        "_rotate",
        "_shift",
        "_swiglu",
        "_swiglu_backward",
        "_terms",
    }
