"""The five ops of a kernel family, registered with torch.library: single nodes for torch.compile
and for recomputation.

    lmoe::f_state   (U, A, cache)          the state at the stream's end starting from zero, its
                    transition, and what the next ops reuse
    lmoe::f_fwd     (o, S_out, kept, S)    outputs, final states, and what bwd needs
    lmoe::f_dstate  G                      gradient of the state before the stream if nothing flows
                    into its end
    lmoe::f_bwd     gradients, dS_in
    lmoe::f_step    o                      one token, state updated in place
All outputs are always returned; one that does not apply is empty. U, A and G are [B, ..]: per row
of the batch, over its documents; they have no autograd of their own, because they serve whoever
builds a sequence from segments (transition.py).

The ops (not the public functions) take states of the stream's borders too, for the segment of a
longer stream, which only its first document enters and only its last one leaves. With cu_seqlens,
S_in [1, HV, K, V] is the state that enters the first token's document, every other one starting
from zero, and dS_out [1, HV, K, V] the gradient of the state that leaves the last token's document,
zero for every other one. With N = 1 that is the same as [N, ..]. S_out and dS_in are [N, HV, K, V]
in any case.

A backend has a module for each family, with the functions state, fwd, dstate, bwd, step (the ops'
arguments without the backend; None for what does not apply) and shapes(*inputs[1:], S_in,
output_final_state, cu_seqlens, C) -> (shape of kept, shape of S, dtype of S).
"""

import contextlib
import importlib
from dataclasses import dataclass

import torch
from torch.library import custom_op

from lmoe.kernels import transition
from lmoe.kernels.grid import document_of
from lmoe.kernels.norm import compute_dtype, l2norm
from lmoe.kernels.op import op

BACKENDS = {
    "chunk": ("ssd", "gla", "delta"),
    "triton": ("ssd", "gla"),
}  # name -> the families that it has
FOLDERS = {"chunk": "chunk", "triton": "gpu"}


def implementation(backend, family):
    """The module of a backend for a family. Imported when it is used: Triton takes its time, and is
    not everywhere."""
    return importlib.import_module(f"lmoe.kernels.{FOLDERS[backend]}.{family}")


@dataclass(frozen=True)
class Family:
    """The five ops of a family under one signature. `inputs` are the public function's tensors in
    the order of `names`, None where absent:
        state(*inputs[1:], cu_seqlens, C, backend) -> (U, A, cache) fwd(*inputs, S_in, cu_seqlens,
        cache, scale, C, output_final_state, backend) -> (o, S_out, kept, S) dstate(*inputs, do,
        cu_seqlens, cache, scale, C, backend) -> G bwd(*inputs, kept, S, do, dS_out, cu_seqlens,
        scale, C, input_state_grad, backend) -> (*gradients of inputs, dS_in) step(*inputs, state,
        scale, backend) -> o
    cache is state's; fwd takes None too and computes what it needs, and then `kept` holds it; where
    a family has caches and is given one, `kept` is empty and cache serves bwd. A is a transition of
    the kind `transition`. With cu_seqlens, S_in [1, ..] is the state entering the first token's
    document and dS_out [1, ..] the gradient of the state leaving the last token's (see the module's
    docstring).
    """

    names: tuple[str, ...]
    transition: type
    state: callable
    fwd: callable
    dstate: callable
    bwd: callable
    step: callable

    def prepare(self, inputs, options):
        """([tensors in the order of `names`, None where absent], scale): what the public functions
        hand to the ops.

        inputs: tensors by name, of whatever leading dims (no batch dim is added). options: further
        arguments of the public functions by name: scale, qk_l2norm, gamma, tau, tensors that do not
        run over tokens. q may be absent, as `state` does not need it.
        """
        given = {**inputs, **options}
        scale, qk_l2norm, gamma, tau = (
            given.pop(name, None) for name in ("scale", "qk_l2norm", "gamma", "tau")
        )
        if gamma is not None:
            given["g"] = gamma
        if tau is not None:
            given["tau"] = given["k"].new_full((1,), tau, dtype=compute_dtype(given["k"]))
        assert given.keys() <= set(self.names), f"{sorted(given)} are not all among {self.names}"
        scale = given["k"].shape[-1] ** -0.5 if scale is None else float(scale)
        if qk_l2norm:
            # Kept in fp32: rounded to bf16, a key's squared norm is 1 +- 4e-3, and with beta near 2
            # such a step is no contraction any more.
            given |= {
                name: l2norm(given[name], wide=True)
                for name in ("q", "k")
                if given.get(name) is not None
            }
        return [given.get(name) for name in self.names], scale


def _wire(fwd, bwd, count):
    """Autograd of a family of `count` inputs from its fwd and bwd ops."""

    def setup_context(ctx, inputs, output):
        *tensors, S_in, cu_seqlens, cache, scale, C, _, backend = inputs
        _, _, kept, S = output
        kept = cache if cache is not None and not kept.numel() else kept
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, cu_seqlens, kept, S)
        ctx.scale, ctx.C, ctx.backend, ctx.v_shape, ctx.state_grad = (
            scale,
            C,
            backend,
            tensors[2].shape,
            S_in is not None,
        )
        ctx.one_state = cu_seqlens is not None and S_in is not None and len(S_in) == 1

    def backward(ctx, do, dS_out, _, __):
        *tensors, cu_seqlens, kept, S = ctx.saved_tensors
        do = tensors[2].new_zeros(ctx.v_shape) if do is None else do
        *grads, dS_in = bwd(
            *tensors, kept, S, do, dS_out, cu_seqlens, ctx.scale, ctx.C, ctx.state_grad, ctx.backend
        )
        grads = [g if needed else None for needed, g in zip(ctx.needs_input_grad[:count], grads)]
        dS_in = dS_in[document_of(cu_seqlens, cu_seqlens.new_zeros(1))] if ctx.one_state else dS_in
        return *grads, dS_in if ctx.state_grad else None, *[None] * 6

    fwd.register_autograd(backward, setup_context=setup_context)


