"""The interface of token mixers, and the one way in which the linear ones run: over a packed
stream, as prefill, and step by step."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lmoe.kernels.family import BACKENDS, Family, Scan
from lmoe.model.batch import SeqInfo, StepInfo
from lmoe.model.config import ModelConfig, opt
from lmoe.model.conv import write_state
from lmoe.model.init import Linear, marks, output_std
from lmoe.model.mixers.features import identity
from lmoe.model.moe.router import RouterStats
from lmoe.model.norm import GatedRMSNorm, WideRMSNorm


class HeadShape(NamedTuple):
    """Heads of q and k, heads of v, and their channels K and V."""

    qk_heads: int
    v_heads: int
    K: int
    V: int


@dataclass
class ScanOptions:
    """Options that every mixer with a recurrence has."""

    heads: int = opt(0, "heads H; 0: by mixer.head_dim, else model.heads", least=0)
    head_dim: int = opt(
        0, "channels K of a head of q and k, which give the number of heads; 0: by heads", least=0
    )
    norm_eps: float = opt(1e-5, "epsilon of the mixer's norms", least=0)
    backend: str = opt(
        "auto",
        "kernel backend; auto: triton on a GPU, else chunk",
        choices=("auto", *BACKENDS, "reference"),
    )
    chunk_size: int = opt(64, "tokens C per chunk, a power of two", least=1)

    def shape(self, config: ModelConfig) -> HeadShape:
        """Return the sizes for a ModelConfig; ValueError where they do not divide."""
        raise NotImplementedError

    def width(self, config: ModelConfig) -> float:
        """Return the channels that the heads of `head_dim` share."""
        raise NotImplementedError

    def count_heads(self, config: ModelConfig) -> int:
        """Count the heads, by head_dim, heads or model.heads; ValueError where head_dim does not
        divide the width, or says another number than heads."""
        if not self.head_dim:
            return self.heads or config.heads
        width = self.width(config)
        if self.heads and self.heads * self.head_dim != width:
            raise ValueError(
                f"mixer.heads = {self.heads} and mixer.head_dim = {self.head_dim} contradict each"
                f" other: the heads share {width:g} channels; give one of the two"
            )
        if width % self.head_dim:
            sizes = range(min(self.head_dim, int(width)), 0, -1)
            fits = next((size for size in sizes if width % size == 0), "no size")
            raise ValueError(
                f"mixer.head_dim = {self.head_dim} does not divide the {width:g} channels that the"
                f" heads share; {fits} does"
            )
        return int(width) // self.head_dim

    def check(self):
        if self.chunk_size & (self.chunk_size - 1):
            raise ValueError(f"mixer.chunk_size = {self.chunk_size} is not a power of two")


@dataclass
class LinearOptions(ScanOptions):
    """Options of mixers whose widths are multiples of the model's."""

    expand_k: float = opt(1.0, "total key width H K over model.dim", above=0)
    expand_v: float = opt(1.0, "total value width over model.dim", above=0)
    value_heads = 0  # as many as heads; a mixer with grouped heads makes it an option

    def width(self, config):
        return config.dim * self.expand_k

    def shape(self, config):
        self.check()
        heads = self.count_heads(config)
        value_heads = self.value_heads or heads
        k = self.width(config) / heads
        v = config.dim * self.expand_v / value_heads
        if k != int(k) or v != int(v) or k < 1 or v < 1:
            raise ValueError(
                f"mixer.expand_k = {self.expand_k}, mixer.expand_v = {self.expand_v}: model.dim = "
                f"{config.dim} times them does not divide into {heads} heads ({value_heads} value "
                "heads); choose mixer.heads so that it does"
            )
        return HeadShape(heads, value_heads, int(k), int(v))


