"""Build a model from the sections of a configuration: the one place that chooses its parts."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from lmoe.model.block import Block, PostNorm, PreNorm
from lmoe.model.config import ModelConfig, check_choice, layer_ffns, repeat
from lmoe.model.ffn import SwiGLU
from lmoe.model.mixers import MIXERS
from lmoe.model.model import Embedding, Head, Model
from lmoe.model.moe.moe import MoE
from lmoe.model.norm import RMSNorm, ZeroCenteredRMSNorm

NORMS = {"rms": RMSNorm, "zero_centered_rms": ZeroCenteredRMSNorm}
RESIDUALS = {"pre_norm": PreNorm, "post_norm": PostNorm}


def layer_mixers(model: ModelConfig) -> list[str]:
    """List the mixer's name of every layer; ValueError for a bad pattern."""
    letters = {"L": model.mixer, "N": model.attention}
    if isinstance(model.pattern, str) and set(model.pattern) - set(letters):
        raise ValueError(
            f"model.pattern = {model.pattern!r}: only L (model.mixer) and N (model.attention) make"
            " a pattern"
        )
    names = [letters.get(name, name) for name in model.pattern]
    for name in names:
        check_choice("model.pattern: mixer", name, MIXERS)
    return repeat("model.pattern", names, model.layers)


def mixer_options(config, name: str):
    """Find the options of a mixer of the model: [attention], [mixer] or [mixer.NAME]."""
    if name == config.model.attention:
        return config.attention
    return config.mixer if name == config.model.mixer else config.mixers[name]


def every_mixer(config) -> dict:
    """List {name: options} of the mixers of all layers, each once."""
    return {name: mixer_options(config, name) for name in layer_mixers(config.model)}


def softmax_options(config) -> list:
    """List the options of every kind of softmax layer in the model."""
    return [chosen for name, chosen in every_mixer(config).items() if MIXERS[name].softmax]


def attention_windows(config) -> set[int]:
    """Find the windows of the model's softmax layers, which their batches need masks for."""
    return {chosen.window for chosen in softmax_options(config)}


def needs_dense_mask(config, device, dtype) -> bool:
    """Ask the softmax layers, if any, for variable-length attention; ValueError where one demands
    it and cannot have it."""
    model = config.model
    options = softmax_options(config)
    return not all([chosen.varlen(model, device, dtype) for chosen in options])


def build_model(config) -> Model:
    """Build the Model of a Config whose model.vocab_size is set, on the current device."""
    model = config.model
    shared = nn.ModuleDict()
    blocks = {}
    routers = {}
    residual = RESIDUALS[model.residual](model.residual_multiplier)

    def norm():
        return NORMS[model.norm](model.dim, model.norm_eps)

    layers = zip(layer_mixers(model), layer_ffns(model, config.moe), strict=True)
    for number, (name, letter) in enumerate(layers):
        mixer = MIXERS[name](model, mixer_options(config, name), number, shared)
        if letter == "E":
            ffn = MoE(model, config.moe)
        else:
            ffn = SwiGLU(model.dim, model.ffn_hidden, std=model.init_std, layers=model.layers)
        blocks[number] = Block(mixer, ffn, [norm(), norm()], residual)
        for child, size in blocks[number].routers.items():
            routers[f"{number}.{child}"] = size
    return Model(Embedding(model), blocks, norm(), Head(model), shared, routers)


@contextlib.contextmanager
def on_meta(config) -> Iterator[None]:
    """Build on the meta device; ValueError, which names the greatest number of a Config's model,
    where a tensor would be larger than any can be."""
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, TypeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        parts = {"model": config.model, "mixer": config.mixer, "attention": config.attention}
        parts |= {f"mixer.{name}": options for name, options in config.mixers.items()}
        numbers = {
            f"{section}.{key}": value
            for section, options in (parts | {"moe": config.moe}).items()
            for key, value in vars(options).items()
            if isinstance(value, (int, float))
        }
        key = max(numbers, key=numbers.get)
        why = str(error).splitlines()[0]
        raise ValueError(
            f"{key} = {numbers[key]} is too large for a model's tensors: {why:.80}"
        ) from None