def register(name, inputs, transition_kind, decay_shape, caches=False):
    """Register a family and return its Family.

    inputs: names of the tensors in order, q, k and v first, with "?" where they may be absent.
    decay_shape(H, K, V): the shape of a transition without its first dim. caches: whether `state`
    leaves a cache, of the shape of fwd's `kept`.
    """
    names = tuple(x.rstrip("?") for x in inputs.split())
    typed = [f"Tensor{'?' if x.endswith('?') else ''} {x.rstrip('?')}" for x in inputs.split()]
    tensors, rest = ", ".join(typed), ", ".join(typed[1:])

    def define(suffix, schema, fake, absent=None, mutates=()):
        def run(*args):
            *args, backend = args
            # Autocast would round the operands of every product inside to bf16; the precision
            # inside is the backend's own affair.
            autocast = torch.is_autocast_enabled(args[1].device.type) and torch.autocast(
                args[1].device.type, enabled=False
            )
            with autocast or contextlib.nullcontext():
                out = getattr(implementation(backend, name), suffix)(*args)
            if suffix == "step":
                return out.to(args[2].dtype)
            if absent is None:
                return out
            return tuple(new(args[1], (0,)) if x is None else x for x in out)

        made = (
            custom_op(f"lmoe::{name}_{suffix}", run, mutates_args=mutates, schema=schema)
            if mutates
            else op(f"{name}_{suffix}", schema)(run)
        )
        made.register_fake(fake)
        return made

    def new(like, shape):
        return like.new_empty(shape, dtype=compute_dtype(like))

    def states(k, v, cu_seqlens, wanted):
        N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return new(k, (N, v.shape[2], k.shape[-1], v.shape[-1]) if wanted else (0,))

    def fake_state(k, v, *args):
        *_, cu_seqlens, C, backend = args
        (B, _, HV, V), K = v.shape, k.shape[-1]
        kept, _, _ = implementation(backend, name).shapes(
            k, v, *args[: len(names) - 3], None, False, cu_seqlens, C
        )
        return (
            new(k, (B, HV, K, V)),
            new(k, (B, *decay_shape(HV, K, V))),
            new(k, kept if caches else (0,)),
        )

    def fake_fwd(q, k, v, *args):
        *_, S_in, cu_seqlens, cache, _, C, final, backend = args
        kept, S, dtype = implementation(backend, name).shapes(
            k, v, *args[: len(names) - 3], S_in, final, cu_seqlens, C
        )
        kept = (0,) if caches and cache is not None else kept
        return (
            v.new_empty(v.shape),
            states(k, v, cu_seqlens, final),
            new(k, kept),
            k.new_empty(S, dtype=dtype),
        )

    def fake_dstate(q, k, v, *args):
        return new(k, (v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]))

    def fake_bwd(*args):
        given, (cu_seqlens, _, _, state_grad, _) = args[: len(names)], args[-5:]
        grads = (new(args[1], (0,)) if x is None else x.new_empty(x.shape) for x in given)
        return *grads, states(given[1], given[2], cu_seqlens, state_grad)

    def fake_step(q, k, v, *args):
        return v.new_empty(v.shape)

    cu, tail = "Tensor? cu_seqlens", "float scale, SymInt C"
    state = define(
        "state",
        f"({rest}, {cu}, SymInt C, str backend) -> (Tensor, Tensor, Tensor)",
        fake_state,
        True,
    )
    fwd = define(
        "fwd",
        f"({tensors}, Tensor? S_in, {cu}, Tensor? cache, {tail}, bool output_final_state, str"
        " backend) -> (Tensor, Tensor, Tensor, Tensor)",
        fake_fwd,
        True,
    )
    dstate = define(
        "dstate",
        f"({tensors}, Tensor do, {cu}, Tensor? cache, {tail}, str backend) -> Tensor",
        fake_dstate,
    )
    bwd = define(
        "bwd",
        f"({tensors}, Tensor kept, Tensor S, Tensor do, Tensor? dS_out, {cu}, {tail}, bool"
        f" input_state_grad, str backend) -> ({', '.join(['Tensor'] * (len(names) + 1))})",
        fake_bwd,
        True,
    )
    step = define(
        "step",
        f"({tensors}, Tensor(a!) state, float scale, str backend) -> Tensor",
        fake_step,
        mutates={"state"},
    )
    _wire(fwd, bwd, len(names))
    return Family(names, transition_kind, state, fwd, dstate, bwd, step)


FAMILIES = {
    "ssd": register("ssd", "q k v g? diag?", transition.Scalar, lambda H, K, V: (H,)),
    "gla": register(
        "gla", "q k v gk? gv? u? tau?", transition.Diagonal, lambda H, K, V: (H, K + V)
    ),
    "delta": register(
        "delta", "q k v beta g?", transition.Dense, lambda H, K, V: (H, K, K), caches=True
    ),
}