class Mixer(nn.Module):
    """A token mixer: x [T, D] -> [T, D], T the tokens of a packed stream or one token of each of N
    sequences.

    A linear mixer names its `family` and writes `project_q`, `project_kv` and `output` (and
    `project_gate`, if it has one); several scans or another read-out are its own `scans` and
    `read`. Head counts come from the shapes of tensors, never from the configuration, so that a
    mixer works on the heads that its rank holds.

    layer: its number in the whole model. shared: the modules that layers share over the depth, by
    name (see `share`); None for a mixer without a model, which then has its own.
    """

    Options = LinearOptions
    presets = {"uniform": {}, "faithful": {}}
    softmax = False  # whether it attends, over the `window` of its options, and has no state
    family: Family | None = None
    # {child or parameter: dim} that tensor parallelism cuts, heads by heads; all else stays whole.
    # None: the mixer refuses to be split.
    tp_plan: dict[str, int] | None = None
    # the kind of heads of which ranks may share one: each takes what it reads
    replicated_heads = ""
    local_heads = slice(None)  # this rank's heads, of a constant per head that is held whole
    left_rows = 0  # tokens before its own that the projections look at
    splits_sequence = True  # whether context parallel ranks can share its stream
    # {name: shape per token, heads first} of the values that go from layer to layer beside x; their
    # heads are those of the mixer.
    residual_shapes: dict[str, tuple[int, ...]] = {}
    router_size = 0  # counts in the statistics that it returns; 0: it returns none
    speaks = True  # of tensor parallel ranks, whose routers see the same tokens, one reports
    sum_over_heads = staticmethod(identity)  # sums partial products over tensor parallel ranks

    def __init__(self, config: ModelConfig, options, layer=0, shared=None):
        super().__init__()
        self.config = config
        self.options = options
        self.layer = layer
        object.__setattr__(self, "_shared", shared)  # the model's child, not this one's

    def share(self, name, make):
        """Take the module that all layers know by this name, made by `make()` in the first one. It
        belongs to the model, not to this mixer, and every stage of a pipeline holds it: its
        parameters carry the marks keep_fp32 and every_stage."""
        if self._shared is None:
            self.add_module(name, make())
        else:
            if name not in self._shared:
                self._shared[name] = make()
            object.__setattr__(self, name, self._shared[name])
        wanted = {"keep_fp32", "every_stage"}
        assert all(wanted <= set(marks(p)) for p in getattr(self, name).parameters())

    def forward(
        self,
        x: Tensor,
        seq: SeqInfo | StepInfo,
        state: dict[str, Tensor] | None = None,
        residuals: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], RouterStats | None]:
        """Mix x [T, D] over the tokens of each document: (y [T, D], residuals, statistics).

        state: None in training; the initial state in prefill, which fills it, and with a StepInfo;
        written in place. residuals {name: [T, heads, ..], in x's dtype}: what layers before this
        one gave; with this one's additions they go on to the next.
        """
        residuals = dict(residuals or {})
        left = seq.context.left_context(x, self.left_rows)
        x = self.streams(x, left, seq, state)
        kv = self.project_kv(x, left, seq, state, residuals)
        scans = self.scans(kv)
        pending = seq.context.start(scans, seq)
        # What needs no entering state stands between start and finish: it hides the exchange.
        q = self.project_q(x, left, seq, state)
        gate = self.project_gate(x)
        entering = seq.context.finish(pending)
        o = self.read(q, kv, scans, entering, seq, state)
        return self.output(o, gate), residuals, kv.get("stats")

    def streams(self, x, left, seq, state):
        """Make what the projections take as their x: [T, D], or a dict of several."""
        return x

    def lookahead(self, x, positions):
        """Return what a token lets the one before it know of itself [T, ..] (of the mixer's choice;
        see LocalContext.lookahead), or None."""
        return None

    def project_q(self, x, left, seq, state) -> Tensor:
        """Project to q [T, H, K]. left [left_rows, D]: the rows before x, or None where the stream
        starts here."""
        raise NotImplementedError

    def project_kv(self, x, left, seq, state, residuals) -> dict[str, Tensor]:
        """Project to the other inputs of the family per token, by name, [T, H, ..]: all that the
        state needs. residuals: this layer's own dict, to read and to add to. An entry "stats" has
        the RouterStats of a mixer with a router."""
        raise NotImplementedError

    def project_gate(self, x):
        """Project to what `output` takes besides o, from x alone, or None."""
        return None

    def output(self, o, gate) -> Tensor:
        """Project o [T, H, V] back, after the norm with the gate: [T, D]."""
        return self.wo(self.norm(o, gate).flatten(-2))

    def constants(self) -> dict:
        """Return the arguments of the family that are not per token."""
        return {}

    def scans(self, kv) -> list[Scan]:
        """Make the recurrences over project_kv's tensors, in the order in which `read` runs
        them."""
        return [self.scan(kv, **self.constants())]

    def scan(self, inputs, **constants) -> Scan:
        """Make a recurrence of the mixer's family over inputs by name."""
        return Scan(self.family, inputs, constants, self.options.chunk_size, self.options.backend)

    def read(self, q, kv, scans, entering, seq, state) -> Tensor:
        """Run the scans: o [T, H, V]. entering: what enters the stream, an entry a scan."""
        return self.recur("S", scans[0], q, entering[0], seq, state)

    def recur(self, key, scan, q, entering, seq, state) -> Tensor:
        """Run one scan: o [T, H, V]; its recurrent state is state[key] [N, H, K, V]."""
        return run_scan(scan, q, entering, seq, entry(state, key))

    def initial_state(self, sequences, max_len, device, dtype) -> dict[str, Tensor]:
        """Make the decode state of N sequences before their first token: tensors, dim 0 the
        sequence."""
        wide = torch.promote_types(dtype, torch.float32)
        state = {}
        for key, (_, heads, K, V) in self.scan_shapes().items():
            shape = sequences, heads, *self.family.state_shape(K, V)
            state[key] = torch.zeros(shape, device=device, dtype=wide)
        for name, module in self.named_children():
            if hasattr(module, "window_shape"):
                shape = sequences, *module.window_shape()
                state[name] = torch.zeros(shape, device=device, dtype=dtype)
        return state

    def scan_shapes(self) -> dict[str, HeadShape]:
        """Return the shape of each scan under the key of its state."""
        return {"S": self.options.shape(self.config)}

    @classmethod
    def families(cls) -> tuple[Family, ...]:
        """Return the families of all its scans."""
        return () if cls.family is None else (cls.family,)

    @classmethod
    def head_counts(cls, options, config) -> dict[str, int]:
        """Return the numbers of heads by kind, which tensor parallel ranks share."""
        shape = options.shape(config)
        return {"key": shape.qk_heads, "value": shape.v_heads}

    def shard_heads(self, size, index) -> dict[str, int]:
        """Take the heads of rank `index` of `size` and return the plan {child or parameter: dim} of
        what is cut. Called once, before the cut."""
        share = self.options.shape(self.config).v_heads // size
        self.local_heads = slice(index * share, (index + 1) * share)
        return dict(self.tp_plan)

    def flops_per_token(self, seq_len) -> float:
        """Count forward FLOPs per token (a multiply-add is 2) of documents of seq_len tokens, a
        number or an array: what the modules count of their own, and the scans'."""
        counted = [m for m in self.modules() if hasattr(m, "flops_per_token") and m is not self]
        C = np.minimum(self.options.chunk_size, seq_len)
        flops = sum(m.flops_per_token() for m in counted)
        for _, heads, K, V in self.scan_shapes().values():
            flops += heads * self.family.flops(K, V, C)
        return flops


