"""Choices of experts for tests."""

import torch


def choose(tokens, k, experts, *, zipf=False):
    """Choose k of the experts for every token, ascending: [tokens, k]. zipf: some far more often
    than others."""
    odds = 1 / torch.arange(1.0, experts + 1) if zipf else torch.ones(experts)
    noise = torch.rand(tokens, experts).log() / odds  # the k last of exponential clocks
    return noise.topk(k, dim=1).indices.sort(1).values


def choose_counts(counts):
    """Make choices [sum(counts), 1] of which so many fall on each expert."""
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return ids[torch.randperm(len(ids))][:, None]
