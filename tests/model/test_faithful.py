"""Presets named faithful: shapes at a published width, epsilons and initial values of
each mixer's official code."""

import pytest
import torch

from lmoe.config import load_config
from lmoe.model.init import Linear, init_weights, marks, materialise, orthogonal
from lmoe.model.mixers import MIXERS
from lmoe.model.mixers.attention import AttentionShape
from lmoe.model.mixers.base import HeadShape
from lmoe.model.mixers.ssm import Decay

# A published width: heads of q and k, of v, K and V.
SHAPES = {
    "attention": (1024, AttentionShape(8, 8, 128)),
    "bla": (1024, HeadShape(8, 8, 128, 128)),
    "lightning": (1024, HeadShape(8, 8, 128, 128)),
    "retnet": (2048, HeadShape(8, 8, 256, 512)),
    "gla": (1024, HeadShape(4, 4, 128, 256)),
    "gated_deltanet": (2048, HeadShape(6, 6, 256, 512)),
    "gsa": (1024, HeadShape(4, 4, 256, 256)),
    "hgrn2": (2048, HeadShape(16, 16, 128, 128)),
    "rwkv6": (2048, HeadShape(32, 32, 64, 64)),
    "mamba2": (768, HeadShape(1, 24, 128, 64)),
    "mamba3": (768, HeadShape(1, 24, 128, 64)),
}
EPSILONS = {"lightning": 1e-6, "retnet": 1e-6, "rwkv6": 64e-5, "attention": 1e-6}
LAYER, LAYERS, STD = 1, 4, 0.05
every_mixer = pytest.mark.parametrize("name", SHAPES)


def configured(name, words, preset="faithful"):
    section = "attention" if MIXERS[name].softmax else "mixer"
    config = load_config([f"--model.{section}={name}", f"--model.preset={preset}", *words])
    return config.model, getattr(config, section)


def made(name, preset="faithful", *words, layer=LAYER):
    """A layer of four with its initial weights."""
    words = ["--model.dim=256", f"--model.layers={LAYERS}", f"--model.init_std={STD}", *words]
    model, options = configured(name, words, preset)
    with torch.device("meta"):
        mixer = MIXERS[name](model, options, layer)
    materialise(mixer, "cpu")
    init_weights(mixer, 0)
    return mixer


@every_mixer
def test_shapes(name):
    width, shape = SHAPES[name]
    heads = 8 if width == 1024 else 4  # not what a preset gives by itself
    model, options = configured(name, [f"--model.dim={width}", f"--model.heads={heads}"])
    assert options.shape(model) == shape


def epsilons(mixer):
    return {m.eps for m in mixer.modules() if m is not mixer and hasattr(m, "eps")}


@every_mixer
def test_epsilons(name):
    words = ["--attention.qk_norm=true"] if name == "attention" else []
    official = set() if name == "bla" else {EPSILONS.get(name, 1e-5)}  # BLA has no norm
    assert epsilons(made(name, "faithful", *words)) == official
    section = "attention" if name == "attention" else "mixer"
    assert epsilons(made(name, "uniform", *words, f"--{section}.norm_eps=0.25")) == {0.25}


def is_uniform(tensor, bound):
    largest = tensor.abs().max().item()
    assert 0.98 * bound < largest <= bound
    assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def is_orthogonal(weight, gain):
    product = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    torch.testing.assert_close(product, gain**2 * torch.eye(len(product)), rtol=0, atol=1e-5)


def attention(mixer):
    assert mixer.options.rope


def bla(mixer):
    assert mixer.norm is None and mixer.wg is None and mixer.options.normalise


def lightning(mixer):
    assert mixer.options.slopes == "minimax"


