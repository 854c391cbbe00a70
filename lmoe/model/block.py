"""One layer: x += mixer(norm(x)); x += ffn(norm(x))."""

from torch import nn

from lmoe.model.ffn import SwiGLU
from lmoe.model.moe.moe import MoE
from lmoe.model.norm import RMSNorm


class Block(nn.Module):
    """A pre-norm residual block of a token mixer and a feed-forward layer (experts or dense)."""

    def __init__(self, model, mixer, ffn):
        super().__init__()
        self.norm_mixer = RMSNorm(model.dim, model.norm_eps)
        self.mixer = mixer
        self.norm_ffn = RMSNorm(model.dim, model.norm_eps)
        self.ffn = ffn

    def forward(self, x, seq, state=None):
        """x [T, D] -> (x [T, D], MoEStats or None). `state`: the mixer's, see Mixer.forward."""
        x = x + self.mixer(self.norm_mixer(x), seq, state)
        y = self.norm_ffn(x)
        if isinstance(self.ffn, MoE):
            y, stats = self.ffn(y, seq)
        else:
            y, stats = self.ffn(y), None
        return x + y, stats

    def flops_per_token(self, seq_len):
        return self.mixer.flops_per_token(seq_len) + self.ffn.flops_per_token()


def make_ffn(model, moe, layer):
    """Experts, or a dense SwiGLU in the first model.dense_layers layers and where there are no experts."""
    if layer < model.dense_layers or not moe.experts:
        return SwiGLU(model.dim, model.ffn_hidden, std=model.init_std, layers=model.layers)
    return MoE(model, moe)
