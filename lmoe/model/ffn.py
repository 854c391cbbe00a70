"""The dense feed-forward layer."""

from torch import nn

from lmoe.kernels.pointwise import swiglu
from lmoe.model.init import Linear, output_std


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases (arXiv 2002.05202); w1, w3 [I, D], w2 [D, I].

    std: of the initial w1 and w3; w2 writes to the residual stream of a model of `layers` blocks.
    """

    def __init__(self, dim, hidden, *, std, layers):
        super().__init__()
        self.w1 = Linear(dim, hidden, std=std)
        self.w3 = Linear(dim, hidden, std=std)
        self.w2 = Linear(hidden, dim, std=output_std(std, layers))

    def forward(self, x):
        """x [T, D] -> [T, D]."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))

    def flops_per_token(self):
        return 3 * self.w1.flops_per_token()
