"""Every mixer of the registry in every preset, the options of softmax attention that change its
path, and mixers that live in the tests: what the model tests run on."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import torch

from lmoe.model.batch import SeqBuilder
from lmoe.model.build import build_model
from lmoe.model.config import ModelConfig, MoEConfig
from lmoe.model.init import init_weights, materialise
from lmoe.model.mixers import MIXERS
from lmoe.model.mixers.attention import AttentionOptions
from tests.model.latent import LatentAttention
from tests.toys import TOYS

SHAPE = ModelConfig(
    dim=32, heads=4, layers=2, vocab_size=64, init_std=0.3, pattern="L", loss_chunk=16
)
EXTRA = {
    "attention-gqa": ("attention", {"kv_heads": 2, "qk_norm": True, "qkv_bias": False}),
    "attention-window": ("attention", {"window": 5}),
    "attention-norope": ("attention", {"rope": False, "head_dim": 6, "qkv_bias": False}),
    "latent-uniform": ("latent", {}),
    "latent-window": ("latent", {"window": 5}),
    "gated_deltanet-gva": ("gated_deltanet", {"heads": 2, "value_heads": 4}),
    "mamba2-groups": ("mamba2", {"head_dim": 8, "d_state": 12, "n_groups": 2}),
    "mamba3-groups": ("mamba3", {"head_dim": 8, "d_state": 12, "n_groups": 2, "heavy_tail": True}),
    "lightning-transnormer": ("lightning", {"slopes": "transnormer"}),
}
UNREGISTERED = {"latent": LatentAttention, **TOYS}
# Options that a preset gives in absolute numbers, made as small as the models here.
SMALL = {
    "mamba2": {"head_dim": 8, "d_state": 12},
    "mamba3": {"head_dim": 8, "d_state": 12},
    "rwkv6": {"mix_low_rank_dim": 4, "decay_low_rank_dim": 4},
    "rwkv6-faithful": {"head_dim": 8},
    "gsa": {"slots": 5},
}
MIXER_VARIANTS = {
    f"{name}-{preset}": (
        name,
        cls.presets[preset] | SMALL.get(name, {}) | SMALL.get(f"{name}-{preset}", {}),
    )
    for name, cls in MIXERS.items()
    for preset in cls.presets
} | EXTRA
MIXER_VARIANTS |= {f"{name}-toy": (name, {}) for name in TOYS}


def class_of(variant):
    return (MIXERS | UNREGISTERED)[MIXER_VARIANTS[variant][0]]


def make_options(variant):
    name, values = MIXER_VARIANTS[variant]
    options = class_of(variant).Options(**values)
    if hasattr(options, "chunk_size"):
        options.chunk_size = 16
    return name, options


def make_mixer(variant, dtype=torch.float64):
    """The mixer of a variant on the CPU, with weights large enough for every path to matter."""
    name, options = make_options(variant)
    with torch.device("meta"):
        mixer = class_of(variant)(SHAPE, options, layer=1).to(dtype)
    materialise(mixer, "cpu")
    init_weights(mixer, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Some start from zero, and what they multiply would count for nothing.
        for p in mixer.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=dtype, generator=generator)
    return mixer


def make_model(variant, dtype=torch.float64, **changes):
    """A two-layer model of a variant, with experts."""
    name, options = make_options(variant)
    shape = dataclasses.replace(SHAPE, mixer=name, **changes)
    attention = options if name == "attention" else AttentionOptions()
    moe = MoEConfig(experts=4, top_k=2, hidden=16, impl="loop")
    config = SimpleNamespace(model=shape, mixer=options, attention=attention, moe=moe)
    with torch.device("meta"), mock.patch.dict(MIXERS, UNREGISTERED):
        model = build_model(config).to(dtype)
    materialise(model, "cpu")
    init_weights(model, 0)
    return model


def window_of(variant):
    return MIXER_VARIANTS[variant][1].get("window", 0) if variant else 0


def make_seq(lengths, variant="", rows=1, device="cpu"):
    """SeqInfo of documents of these lengths, in `rows` rows of equal length."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = int(cu_seqlens[-1])
    build = SeqBuilder(device, dense_mask=True, windows={window_of(variant)})
    return build.seq_info(cu_seqlens, rows, total // rows)
