"""Softmax attention over packed documents: grouped queries, RoPE, optional bias, q and k norm and
sliding window."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from lmoe.model.batch import AttentionMask, document_ids
from lmoe.model.config import opt
from lmoe.model.init import Linear
from lmoe.model.mixers.base import Mixer, in_heads, output_projection, projections
from lmoe.model.norm import RMSNorm
from lmoe.model.rope import rope


class AttentionShape(NamedTuple):
    """Heads of queries, heads of keys and values, and their channels."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass
class AttentionOptions:
    heads: int = opt(0, "query heads; 0: model.heads", least=0)
    kv_heads: int = opt(0, "key-value heads, a divisor of the query heads; 0: as many", least=0)
    head_dim: int = opt(0, "size of a head; 0: model.dim over the heads", least=0)
    qkv_bias: bool = opt(True, "bias on q, k and v")
    qk_norm: bool = opt(False, "RMSNorm on every head of q and k")
    norm_eps: float = opt(0.0, "epsilon of that norm; 0: model.norm_eps", least=0)
    rope: bool = opt(True, "rotary position embedding")
    rope_theta: float = opt(10000.0, "base of the rotary frequencies", least=1)
    window: int = opt(
        0, "tokens that a token may attend to, itself included; 0: its whole document", least=0
    )
    impl: str = opt(
        "auto",
        "sdpa: any device, a dense mask; varlen: CUDA, bfloat16, documents without a mask",
        choices=("auto", "sdpa", "varlen"),
    )

    def shape(self, config) -> AttentionShape:
        """Return the sizes for a ModelConfig; ValueError where they do not divide."""
        heads = self.heads or config.heads
        kv_heads = self.kv_heads or heads
        if not self.head_dim and config.dim % heads:
            raise ValueError(
                f"attention.heads = {heads} does not divide model.dim = {config.dim}; set"
                " attention.head_dim or other heads"
            )
        head_dim = self.head_dim or config.dim // heads
        if heads % kv_heads:
            raise ValueError(
                f"attention.kv_heads = {kv_heads} does not divide the {heads} query heads"
            )
        if self.rope and head_dim % 2:
            raise ValueError(f"attention.rope needs an even head size, not {head_dim}")
        return AttentionShape(heads, kv_heads, head_dim)

    def varlen(self, config, device, dtype) -> bool:
        """Tell whether variable-length attention serves here; ValueError where it is demanded and
        does not."""
        head_dim = self.shape(config).head_dim
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
    softmax = True
    presets = {"uniform": {}, "faithful": {}}
    tp_plan = {"wq": 0, "wk": 0, "wv": 0, "wo": 1}
    replicated_heads = "key-value"
    # the only key-value head that this rank's queries read, where it holds less than one
    kv_head = None

    def __init__(self, config, options, layer=0, shared=None):
        super().__init__(config, options, layer, shared)
        heads, kv_heads, self.head_dim = options.shape(config)

        def norm():
            eps = options.norm_eps or config.norm_eps
            return RMSNorm(self.head_dim, eps) if options.qk_norm else nn.Identity()

        widths = [number * self.head_dim for number in (heads, kv_heads, kv_heads)]
        self.wq, self.wk, self.wv = projections(config, widths, bias=options.qkv_bias)
        self.norm_q = norm()
        self.norm_k = norm()
        self.wo = output_projection(config, heads * self.head_dim)

    def forward(self, x, seq, state=None, residuals=None):
        q, k, v = (in_heads(w(x), self.head_dim) for w in (self.wq, self.wk, self.wv))
        if self.kv_head is not None:
            k, v = (t[:, self.kv_head : self.kv_head + 1] for t in (k, v))
        q = self.norm_q(q)
        k = self.norm_k(k)
        if self.config.attention_multiplier:
            q = q * (self.config.attention_multiplier * self.head_dim**0.5)
        if self.options.rope:
            q, k = (rope(t, seq.positions, self.options.rope_theta) for t in (q, k))
        o = cached_attention(attend, q, {"k": k, "v": v}, seq, self.options.window, state)
        return self.wo(o.flatten(-2)), residuals or {}, None

    @classmethod
    def head_counts(cls, options, config):
        shape = options.shape(config)
        return {"": shape.heads, "key-value": shape.kv_heads}

    def shard_heads(self, size, index):
        """With fewer key-value heads than ranks, wk and wv stay whole and each rank takes the head
        that its query heads read."""
        kv_heads = self.options.shape(self.config).kv_heads
        plan = dict(self.tp_plan)
        if kv_heads % size:
            self.kv_head = index * kv_heads // size
            del plan["wk"], plan["wv"]
        return plan

    def initial_state(self, sequences, max_len, device, dtype):
        shape = self.wk.weight.shape[0] // self.head_dim, self.head_dim
        slots = min(max_len, self.options.window or max_len)
        return empty_cache({"k": shape, "v": shape}, sequences, slots, device, dtype)

    def flops_per_token(self, seq_len):
        """Scores and values cost 4 d per head and visible token; on average half of the row, or the
        window, is visible."""
        projections = sum(m.flops_per_token() for m in self.modules() if isinstance(m, Linear))
        heads, _, head_dim = self.options.shape(self.config)
        w = np.minimum(self.options.window or seq_len, seq_len)
        return projections + 4 * heads * head_dim * (w - w * (w - 1) / (2 * seq_len))


