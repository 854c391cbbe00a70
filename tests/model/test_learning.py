"""Every mixer learns what only a mixer can."""

import math

import pytest
import torch

from lmoe.config.sections import OptimizerConfig
from lmoe.optimizer import build_optimizer
from tests.model.variants import MIXER_VARIANTS, make_model, make_seq

SYMBOLS, DOCUMENTS, LENGTH = 8, 16, 16


@pytest.mark.slow
@pytest.mark.parametrize("variant", MIXER_VARIANTS)
def test_every_mixer_learns(variant):
    """100 steps on documents a b a b ..: what follows a token is the one before it. Without a mixer
    the loss ends at chance. (The least is learnt by the memories among the toys, which have no
    decay: 1.63 of 2.08.)"""
    model = make_model(variant, torch.float32, noise=0.0, init_std=0.1)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-2), model)
    generator, seq, losses = (
        torch.Generator().manual_seed(0),
        make_seq([LENGTH] * DOCUMENTS, variant),
        [],
    )
    for _ in range(100):
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
