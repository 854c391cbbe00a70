"""A small model with its optimizers, and how the checkpoint tests train and compare it."""

import random

import numpy as np
import torch
from torch import nn

from lmoe import checkpoint


class Toy(nn.Module):
    """Two layers with dropout, a persistent and a temporary buffer."""

    def __init__(self, hidden=33, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(7, hidden, dtype=dtype)
        self.second = nn.Linear(hidden, 3, bias=False, dtype=dtype)
        self.register_buffer("load", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.second(nn.functional.dropout(self.first(x), 0.3))


def adamw(model, **options):
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [
        torch.optim.AdamW(decay, lr=0.1, **options),
        torch.optim.AdamW(rest, lr=0.1, weight_decay=0.0, **options),
    ]


def train(model, optimizers, steps):
    """Steps whose data and dropout come from all the generators that a checkpoint holds."""
    dtype = model.first.weight.dtype
    for _ in range(steps):
        x = torch.randn(4, 7, dtype=dtype) * (1 + random.random()) + float(np.random.normal())
        model(x).square().sum().backward()
        model.load += 1.5
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def seed(value):
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def tensors(model, optimizers):
    return {
        key: value.detach().clone()
        for key, value in (
            checkpoint.model_tensors(model) | checkpoint.optimizer_tensors(model, optimizers)
        ).items()
    }


def assert_equal(some, other):
    assert some.keys() == other.keys()
    for key in some:
        assert some[key].dtype == other[key].dtype and some[key].device == other[key].device, key
        assert torch.equal(some[key], other[key]), key
