"""Activation recomputation, block by block.

What must not be done twice is saved in every mode: the routing (recomputed logits that differ in
the last bit would send tokens to other experts than the forward pass did), sums of counts, and the
exchange of states between context parallel ranks.
"""

import functools

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lmoe.parallel.context  # noqa: F401  with all that it imports, it registers the ops below
from lmoe.kernels.family import REGISTERED

aten = torch.ops.aten
lmoe_ops = torch.ops.lmoe

_SAVE_ALWAYS = {
    lmoe_ops.route_topk.default,
    lmoe_ops.sum_over_ranks.default,
    lmoe_ops.all_gather_states.default,
    lmoe_ops.prefix_state.default,
    # SDPA may draw random numbers, so a compiled region would carry a random state to its
    # repetition, which torch 2.13 mixes up with the device mesh of a weight that tensor parallelism
    # cuts.
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}

# Selective mode also keeps the outputs of matrix products, attention, exchanges of tokens and the
# mixers' scans; norms, gates and the like are redone.
_SAVE_SELECTIVE = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    torch.ops.torch_attn._varlen_attn.default,
    lmoe_ops.sort_by_expert.default,
    lmoe_ops.experts.default,
    lmoe_ops.all_to_all.default,
    lmoe_ops.shift_rows.default,
    lmoe_ops.mirror_rows.default,
    lmoe_ops.rope_table.default,
    # The exchanges of tokens between tensor parallel ranks.
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}


def _policy(mode, ctx, op, *args, **kwargs):
    keep = op in _SAVE_ALWAYS
    if mode == "selective":
        keep = keep or op in _SAVE_SELECTIVE or (op.namespace == "lmoe" and is_scan(op))
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def is_scan(op):
    """Tell whether an op is the forward of a family."""
    return any(op is family.ops.fwd._opoverload for family in REGISTERED.values())


def apply_recompute(owner, method, mode):
    """Make a method recompute in the backward pass. mode: full or selective."""
    forward = getattr(owner, method)
    contexts = functools.partial(
        create_selective_checkpoint_contexts, functools.partial(_policy, mode)
    )

    def recomputed(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )

    setattr(owner, method, recomputed)
