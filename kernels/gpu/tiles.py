"""Sizes of chunks and tiles: chosen offline on an H100, held within the shared memory of the others by cross-compilation
(tests/kernels/test_compiles.py). Nothing is tuned while a program runs.
"""

import functools

import torch
import triton

LITTLE = 100 * 1024  # sm_86, 89 and 120 give a block 99 KB of shared memory, sm_80 163, sm_90 and 100 227

# kernel -> (most channels of K in a tile, or None: all of them; of V; warps; stages; most registers, or None)
MUCH_SHARED = {
    "walk": (64, 64, 4, 3, None),
    "ssd outputs": (None, 128, 4, 1, None),
    "ssd gradients": (None, 32, 8, 3, None),
    "ssd gradients, light": (None, 32, 4, 2, None),
    "gla weights": (32, None, 4, 1, None),
    "gla outputs": (64, 128, 4, 2, None),
    "gla outputs, gv": (64, 64, 8, 1, None),
    "gla value gradients": (64, 128, 4, 1, None),
    "gla value gradients, gv": (64, 64, 8, 1, None),
    "gla key gradients": (64, 64, 8, 1, None),
}
LITTLE_SHARED = MUCH_SHARED | {
    "ssd outputs": (None, 64, 4, 1, None),
    "ssd gradients": (None, 16, 8, 1, None),
    "ssd gradients, light": (None, 32, 4, 1, None),
}
# A tile of K that is narrower than this is padded: Triton 3.6 compiles some kernels wrongly whose products are narrow (H100).
LEAST = {"gla key gradients": 64}


@functools.cache
def _properties(index):
    return torch.cuda.get_device_properties(index)


def processors(x):
    """Multiprocessors of a tensor's GPU; of an H100 where there is none."""
    return _properties(x.device.index).multi_processor_count if x.device.type == "cuda" else 132


def little_shared(x):
    return x.device.type == "cuda" and _properties(x.device.index).shared_memory_per_block_optin < LITTLE


def tile(size, most, least=16):
    """The tile of a dim: a power of two."""
    return min(max(least, triton.next_power_of_2(size)), most)


def tiles(kernel, plan, variant=None):
    """Keyword arguments of a launch."""
    table = LITTLE_SHARED if plan.little else MUCH_SHARED
    BK, BV, warps, stages, registers = table[f"{kernel}, {variant}" if variant else kernel]
    options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
    return {"BK": tile(plan.K, BK or 256, LEAST.get(kernel, 16)), "BV": tile(plan.V, BV or 256), **options}


def chunk(k, v, C):
    """The tokens of a chunk: C, or as many as fit the shared memory. k [.., K], v [.., V]: only shapes, dtype and device matter."""
    wide, narrow = k.dtype == torch.float32, max(k.shape[-1], v.shape[-1]) <= 128
    if little_shared(k):
        return min(C, {(False, True): 64, (False, False): 32, (True, True): 32, (True, False): 16}[wide, narrow])
    return min(C, 32 if wide and not narrow else 64)  # 128 tokens would not fit the registers
