"""What a token mixer is, and the one way in which the linear ones run: over a packed stream, as
prefill, and step by step."""

from dataclasses import dataclass

import torch
from torch import nn

from lmoe.kernels import ops
from lmoe.kernels.conv import short_conv, short_conv_step
from lmoe.kernels.pointwise import token_shift
from lmoe.model.batch import Segment
from lmoe.model.config import opt
from lmoe.model.init import Linear, local, marks, output_std
from lmoe.model.norm import WideRMSNorm

BACKENDS = ("auto", "reference", *ops.BACKENDS)
FAMILIES = ops.FAMILIES


def family_flops(family, K, V, C):
    """Forward FLOPs per token and head of a family's chunk form with chunks of C tokens (dense
    tiles, exponentials not counted)."""
    if family == "delta":
        return C * (6 * K + 4 * V) + 6 * K * V + 2 * C * C / 3
    return 2 * C * (K + V) + 4 * K * V


@dataclass
class ScanOptions:
    """Options that every mixer with a recurrence has."""

    heads: int = opt(0, "heads H; 0: model.heads")
    backend: str = opt(
        "auto", "kernel backend: auto (triton on a GPU, else chunk), chunk, triton or reference"
    )
    chunk_size: int = opt(64, "tokens C per chunk")

    def shape(self, model):
        """(heads of q and k, heads of v, K, V) for a ModelConfig; ValueError where they do not
        divide or an option is out of range."""
        raise NotImplementedError

    def check(self):
        if self.backend not in BACKENDS:
            raise ValueError(
                f"mixer.backend = {self.backend!r} is not known; one of: {', '.join(BACKENDS)}"
            )
        if self.chunk_size < 1 or self.chunk_size & (self.chunk_size - 1):
            raise ValueError(f"mixer.chunk_size = {self.chunk_size} is not a power of two")


@dataclass
class LinearOptions(ScanOptions):
    """Options of mixers whose widths are multiples of the model's."""

    expand_k: float = opt(1.0, "total key width H K over model.dim")
    expand_v: float = opt(1.0, "total value width over model.dim")
    value_heads = 0  # as many as heads; a mixer with grouped heads makes it an option

    def shape(self, model):
        self.check()
        heads = self.heads or model.heads
        value_heads = self.value_heads or heads
        k, v = model.dim * self.expand_k / heads, model.dim * self.expand_v / value_heads
        if k != int(k) or v != int(v) or k < 1 or v < 1:
            raise ValueError(
                f"mixer.expand_k = {self.expand_k}, mixer.expand_v = {self.expand_v}: model.dim ="
                f" {model.dim} times them does not divide into {heads} heads ({value_heads} value"
                " heads); choose mixer.heads so that it does"
            )
        return heads, value_heads, int(k), int(v)


class ShortConv(nn.Module):
    """Depthwise causal convolution over the stream, restarting at every document: x [T, C] -> [T,
    C], then SiLU."""

    def __init__(self, channels, width=4, activation="silu", bias=False, backend="auto"):
        super().__init__()
        self.width, self.activation, self.backend = width, activation, backend
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_parameter(self, name, tensor, generator):
        if name == "bias":
            tensor.zero_()
        else:
            tensor.uniform_(-(self.width**-0.5), self.width**-0.5, generator=generator)

    def forward(self, x, halo, seq, state, key):
        """halo [>= width-1, C] or None: the stream's inputs before x. `state[key]` [N, width-1, C]:
        the last inputs of every sequence, kept by prefill and advanced in place by decoding."""
        rows, weight, bias = (
            self.width - 1,
            local(self.weight),
            None if self.bias is None else local(self.bias),
        )
        if seq.decoding:
            return short_conv_step(x, state[key], weight, bias, self.activation, self.backend)
        halo = None if halo is None else halo[len(halo) - rows :]
        if state is not None:
            state[key] = seq.context.last(last_inputs(x, halo, seq, rows), seq)
        return short_conv(x, weight, bias, seq.positions, halo, self.activation, self.backend)

    def window(self):
        """(rows, channels) of the decode state."""
        return self.width - 1, self.weight.shape[0]

    def flops_per_token(self):
        return 2 * self.weight.numel()


