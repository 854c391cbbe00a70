"""Sizes of chunks and tiles: chosen offline on an H100, held within the shared memory of the others
by cross-compilation (tests/kernels/test_compiles.py). Nothing is tuned while a program runs.
"""

import functools
from types import SimpleNamespace

import torch

from lmoe.kernels.families import FAMILIES

LITTLE = 100  # sm_86, 89 and 120 give a block 99 KB of shared memory, sm_80 163, sm_90 and 100 227

# kernel -> (most channels of K in a tile, or None: all of them; of V; warps; stages)
MUCH_SHARED = {
    "walk": (64, 64, 4, 3),
    "ssd outputs": (128, 128, 4, 1),
    "ssd outputs, exact": (32, 64, 4, 1),
    "ssd gradients": (None, 32, 8, 3),
    "ssd gradients, light": (None, 32, 4, 2),
    "ssd gradients, wide": (None, 32, 8, 1),
    "ssd gradients, exact": (None, 16, 8, 1),
    "gla weights": (32, None, 4, 1),
    "gla outputs": (64, 128, 4, 2),
    "gla outputs, gv": (64, 32, 4, 1),
    "gla value gradients": (64, 128, 4, 1),
    "gla value gradients, narrow": (64, 32, 8, 1),
    "gla key gradients": (64, 64, 8, 1),
}
LITTLE_SHARED = MUCH_SHARED | {
    "ssd outputs": (64, 64, 4, 1),
    "ssd gradients": (None, 16, 8, 1),
    "ssd gradients, light": (None, 32, 4, 1),
}
# Tiles of K and of V that are narrower than this are padded: on an H100, Triton 3.6 gave gla's key
# gradients and ssd's outputs illegal addresses or wrong results where they were narrower. The cause
# is not known (triton issue 11366 is much like it). ssd's gradients were not seen to fail; narrower
# ones were not tried.
LEAST = {"gla key gradients": (64, 16), "ssd outputs": (16, 64), "ssd gradients": (16, 32)}

# family -> [(KB of shared memory, tokens of a chunk with up to 64, 128, 256 channels in bf16, the
# same in fp32)]; 0: none
CHUNKS = {
    "ssd": [
        (200, (64, 64, 64), (64, 64, 32)),
        (160, (64, 64, 32), (64, 32, 16)),
        (0, (64, 64, 0), (32, 16, 0)),
    ],
    "gla": [
        (200, (64, 64, 64), (64, 64, 32)),
        (160, (64, 64, 64), (64, 64, 32)),
        (0, (64, 64, 32), (32, 32, 16)),
    ],
}


# What is planned for, and compiled for, where there is no GPU.
ELSEWHERE = SimpleNamespace(
    multi_processor_count=132, shared_memory_per_block_optin=227 * 1024
)  # an H100


@functools.cache
def _properties(index):
    return torch.cuda.get_device_properties(index)


def gpu_of(x):
    return _properties(x.device.index) if x.device.type == "cuda" else ELSEWHERE


def processors(x):
    return gpu_of(x).multi_processor_count


def shared_memory(x):
    """KB that a block may take."""
    return gpu_of(x).shared_memory_per_block_optin // 1024


def rounds(*tensors):
    """Tell whether products are of bf16 operands; those of fp32 ones are exact, and one such tensor
    is enough."""
    return all(x.dtype == torch.bfloat16 for x in tensors)


def cdiv(a, b):
    return -(-a // b)  # triton.cdiv is a jitted function, which takes microseconds


def power_of_2(n):
    """The least one that is no less than n."""
    return 1 << (n - 1).bit_length()


def tile(size, most, least=16):
    """The tile of a dim: a power of two."""
    return min(max(least, power_of_2(size)), most)


def tiles(kernel, plan, variant=None):
    """Keyword arguments of a launch."""
    table = LITTLE_SHARED if plan.shared < LITTLE else MUCH_SHARED
    BK, BV, warps, stages = table[f"{kernel}, {variant}" if variant else kernel]
    least_k, least_v = LEAST.get(kernel, (16, 16))
    return {
        "BK": tile(plan.K, BK or 256, least_k),
        "BV": tile(plan.V, BV or 256, least_v),
        "num_warps": warps,
        "num_stages": stages,
    }


def chunk(family, k, v, C):
    """The tokens of a chunk: C, or as many as fit a GPU; ValueError if none do, or the heads are
    too narrow.

    k [.., K], v [.., V]: shapes, dtype and device matter. What counts are channels of K for ssd,
    whose programs hold all of K, and of either for gla.
    """
    least = FAMILIES[family].min_head_dim
    if min(k.shape[-1], v.shape[-1]) < least:
        raise ValueError(
            f"q, v: heads of {k.shape[-1]} and {v.shape[-1]} channels; the triton backend of"
            f" {family} takes {least} and more"
        )
    shared = shared_memory(k)
    widest = k.shape[-1] if family == "ssd" else max(k.shape[-1], v.shape[-1])
    _, narrow, wide = next(row for row in CHUNKS[family] if shared >= row[0])
    most = (narrow if rounds(k, v) else wide)[0 if widest <= 64 else 1 if widest <= 128 else 2]
    if not most:
        raise ValueError(
            f"q: {widest} channels a head do not fit {shared} KB of shared memory; up to 128 do, or"
            " take backend = chunk"
        )
    return min(C, most)
