"""Multi-head latent attention in small (arXiv 2405.04434, section 2.1): what is attended to is made
inside the kernel from a latent [T, C] and a rotary key [T, R] that all heads share."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lmoe.model.config import opt
from lmoe.model.init import Linear, local
from lmoe.model.mixers.attention import attend, cached_attention, empty_cache
from lmoe.model.mixers.base import HeadShape, Mixer, output_projection
from lmoe.model.rope import rope

LATENT, ROTARY, KEY, VALUE = 10, 4, 6, 5


@dataclass
class LatentOptions:
    heads: int = opt(0, "heads; 0: model.heads", least=0)
    window: int = opt(0, "tokens that a token may attend to; 0: its whole document", least=0)

    def shape(self, config):
        heads = self.heads or config.heads
        return HeadShape(heads, heads, KEY + ROTARY, VALUE)

    def varlen(self, config, device, dtype):
        return False


class LatentAttention(Mixer):
    Options = LatentOptions
    softmax = True
    tp_plan = {"wq": 0, "wkv": 0, "wo": 1}

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        heads = options.shape(config)[0]

        def linear(rows, width):
            return Linear(rows, width, std=config.init_std)

        self.wq = linear(config.dim, heads * (KEY + ROTARY))
        self.wc, self.wr = linear(config.dim, LATENT), linear(config.dim, ROTARY)
        self.wkv = linear(LATENT, heads * (KEY + VALUE))
        self.wo = output_projection(config, heads * VALUE)

    def forward(self, x, seq, state=None, residuals=None):
        q, rotary = self.wq(x).unflatten(-1, (-1, KEY + ROTARY)), self.wr(x)[:, None]
        q, rotary_q = q.split([KEY, ROTARY], -1)
        rotary_q, rotary = (rope(t, seq.positions, 10000.0) for t in (rotary_q, rotary))
        q = torch.cat([q, rotary_q], -1)
        kv = {"latent": self.wc(x), "rotary": rotary[:, 0]}
        o = cached_attention(self.attend, q, kv, seq, self.options.window, state)
        return self.wo(o.flatten(-2)), residuals or {}, None

    def attend(self, q, kv, mask, window, heads):
        latent, rotary = kv
        weight = local(self.wkv.weight).unflatten(0, (-1, KEY + VALUE))[heads].flatten(0, 1)
        k, v = F.linear(latent, weight).unflatten(-1, (-1, KEY + VALUE)).split([KEY, VALUE], -1)
        rotary = rotary[..., None, :].expand(*k.shape[:-1], ROTARY)
        return attend(q, (torch.cat([k, rotary], -1), v), mask, window, heads)

    def shard_heads(self, size, index):
        return dict(self.tp_plan)

    def initial_state(self, sequences, max_len, device, dtype):
        slots = min(max_len, self.options.window or max_len)
        shapes = {"latent": (LATENT,), "rotary": (ROTARY,)}
        return empty_cache(shapes, sequences, slots, device, dtype)

    def flops_per_token(self, seq_len):
        projections = sum(m.flops_per_token() for m in self.modules() if isinstance(m, Linear))
        heads, _, K, V = self.options.shape(self.config)
        return projections + heads * (K + V) * (seq_len + 1)
