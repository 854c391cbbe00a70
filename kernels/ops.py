"""The public functions, each of which stands in the file of its family or utility.

Arguments that the scans share: q, k [B, T, H, K]; v [B, T, HV, V]; log decays and states float32
(float64 beside float64 inputs); cu_seqlens int32 or int64 [N+1], B = 1: the borders of N packed
documents, 0 first and T last, an entry repeated for an empty document. States are [N, HV, K, V], N
= B without cu_seqlens; final states cost a pass of their own and come only with output_final_state.
scale: K^-1/2 if None. chunk_size: a power of two; triton takes smaller chunks where these do not
fit a GPU. backend: "auto" (triton on a GPU where it takes the inputs, else chunk), "reference",
"chunk" or "triton". Everything is computed in float32, float64 for float64 inputs (by triton with
bf16 products of bf16 inputs), and is differentiable, states included. Scans return (o [B, T, HV, V]
in v's dtype, final states or None); ValueError where arguments do not fit.
"""

from lmoe.kernels.conv import short_conv, short_conv_step
from lmoe.kernels.cross_entropy import linear_cross_entropy
from lmoe.kernels.experts import sort_by_expert, swiglu_experts
from lmoe.kernels.families import FAMILIES
from lmoe.kernels.families.delta import delta, delta_step
from lmoe.kernels.families.gla import gla, gla_step
from lmoe.kernels.families.ssd import ssd, ssd_step
from lmoe.kernels.family import BACKENDS, Scan
from lmoe.kernels.norm import gated_rms_norm, l2norm, rms_norm

__all__ = [
    "BACKENDS",
    "FAMILIES",
    "Scan",
    "delta",
    "delta_step",
    "gated_rms_norm",
    "gla",
    "gla_step",
    "l2norm",
    "linear_cross_entropy",
    "rms_norm",
    "short_conv",
    "short_conv_step",
    "sort_by_expert",
    "ssd",
    "ssd_step",
    "swiglu_experts",
]
