"""Angles that add up over the tokens of a document, by which heads turn (Mamba3, GateLoop)."""

import math

import torch
from torch import Tensor

from lmoe.kernels.families import SSD
from lmoe.kernels.family import Scan
from lmoe.model.mixers.base import run_scan


def angle_sums(turns: Tensor, seq, state: Tensor | None, chunk_size: int, backend: str) -> Tensor:
    """Sum turns [T, H, R], radians, from each document's start, modulo 2 pi: [T, H, R]. state [N,
    H, 1, R] float64 or None: the sums so far, written in place.

    A recurrence without decay, in float64, so that it serves context parallelism and decoding."""
    ones = turns.new_ones(*turns.shape[:2], 1, dtype=torch.float64)
    # As long as it is, a sum costs its length squared; these backends take float64.
    chunk_size = min(16, chunk_size)
    backend = "reference" if backend == "reference" else "chunk"
    inputs = {"k": ones, "v": turns.double()}
    scan = Scan(SSD, inputs, {"scale": 1.0}, chunk_size, backend)
    (entering,) = seq.context.finish(seq.context.start([scan], seq))
    sums = run_scan(scan, ones, entering, seq, state)
    return torch.remainder(sums, 2 * math.pi).to(turns.dtype)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the first 2 R channels of x [T, H, N], neighbours in pairs, by angles [T, H, R]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    turned, rest = x.split([2 * angles.shape[-1], x.shape[-1] - 2 * angles.shape[-1]], -1)
    a, b = turned.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos = angles.cos().to(wide)
    sin = angles.sin().to(wide)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), rest], -1)
