"""A family of recurrences: what it declares, a scan over it, and the ops that it is registered as.

An op is a single node for torch.compile and for recomputation. Those of a family f:
    lmoe::f_state   (U, A, cache)          the state at the end of the stream from a zero start, the
                                           transition of the stream, and what the next ops reuse
    lmoe::f_fwd     (o, S_out, kept, S)    outputs, final states, and what bwd needs
    lmoe::f_dstate  G                      gradient of the state before the stream if nothing flows
                                           into its end
    lmoe::f_bwd     gradients, dS_in
    lmoe::f_step    o                      one token, state updated in place
A family whose segments do not compose (transition None) has no state and dstate. All outputs are
always returned; one that does not apply is empty. U, A and G are [B, ..]: per row of the batch,
over its documents; they have no autograd of their own, because they serve whoever builds a sequence
from segments (transition.py).

fwd and bwd take states of the stream's borders too, for the segment of a longer stream, which only
its first document enters and only its last one leaves. With cu_seqlens, S_in [1, HV, ..] is the
state that enters the first token's document, every other one starting from zero, and dS_out
[1, HV, ..] the gradient of the state that leaves the last token's document, zero for every other
one. With N = 1 that is the same as [N, ..]. S_out and dS_in are [N, HV, ..] in any case.

A form of a family (`chunk`, `triton`) is a module with the functions state, fwd, dstate, bwd, step
(the ops' arguments without the backend; None for what does not apply) and shapes(*tensors[1:],
S_in, output_final_state, cu_seqlens, C) -> (shape of kept, shape of S, dtype of S).
"""

import contextlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from lmoe.kernels.choice import INSTALLED
from lmoe.kernels.grid import document, sequences
from lmoe.kernels.norm import compute_dtype
from lmoe.kernels.op import op

BACKENDS = ("chunk", "triton")
REGISTERED: dict[str, "Family"] = {}  # every family whose ops torch knows


class Argument(NamedTuple):
    """A tensor of a family's public function. shapes: one or more, in letters."""

    name: str
    optional: bool
    shapes: tuple[tuple[str, ...], ...]

    @property
    def per_token(self) -> bool:
        return self.shapes[0][0] == "T"

    def head_dim(self) -> int | None:
        """Return the dim that counts heads, without leading T, or None for one of all heads."""
        letters = [x for x in self.shapes[0] if x != "T"]
        return next((i for i, x in enumerate(letters) if x in ("H", "HV")), None)


def parse_arguments(text: str) -> tuple[Argument, ...]:
    """Read "q T H K, .., g? T HV | T HV K": names, "?" where optional, shapes in letters."""
    found = []
    for part in text.split(","):
        name, _, shapes = part.strip().partition(" ")
        alternatives = tuple(tuple(shape.split()) for shape in shapes.split("|"))
        found.append(Argument(name.rstrip("?"), name.endswith("?"), alternatives))
    return tuple(found)


def product_flops(K: int, V: int, C: int) -> float:
    """Forward FLOPs a token and head: weights and values in a chunk, state read and written."""
    return 2 * C * (K + V) + 4 * K * V


def log_decay_sample(x: Tensor) -> Tensor:
    """Log decays as gates make them, most of them slow and some fast, from standard normal x."""
    return F.logsigmoid(3 * x + 1)