def retnet(mixer):
    rows = {"wq": 256, "wk": 256, "wv": 512, "wg": 512}
    for child, width in rows.items():
        is_uniform(getattr(mixer, child).weight, 2**-2.5 * (6 / (256 + width)) ** 0.5)
    is_uniform(mixer.wo.weight, (6 / (256 + 512)) ** 0.5)
    assert not [name for name, _ in mixer.named_parameters() if "norm" in name]
    # q = (1, 0, 1, 0, ..) at position 1 turns by the frequencies themselves.
    seq = type("At", (), {"positions": torch.ones(1, dtype=torch.int64)})
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(mixer.K // 2)[None, None]
    turned = mixer.features(q, seq).view(-1, 2)
    angles = torch.atan2(turned[:, 1], turned[:, 0])
    frequencies = 1 / 10000 ** torch.linspace(0, 1, mixer.K // 2, dtype=torch.float64)
    torch.testing.assert_close(angles, frequencies)


def gla(mixer):
    assert not mixer.decay_out.bias.any()


def gated_deltanet(mixer):
    assert mixer.decay.least == 0.0
    for least, floor in ((mixer.decay.least, 1e-4), (Decay(1).least, 1.0)):
        A = torch.empty(1_000_000)
        Decay(1, least).init_parameter("A_log", A, torch.Generator().manual_seed(0))
        A.exp_()
        assert A.min().item() == pytest.approx(floor, rel=1e-4) and A.max() < 16.001
        assert A.mean().item() == pytest.approx((least + 16) / 2, rel=0.01)


def gsa(mixer):
    assert mixer.options.slots == 64 and mixer.norm.size == 256


def hgrn2(mixer):
    assert not mixer.hgrn2_bounds.logits.any() and mixer.norm.size == 256


def rwkv6(mixer):
    assert torch.allclose(mixer.norm.weight, torch.tensor(((LAYER + 1) / LAYERS) ** 0.7))
    assert not mixer.wo.weight.any() and not mixer.norm.bias.any()
    for child, gain in {"wr": 1.0, "wk": 0.1, "wv": 1.0, "wg": 0.1}.items():
        is_orthogonal(getattr(mixer, child).weight, gain)
    is_uniform(mixer.decay_out.weight, 0.01)
    is_uniform(mixer.mix.B, 0.01)
    assert not mixer.mix.A.weight.any() and not mixer.decay_in.weight.any()
    matrices = {name for name, p in mixer.named_parameters() if p.ndim > 1}
    decaying = {name for name in matrices if "no_decay" not in marks(mixer.get_parameter(name))}
    assert decaying == {f"w{x}.weight" for x in "rkvgo"}


def mamba2(mixer):
    for conv in (mixer.conv_x, mixer.conv_B, mixer.conv_C):
        is_uniform(conv.bias, 0.5)
        is_uniform(conv.weight, 0.5)
    A = mixer.decay.A_log.exp()
    assert A.min() >= 1 and A.max() <= 16.001


def mamba3(mixer):
    assert mixer.options.heavy_tail
    assert (mixer.bias_B == 1).all() and (mixer.bias_C == 1).all()


OFFICIAL = [attention, bla, lightning, retnet, gla, gated_deltanet, gsa, hgrn2, rwkv6, mamba2]
OFFICIAL = {check.__name__: check for check in [*OFFICIAL, mamba3]}


@every_mixer
def test_initial_values(name):
    """And what the official code leaves to the model has its N(0, init_std)."""
    OFFICIAL[name](made(name))
    # In the preset of comparable shapes, all projections have.
    for child, module in made(name, "uniform").named_children():
        if isinstance(module, Linear) and module.weight.numel() > 4096 and "decay" not in child:
            std = STD / (2 * LAYERS) ** 0.5 if child == "wo" else STD
            assert module.weight.std().item() == pytest.approx(std, rel=0.1), child


def test_orthogonal_values_do_not_depend_on_threads():
    drawn, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            drawn.append(torch.empty(384, 256))
            orthogonal(drawn[-1], 0.1, torch.Generator().manual_seed(0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*drawn)