def in_heads(x: Tensor, size: int) -> Tensor:
    """View x [.., H size] as heads [.., H, size]."""
    return x.unflatten(-1, (-1, size))


def entry(state, key):
    """Take a tensor from a decode state, or None without one."""
    return None if state is None else state[key]


def run_scan(scan: Scan, q, entering, seq, state) -> Tensor:
    """Run a scan over a stream, from what enters it, or one step: o [T, H, V]. state [N, H, ..] or
    None: of every sequence, written in place."""
    if seq.decoding:
        return scan.family.step(scan, q, state)
    o, final = seq.context.scan(scan, q, entering, seq, state is not None)
    if state is not None:
        write_state(state, final)
    return o


class QKVMixer(Mixer):
    """A mixer whose q, k, v and gate are bias-free projections of x, with a norm over o, the gate,
    and a projection back.

    It adds to the inputs what its recurrence needs, and may pass q and k through `features`."""

    tp_plan = {"wq": 0, "wk": 0, "wv": 0, "wg": 0, "wo": 1}
    wide_activation = "silu"  # of the gate beside a wide norm

    def __init__(self, config, options, layer=0, shared=None, *, wide=False, gated=True):
        """wide: the norm is over all heads together, not over each."""
        super().__init__(config, options, layer, shared)
        heads, value_heads, self.K, self.V = options.shape(config)
        k = heads * self.K
        v = value_heads * self.V
        self.wq, self.wk, self.wv = projections(config, [k, k, v])
        self.wg = projections(config, [v])[0] if gated else None
        self.norm = GatedRMSNorm(self.V, options.norm_eps)
        if wide:
            self.norm = WideRMSNorm(v, options.norm_eps, self.wide_activation)
        self.wo = output_projection(config, v)

    def shard_heads(self, size, index):
        plan = super().shard_heads(size, index)
        return plan | {"norm": 0} if isinstance(self.norm, WideRMSNorm) else plan

    def features(self, x, seq):
        """Map q and k [T, H, K]."""
        return x

    def project_q(self, x, left, seq, state):
        return self.features(in_heads(self.wq(x), self.K), seq)

    def project_kv(self, x, left, seq, state, residuals):
        k = self.features(in_heads(self.wk(x), self.K), seq)
        return {"k": k, "v": in_heads(self.wv(x), self.V)}

    def project_gate(self, x):
        return None if self.wg is None else in_heads(self.wg(x), self.V)


def projections(config, widths, bias=False):
    """Make Linear layers from model.dim to each of `widths`."""
    return [Linear(config.dim, width, bias, std=config.init_std) for width in widths]


def output_projection(config, width):
    """Make the Linear layer from `width` back to the residual stream."""
    return Linear(width, config.dim, std=output_std(config.init_std, config.layers))