class TokenShift(nn.Module):
    """x [T, D] of the token before each one, zero at a document's start (arXiv 2404.05892, section
    4.1)."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x, halo, seq, state, key):
        """As ShortConv: halo [>= 1, D] or None; `state[key]` [N, 1, D]."""
        if seq.decoding:
            before = state[key].squeeze(1).to(x.dtype)
            state[key] = x.unsqueeze(1).to(state[key].dtype)
            return before
        halo = None if halo is None else halo[-1:]
        if state is not None:
            state[key] = seq.context.last(last_inputs(x, halo, seq, 1), seq)
        return token_shift(x, seq.positions, halo)

    def window(self):
        return 1, self.dim


def last_inputs(x, halo, seq, rows):
    """[N, rows, C]: the last `rows` rows of each document that ends in the stream x [T, C], zeros
    before its start."""
    ends = seq.cu_seqlens[1:].long()
    back = torch.arange(-rows, 0, device=x.device)
    # Of the last token's place in its document: a document may have begun before this stream.
    length = seq.positions[(ends - 1).clamp(min=0)] + 1
    length = length.masked_fill(seq.cu_seqlens.diff() == 0, 0)
    inside = length[:, None] + back >= 0
    before = 0 if halo is None else rows
    x = x if halo is None else torch.cat([halo, x])
    return x[(ends[:, None] + back + before).clamp(min=0)] * inside[..., None]


class Mixer(nn.Module):
    """A token mixer: x [T, D] -> [T, D], T the tokens of a packed stream or one token of each of N
    sequences.

    A linear mixer names its `family` and writes `project_q`, `project_kv` and `output` (and
    `project_gate`, if it has one); several scans or another read-out are an own `segments` and
    `scan`. Head counts come from the shapes of tensors, never from the configuration, so that a
    mixer works on the heads that its rank holds.

    layer: its number in the whole model. shared: the modules that layers share over the depth, by
    name (see `share`); None for a mixer without a model, which then has its own. shards: {child or
    parameter: dim} that tensor parallelism cuts, heads by heads; all else stays whole. Without it
    the mixer refuses to be split. halo_rows: how many tokens before its own the mixer's projections
    look at. carries: {name: shape per token, heads first} of the values that go from layer to layer
    beside x; their heads are those of the mixer. softmax: whether it attends, over
    the `window` of its options.
    """

    Options = LinearOptions
    presets = {"uniform": {}, "faithful": {}}
    family = None
    softmax = False
    shards = None
    # which of shape()'s two head counts may be less than the ranks that split them: each takes what
    # its heads use
    shared_heads = None
    mine = slice(None)  # this rank's heads, of a constant per head that is held whole
    halo_rows = 0
    carries = {}

    def __init__(self, model, options, layer=0, shared=None):
        super().__init__()
        self.model, self.options, self.layer = model, options, layer
        object.__setattr__(self, "_shared", shared)  # the model's child, not this one's

    def share(self, name, make):
        """The module that all layers know by this name, made by `make()` in the first one. It
        belongs to the model, not to this mixer, and every stage of a pipeline holds it: its
        parameters carry the marks keep_fp32 and every_stage."""
        if self._shared is None:
            self.add_module(name, make())
        else:
            if name not in self._shared:
                self._shared[name] = make()
            object.__setattr__(self, name, self._shared[name])
        assert all(
            {"keep_fp32", "every_stage"} <= set(marks(p)) for p in getattr(self, name).parameters()
        )

    def forward(self, x, seq, state=None, carried=None):
        """`state`: None in training; the initial state, filled, in prefill; the same dict, updated
        in place, with a StepInfo.

        With `carries`: `carried` {name: [T, heads, ...], in x's dtype} has what layers before this
        one gave, and the result is (y, carried).
        """
        halo = seq.halo(x, self.halo_rows)
        x = self.before(x, halo, seq, state)
        inputs = self.project_kv(x, halo, seq, state)
        if self.carries:
            inputs, carried = self.carry(inputs, carried)
        pending = seq.begin(self.segments(inputs))
        # What needs no incoming state stands between begin and finish: it hides the exchange.
        q, gate = self.project_q(x, halo, seq, state), self.project_gate(x)
        incoming = seq.finish(pending)
        o = self.scan({"q": q, **inputs}, seq, state, incoming)
        y = self.output(o, gate)
        return (y, carried) if self.carries else y

    def before(self, x, halo, seq, state):
        """What the projections get as their x."""
        return x

    def ahead(self, x, positions):
        """[T, ..]: what a token lets the one before it know of itself (of the mixer's choice; see
        seq.context.following), or None."""
        return None

    def project_q(self, x, halo, seq, state):
        """q [T, H, K]. halo [halo_rows, D]: the rows before x, or None where the stream starts
        here."""
        raise NotImplementedError

    def project_kv(self, x, halo, seq, state):
        """The other per-token inputs of the family's op, by name, [T, H, ...]: all that the state
        needs."""
        raise NotImplementedError

    def carry(self, inputs, carried):
        """(inputs, carried) with what the layers before say to this one, and this one to those that
        follow. inputs: project_kv's, whose own additions are taken out here. Both dicts come back
        as new ones."""
        raise NotImplementedError

    def project_gate(self, x):
        """What `output` takes besides o, computed from x alone, or None."""
        return None

    def output(self, o, gate):
        """o [T, H, V] -> [T, D]."""
        raise NotImplementedError

    def scan_options(self):
        """Keyword arguments of the op that are not per token."""
        return {}

    def segments(self, inputs):
        """The recurrences over `inputs` (of project_kv, and q where `scan` asks), in the order in
        which `scan` runs them."""
        return [self.segment(inputs, **self.scan_options())]

    def segment(self, inputs, **options):
        """A recurrence over tensors by name, those that are None left out."""
        inputs = {name: x for name, x in inputs.items() if x is not None}
        return Segment(self.family, inputs, options, self.options.chunk_size, self.options.backend)

    def scan(self, inputs, seq, state, incoming):
        """o [T, H, V]; incoming: what enters the stream, an entry per segment, or None."""
        (segment,) = self.segments(inputs)
        return self.recur("S", segment, seq, state, incoming and incoming[0])

    def recur(self, key, segment, seq, state, incoming):
        """Run one segment: o [T, H, V]; the recurrent state lives in state[key] [N, H, K, V]."""
        if seq.decoding:
            backend = "chunk" if segment.backend == "reference" else segment.backend
            return getattr(ops, f"{segment.family}_step")(
                **segment.inputs, **segment.options, state=state[key], backend=backend
            )
        o, final = seq.context.scan(segment, incoming, seq, state is not None)
        if state is not None:
            state[key] = final
        return o

    def initial_state(self, sequences, max_len, device, dtype):
        """The decode state of N sequences before their first token: a dict of tensors, dim 0 =
        sequence."""
        wide = torch.promote_types(dtype, torch.float32)
        shapes = self.state_shapes()
        state = {
            key: torch.zeros(sequences, *shape, device=device, dtype=wide)
            for key, shape in shapes.items()
        }
        for name, module in self.named_children():
            if isinstance(module, (ShortConv, TokenShift)):
                state[name] = torch.zeros(sequences, *module.window(), device=device, dtype=dtype)
        return state

    def state_shapes(self):
        """{key: (value heads, K, V)} of the recurrent states, one for each segment."""
        return {"S": self.options.shape(self.model)[1:]}

    def split(self, size, index):
        """{child or parameter: dim} to cut for `size` tensor parallel ranks, of which this is
        `index`. Called once, before the cut."""
        share = self.options.shape(self.model)[1] // size
        self.mine = slice(index * share, (index + 1) * share)
        return dict(self.shards)

    def flops_per_token(self, seq_len):
        """Forward FLOPs per token (a multiply-add is 2): what the modules count of their own, and
        the scans'."""
        projections = sum(
            m.flops_per_token()
            for m in self.modules()
            if hasattr(m, "flops_per_token") and m is not self
        )
        C = min(self.options.chunk_size, seq_len)
        return projections + sum(
            heads * family_flops(self.family, K, V, C)
            for heads, K, V in self.state_shapes().values()
        )


class QKVMixer(Mixer):
    """A mixer whose q, k, v and gate are bias-free projections of x, with a norm over o, the gate,
    and a projection back.

    It adds to the inputs what its recurrence needs, and may pass q and k through `features`."""

    shards = {"wq": 0, "wk": 0, "wv": 0, "wg": 0, "wo": 1}

    def __init__(self, model, options, layer=0, shared=None, *, norm, gated=True):
        """norm: of (heads, V), the module over o."""
        super().__init__(model, options, layer, shared)
        heads, value_heads, self.K, self.V = options.shape(model)
        k, v = heads * self.K, value_heads * self.V
        self.wq, self.wk, self.wv = projections(model, [k, k, v])
        self.wg = projections(model, [v])[0] if gated else None
        self.norm = norm(value_heads, self.V)
        self.wo = output_projection(model, v)

    def split(self, size, index):
        shards = super().split(size, index)
        return shards | {"norm": 0} if isinstance(self.norm, WideRMSNorm) else shards

    def features(self, x, seq):
        """Of q and k [T, H, K]."""
        return x

    def project_q(self, x, halo, seq, state):
        return self.features(self.wq(x).unflatten(-1, (-1, self.K)), seq)

    def project_kv(self, x, halo, seq, state):
        return {
            "k": self.features(self.wk(x).unflatten(-1, (-1, self.K)), seq),
            "v": self.wv(x).unflatten(-1, (-1, self.V)),
        }

    def project_gate(self, x):
        return None if self.wg is None else self.wg(x).unflatten(-1, (-1, self.V))

    def output(self, o, gate):
        return self.wo(self.norm(o, gate).flatten(-2))


def projections(model, widths):
    """Bias-free Linear layers from model.dim to each of `widths`."""
    return [Linear(model.dim, width, std=model.init_std) for width in widths]


def output_projection(model, width):
    """The Linear layer from `width` back to the residual stream."""
    return Linear(width, model.dim, std=output_std(model.init_std, model.layers))
