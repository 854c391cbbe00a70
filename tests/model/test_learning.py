"""Every mixer learns what only a mixer can."""

import math

import pytest
import torch

from lmoe.config import load_config
from lmoe.model.config import ModelConfig
from lmoe.optimizer import build_optimizer
from tests.model.variants import MIXER_VARIANTS, SHAPE, make_model, make_seq

SYMBOLS, DOCUMENTS, LENGTH = 8, 16, 16


@pytest.mark.slow
@pytest.mark.parametrize("variant", MIXER_VARIANTS)
def test_every_mixer_learns(variant):
    """150 steps on documents a b a b ..: what follows a token is the one before it. Without a mixer
    the loss ends at chance. Initial weights and rates are those of a user's first run."""
    options = load_config(["--config=train_configs/debug.toml"]).optimizer
    init_std = ModelConfig(dim=SHAPE.dim).init_std
    model = make_model(variant, torch.float32, noise=0.0, init_std=init_std)
    optimizer = build_optimizer(options, model)
    generator, seq, losses = (
        torch.Generator().manual_seed(0),
        make_seq([LENGTH] * DOCUMENTS, variant),
        [],
    )
    for _ in range(150):
        stream = torch.randint(SYMBOLS, (DOCUMENTS, 2), generator=generator).repeat(
            1, LENGTH // 2 + 1
        )
        tokens, labels = stream[:, :LENGTH], stream[:, 1 : LENGTH + 1].clone()
        labels[:, 0] = -100  # b, which nothing tells
        output = model(tokens.flatten(), seq, labels.flatten(), float(DOCUMENTS * (LENGTH - 1)))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < min(first, math.log(SYMBOLS)) - 0.4, (first, last)
