"""Tensor parallelism: weights over heads, hidden widths and the vocabulary; tokens in between.

Outside of mixers and feed-forward layers every rank holds T / tp neighbouring tokens (so norms,
residual and router do a tp-th of the work). A mixer or feed-forward layer gathers the tokens, works
on its heads or hidden units, and sums and scatters what it gives back.

Mixers say which of their children and parameters are cut, and along which dim, in `tp_plan`, and a
child which of its parameters that is (`shards`); all others stay
whole. A whole parameter is only ever used for tokens or heads that no other rank has, so its
gradient is a plain sum over the ranks (parallel/gradients.py).
"""

import functools

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from lmoe.kernels.compat import assert_all
from lmoe.kernels.experts import Plan
from lmoe.model.config import layer_ffns
from lmoe.model.ffn import SwiGLU
from lmoe.model.init import marked, marks
from lmoe.model.moe.dispatch import LocalDispatch
from lmoe.model.norm import WideRMSNorm
from lmoe.parallel.collectives import (
    Ranks,
    all_gather,
    gather_tokens,
    scatter_tokens,
    sum_in_both_directions,
)

# Of modules that are no mixers; a mixer has its own plan.
VOCABULARY = {"weight": 0}
SWIGLU = {"w1": 0, "w3": 0, "w2": 1}
EXPERTS = {"w13": 2, "w2": 2}


def check_tensor_parallel(config, tp, ep):
    """Refuse sizes that tp ranks cannot share; ep: of those that share experts."""

    def need(key, size):
        if size % tp:
            raise ValueError(f"parallel.tp = {tp} does not divide {key} = {size}")

    if config.model.vocab_size:  # 0: the tokenizer's; checked again once it is known
        need("model.vocab_size", config.model.vocab_size)
    if config.moe.experts and ep == 1:
        need("moe.hidden", config.moe.hidden)
        if config.moe.impl == "grouped":
            need("moe.hidden / 8 (moe.impl = grouped)", config.moe.hidden // 8)
    if config.moe.experts and config.moe.shared:
        need("moe.shared", config.moe.shared)
    if "D" in layer_ffns(config.model, config.moe):
        need("model.ffn_hidden", config.model.ffn_hidden)


def apply_tensor_parallel(model, config, dims):
    """Cut the parameters of a model on the meta device and put the exchanges of tokens around its
    layers."""
    ranks = Ranks.of(dims.group("tp"))
    mesh = dims.dense["tp"]
    for part in (model.embed, model.head):
        if part is not None:
            shard(part, VOCABULARY, mesh)
            part.vocab = Vocabulary(ranks, config.model.vocab_size)
    for block in model.blocks:
        shard(block.mixer, block.mixer.shard_heads(ranks.size, ranks.index), mesh)
        block.mixer.speaks = ranks.index == 0
        exchange_tokens(block.mixer, ranks)
        for module in block.modules():
            if hasattr(module, "sum_over_heads"):
                module.sum_over_heads = functools.partial(sum_in_both_directions, ranks=ranks)
            if isinstance(module, WideRMSNorm):
                module.group = ranks.index * module.groups // ranks.size
            if isinstance(module, SwiGLU):
                shard(module, SWIGLU, mesh)
                exchange_tokens(module, ranks)
        if block.has_experts and dims.ep == 1:
            shard(block.ffn.experts, EXPERTS, mesh)
            block.ffn.experts.dispatch = SlicedDispatch(block.ffn.cfg.experts, ranks)


def shard(module: nn.Module, plan: dict[str, int], mesh):
    """Cut parameters into DTensors. plan: {name: dim} of parameters, or of children, which say in
    `shards(dim)` {parameter: dim} what that means for each of theirs; without it all are cut alike.
    """
    for name, dim in plan.items():
        target = getattr(module, name, None)
        if target is None:
            continue
        owner = target
        if isinstance(target, nn.Parameter):
            owner = module
            cuts = {name: dim}
        elif hasattr(target, "shards"):
            cuts = target.shards(dim)
        else:
            cuts = dict.fromkeys(dict(target.named_parameters(recurse=False)), dim)
        for child, axis in cuts.items():
            parameter = getattr(owner, child)
            assert parameter.shape[axis] % mesh.size() == 0, f"{name}.{child}: {parameter.shape}"
            part = distribute_tensor(parameter.data, mesh, [Shard(axis)], src_data_rank=None)
            part = nn.Parameter(part, requires_grad=parameter.requires_grad)
            owner.register_parameter(child, marked(part, *marks(parameter)))


def exchange_tokens(module, ranks):
    """Gather x before the module, sum and scatter what it returns. A mixer's residuals stay as they
    are: all tokens, some heads."""

    def scatter(module, args, output):
        if isinstance(output, tuple):
            return scatter_tokens(output[0], ranks), *output[1:]
        return scatter_tokens(output, ranks)

    module.register_forward_pre_hook(
        lambda module, args: (gather_tokens(args[0], ranks), *args[1:])
    )
    module.register_forward_hook(scatter)


class Vocabulary:
    """Speaks for the ranks that hold the other rows of the vocabulary
    (kernels/cross_entropy.py)."""

    def __init__(self, ranks, size):
        self.ranks = ranks
        self.rows = size // ranks.size
        self.start = ranks.index * self.rows

    def gather(self, x):
        return gather_tokens(x, self.ranks)

    def gather_parts(self, x):
        """x [..] of every rank, in their order: [ranks, ..]."""
        return all_gather(x, self.ranks).view(self.ranks.size, *x.shape)

    def embed(self, tokens, weight):
        """tokens [T] -> this rank's slice [T / tp, D] of their embeddings. A token that no rank
        has is a RuntimeError on every rank (linear_cross_entropy says when)."""
        known = (tokens >= 0) & (tokens < self.rows * self.ranks.size)
        assert_all(known, "a token is no word of the vocabulary")
        here = (tokens >= self.start) & (tokens < self.start + self.rows)
        x = F.embedding((tokens - self.start).masked_fill(~here, 0), weight)
        return scatter_tokens(x.masked_fill(~here[:, None], 0), self.ranks)


class SlicedDispatch(LocalDispatch):
    """Dispatch of all ranks' tokens to this rank's slice of every expert."""

    def begin(self, topk_ids: Tensor) -> Plan:
        return super().begin(gather_tokens(topk_ids, self.ranks))

    def run(self, experts, x: Tensor, weights: Tensor, pending: Plan) -> Tensor:
        x, weights = (gather_tokens(t, self.ranks) for t in (x, weights))
        return scatter_tokens(experts(x, weights, pending), self.ranks)
