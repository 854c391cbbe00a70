"""The public functions: defaults, refusals, choice of backend, and registration with torch.library.

A family f is five registered ops, single nodes for torch.compile and for recomputation:
    lmoe::f_state   (U, A, cache)          the state at the stream's end starting from zero, its transition, and what the next ops reuse
    lmoe::f_fwd     (o, S_out, kept, S)    outputs, final states, and what bwd needs
    lmoe::f_dstate  G                      gradient of the state before the stream if nothing flows into its end
    lmoe::f_bwd     gradients, dS_in
    lmoe::f_step    o                      one token, state updated in place
All outputs are always returned; one that does not apply is empty. U, A and G are [B, ..]: per row of the batch, over its documents; they
have no autograd of their own, because they serve whoever builds a sequence from segments (transition.py).

Common arguments: q, k [B, T, H, K]; v [B, T, HV, V]; log decays and states float32 (float64 beside float64 inputs); cu_seqlens int32 or
int64 [N+1], B = 1: the borders of N packed documents, 0 first and T last, an entry repeated for an empty document. States are [N, HV, K,
V], N = B without cu_seqlens. Everything is computed in float32, float64 for float64 inputs. o has v's dtype.

The ops (not the public functions) take states of the stream's borders too, for the segment of a longer stream, which only its first
document enters and only its last one leaves. With cu_seqlens, S_in [1, HV, K, V] is the state that enters the first token's document,
every other one starting from zero, and dS_out [1, HV, K, V] the gradient of the state that leaves the last token's document, zero for
every other one. With N = 1 that is the same as [N, ..]. S_out and dS_in are [N, HV, K, V] in any case.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.library import custom_op

from lmoe.kernels import chunk, reference, transition
from lmoe.kernels.conv import short_conv, short_conv_step
from lmoe.kernels.cross_entropy import linear_cross_entropy
from lmoe.kernels.grid import document_of
from lmoe.kernels.grouped import grouped_mm
from lmoe.kernels.norm import compute_dtype, gated_rms_norm, l2norm, rms_norm

__all__ = [
    "BACKENDS",
    "FAMILIES",
    "delta",
    "delta_step",
    "gated_rms_norm",
    "gla",
    "gla_step",
    "grouped_mm",
    "l2norm",
    "linear_cross_entropy",
    "rms_norm",
    "short_conv",
    "short_conv_step",
]

BACKENDS = {"chunk": chunk}  # name -> module with <family>_state, _fwd, _dstate, _bwd, _step and _shapes


def _call(backend: str, name: str, *args):
    # Autocast would round the operands of every product inside to bf16; the precision inside is the backend's own affair.
    with torch.autocast(args[0].device.type, enabled=False):
        return getattr(BACKENDS[backend], name)(*args)


def _absent_as_empty(tensors, like):
    return tuple(like.new_empty(0, dtype=compute_dtype(like)) if x is None else x for x in tensors)


def _gradients_like(inputs, like):
    return tuple(like.new_empty(0, dtype=compute_dtype(like)) if x is None else x.new_empty(x.shape) for x in inputs)


def _state_shape(v, K, cu_seqlens):
    return (v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, v.shape[2], K, v.shape[3])


def _wire(fwd, bwd):
    """Autograd of a family from its fwd and bwd ops. fwd's arguments: the tensors, S_in, cu_seqlens, cache, scale, C, output_final_state,
    backend.
    """

    def setup_context(ctx, inputs, output):
        *tensors, S_in, cu_seqlens, cache, scale, C, _, backend = inputs
        _, _, kept, S = output
        kept = kept if kept.numel() else cache
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, cu_seqlens, kept, S)
        ctx.scale, ctx.C, ctx.backend, ctx.v_shape, ctx.state_grad = scale, C, backend, tensors[2].shape, S_in is not None
        ctx.one_state = cu_seqlens is not None and S_in is not None and len(S_in) == 1

    def backward(ctx, do, dS_out, _, __):
        *tensors, cu_seqlens, kept, S = ctx.saved_tensors
        do = tensors[2].new_zeros(ctx.v_shape) if do is None else do
        *grads, dS_in = bwd(*tensors, kept, S, do, dS_out, cu_seqlens, ctx.scale, ctx.C, ctx.state_grad, ctx.backend)
        grads = [None if x is None else g for x, g in zip(tensors, grads)]
        dS_in = dS_in[document_of(cu_seqlens, cu_seqlens.new_zeros(1))] if ctx.one_state else dS_in
        return *grads, dS_in if ctx.state_grad else None, *[None] * 6

    fwd.register_autograd(backward, setup_context=setup_context)


# ----------------------------------------------------------------------------------------------------------------------------------------
# gla


@custom_op("lmoe::gla_state", mutates_args=())
def gla_state_op(
    k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, cu_seqlens: Tensor | None, C: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return *_call(backend, "gla_state", k, v, gk, gv, cu_seqlens, C), k.new_empty(0)


@gla_state_op.register_fake
def _(k, v, gk, gv, cu_seqlens, C, backend):
    (B, _, H, K), V, dtype = k.shape, v.shape[-1], compute_dtype(k)
    return k.new_empty(B, H, K, V, dtype=dtype), k.new_empty(B, H, K + V, dtype=dtype), k.new_empty(0)


@custom_op("lmoe::gla_fwd", mutates_args=())
def gla_fwd_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    S_in: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: Tensor | None,
    scale: float,
    C: int,
    output_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _absent_as_empty(_call(backend, "gla_fwd", q, k, v, gk, gv, u, S_in, cu_seqlens, scale, C, output_final_state), k)


@gla_fwd_op.register_fake
def _(q, k, v, gk, gv, u, S_in, cu_seqlens, cache, scale, C, output_final_state, backend):
    dtype, (kept, S) = compute_dtype(k), BACKENDS[backend].gla_shapes(q, v, cu_seqlens, C)
    final = _state_shape(v, q.shape[-1], cu_seqlens) if output_final_state else (0,)
    return v.new_empty(v.shape), *(k.new_empty(shape, dtype=dtype) for shape in (final, kept, S))


@custom_op("lmoe::gla_dstate", mutates_args=())
def gla_dstate_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    do: Tensor,
    cu_seqlens: Tensor | None,
    cache: Tensor | None,
    scale: float,
    C: int,
    backend: str,
) -> Tensor:
    return _call(backend, "gla_dstate", q, k, v, gk, gv, u, do, cu_seqlens, scale, C)


@gla_dstate_op.register_fake
def _(q, k, v, gk, gv, u, do, cu_seqlens, cache, scale, C, backend):
    return k.new_empty(k.shape[0], *k.shape[2:], v.shape[-1], dtype=compute_dtype(k))


@custom_op("lmoe::gla_bwd", mutates_args=())
def gla_bwd_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    u: Tensor | None,
    kept: Tensor,
    S: Tensor,
    do: Tensor,
    dS_out: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    C: int,
    input_state_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _absent_as_empty(_call(backend, "gla_bwd", q, k, v, gk, gv, u, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad), q)


@gla_bwd_op.register_fake
def _(q, k, v, gk, gv, u, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad, backend):
    dS_in = k.new_empty(_state_shape(v, k.shape[-1], cu_seqlens) if input_state_grad else (0,), dtype=compute_dtype(k))
    return *_gradients_like((q, k, v, gk, gv, u), q), dS_in


@custom_op("lmoe::gla_step", mutates_args={"state"})
def gla_step_op(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None, u: Tensor | None, state: Tensor, scale: float, backend: str
) -> Tensor:
    return _call(backend, "gla_step", q, k, v, gk, gv, u, state, scale).to(v.dtype)


@gla_step_op.register_fake
def _(q, k, v, gk, gv, u, state, scale, backend):
    return v.new_empty(v.shape)


_wire(gla_fwd_op, gla_bwd_op)


def gla(
    q,
    k,
    v,
    gk=None,
    gv=None,
    u=None,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    chunk_size=64,
    backend="auto",
):
    """Gated linear attention, S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t^T v_t, o_t = scale q_t S_t (arXiv 2312.06635).

    q, k [B, T, H, K]; v [B, T, H, V]; log decays gk [B, T, H, K] and gv [B, T, H, V], each <= 0 or absent. With the bonus u [H, K]
    outputs read the state before their token: o_t = scale q_t (S_{t-1} + diag(u) k_t^T v_t) (RWKV6, arXiv 2404.05892). scale: K^-1/2 if
    None. initial_state [N, H, K, V]; differentiable like everything else. chunk_size: a power of two.
    Returns (o [B, T, H, V], final states [N, H, K, V] or None).
    """
    _check(q, k, v, cu_seqlens, initial_state, chunk_size, backend)
    B, T, H, K = q.shape
    if v.shape[2] != H:
        raise ValueError(f"v: {v.shape[2]} heads beside {H} of q and k; gla needs the same number")
    for name, x, shape in (("gk", gk, q.shape), ("gv", gv, v.shape), ("u", u, (H, K))):
        _check_shape(name, x, shape)
    tensors, scale = FAMILIES["gla"].prepare({"q": q, "k": k, "v": v, "gk": gk, "gv": gv}, {"u": u, "scale": scale})
    if backend == "reference":
        o, S = reference.gla(*tensors, scale, initial_state, cu_seqlens)
    else:
        S_in = None if initial_state is None else initial_state.to(compute_dtype(k))
        o, S, _, _ = gla_fwd_op(*tensors, S_in, cu_seqlens, None, scale, chunk_size, output_final_state, resolve(backend))
    return o, S if output_final_state else None


def gla_step(q, k, v, gk=None, gv=None, u=None, *, state, scale=None):
    """One token of `gla` for each of N sequences: q, k, gk [N, H, K], v, gv [N, H, V], u [H, K]. state [N, H, K, V] is updated in place.
    Returns o [N, H, V].
    """
    tensors, scale = FAMILIES["gla"].prepare({"q": q, "k": k, "v": v, "gk": gk, "gv": gv}, {"u": u, "scale": scale})
    return gla_step_op(*tensors, state, scale, resolve("auto"))


# ----------------------------------------------------------------------------------------------------------------------------------------
# delta


@custom_op("lmoe::delta_state", mutates_args=())
def delta_state_op(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, C: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _call(backend, "delta_state", k, v, beta, g, cu_seqlens, C)


@delta_state_op.register_fake
def _(k, v, beta, g, cu_seqlens, C, backend):
    (B, _, H, V), K, dtype = v.shape, k.shape[-1], compute_dtype(k)
    kept, _ = BACKENDS[backend].delta_shapes(v, K, cu_seqlens, C)
    return tuple(k.new_empty(shape, dtype=dtype) for shape in ((B, H, K, V), (B, H, K, K), kept))


@custom_op("lmoe::delta_fwd", mutates_args=())
def delta_fwd_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    S_in: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: Tensor | None,
    scale: float,
    C: int,
    output_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _absent_as_empty(_call(backend, "delta_fwd", q, k, v, beta, g, S_in, cu_seqlens, cache, scale, C, output_final_state), k)


@delta_fwd_op.register_fake
def _(q, k, v, beta, g, S_in, cu_seqlens, cache, scale, C, output_final_state, backend):
    dtype, K = compute_dtype(k), k.shape[-1]
    kept, S = BACKENDS[backend].delta_shapes(v, K, cu_seqlens, C)
    final = _state_shape(v, K, cu_seqlens) if output_final_state else (0,)
    return v.new_empty(v.shape), *(k.new_empty(shape, dtype=dtype) for shape in (final, kept if cache is None else (0,), S))


@custom_op("lmoe::delta_dstate", mutates_args=())
def delta_dstate_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    do: Tensor,
    cu_seqlens: Tensor | None,
    cache: Tensor,
    scale: float,
    C: int,
    backend: str,
) -> Tensor:
    return _call(backend, "delta_dstate", q, k, v, beta, g, do, cu_seqlens, cache, scale, C)


@delta_dstate_op.register_fake
def _(q, k, v, beta, g, do, cu_seqlens, cache, scale, C, backend):
    return k.new_empty(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1], dtype=compute_dtype(k))


@custom_op("lmoe::delta_bwd", mutates_args=())
def delta_bwd_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    kept: Tensor,
    S: Tensor,
    do: Tensor,
    dS_out: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    C: int,
    input_state_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _absent_as_empty(_call(backend, "delta_bwd", q, k, v, beta, g, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad), q)


@delta_bwd_op.register_fake
def _(q, k, v, beta, g, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad, backend):
    dS_in = k.new_empty(_state_shape(v, k.shape[-1], cu_seqlens) if input_state_grad else (0,), dtype=compute_dtype(k))
    return *_gradients_like((q, k, v, beta, g), q), dS_in


@custom_op("lmoe::delta_step", mutates_args={"state"})
def delta_step_op(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float, backend: str) -> Tensor:
    return _call(backend, "delta_step", q, k, v, beta, g, state, scale).to(v.dtype)


@delta_step_op.register_fake
def _(q, k, v, beta, g, state, scale, backend):
    return v.new_empty(v.shape)


_wire(delta_fwd_op, delta_bwd_op)


def delta(
    q,
    k,
    v,
    beta,
    g=None,
    *,
    qk_l2norm=False,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    chunk_size=64,
    backend="auto",
):
    """Gated delta rule, S' = diag(e^g_t) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S'), o_t = scale q_t S_t.

    g absent: DeltaNet (arXiv 2406.06484); one decay per head [B, T, HV]: Gated DeltaNet (2412.06464); per key channel [B, T, HV, K]: KDA
    (2510.26692).
    q, k [B, T, H, K]; v [B, T, HV, V] with HV a multiple of H (value head h reads q and k of head h // (HV / H)); beta [B, T, HV] in [0,
    2]. Keys must have norm <= 1 for the state to stay bounded: qk_l2norm normalises q and k. scale: K^-1/2 if None. initial_state [N, HV,
    K, V].
    Returns (o [B, T, HV, V], final states [N, HV, K, V] or None).
    """
    _check(q, k, v, cu_seqlens, initial_state, chunk_size, backend)
    B, T, HV, V = v.shape
    _check_shape("beta", beta, (B, T, HV))
    if g is not None and g.ndim == 3:
        _check_shape("g", g, (B, T, HV))
    else:
        _check_shape("g", g, (B, T, HV, q.shape[-1]))
    inputs, options = {"q": q, "k": k, "v": v, "beta": beta, "g": g}, {"qk_l2norm": qk_l2norm, "scale": scale}
    tensors, scale = FAMILIES["delta"].prepare(inputs, options)
    if backend == "reference":
        o, S = reference.delta(*tensors, scale, initial_state, cu_seqlens)
    else:
        S_in = None if initial_state is None else initial_state.to(compute_dtype(k))
        o, S, _, _ = delta_fwd_op(*tensors, S_in, cu_seqlens, None, scale, chunk_size, output_final_state, resolve(backend))
    return o, S if output_final_state else None


def delta_step(q, k, v, beta, g=None, *, state, qk_l2norm=False, scale=None):
    """One token of `delta` for each of N sequences: q, k [N, H, K], v [N, HV, V], beta [N, HV], g [N, HV] or [N, HV, K]. state is updated
    in place; returns o.
    """
    inputs, options = {"q": q, "k": k, "v": v, "beta": beta, "g": g}, {"qk_l2norm": qk_l2norm, "scale": scale}
    tensors, scale = FAMILIES["delta"].prepare(inputs, options)
    return delta_step_op(*tensors, state, scale, resolve("auto"))


# ----------------------------------------------------------------------------------------------------------------------------------------
# The families, for those who build a sequence from segments


@dataclass(frozen=True)
class Family:
    """The five ops of a family under one signature. `inputs` are the public function's tensors in the order of `names`, None where absent:
        state(*inputs[1:5], cu_seqlens, C, backend) -> (U, A, cache)
        fwd(*inputs, S_in, cu_seqlens, cache, scale, C, output_final_state, backend) -> (o, S_out, kept, S)
        dstate(*inputs, do, cu_seqlens, cache, scale, C, backend) -> G
        bwd(*inputs, kept, S, do, dS_out, cu_seqlens, scale, C, input_state_grad, backend) -> (*gradients of inputs, dS_in)
        step(*inputs, state, scale, backend) -> o
    cache is state's; fwd takes None too and computes what it needs, and then `kept` holds it; given one, `kept` is empty if cache serves
    bwd.
    A is a transition of the kind `transition`. With cu_seqlens, S_in [1, ..] is the state entering the first token's document and dS_out
    [1, ..] the gradient of the state leaving the last token's (see the module's docstring).
    """

    names: tuple[str, ...]
    transition: type
    state: callable
    fwd: callable
    dstate: callable
    bwd: callable
    step: callable

    def prepare(self, inputs, options):
        """([tensors in the order of `names`, None where absent], scale): what the public functions hand to the ops.

        inputs: tensors by name, of whatever leading dims (no batch dim is added). options: further arguments of the public functions by
        name: scale, qk_l2norm, tensors that do not run over tokens. q may be absent, as `state` does not need it.
        """
        given = {**inputs, **options}
        scale, qk_l2norm = given.pop("scale", None), given.pop("qk_l2norm", False)
        assert given.keys() <= set(self.names), f"{sorted(given)} are not all among {self.names}"
        scale = given["k"].shape[-1] ** -0.5 if scale is None else float(scale)
        if qk_l2norm:
            # Kept in fp32: rounded to bf16, a key's squared norm is 1 +- 4e-3, and with beta near 2 such a step is no contraction any more.
            given |= {name: l2norm(given[name].to(compute_dtype(given[name]))) for name in ("q", "k") if given.get(name) is not None}
        return [given.get(name) for name in self.names], scale


FAMILIES = {
    "gla": Family(("q", "k", "v", "gk", "gv", "u"), transition.Diagonal, gla_state_op, gla_fwd_op, gla_dstate_op, gla_bwd_op, gla_step_op),
    "delta": Family(
        ("q", "k", "v", "beta", "g"), transition.Dense, delta_state_op, delta_fwd_op, delta_dstate_op, delta_bwd_op, delta_step_op
    ),
}


# ----------------------------------------------------------------------------------------------------------------------------------------
# Refusals


def resolve(backend):
    return "chunk" if backend == "auto" else backend


def _check(q, k, v, cu_seqlens, initial_state, chunk_size, backend):
    if backend not in ("auto", "reference", *BACKENDS):
        raise ValueError(f"backend: no {backend!r}; there are auto, reference, {', '.join(BACKENDS)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: shape {list(x.shape)} is not [B, T, heads, channels]")
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name}: dtype {x.dtype} is not floating point")
    _check_shape("k", k, q.shape)
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v: shape {list(v.shape)} does not start with [B, T] = {list(q.shape[:2])} of q")
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"v: {v.shape[2]} heads are not a multiple of the {q.shape[2]} of q and k")
    if q.shape[1] == 0:
        raise ValueError("q: T = 0, there are no tokens")
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size: {chunk_size} is not a power of two")
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"cu_seqlens: packed documents need B = 1, not {q.shape[0]}; flatten the rows into one stream")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens: {cu_seqlens.dtype} {list(cu_seqlens.shape)} is not int32 or int64 [N+1] with N >= 1")
    _check_shape("initial_state", initial_state, _state_shape(v, q.shape[-1], cu_seqlens))


def _check_shape(name, x, shape):
    if x is None:
        return
    if x.shape != torch.Size(shape):
        raise ValueError(f"{name}: shape {list(x.shape)} should be {list(shape)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name}: dtype {x.dtype} is not floating point")
