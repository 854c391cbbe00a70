"""One layer: a token mixer and a feed-forward layer, each with its norm, on the residual stream."""

from dataclasses import dataclass

from torch import Tensor, nn

from lmoe.model.moe.moe import MoE
from lmoe.model.moe.router import RouterStats


@dataclass(frozen=True)
class PreNorm:
    """The residual rule x + multiplier * layer(norm(x))."""

    multiplier: float = 1.0

    def enter(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Make what the layer sees of the stream x [T, D]."""
        return norm(x)

    def leave(self, x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        """Add what the layer gave, y [T, D], to the stream x [T, D]."""
        return x + (y if self.multiplier == 1 else self.multiplier * y)


class PostNorm(PreNorm):
    """The residual rule x + multiplier * norm(layer(x)) (OLMo 2, arXiv 2501.00656)."""

    def enter(self, x, norm):
        return x

    def leave(self, x, y, norm):
        return super().leave(x, norm(y), norm)


class Block(nn.Module):
    """A residual block of a token mixer and a feed-forward layer (experts or dense). norms: of the
    two; residual: the rule by which they join the stream."""

    def __init__(self, mixer: nn.Module, ffn: nn.Module, norms: list[nn.Module], residual: PreNorm):
        super().__init__()
        self.norm_mixer = norms[0]
        self.mixer = mixer
        self.norm_ffn = norms[1]
        self.ffn = ffn
        self.residual = residual

    @property
    def has_experts(self) -> bool:
        return isinstance(self.ffn, MoE)

    @property
    def routers(self) -> dict[str, int]:
        """{child with a router: number of its counts}"""
        experts = self.ffn.cfg.experts if self.has_experts else 0
        sizes = {"mixer": self.mixer.router_size, "ffn": experts}
        return {child: size for child, size in sizes.items() if size}

    def forward(
        self, x: Tensor, seq, state=None, residuals: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, RouterStats]]:
        """Run the layer: x [T, D] -> (x [T, D], residuals, {child: statistics of its router}).
        state, residuals: the mixer's, see Mixer.forward; a mixer passes on what it does not know.
        """
        x, residuals, stats = self.mix(x, seq, state, residuals)
        stats = {} if stats is None else {"mixer": stats}
        if not self.has_experts:
            y = self.ffn(self.residual.enter(x, self.norm_ffn))
        else:
            y, routing, stats["ffn"] = self.route(x, seq)
            y = self.ffn.routed_experts(y, routing)
        return self.residual.leave(x, y, self.norm_ffn), residuals, stats

    def mix(self, x, seq, state, residuals):
        """Run the first half: norm, mixer, residual."""
        seen = self.residual.enter(x, self.norm_mixer)
        y, residuals, stats = self.mixer(seen, seq, state, residuals)
        return self.residual.leave(x, y, self.norm_mixer), residuals, stats

    def route(self, x, seq):
        """Run what comes before the experts: (what they see, Routing, RouterStats)."""
        y = self.residual.enter(x, self.norm_ffn)
        return y, *self.ffn.route(y, seq)

    def flops_per_token(self, seq_len: int) -> float:
        return self.mixer.flops_per_token(seq_len) + self.ffn.flops_per_token()