@dataclass(eq=False)
class Family:
    """All that a family of recurrences is; whoever needs more of it than its name asks here.

    arguments: tensors of the public function, q, k and v first, as parse_arguments reads them. T:
    tokens, H heads of q and k, HV heads of v (a multiple of H), K and V channels; any other letter
    is a size of its own. One without T is constant over tokens, one without heads the same for all
    of them.
    numbers: the public function's further arguments, besides scale.
    tensors: of the ops, in order, q, k and v first, "?" where they may be absent. One with the name
    of an argument has its shape; one with that of a number is the number, without a gradient.
    prepare: arguments and numbers by name, as given -> tensors of the ops by name; q and the others
    may come apart.
    refuse: ValueError for arguments that cannot stand together.
    reference: the recurrence one token at a time (reference.py): (*tensors, scale, initial_state,
    cu_seqlens) -> (o, final states).
    forms: {backend: its module}, imported when it is used.
    transition: a class of transition.py, or None where segments do not compose.
    states: (K, V) -> {name: shape} of one head's state. Several tensors travel as one: see
    state_shape and views.
    caches: `state` leaves a cache of the shape of fwd's `kept`.
    flops: (K, V, C) -> forward FLOPs a token and head with chunks of C tokens.
    gates: the kinds that are checked before a run, as names of arguments and numbers beside q, k, v
    ("g:1": the second shape of g). samples: {argument: values for the check from normal ones};
    numbers take the value there.
    min_head_dim, max_head_dim: the channels that Triton kernels take.
    """

    name: str
    arguments: str | tuple[Argument, ...]
    tensors: str | tuple[str, ...]
    reference: Callable
    forms: dict[str, str]
    transition: type | None
    numbers: tuple[str, ...] = ()
    prepare: Callable = dict
    refuse: Callable = lambda given: None
    states: Callable = lambda K, V: {"S": (K, V)}
    caches: bool = False
    flops: Callable = product_flops
    gates: tuple[str, ...] = ("",)
    samples: dict = field(default_factory=dict)
    min_head_dim: int = 16
    max_head_dim: int = 256

    def __post_init__(self):
        self.arguments = parse_arguments(self.arguments)
        self.known = {*(x.name for x in self.arguments), *self.numbers, "scale"}
        self.per_token = frozenset(x.name for x in self.arguments if x.per_token)
        self.grouped = any("HV" in x.shapes[0] for x in self.arguments if x.name == "v")
        self.schema = self.tensors.split()
        self.tensors = tuple(name.rstrip("?") for name in self.schema)
        self.ops = register(self)

    def form(self, backend: str):
        """Import the module of a backend. Triton takes its time, and is not everywhere."""
        return importlib.import_module(self.forms[backend])

    def resolve(self, backend: str, k: Tensor, v: Tensor, chunk_size: int = 16) -> str:
        """Return what "auto" is for heads [.., K] and [.., V]: triton on a GPU (for which the meta
        device stands) where it takes family, heads and dtype, else chunk."""
        if backend != "auto":
            return backend
        heads = k.shape[-1], v.shape[-1]
        fits = "triton" in self.forms and INSTALLED and k.device.type in ("cuda", "meta")
        fits = fits and {k.dtype, v.dtype} <= {torch.bfloat16, torch.float32} and chunk_size >= 16
        fits = fits and self.min_head_dim <= min(heads) and max(heads) <= self.max_head_dim
        return "triton" if fits else "chunk"

    def state_shape(self, K: int, V: int) -> tuple[int, ...]:
        """Shape of one head's state: that of its only tensor, or [elements of all of them]."""
        shapes = list(self.states(K, V).values())
        return tuple(shapes[0]) if len(shapes) == 1 else (sum(map(math.prod, shapes)),)

    def states_shape(self, k: Tensor, v: Tensor, N: int) -> tuple[int, ...]:
        """Shape of the states of N sequences with heads [.., H, K] and [.., HV, V]."""
        return N, v.shape[-2], *self.state_shape(k.shape[-1], v.shape[-1])

    def views(self, state: Tensor, K: int, V: int) -> dict[str, Tensor]:
        """Views [N, H, ..] of the tensors that a state [N, H, *state_shape] holds, by name."""
        shapes = self.states(K, V)
        if len(shapes) == 1:
            return dict.fromkeys(shapes, state)
        parts = state.split([math.prod(shape) for shape in shapes.values()], dim=-1)
        return {name: x.unflatten(-1, shape) for (name, shape), x in zip(shapes.items(), parts)}

    def bind(self, given: dict, lead: torch.Size) -> dict[str, int]:
        """Check the shapes of arguments and return {letter: size}. lead: the tokens' leading
        dims."""
        sizes = {}
        for argument in self.arguments[1:]:
            x = given.get(argument.name)
            if x is None:
                if not argument.optional:
                    raise ValueError(f"{argument.name}: {self.name} needs it")
                continue
            if not x.dtype.is_floating_point:
                raise ValueError(f"{argument.name}: dtype {x.dtype} is not floating point")
            for shape in argument.shapes:
                letters = [*lead, *shape[1:]] if argument.per_token else list(shape)
                wanted = [sizes.get(letter, letter) for letter in letters]
                fits = len(wanted) == x.ndim and all(
                    isinstance(size, str) or size == there for size, there in zip(wanted, x.shape)
                )
                if fits:
                    sizes |= {a: b for a, b in zip(letters, x.shape) if isinstance(a, str)}
                    break
            else:
                wanted = ", ".join(map(str, wanted))
                raise ValueError(f"{argument.name}: shape {list(x.shape)} should be [{wanted}]")
        shared = sizes.get("H", 1)
        heads = sizes.get("HV", shared)
        if heads % shared:
            raise ValueError(f"v: {heads} heads are not a multiple of the {shared} of q and k")
        return sizes

    def call(self, scan: "Scan", cu_seqlens: Tensor | None, stream=True) -> "Call":
        """Check a scan and prepare the Call of its ops, without q. stream: tokens [T, ..] or [B, T,
        ..], not one token [N, ..] of every sequence."""
        v = scan.inputs.get("v")
        if v is None or v.ndim < 3:
            shape = None if v is None else list(v.shape)
            raise ValueError(f"v: shape {shape} is not [B, T, heads, channels]")
        given = scan.inputs | scan.constants
        given = {name: x for name, x in given.items() if x is not None}
        unknown = [name for name in given if name not in self.known]
        assert not unknown, f"{unknown} are no arguments of {self.name}"
        sizes = self.bind(given, v.shape[:-2])
        scan.check(v, cu_seqlens)
        self.refuse(given)
        scale = given.pop("scale", None)
        scale = sizes["K"] ** -0.5 if scale is None else float(scale)
        if stream and v.ndim == 3:
            given |= {name: x[None] for name, x in given.items() if name in self.per_token}
        tensors = self.prepare(given)
        tensors = [tensors.get(name) for name in self.tensors]
        backend = scan.backend
        if backend != "reference":
            backend = self.resolve(backend, *tensors[1:3], scan.chunk_size if stream else 16)
        return Call(self, tensors, scale, cu_seqlens, scan.chunk_size, backend)

    def with_q(self, call: "Call", scan: "Scan", q: Tensor) -> "Call":
        """Add the q [.., H, K] of a scan to its Call."""
        wanted = scan.inputs["k"].shape
        if q.shape != wanted:
            raise ValueError(f"q: shape {list(q.shape)} should be {list(wanted)}, as k's")
        if not q.dtype.is_floating_point:
            raise ValueError(f"q: dtype {q.dtype} is not floating point")
        numbers = {name: x for name, x in scan.constants.items() if name in self.numbers}
        q = self.prepare({"q": q, **numbers})["q"]
        _, k, *others = call.tensors
        return call._replace(tensors=[q[None] if q.ndim < k.ndim else q, k, *others])

    def run(
        self,
        scan: "Scan",
        q: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run a scan with its q [.., T, H, K]: (o like v, the states at the end of every document
        [N, HV, ..] if output_final_state). initial_state [N, HV, ..]; cu_seqlens [N+1]: the
        documents of a stream, N = B without."""
        call = self.with_q(self.call(scan, cu_seqlens), scan, q)
        v = call.tensors[2]
        if initial_state is not None:
            shape = initial_state.shape
            wanted = self.states_shape(q, v, sequences(v, cu_seqlens))
            if shape != wanted:
                raise ValueError(f"initial_state: shape {list(shape)} should be {list(wanted)}")
        if call.backend == "reference":
            o, S = self.reference(*call.tensors, call.scale, initial_state, cu_seqlens)
        else:
            if initial_state is not None:
                initial_state = initial_state.to(compute_dtype(call.tensors[1]))
            o, S, _, _ = call.fwd(initial_state, None, output_final_state)
        return o.view_as(scan.inputs["v"]), S if output_final_state else None

    def step(self, scan: "Scan", q: Tensor, state: Tensor) -> Tensor:
        """Run one token of N sequences, inputs and q [N, heads, ..]: o like v. state [N, HV, ..] is
        updated in place."""
        call = self.with_q(self.call(scan, None, stream=False), scan, q)
        backend = "chunk" if call.backend == "reference" else call.backend
        return self.ops.step(*call.tensors, state, call.scale, backend)


@dataclass
class Scan:
    """One recurrence over a stream, made once a forward pass.

    inputs: the family's arguments per token by name, without q: [T, heads, ..], with rows of a
    batch [B, T, heads, ..], in decoding [N, heads, ..]. constants: the other arguments and numbers.
    cu_seqlens [N+1]: borders of documents of its own, where they are not those of the stream.
    """

    family: Family
    inputs: dict[str, Tensor]
    constants: dict = field(default_factory=dict)
    chunk_size: int = 64
    backend: str = "auto"
    cu_seqlens: Tensor | None = None

    def check(self, v: Tensor, cu_seqlens: Tensor | None):
        """Refuse what no op takes, beside the shapes of arguments. v [.., T, HV, V]."""
        known = "auto", "reference", *BACKENDS
        if self.backend not in known:
            raise ValueError(f"backend: no {self.backend!r}; there are {', '.join(known)}")
        if self.backend in BACKENDS and self.backend not in self.family.forms:
            raise ValueError(f"backend: {self.backend} has no {self.family.name}; take auto")
        if v.shape[-3] == 0:
            raise ValueError("q: T = 0, there are no tokens")
        if self.chunk_size < 1 or self.chunk_size & (self.chunk_size - 1):
            raise ValueError(f"chunk_size: {self.chunk_size} is not a power of two")
        if cu_seqlens is None:
            return
        if v.ndim > 3 and v.shape[0] != 1:
            raise ValueError(
                f"cu_seqlens: packed documents need B = 1, not {v.shape[0]}; flatten the rows into "
                "one stream"
            )
        whole = cu_seqlens.dtype in (torch.int32, torch.int64)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or not whole:
            raise ValueError(
                f"cu_seqlens: {cu_seqlens.dtype} {list(cu_seqlens.shape)} is not int32 or int64 "
                "[N+1] with N >= 1"
            )


class Call(NamedTuple):
    """A scan as the ops of its family take it: tensors [B, T, ..] in their order, None where
    absent; the first one is q."""

    family: Family
    tensors: list[Tensor | None]
    scale: float
    cu_seqlens: Tensor | None
    chunk_size: int
    backend: str

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """(U [B, HV, ..], A [B, HV, ..], cache)"""
        rest = self.cu_seqlens, self.chunk_size, self.backend
        return self.family.ops.state(*self.tensors[1:], *rest)

    def fwd(self, S_in, cache, output_final_state):
        """(o, S_out, kept, S)"""
        rest = self.scale, self.chunk_size, output_final_state, self.backend
        return self.family.ops.fwd(*self.tensors, S_in, self.cu_seqlens, cache, *rest)

    def dstate(self, do, cache) -> Tensor:
        """G [B, HV, ..]"""
        rest = self.scale, self.chunk_size, self.backend
        return self.family.ops.dstate(*self.tensors, do, self.cu_seqlens, cache, *rest)

    def bwd(self, kept, S, do, dS_out, input_state_grad):
        """(*gradients of tensors, dS_in)"""
        rest = self.cu_seqlens, self.scale, self.chunk_size, input_state_grad, self.backend
        return self.family.ops.bwd(*self.tensors, kept, S, do, dS_out, *rest)


def register(family: Family) -> SimpleNamespace:
    """Register the ops of a family and return them by name:
    state(*tensors[1:], cu_seqlens, C, backend) -> (U, A, cache)
    fwd(*tensors, S_in, cu_seqlens, cache, scale, C, output_final_state, backend) -> (o, S_out,
        kept, S)
    dstate(*tensors, do, cu_seqlens, cache, scale, C, backend) -> G
    bwd(*tensors, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad, backend) ->
        (*gradients of tensors, dS_in)
    step(*tensors, state, scale, backend) -> o

    cache is state's; fwd takes None too and computes what it needs, and then `kept` holds it; where
    a family has caches and is given one, `kept` is empty and cache serves bwd.
    """
    count = len(family.tensors)
    typed = [f"Tensor{'?' * name.endswith('?')} {name.rstrip('?')}" for name in family.schema]
    tensors = ", ".join(typed)
    rest = ", ".join(typed[1:])

    def define(suffix, inputs, outputs, fake):
        def run(*args):
            *args, backend = args
            # Autocast would round the operands of every product inside to bf16; the precision
            # inside is the backend's own affair.
            device = args[1].device.type
            autocast = contextlib.nullcontext()
            if torch.is_autocast_enabled(device):
                autocast = torch.autocast(device, enabled=False)
            with autocast:
                out = getattr(family.form(backend), suffix)(*args)
            return out.to(args[2].dtype) if suffix == "step" else out

        name = f"{family.name}_{suffix}"
        outputs = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
        schema = f"({inputs}, str backend) -> {outputs}"
        if suffix == "step":
            made = custom_op(f"lmoe::{name}", run, mutates_args={"state"}, schema=schema)
        else:
            made = op(name, schema)(run)
        made.register_fake(fake)
        return made

    def new(like, shape):
        return like.new_empty(shape, dtype=compute_dtype(like))

    def states(k, v, N):
        return new(k, family.states_shape(k, v, N))

    def fake_state(k, v, *args):
        *rest, cu_seqlens, C, backend = args
        B, H, *state = family.states_shape(k, v, v.shape[0])
        shapes = family.form(backend).shapes
        kept, _, _ = shapes(k, v, *rest, None, False, cu_seqlens, C)
        A = new(k, (B, H, *family.transition.shape(state)))
        return states(k, v, B), A, new(k, kept) if family.caches else None

    def fake_fwd(q, k, v, *args):
        *rest, S_in, cu_seqlens, cache, _, C, final, backend = args
        shapes = family.form(backend).shapes
        kept, S, dtype = shapes(k, v, *rest, S_in, final, cu_seqlens, C)
        kept = None if family.caches and cache is not None else new(k, kept)
        finals = states(k, v, sequences(v, cu_seqlens)) if final else None
        return v.new_empty(v.shape), finals, kept, k.new_empty(S, dtype=dtype)

    def fake_dstate(q, k, v, *args):
        return states(k, v, v.shape[0])

    def fake_bwd(*args):
        given, (cu_seqlens, _, _, state_grad, _) = args[:count], args[-5:]
        absent = [x is None or name in family.numbers for name, x in zip(family.tensors, given)]
        grads = [None if no else x.new_empty(x.shape) for no, x in zip(absent, given)]
        _, k, v, *_ = given
        return *grads, states(k, v, sequences(v, cu_seqlens)) if state_grad else None

    def fake_step(q, k, v, *args):
        return v.new_empty(v.shape)

    def setup_context(ctx, inputs, output):
        *tensors, S_in, cu_seqlens, cache, scale, C, _, backend = inputs
        _, _, kept, S = output
        kept = cache if cache is not None and not kept.numel() else kept
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, cu_seqlens, kept, S)
        ctx.rest = scale, C, S_in is not None, backend
        ctx.one_state = cu_seqlens is not None and S_in is not None and len(S_in) == 1

    def backward(ctx, do, dS_out, _, __):
        *tensors, cu_seqlens, kept, S = ctx.saved_tensors
        do = torch.zeros_like(tensors[2]) if do is None else do
        *grads, dS_in = ops.bwd(*tensors, kept, S, do, dS_out, cu_seqlens, *ctx.rest)
        return *grads, dS_in[document(cu_seqlens, 0)] if ctx.one_state else dS_in

    cu = "Tensor? cu_seqlens"
    tail = "float scale, SymInt C"
    ops = SimpleNamespace()
    if family.transition is not None:
        ops.state = define("state", f"{rest}, {cu}, SymInt C", 3, fake_state)
        inputs = f"{tensors}, Tensor do, {cu}, Tensor? cache, {tail}"
        ops.dstate = define("dstate", inputs, 1, fake_dstate)
    inputs = f"{tensors}, Tensor? S_in, {cu}, Tensor? cache, {tail}, bool output_final_state"
    ops.fwd = define("fwd", inputs, 4, fake_fwd)
    inputs = f"{tensors}, Tensor kept, Tensor S, Tensor do, Tensor? dS_out, {cu}, {tail}"
    ops.bwd = define("bwd", f"{inputs}, bool input_state_grad", count + 1, fake_bwd)
    inputs = f"{tensors}, Tensor(a!) state, float scale"
    ops.step = define("step", inputs, 1, fake_step)
    ops.fwd.register_autograd(backward, setup_context=setup_context)
    REGISTERED[family.name] = family
    return ops
