"""The model: embedding, blocks, final norm, head. build.py makes one of a configuration."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe.kernels.cross_entropy import linear_cross_entropy
from lmoe.model.block import Block
from lmoe.model.config import ModelConfig
from lmoe.model.init import local
from lmoe.model.moe.router import RouterStats


class Output(NamedTuple):
    """loss: sum of the cross-entropy over valid tokens / normaliser (nats); z_loss likewise; stats:
    {router's name in Model.routers: its statistics}, of the layers that ran."""

    loss: Tensor
    z_loss: Tensor
    stats: dict[str, RouterStats]

    def detach(self) -> "Output":
        """Cut the losses from their graph."""
        return self._replace(loss=self.loss.detach(), z_loss=self.z_loss.detach())


class Embedding(nn.Embedding):
    """Rows of a table, times a multiplier: tokens [T] -> [T, D]."""

    vocab = None  # as in Head

    def __init__(self, config: ModelConfig):
        super().__init__(config.vocab_size, config.dim)
        self.config = config

    def reset_parameters(self):
        pass  # init_parameter draws the weights, layout-independently

    def init_parameter(self, name, tensor, generator):
        tensor.normal_(0.0, self.config.init_std, generator=generator)

    def forward(self, tokens):
        if self.vocab is None:
            x = F.embedding(tokens, self.weight)
        else:
            x = self.vocab.embed(tokens, local(self.weight))
        multiplier = self.config.embedding_multiplier
        return x if multiplier == 1 else multiplier * x


class Head(nn.Module):
    """Linear to the vocabulary, times a multiplier, and, with labels, the cross-entropy that never
    holds all logits. Where they are tied, it borrows the embedding's weight."""

    # Speaks for the ranks that hold the other rows of the vocabulary; parallel/tensor.py sets it.
    vocab = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.dim)
        self.weight = None if config.tie_embeddings else nn.Parameter(weight)

    def init_parameter(self, name, tensor, generator):
        tensor.normal_(0.0, self.config.init_std, generator=generator)

    def forward(self, x, labels=None, normaliser=None, weight=None):
        """Compute logits [T, V] of x [T, D]; with labels [T] (IGNORE: none) and a normaliser,
        (loss, z-loss) as in linear_cross_entropy.

        weight [V, D]: the embedding's where it is tied.
        """
        weight = local(self.weight if weight is None else weight)
        config = self.config
        x = x if config.logits_multiplier == 1 else config.logits_multiplier * x
        if self.vocab is not None:
            assert labels is not None, "logits of a vocabulary that is sharded over ranks"
            x = self.vocab.gather(x)
        if labels is None:
            return F.linear(x, weight)
        rest = {"z_coeff": config.z_loss, "chunk": config.loss_chunk, "vocab": self.vocab}
        if config.logits_dtype == "bfloat16":
            rest["logits_dtype"] = torch.bfloat16
        return linear_cross_entropy(x, weight, labels, normaliser, **rest)

    def flops_per_token(self):
        return 2 * self.config.vocab_size * self.config.dim


class Model(nn.Module):
    """A decoder over a packed stream.

    blocks: {number in the whole model: Block}; shared: modules that mixers share over the depth.
    routers: {"3.ffn": number of counts} for the router in child `ffn` of block 3, of the whole
    model, in the order of depth.

    Under pipeline parallelism a rank's Model holds only its blocks, and embedding, norm and head
    are None where they are elsewhere. `stages`: the Models that this rank runs, in order; the model
    itself without a pipeline. `incoming`, `outgoing`: {name: shape per token} of the residuals that
    cross its borders.
    """

    incoming: dict[str, tuple[int, ...]] = {}
    outgoing: dict[str, tuple[int, ...]] = {}

    def __init__(
        self,
        embed: Embedding | None,
        blocks: dict[int, Block],
        norm: nn.Module | None,
        head: Head | None,
        shared: nn.ModuleDict,
        routers: dict[str, int],
    ):
        super().__init__()
        self.stages = [self]
        self.routers = routers
        self.embed = embed
        self.shared = shared
        self.blocks = nn.ModuleList()
        for number, block in blocks.items():
            self.blocks.add_module(str(number), block)
        self.norm = norm
        self.head = head

    def part(self, numbers, first: bool, last: bool) -> "Model":
        """Make a Model of the blocks `numbers`, with the embedding if `first`, final norm and head
        if `last`; they are this one's modules."""
        blocks = {number: self.blocks[number] for number in numbers}
        ends = (self.norm, self.head) if last else (None, None)
        embed = self.embed if first else None
        return Model(embed, blocks, *ends, self.shared, self.routers)

    def residuals_into(self, number: int) -> dict[str, tuple[int, ...]]:
        """Find the residuals that blocks before block `number` give and blocks from there on take:
        {name: shape per token}."""
        blocks = list(self.blocks)
        before = {}
        after = {}
        for block in blocks[:number]:
            before |= block.mixer.residual_shapes
        for block in blocks[number:]:
            after |= block.mixer.residual_shapes
        return {name: before[name] for name in sorted(before.keys() & after.keys())}

    def forward(
        self, inputs, seq, labels=None, normaliser=None, states=None, select=None, residuals=None
    ):
        """Run tokens [T] int64, or x [T, D] where another stage embeds. With labels: Output.
        Without: logits [T, V], or [len(select), V] of the tokens `select`. A stage without the
        head: (x [T, D], residuals, statistics).

        states: one decode state per block; residuals: those that other stages gave (see
        Mixer.forward).
        """
        x = inputs if self.embed is None else self.embed(inputs)
        stats = {}
        for i, (number, block) in enumerate(self.blocks.named_children()):
            state = None if states is None else states[i]
            x, residuals, reported = block(x, seq, state, residuals)
            stats |= {f"{number}.{child}": of_router for child, of_router in reported.items()}
        if self.head is None:
            return x, residuals, stats
        x = self.norm(x if select is None else x[select])
        weight = self.embed.weight if self.head.weight is None else None
        if labels is None:
            return self.head(x, weight=weight)
        return Output(*self.head(x, labels, normaliser, weight=weight), stats)

    def initial_states(self, sequences, max_len, device, dtype) -> list[dict[str, Tensor]]:
        """Make the decode states of N sequences, one for each block."""
        rest = sequences, max_len, device, dtype
        return [block.mixer.initial_state(*rest) for block in self.blocks]

    def moe_layers(self):
        return [block.ffn for block in self.blocks if block.has_experts]

    def flops_per_token(self, seq_len: int) -> float:
        """Count forward FLOPs per token of documents of seq_len tokens (a number or an array),
        active experts only; a training step costs three times as much."""
        blocks = sum(block.flops_per_token(seq_len) for block in self.blocks)
        return self.head.flops_per_token() + blocks


def count_parameters(model: Model) -> dict[str, int]:
    """Count {total, body, active_body, active}: body is without embedding and head, active has
    top_k of the routed experts."""
    total = sum(p.numel() for p in model.parameters())
    ends = [p for module in (model.embed, model.head) for p in module.parameters()]
    body = total - sum(p.numel() for p in ends)
    idle = 0
    for layer in model.moe_layers():
        routed = sum(p.numel() for p in layer.experts.parameters())
        idle += routed - routed * layer.cfg.top_k // layer.cfg.experts
    return {"total": total, "body": body, "active_body": body - idle, "active": total - idle}
