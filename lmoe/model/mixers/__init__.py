"""The registry of token mixers: a new mixer is one file and one line here, and every test over the
registry then runs on it."""

from lmoe.model.mixers.attention import Attention
from lmoe.model.mixers.bla import BLA
from lmoe.model.mixers.gated_deltanet import GatedDeltaNet
from lmoe.model.mixers.gla import GLA
from lmoe.model.mixers.gsa import GSA
from lmoe.model.mixers.hgrn2 import HGRN2
from lmoe.model.mixers.lightning import Lightning
from lmoe.model.mixers.mamba2 import Mamba2
from lmoe.model.mixers.mamba3 import Mamba3
from lmoe.model.mixers.retnet import RetNet
from lmoe.model.mixers.rwkv6 import RWKV6

MIXERS = {
    "attention": Attention,
    "bla": BLA,
    "lightning": Lightning,
    "retnet": RetNet,
    "gla": GLA,
    "gated_deltanet": GatedDeltaNet,
    "gsa": GSA,
    "hgrn2": HGRN2,
    "rwkv6": RWKV6,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
}
