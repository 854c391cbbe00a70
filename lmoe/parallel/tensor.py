"""Tensor parallelism: weights over heads, hidden widths and the vocabulary; tokens in between.

Outside of mixers and feed-forward layers every rank holds T / tp neighbouring tokens (so norms,
residual and router do a tp-th of the work). A mixer or feed-forward layer gathers the tokens, works
on its heads or hidden units, and sums and scatters what it gives back.

Modules say which of their parameters are cut, and along which dim, in `shards`; all others stay
whole. A whole parameter is only ever used for tokens or heads that no other rank has, so its
gradient is a plain sum over the ranks (parallel/gradients.py).
"""

import functools

import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from lmoe.model.ffn import SwiGLU
from lmoe.model.init import marked, marks
from lmoe.model.moe.dispatch import LocalDispatch
from lmoe.model.norm import WideRMSNorm
from lmoe.parallel.collectives import (
    Ranks,
    all_reduce,
    gather_tokens,
    scatter_tokens,
    sum_in_both_directions,
)

# Of modules that are no mixers; a mixer has its own `shards`.
EMBEDDING, HEAD, SWIGLU, EXPERTS = (
    {"weight": 0},
    {"weight": 0},
    {"w1": 0, "w3": 0, "w2": 1},
    {"w13": 2, "w2": 2},
)


def check_tensor_parallel(config, tp):
    """Refuse sizes that tp ranks cannot share."""

    def need(key, size):
        if size % tp:
            raise ValueError(f"parallel.tp = {tp} does not divide {key} = {size}")

    if config.model.vocab_size:  # 0: the tokenizer's; checked again once it is known
        need("model.vocab_size", config.model.vocab_size)
    if config.moe.experts and config.parallel.ep == 1:
        need("moe.hidden", config.moe.hidden)
        if config.moe.impl == "grouped":
            need("moe.hidden / 8 (moe.impl = grouped)", config.moe.hidden // 8)
    if config.moe.experts and config.moe.shared:
        need("moe.shared", config.moe.shared)
    if not config.moe.experts or config.model.dense_layers:
        need("model.ffn_hidden", config.model.ffn_hidden)


def apply_tensor_parallel(model, config, dims):
    """Cut the parameters of a model on the meta device and put the exchanges of tokens around its
    layers."""
    ranks, mesh = Ranks.of(dims.group("tp")), dims.dense["tp"]
    for part, shards in ((model.embed, EMBEDDING), (model.head, HEAD)):
        if part is not None:
            shard(part, shards, mesh)
            part.vocab = Vocabulary(ranks, config.model.vocab_size)
    for block in model.blocks:
        shard(block.mixer, block.mixer.split(ranks.size, ranks.index), mesh)
        exchange_tokens(block.mixer, ranks)
        for module in block.modules():
            if isinstance(module, WideRMSNorm):
                module.sum_over = functools.partial(sum_in_both_directions, ranks=ranks)
                module.group = ranks.index * module.groups // ranks.size
            if isinstance(module, SwiGLU):
                shard(module, SWIGLU, mesh)
                exchange_tokens(module, ranks)
        if block.has_experts and dims.ep == 1:
            shard(block.ffn.experts, EXPERTS, mesh)
            block.ffn.experts.dispatch = GatheredDispatch(block.ffn.cfg.experts, ranks)


def shard(module, shards, mesh):
    """Make the named parameters, or all parameters of the named children, DTensors that are cut
    along the given dim."""
    for name, dim in shards.items():
        target = getattr(module, name, None)
        if isinstance(target, nn.Parameter):
            owners = [(module, name, target)]
        elif target is None:
            continue
        else:
            owners = [(target, child, p) for child, p in target.named_parameters(recurse=False)]
        for owner, child, parameter in owners:
            assert parameter.shape[dim] % mesh.size() == 0, f"{name}.{child}: {parameter.shape}"
            cut = distribute_tensor(parameter.data, mesh, [Shard(dim)], src_data_rank=None)
            cut = nn.Parameter(cut, parameter.requires_grad)
            owner.register_parameter(child, marked(cut, *marks(parameter)))


def exchange_tokens(module, ranks):
    """Gather x before the module, sum and scatter what it returns. What a mixer carries over the
    depth stays as it is: all tokens, some heads."""

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
        self.ranks, self.rows = ranks, size // ranks.size
        self.start = ranks.index * self.rows

    def gather(self, x):
        return gather_tokens(x, self.ranks)

    def max(self, x):
        return all_reduce(x, self.ranks, "max")

    def sum(self, x):
        return all_reduce(x, self.ranks)

    def embed(self, tokens, weight):
        """tokens [T] -> this rank's slice [T / tp, D] of their embeddings."""
        here = (tokens >= self.start) & (tokens < self.start + self.rows)
        x = F.embedding((tokens - self.start).masked_fill(~here, 0), weight)
        return scatter_tokens(x.masked_fill(~here[:, None], 0), self.ranks)


class GatheredDispatch(LocalDispatch):
    """Every rank runs all tokens through its slice of every expert."""

    def __init__(self, experts, ranks):
        super().__init__(experts)
        self.ranks = ranks

    def begin(self, ids):
        return super().begin(gather_tokens(ids, self.ranks))

    def dispatch(self, x, weights, plan):
        return super().dispatch(
            gather_tokens(x, self.ranks), gather_tokens(weights, self.ranks), plan
        )

    def combine(self, rows, handle):
        return scatter_tokens(super().combine(rows, handle), self.ranks)
