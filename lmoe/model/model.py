"""The model: embedding, blocks, final norm, head."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lmoe.kernels.cross_entropy import linear_cross_entropy
from lmoe.model.block import Block, make_ffn
from lmoe.model.init import local
from lmoe.model.mixers import MIXERS
from lmoe.model.moe.balance import add_loss, hf_pooled_loss
from lmoe.model.moe.moe import MoE
from lmoe.model.norm import RMSNorm


class Output(NamedTuple):
    """loss: sum of the cross-entropy over valid tokens / normaliser (nats); z_loss likewise; stats:
    {router's name in Model.routers: its statistics}, of the layers that ran."""

    loss: torch.Tensor
    z_loss: torch.Tensor
    stats: dict


class Embedding(nn.Embedding):
    vocab = None  # as in Head

    def __init__(self, vocab_size, dim, std):
        super().__init__(vocab_size, dim)
        self.std = std

    def reset_parameters(self):
        pass  # init_parameter draws the weights, layout-independently

    def init_parameter(self, name, tensor, generator):
        tensor.normal_(0.0, self.std, generator=generator)

    def forward(self, tokens):
        """tokens [T] -> [T, D]."""
        return (
            F.embedding(tokens, self.weight)
            if self.vocab is None
            else self.vocab.embed(tokens, local(self.weight))
        )


class Head(nn.Module):
    """Linear to the vocabulary and, with labels, the cross-entropy that never holds all logits."""

    # speaks for the ranks that hold the other rows of the vocabulary; parallel/tensor.py installs
    # it
    vocab = None

    def __init__(self, model):
        super().__init__()
        self.std, self.z_coeff, self.chunk = model.init_std, model.z_loss, model.loss_chunk
        self.weight = (
            None if model.tie_embeddings else nn.Parameter(torch.empty(model.vocab_size, model.dim))
        )

    def init_parameter(self, name, tensor, generator):
        tensor.normal_(0.0, self.std, generator=generator)

    def forward(self, x, labels=None, normaliser=None, weight=None):
        """x [T, D] -> logits [T, V]; with labels [T] (IGNORE: none) and a normaliser, (loss,
        z-loss) as in linear_cross_entropy.

        weight [V, D]: the embedding's where it is tied.
        """
        weight = local(self.weight if weight is None else weight)
        if self.vocab is not None:
            assert labels is not None, "logits of a vocabulary that is sharded over ranks"
            x = self.vocab.gather(x)
        if labels is None:
            return F.linear(x, weight)
        return linear_cross_entropy(
            x, weight, labels, normaliser, z_coeff=self.z_coeff, chunk=self.chunk, vocab=self.vocab
        )


def layer_mixers(model):
    """The mixer's name of every layer, from model.pattern."""
    letters = {"L": model.mixer, "N": "attention"}
    if isinstance(model.pattern, str):
        unknown = set(model.pattern) - set(letters)
        if unknown or not model.pattern:
            raise ValueError(
                f"model.pattern = {model.pattern!r}: only L (the linear mixer) and N (softmax"
                " attention) make a pattern"
            )
        names = [letters[letter] for letter in model.pattern]
    else:
        names = [letters.get(name, name) for name in model.pattern]
        unknown = set(names) - set(MIXERS)
        if unknown or not names:
            raise ValueError(
                f"model.pattern names {sorted(unknown)}, which are no mixers; one of:"
                f" {', '.join(MIXERS)}"
            )
    if model.layers % len(names):
        raise ValueError(
            f"model.pattern has {len(names)} layers, which does not divide model.layers ="
            f" {model.layers}"
        )
    return names * (model.layers // len(names))


class Model(nn.Module):
    """A decoder over a packed stream. `model`: ModelConfig with its vocab_size set; mixer,
    attention: options; moe: MoEConfig.

    Under pipeline parallelism a rank's Model holds only its blocks (under their numbers in the
    whole model), and embedding, norm and head are None where they are elsewhere. `stages`: the
    Models that this rank runs, in order; the model itself without a pipeline. `incoming`,
    `outgoing`: {name: shape per token} of the values carried over the depth that cross its borders.
    `routers`: {"3.ffn": number of counts} for the router in child `ffn` of block 3, of the whole
    model, in the order of depth.
    """

    incoming = outgoing = {}

    def __init__(self, model, mixer, attention, moe):
        super().__init__()

        def options(name):
            if name == "attention":
                return attention
            if name == model.mixer:
                return mixer
            return MIXERS[name].Options(**MIXERS[name].presets[model.preset])

        self.config, self.moe, self.stages = model, moe, [self]
        self.embed = Embedding(model.vocab_size, model.dim, model.init_std)
        self.shared = (
            nn.ModuleDict()
        )  # what mixers share over the depth; every stage of a pipeline has it
        self.blocks = nn.ModuleList(
            Block(
                model,
                MIXERS[name](model, options(name), layer, self.shared),
                make_ffn(model, moe, layer),
            )
            for layer, name in enumerate(layer_mixers(model))
        )
        self.norm = RMSNorm(model.dim, model.norm_eps)
        self.head = Head(model)
        self.routers = {
            f"{number}.{child}": size
            for number, block in self.blocks.named_children()
            for child, size in block.routers.items()
        }

    def part(self, numbers, first, last):
        """A Model of the blocks `numbers`, with the embedding if `first`, final norm and head if
        `last`; they are this one's modules."""
        part = Model.__new__(Model)
        nn.Module.__init__(part)
        part.config, part.moe, part.stages, part.shared = self.config, self.moe, [part], self.shared
        part.routers = self.routers
        part.embed = self.embed if first else None
        part.blocks = nn.ModuleList()
        for number in numbers:
            part.blocks.add_module(str(number), self.blocks[number])
        part.norm, part.head = (self.norm, self.head) if last else (None, None)
        return part

    def carried_into(self, number):
        """{name: shape per token} of what blocks before block `number` carry and blocks from there
        on take up."""
        blocks = list(self.blocks)
        before, after = (
            {k: v for block in part for k, v in block.mixer.carries.items()}
            for part in (blocks[:number], blocks[number:])
        )
        return {name: before[name] for name in sorted(before.keys() & after.keys())}

    def forward(
        self, inputs, seq, labels=None, normaliser=None, states=None, select=None, carried=None
    ):
        """inputs: tokens [T] int64, or x [T, D] where another stage embeds. With labels: Output.
        Without: logits [T, V], or [len(select), V] of the tokens `select`. A stage without the
        head: (x [T, D], carried, statistics).

        states: one decode state per block; carried: the values that other stages carried (see
        Mixer.forward).
        """
        x = inputs if self.embed is None else self.embed(inputs)
        stats = {}
        for i, (number, block) in enumerate(self.blocks.named_children()):
            x, carried, own = block(x, seq, None if states is None else states[i], carried)
            stats |= {f"{number}.{child}": reported for child, reported in own.items()}
        if self.head is None:
            return x, carried, stats
        if (
            stats
            and self.moe.balance == "hf_pooled"
            and seq.weights.microbatch
            and labels is not None
        ):
            pooled = hf_pooled_loss(
                list(stats.values()), self.moe.balance_coeff, seq.weights.microbatch
            )
            x = add_loss(x, pooled)
            last = next(reversed(stats))
            stats[last] = stats[last]._replace(balance=pooled.detach())
        x = self.norm(x if select is None else x[select])
        weight = self.embed.weight if self.head.weight is None else None
        if labels is None:
            return self.head(x, weight=weight)
        loss, z_loss = self.head(x, labels, normaliser, weight=weight)
        return Output(
            loss, z_loss, {k: s._replace(pooled=s.pooled.detach()) for k, s in stats.items()}
        )

    def initial_states(self, sequences, max_len, device, dtype):
        return [
            block.mixer.initial_state(sequences, max_len, device, dtype) for block in self.blocks
        ]

    def moe_layers(self):
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]

    def flops_per_token(self, seq_len):
        """Forward FLOPs per token, active experts only; a training step costs three times as
        much."""
        head = 2 * self.config.dim * self.config.vocab_size
        return head + sum(block.flops_per_token(seq_len) for block in self.blocks)


def count_parameters(model):
    """{total, body, active_body, active}: body is without embedding and head, active counts top_k
    of the routed experts."""
    total = sum(p.numel() for p in model.parameters())
    ends = sum(p.numel() for module in (model.embed, model.head) for p in module.parameters())
    idle = 0
    for layer in model.moe_layers():
        routed = sum(p.numel() for p in layer.experts.parameters())
        idle += routed - routed * layer.cfg.top_k // layer.cfg.experts
    return {
        "total": total,
        "body": total - ends,
        "active_body": total - ends - idle,
        "active": total - idle,
    }
