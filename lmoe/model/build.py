"""Build a model from the sections of a configuration."""

from torch import nn

from lmoe.model.block import Block, make_ffn
from lmoe.model.config import check_choice, layer_ffns, repeat
from lmoe.model.mixers import MIXERS
from lmoe.model.model import Model


def layer_mixers(model):
    """List the mixer's name of every layer. model: ModelConfig; ValueError for a bad pattern."""
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


def moe_layer_count(model, moe):
    """Count the MoE layers of the whole model. model: ModelConfig; moe: MoEConfig."""
    return layer_ffns(model, moe).count("E")


def mixer_options(config, name):
    """Find the options of a mixer of the model: [attention], [mixer] or [mixer.NAME]."""
    if name == config.model.attention:
        return config.attention
    return config.mixer if name == config.model.mixer else config.mixers[name]


def build_model(config):
    """Build the Model of a Config whose model.vocab_size is set, on the current device."""
    model, shared, blocks = config.model, nn.ModuleDict(), []
    ffns = layer_ffns(model, config.moe)
    for layer, name in enumerate(layer_mixers(model)):
        mixer = MIXERS[name](model, mixer_options(config, name), layer, shared)
        blocks.append(Block(model, mixer, make_ffn(model, config.moe, ffns[layer])))
    return Model(model, config.moe, blocks, shared)
