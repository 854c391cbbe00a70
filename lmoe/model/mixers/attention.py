"""Softmax attention over packed documents: grouped queries, RoPE, optional bias, q and k norm and
sliding window."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from lmoe.model.batch import document_ids
from lmoe.model.config import opt
from lmoe.model.init import Linear
from lmoe.model.mixers.base import Mixer, output_projection
from lmoe.model.norm import RMSNorm
from lmoe.model.rope import rope


@dataclass
class AttentionOptions:
    heads: int = opt(0, "query heads; 0: model.heads")
    kv_heads: int = opt(0, "key-value heads, a divisor of the query heads; 0: as many")
    head_dim: int = opt(0, "size of a head; 0: model.dim over the heads")
    qkv_bias: bool = opt(True, "bias on q, k and v")
    qk_norm: bool = opt(False, "RMSNorm on every head of q and k")
    rope: bool = opt(True, "rotary position embedding")
    rope_theta: float = opt(10000.0, "base of the rotary frequencies")
    window: int = opt(
        0, "tokens that a token may attend to, itself included; 0: its whole document"
    )
    impl: str = opt(
        "auto",
        "auto, sdpa (any device, a dense mask) or varlen (CUDA, bfloat16: documents without a"
        " mask)",
    )

    def shape(self, model):
        """(query heads, key-value heads, head size); ValueError where they do not divide."""
        heads = self.heads or model.heads
        kv_heads = self.kv_heads or heads
        if not self.head_dim and model.dim % heads:
            raise ValueError(
                f"attention.heads = {heads} does not divide model.dim = {model.dim}; set"
                " attention.head_dim or other heads"
            )
        head_dim = self.head_dim or model.dim // heads
        if heads % kv_heads:
            raise ValueError(
                f"attention.kv_heads = {kv_heads} does not divide the {heads} query heads"
            )
        if self.rope and head_dim % 2:
            raise ValueError(f"attention.rope needs an even head size, not {head_dim}")
        return heads, kv_heads, head_dim

    def varlen(self, model, device, dtype):
        """Whether variable-length attention serves here; ValueError where it is demanded and does
        not."""
        head_dim = self.shape(model)[2]
        able = (
            torch.device(device).type == "cuda"
            and dtype == torch.bfloat16
            and head_dim % 8 == 0
            and head_dim <= 256
        )
        if self.impl == "varlen" and not able:
            raise ValueError(
                "attention.impl = varlen needs CUDA, training.dtype = bfloat16 and a head size"
                f" that is a multiple of 8 up to 256, not {device}, {dtype} and {head_dim}; sdpa"
                " runs anywhere"
            )
        return able and self.impl != "sdpa"


class Attention(Mixer):
    """softmax(q k^T / sqrt(d) + mask) v, causal within each document."""

    Options = AttentionOptions
    presets = {"uniform": {}, "faithful": {}}
    softmax = True
    shards = {"wq": 0, "wk": 0, "wv": 0, "wo": 1}
    shared_heads = 1
    kv_head = (
        None  # the only key-value head that this rank's queries read, where it holds less than one
    )

    def __init__(self, model, options, layer=0, shared=None):
        super().__init__(model, options, layer, shared)
        heads, kv_heads, self.head_dim = options.shape(model)

        def linear(width):
            return Linear(
                model.dim, width * self.head_dim, bias=options.qkv_bias, std=model.init_std
            )

        self.wq, self.wk, self.wv = linear(heads), linear(kv_heads), linear(kv_heads)
        self.norm_q = (
            RMSNorm(self.head_dim, model.norm_eps) if options.qk_norm else torch.nn.Identity()
        )
        self.norm_k = (
            RMSNorm(self.head_dim, model.norm_eps) if options.qk_norm else torch.nn.Identity()
        )
        self.wo = output_projection(model, heads * self.head_dim)

    def forward(self, x, seq, state=None):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.kv_head is not None:
            k, v = (t[:, self.kv_head : self.kv_head + 1] for t in (k, v))
        q, k = self.norm_q(q), self.norm_k(k)
        if self.options.rope:
            q, k = (rope(t, seq.positions, self.options.rope_theta) for t in (q, k))
        if seq.decoding:
            o = self.decode(q, k, v, seq, state)
        else:
            if state is not None:
                fill_cache(state, k, v, seq)
            o = seq.context.attend(attend, q, k, v, seq, self.options.window)
        return self.wo(o.flatten(-2))

    def split(self, size, index):
        """With fewer key-value heads than ranks, wk and wv stay whole and each rank takes the head
        that its query heads read."""
        kv_heads, shards = self.options.shape(self.model)[1], dict(self.shards)
        if kv_heads % size:
            self.kv_head = index * kv_heads // size
            del shards["wk"], shards["wv"]
        return shards

    def initial_state(self, sequences, max_len, device, dtype):
        """k, v [N, S, Hkv, d] and the position in each slot [N, S] (-1: empty); S = max_len, or the
        window where that is less."""
        slots = min(max_len, self.options.window or max_len)
        kv_heads = self.wk.weight.shape[0] // self.head_dim
        shape = (sequences, slots, kv_heads, self.head_dim)
        return {
            "k": torch.zeros(shape, device=device, dtype=dtype),
            "v": torch.zeros(shape, device=device, dtype=dtype),
            "slots": torch.full((sequences, slots), -1, device=device, dtype=torch.int64),
        }

    def decode(self, q, k, v, seq, state):
        sequences = torch.arange(q.shape[0], device=q.device)
        slot = seq.positions % state["slots"].shape[1]
        state["k"][sequences, slot], state["v"][sequences, slot] = k, v
        state["slots"][sequences, slot] = seq.positions
        held = state["slots"]
        mask = held >= 0
        if self.options.window:
            mask &= seq.positions[:, None] - held < self.options.window
        o = F.scaled_dot_product_attention(
            q[:, :, None],
            state["k"].transpose(1, 2),
            state["v"].transpose(1, 2),
            attn_mask=mask[:, None, None],
            enable_gqa=True,
        )
        return o.squeeze(2)

    def flops_per_token(self, seq_len):
        """Scores and values cost 4 d per head and visible token; on average half of the row, or the
        window, is visible."""
        projections = sum(m.flops_per_token() for m in self.modules() if isinstance(m, Linear))
        heads, _, head_dim = self.options.shape(self.model)
        visible = (seq_len + 1) / 2
        if 0 < self.options.window < seq_len:
            w = self.options.window
            visible = w - w * (w - 1) / (2 * seq_len)
        return projections + 4 * heads * head_dim * visible


def attend(q, k, v, visible, window):
    """q [.., Tq, Hq, d], k and v [.., Tk, Hkv, d] -> [.., Tq, Hq, d]; one batch dim with a mask,
    none with borders. See Visible."""
    groups = q.shape[-2] // k.shape[-2]
    if visible.mask is None:
        k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))
        window = (window - 1 if window else -1, 0)
        return varlen_attn(
            q, k, v, visible.cu_q, visible.cu_k, visible.max_q, visible.max_k, window_size=window
        )
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible.mask, enable_gqa=groups > 1
    ).transpose(-3, -2)


def fill_cache(state, k, v, seq):
    """Write the keys and values of packed prompts to their slots; of a windowed cache only those
    that still count."""
    documents, positions = document_ids(seq.cu_seqlens, k.shape[0]), seq.positions
    k, v, documents, positions = (seq.context.whole(t) for t in (k, v, documents, positions))
    slots = state["slots"].shape[1]
    ends = torch.zeros_like(seq.cu_seqlens[1:], dtype=torch.int64).scatter_reduce(
        0, documents, positions + 1, "amax"
    )
    kept = (positions >= ends[documents] - slots).nonzero().squeeze(1)
    where = documents[kept], positions[kept] % slots
    state["k"][where], state["v"][where] = (
        k[kept].to(state["k"].dtype),
        v[kept].to(state["v"].dtype),
    )
    state["slots"][where] = positions[kept]
