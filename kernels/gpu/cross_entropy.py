"""Cross-entropy of a chunk's logits [n, V], one program a row: two kernels, between which ranks
with other words tell what they have. All in fp32, whatever the logits are in.

They stand for the functions of their names in kernels/cross_entropy.py. A lane sums every BLOCKth
word by itself, and lanes add up in a fixed order: the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl

from lmoe.kernels.cross_entropy import lies_over
from lmoe.kernels.gpu.common import load_fp32
from lmoe.kernels.gpu.pointwise import ready

BLOCK = 4096
WARPS = 8
LEAST = tl.constexpr(-3e38)  # below all logits, and no infinity, whose differences are no numbers


@triton.jit
def _parts(logits, label, parts, N, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * V
    top = tl.full([BLOCK], LEAST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        word = start + tl.arange(0, BLOCK)
        x = tl.load(at + word, mask=word < V, other=-float("inf")).to(tl.float32)
        rise = x - top
        e = tl.exp(-tl.abs(rise))
        total = tl.where(rise > 0, total * e + 1.0, total + e)
        top = tl.maximum(top, x)
    most = tl.max(top, 0)
    own = tl.load(label + row)
    tl.store(parts + row, most)
    tl.store(parts + N + row, tl.sum(total * tl.exp(top - most), 0))
    tl.store(parts + 2 * N + row, load_fp32(at + own, own >= 0))


@triton.jit
def _terms(
    logits,
    gradient,
    label,
    parts,
    share,
    terms,
    z_twice,
    N,
    V,
    OF_RANK,
    STRIDE,
    RANKS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    own = tl.load(label + row).to(tl.int32)
    top = tl.load(parts + row)
    for rank in tl.static_range(1, RANKS):
        top = tl.maximum(top, tl.load(parts + rank * OF_RANK + row))
    total, target = 0.0, 0.0
    for rank in tl.static_range(0, RANKS):
        at = parts + rank * OF_RANK + row
        total += tl.load(at + N) * tl.exp(tl.load(at) - top)
        target += tl.load(at + 2 * N)
    log_total = tl.log(total)
    lse = log_total + top
    here = tl.where(own >= 0, 1.0, 0.0)
    tl.store(terms + row, (log_total - (target - top)) * here)
    tl.store(terms + N + row, lse * here)
    if GRADIENT:
        whole = tl.load(share + row)
        factor = whole * (1.0 + z_twice * lse) / total
        base, to = row.to(tl.int64) * V, row.to(tl.int64) * STRIDE
        for start in range(0, V, BLOCK):
            word = start + tl.arange(0, BLOCK)
            x = tl.load(logits + base + word, mask=word < V, other=-float("inf")).to(tl.float32)
            d = tl.exp(x - top) * factor - tl.where(word == own, whole, 0.0)
            # The gradient may lie over logits that other warps have yet to load: of this block, and
            # none of those after it.
            tl.debug_barrier()
            tl.store(gradient + to + word, d.to(gradient.dtype.element_ty), mask=word < V)


def parts(logits, label):
    """[3, n] fp32 of logits [n, V], which stay: as kernels/cross_entropy.py says."""
    (logits,) = ready(logits=logits)
    n, V = logits.shape
    found = logits.new_empty(3, n, dtype=torch.float32)
    _parts[(n,)](logits, label, found, n, V, BLOCK=BLOCK, num_warps=WARPS)
    return found


def terms(logits, label, own, gathered, share, z_coeff, dtype):
    """([2, n] fp32, the gradient of the logits [n, V] in `dtype` or None): as
    kernels/cross_entropy.py says. The gradient takes the place of the logits where it fits."""
    n, V = logits.shape
    found = logits.new_empty(2, n, dtype=torch.float32)
    gradient = None if dtype is None else _place(logits, dtype)
    _terms[(n,)](
        logits,
        gradient,
        label,
        gathered,  # rows of n, of each rank one after the other
        share,
        found,
        2.0 * z_coeff,
        n,
        V,
        gathered.stride(0),
        0 if gradient is None else gradient.stride(0),
        RANKS=len(gathered),
        GRADIENT=gradient is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return found, gradient


def _place(logits, dtype):
    """Find memory for the gradient of logits."""
    V = logits.shape[1]
    if not lies_over(V, logits.dtype, dtype):
        return torch.empty_like(logits, dtype=dtype)
    return logits.view(dtype)[:, :V]