def attend(q, kv, mask: AttentionMask, window: int, heads: slice) -> Tensor:
    """Softmax attention. q [B, Tq, H, d], kv: k [B, Tk, Hkv, d] and v [B, Tk, Hkv, V] of the same
    heads -> [B, Tq, H, V]; B is 1 where the mask has the borders of documents."""
    k, v = kv
    groups = q.shape[-2] // k.shape[-2]
    if mask.cu_seqlens_q is not None:
        k, v = (t.repeat_interleave(groups, dim=2) if groups > 1 else t for t in (k, v))
        borders = mask.cu_seqlens_q, mask.cu_seqlens_k, mask.max_seqlen_q, mask.max_seqlen_k
        window = (window - 1 if window else -1, 0)
        return varlen_attn(q[0], k[0], v[0], *borders, window_size=window)[None]
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    causal = mask.dense is None
    grouped = groups > 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.dense, is_causal=causal, enable_gqa=grouped
    ).transpose(-3, -2)


# --------------------------------------------------------------------------------------------------
# The decode state: what attention looks at, {name: [N, S, ..]} in S slots, and the position in each
# slot, slots [N, S] (-1: empty). A token's slot is its position modulo S.


def empty_cache(shapes: dict, sequences: int, slots: int, device, dtype) -> dict:
    """Make the state of N sequences before their first token. shapes: {name: shape per token}."""
    state = {
        name: torch.zeros(sequences, slots, *shape, device=device, dtype=dtype)
        for name, shape in shapes.items()
    }
    state["slots"] = torch.full((sequences, slots), -1, device=device)
    return state


def cached_attention(kernel, q: Tensor, kv: dict, seq, window: int, state: dict | None) -> Tensor:
    """Attend over the stream, or in decoding over the state, into which the tokens are written in
    place. q [T, H, d], kv {name: [T, ..]} -> [T, H, V]. kernel: see LocalContext.attend."""
    if not seq.decoding:
        if state is not None:
            fill_cache(state, kv, seq)
        return seq.context.attend(kernel, q, tuple(kv.values()), seq, window)
    slots = state["slots"]
    write_cache(state, kv, torch.arange(len(q), device=q.device), seq.positions)
    mask = slots >= 0
    if window:
        mask &= seq.positions[:, None] - slots < window
    mask = AttentionMask(mask[:, None, None])
    return kernel(q[:, None], [state[name] for name in kv], mask, window, slice(None)).squeeze(1)


def write_cache(state, kv, sequences, positions):
    """Write rows of kv {name: [R, ..]} to the slots of their sequences and positions, int64 [R]."""
    where = sequences, positions % state["slots"].shape[1]
    for name, rows in {**kv, "slots": positions}.items():
        state[name][where] = rows.to(state[name].dtype)


def fill_cache(state, kv, seq):
    """Write packed prompts to their slots; of a windowed cache only those that still count."""
    documents = document_ids(seq.cu_seqlens, len(seq.positions))
    positions = seq.positions
    documents, positions, *rows = (
        seq.context.gather_sequence(t) for t in (documents, positions, *kv.values())
    )
    ends = torch.zeros_like(seq.cu_seqlens[1:], dtype=torch.int64).scatter_reduce(
        0, documents, positions + 1, "amax"
    )
    kept = (positions >= ends[documents] - state["slots"].shape[1]).nonzero().squeeze(1)
    kv = {name: x[kept] for name, x in zip(kv, rows, strict=True)}
    write_cache(state, kv, documents[kept], positions[kept])
