"""Feature maps of keys and queries, per head on [.., K]."""

import torch
import torch.nn.functional as F


def elu1(x):
    return F.elu(x) + 1


def relu2(x):
    return F.relu(x).square()


def softmax(x):
    return torch.softmax(x, -1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def identity(x):
    return x


FEATURE_MAPS = {
    "identity": identity,
    "silu": F.silu,
    "elu1": elu1,
    "relu": F.relu,
    "relu2": relu2,
    "sigmoid": torch.sigmoid,
    "softmax": softmax,
}
# Never below zero: only these can be normalised.
POSITIVE = ("elu1", "relu", "relu2", "sigmoid", "softmax")
