"""The dense feed-forward layer."""

import torch.nn.functional as F
from torch import nn

from lmoe.model.init import Linear


class FFN(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x), without biases; w1, w3 [I, D], w2 [D, I].

    std: of the initial w1 and w3; out_std: of w2, which writes to the residual stream.
    """

    def __init__(self, dim, hidden, *, std, out_std):
        super().__init__()
        self.w1 = Linear(dim, hidden, std=std)
        self.w3 = Linear(dim, hidden, std=std)
        self.w2 = Linear(hidden, dim, std=out_std)

    def forward(self, x):
        """x [T, D] -> [T, D]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def flops_per_token(self):
        return self.w1.flops_per_token() + self.w3.flops_per_token() + self.w2.flops_per_token()
