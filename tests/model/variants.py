"""Every mixer of the registry in every preset, the options of softmax attention that change its
path, and mixers that live in the tests: what the model tests run on."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import torch

from lmoe.model.batch import SeqBuilder
from lmoe.model.build import build_model
from lmoe.model.config import ModelConfig, MoEConfig
from lmoe.model.init import Linear, materialise
from lmoe.model.mixers import MIXERS
from lmoe.model.mixers.attention import AttentionOptions
from tests.harness.weights import init_noisy
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
    "gated_deltanet-faithful": {"head_dim": 6},
    "retnet-faithful": {"head_dim": 8},
    "hgrn2-faithful": {"head_dim": 8},
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
    init_noisy(mixer, std=0.1)
    return mixer


# What makes a state last for hundreds of tokens: values by mixer and name of a parameter or buffer.
# Those of a mixer that is not here have constants by these names, or no decay.
SLOW_CONSTANTS = {"log_decay": -0.002}
SLOW = {
    "gla": {"decay_out.bias": 6.0},
    "gated_deltanet": {"decay.A_log": -6.0, "wb.bias": -5.0},  # a key forgets what it meets, too
    "gsa": {"wf.bias": 4.0},
    "hgrn2": {"wk.bias": 6.0},
    "rwkv6": {"decay_bias": -6.5},
    "mamba2": {"decay.A_log": -6.0},
    "mamba3": {"wA.bias": -30.0, "dt_bias": -3.0},
    "selective": {"dt_proj.bias": -7.0},
    "mini_batch": {"rates": 0.01},
    "rotor": {"log_decay": -6.0},
}
SLOW["first_value"] = SLOW["gla"]


@torch.no_grad()
def make_slow_mixer(variant, dtype=torch.float64):
    """The mixer of a variant with decays near 1 (see test_a_slow_mixer_remembers): with those of
    the first weights, what leaks from a state is soon too little to be seen."""
    mixer = make_mixer(variant, dtype)
    for path, value in SLOW.get(MIXER_VARIANTS[variant][0], SLOW_CONSTANTS).items():
        child, _, name = path.rpartition(".")
        owner = mixer.get_submodule(child)
        if isinstance(owner, Linear):
            owner.weight *= 0.1
            if owner.bias is None:
                owner.bias = torch.nn.Parameter(owner.weight.new_empty(owner.out_features))
        if hasattr(owner, name):
            getattr(owner, name).fill_(value)
    return mixer


def make_model(variant, dtype=torch.float64, noise=0.05, **changes):
    """A two-layer model of a variant, with experts."""
    name, options = make_options(variant)
    shape = dataclasses.replace(SHAPE, mixer=name, **changes)
    attention = options if name == "attention" else AttentionOptions()
    moe = MoEConfig(experts=4, top_k=2, hidden=16, impl="loop")
    config = SimpleNamespace(model=shape, mixer=options, attention=attention, moe=moe)
    with torch.device("meta"), mock.patch.dict(MIXERS, UNREGISTERED):
        model = build_model(config).to(dtype)
    materialise(model, "cpu")
    init_noisy(model, std=noise)
    return model


def window_of(variant):
    return MIXER_VARIANTS[variant][1].get("window", 0) if variant else 0


def make_seq(lengths, variant="", rows=1, device="cpu"):
    """SeqInfo of documents of these lengths, in `rows` rows of equal length."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = int(cu_seqlens[-1])
    build = SeqBuilder(device, dense_mask=True, windows={window_of(variant)})
    return build.seq_info(cu_seqlens, rows, total // rows)
