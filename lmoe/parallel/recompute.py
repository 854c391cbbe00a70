"""Activation recomputation, block by block.

What must not be done twice is saved in every mode: the routing (recomputed logits that differ in the last bit would send tokens to
other experts than the forward pass did).
"""

import functools

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lmoe.kernels.grouped
import lmoe.model.moe.router  # noqa: F401  registers the routing op
from lmoe.model.mixers.base import FAMILIES

aten = torch.ops.aten

_SAVE_ALWAYS = {torch.ops.lmoe.route_topk.default}

# Selective mode also keeps the outputs of matrix products, attention and the mixers' scans; norms, gates and the like are redone.
_SAVE_SELECTIVE = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.lmoe.grouped_mm.default,
    *(getattr(torch.ops.lmoe, f"{family}_fwd").default for family in FAMILIES),
}


def _policy(mode, ctx, op, *args, **kwargs):
    keep = op in _SAVE_ALWAYS or (mode == "selective" and op in _SAVE_SELECTIVE)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def apply_recompute(block, mode):
    """Make `block.forward` recompute in the backward pass. mode: full or selective."""
    forward = block.forward
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, mode))

    def recomputed(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    block.forward = recomputed
