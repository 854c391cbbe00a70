"""Log decays from the logits of gates: alpha = sigmoid(z)^(1 / tau) (arXiv 2312.06635, eq. 6)."""

import torch
import torch.nn.functional as F

from lmoe.kernels.norm import compute_dtype


def log_decay(z, tau):
    """log alpha in float32, float64 for float64 logits; z itself without tau. z [.., K], None or
    not; tau [1] or None."""
    return z if tau is None or z is None else F.logsigmoid(z.to(compute_dtype(z))) / tau


def logit_gradient(dg, z, tau):
    """The gradient of the logits z, in their dtype, from that of their log decays."""
    return (
        dg if tau is None or z is None else (dg * torch.sigmoid(-z.to(dg.dtype)) / tau).to(z.dtype)
    )
