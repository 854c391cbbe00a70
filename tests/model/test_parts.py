"""The parts of a model that a configuration chooses: norms, the residual rule, multipliers."""

import pytest
import torch

from lmoe.config import load_config
from lmoe.model.build import build_model
from lmoe.model.init import materialise
from tests.harness.compare import TINY, compare_to_one_rank
from tests.harness.layouts import words
from tests.harness.weights import init_noisy
from tests.model.variants import make_seq

PARTS = {
    "norm": "zero_centered_rms",
    "residual": "post_norm",
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_multiplier": 0.25,
    "attention_multiplier": 0.7,
}
TOML = TINY | {"model": TINY["model"] | PARTS}


def make(**changes):
    model = TINY["model"] | {"pattern": ["gla", "attention", "attention"]} | changes
    config = load_config([], toml=TINY | {"model": model})
    with torch.device("meta"):
        made = build_model(config).double()
    materialise(made, "cpu")
    init_noisy(made, std=0.3)
    return made


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@pytest.mark.parametrize("residual", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("norm", ["rms", "zero_centered_rms"])
def test_the_parts_are_their_formulas(norm, residual):
    model = make(**PARTS | {"norm": norm, "residual": residual})
    tokens, seq = (
        torch.randint(0, 64, (20,), generator=torch.Generator().manual_seed(0)),
        make_seq([12, 8]),
    )

    def normed(x, module):
        return rms(x, module.weight + (norm == "zero_centered_rms"))

    def join(x, layer, module):
        if residual == "pre_norm":
            return x + 0.5 * layer(normed(x, module))
        return x + 0.5 * normed(layer(x), module)

    x = 3.0 * model.embed.weight[tokens]
    for block in model.blocks:
        x = join(x, lambda x, mixer=block.mixer: mixer(x, seq)[0], block.norm_mixer)
        x = join(x, lambda x, ffn=block.ffn: ffn(x, seq)[0], block.norm_ffn)
    logits = 0.25 * normed(x, model.norm) @ model.head.weight.T
    torch.testing.assert_close(model(tokens, seq), logits, rtol=1e-10, atol=1e-10)


def test_the_attention_multiplier_is_the_scale_of_scores():
    """That of 1 / sqrt(head size) is the default's; another one is another model."""
    tokens, seq = torch.arange(20), make_seq([20])
    default, same, other = (make(attention_multiplier=m)(tokens, seq) for m in (0.0, 16**-0.5, 0.5))
    torch.testing.assert_close(same, default, rtol=1e-12, atol=1e-12)
    assert (other - default).abs().max() > 1e-3


@pytest.mark.usefixtures("one_rank")
@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize("layout", [{"tp": 2, "ep": 2}, {"pp": 2, "cp": 2}], ids=str)
def test_layouts_of_such_a_model(pools, layout):
    compare_to_one_rank(pools(4), [], words(layout), toml=TOML)
