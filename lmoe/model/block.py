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

    @property
    def has_experts(self):
        return isinstance(self.ffn, MoE)

    @property
    def routers(self):
        """{name of the child that has a router: number of its counts}."""
        return {"ffn": self.ffn.cfg.experts} if self.has_experts else {}

    def forward(self, x, seq, state=None, carried=None):
        """x [T, D] -> (x [T, D], carried, {"ffn": the statistics of its router} or {}). `state`,
        `carried`: the mixer's, see Mixer.forward; the values carried over the depth pass through a
        block whose mixer knows none."""
        x, carried = self.mix(x, seq, state, carried or {})
        if not self.has_experts:
            return x + self.ffn(self.norm_ffn(x)), carried, {}
        y, routing, stats = self.route(x, seq)
        return x + self.ffn.experts_of(y, routing), carried, {"ffn": stats}

    def mix(self, x, seq, state, carried):
        """The first half: norm, mixer, residual."""
        if not self.mixer.carries:
            return x + self.mixer(self.norm_mixer(x), seq, state), carried
        y, carried = self.mixer(self.norm_mixer(x), seq, state, carried)
        return x + y, carried

    def route(self, x, seq):
        """(normed x, Routing, MoEStats): what comes before the experts."""
        y = self.norm_ffn(x)
        return y, *self.ffn.route(y, seq)

    def flops_per_token(self, seq_len):
        return self.mixer.flops_per_token(seq_len) + self.ffn.flops_per_token()


def make_ffn(model, moe, layer):
    """Experts, or a dense SwiGLU in the first model.dense_layers layers and where there are no
    experts."""
    if layer < model.dense_layers or not moe.experts:
        return SwiGLU(model.dim, model.ffn_hidden, std=model.init_std, layers=model.layers)
    return MoE(model, moe)
