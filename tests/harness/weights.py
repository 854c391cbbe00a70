"""Initial values for tests that compare numbers."""

import zlib

import torch

from lmoe.model.init import clean_name, cut, init_weights, local


def init_noisy(model, seed=0, std=0.01):
    """Fill a materialised model with its initial weights, and noise on all of them."""
    init_weights(model, seed)
    add_noise(model, std)


@torch.no_grad()
def add_noise(model, std=0.01):
    """Add N(0, std) to every parameter, the same under any layout. Some start from zero, and what
    they multiply would count for nothing."""
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(clean_name(name).encode()))
        noise = torch.empty(p.shape).normal_(0.0, std, generator=generator)
        local(p).add_(cut(noise, p).to(p.device))
