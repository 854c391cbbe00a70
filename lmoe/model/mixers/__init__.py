"""The registry of token mixers: a new mixer is one file and one line here, and every test over the registry then runs on it."""

from lmoe.model.mixers.attention import Attention
from lmoe.model.mixers.gated_deltanet import GatedDeltaNet
from lmoe.model.mixers.gla import GLA

MIXERS = {
    "attention": Attention,
    "gla": GLA,
    "gated_deltanet": GatedDeltaNet,
}
