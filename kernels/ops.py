"""The public functions: defaults, refusals, choice of backend. The ops behind them are registered
in families.py.

Common arguments: q, k [B, T, H, K]; v [B, T, HV, V]; log decays and states float32 (float64 beside
float64 inputs); cu_seqlens int32 or int64 [N+1], B = 1: the borders of N packed documents, 0 first
and T last, an entry repeated for an empty document. States are [N, HV, K, V], N = B without
cu_seqlens; final states cost a pass of their own and come only with output_final_state. scale:
K^-1/2 if None. chunk_size: a power of two; triton takes smaller chunks where these do not fit a
GPU. Everything is computed in float32, float64 for float64 inputs (by triton with bf16 products of
bf16 inputs), and is differentiable, states included. They return (o [B, T, HV, V] in v's dtype,
final states or None).
"""

import torch

from lmoe.kernels import reference
from lmoe.kernels.choice import INSTALLED, NARROWEST
from lmoe.kernels.conv import short_conv, short_conv_step
from lmoe.kernels.cross_entropy import linear_cross_entropy
from lmoe.kernels.families import BACKENDS, FAMILIES
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
    "ssd",
    "ssd_step",
]


def _run(
    family, inputs, options, initial_state, output_final_state, cu_seqlens, chunk_size, backend
):
    tensors, scale = FAMILIES[family].prepare(inputs, options)
    if backend == "reference":
        o, S = getattr(reference, family)(*tensors, scale, initial_state, cu_seqlens)
    else:
        S_in = None if initial_state is None else initial_state.to(compute_dtype(tensors[1]))
        backend = resolve(backend, family, *tensors[1:3], chunk_size)
        o, S, _, _ = FAMILIES[family].fwd(
            *tensors, S_in, cu_seqlens, None, scale, chunk_size, output_final_state, backend
        )
    return o, S if output_final_state else None


def _step(family, inputs, options, state, backend):
    tensors, scale = FAMILIES[family].prepare(inputs, options)
    return FAMILIES[family].step(*tensors, state, scale, resolve(backend, family, *tensors[1:3]))


# --------------------------------------------------------------------------------------------------
# ssd


def ssd(
    q,
    k,
    v,
    g=None,
    gamma=None,
    *,
    diag=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    chunk_size=64,
    backend="auto",
):
    """Linear attention with a scalar decay, S_t = e^g_t S_{t-1} + k_t^T v_t, o_t = scale q_t S_t
    (Mamba2, arXiv 2405.21060).

    q, k [B, T, H, K]; v [B, T, HV, V] with HV a multiple of H (value head h reads q and k of head h
    // (HV / H)). The log decay, <= 0: g [B, T, HV], or gamma [HV], constant over tokens and without
    a gradient (RetNet, arXiv 2307.08621), or neither (arXiv 2006.16236). diag [B, T, HV]: the
    weight of a token in its own output, instead of 1 (Mamba3, arXiv 2603.15569).
    """
    _check("ssd", q, k, v, cu_seqlens, initial_state, chunk_size, backend)
    B, T, HV, _ = v.shape
    for name, x, shape in (
        ("g", g, (B, T, HV)),
        ("gamma", gamma, (HV,)),
        ("diag", diag, (B, T, HV)),
    ):
        _check_shape(name, x, shape)
    if gamma is not None and (g is not None or gamma.requires_grad):
        raise ValueError(
            "gamma: decays that do not vary over tokens stand alone and have no gradient; pass g"
            " [B, T, HV] instead"
        )
    inputs, options = (
        {"q": q, "k": k, "v": v, "g": g, "diag": diag},
        {"gamma": gamma, "scale": scale},
    )
    return _run(
        "ssd", inputs, options, initial_state, output_final_state, cu_seqlens, chunk_size, backend
    )


def ssd_step(q, k, v, g=None, gamma=None, *, diag=None, state, scale=None, backend="auto"):
    """One token of `ssd` for each of N sequences: q, k [N, H, K], v [N, HV, V], g, diag [N, HV],
    gamma [HV]. state [N, HV, K, V] is updated in place; returns o [N, HV, V].
    """
    return _step(
        "ssd",
        {"q": q, "k": k, "v": v, "g": g, "diag": diag},
        {"gamma": gamma, "scale": scale},
        state,
        backend,
    )


# --------------------------------------------------------------------------------------------------
# gla


def gla(
    q,
    k,
    v,
    gk=None,
    gv=None,
    u=None,
    *,
    tau=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    chunk_size=64,
    backend="auto",
):
    """Gated linear attention, S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t^T v_t, o_t = scale q_t
    S_t (arXiv 2312.06635).

    q, k [B, T, H, K]; v [B, T, H, V]; log decays gk [B, T, H, K] and gv [B, T, H, V], each <= 0 or
    absent. With the bonus u [H, K] outputs read the state before their token: o_t = scale q_t
    (S_{t-1} + diag(u) k_t^T v_t) (RWKV6, arXiv 2404.05892). With tau, a number, gk are logits in
    any dtype, and the log decays logsigmoid(gk) / tau in float32.
    """
    _check("gla", q, k, v, cu_seqlens, initial_state, chunk_size, backend)
    B, T, H, K = q.shape
    if v.shape[2] != H:
        raise ValueError(f"v: {v.shape[2]} heads beside {H} of q and k; gla needs the same number")
    for name, x, shape in (("gk", gk, q.shape), ("gv", gv, v.shape), ("u", u, (H, K))):
        _check_shape(name, x, shape)
    if tau is not None and (gk is None or not tau > 0):
        raise ValueError(
            f"tau: {tau} divides the log decays of logits gk; it is above 0, and stands beside gk"
        )
    inputs, options = (
        {"q": q, "k": k, "v": v, "gk": gk, "gv": gv},
        {"u": u, "tau": tau, "scale": scale},
    )
    return _run(
        "gla", inputs, options, initial_state, output_final_state, cu_seqlens, chunk_size, backend
    )


def gla_step(q, k, v, gk=None, gv=None, u=None, *, state, tau=None, scale=None, backend="auto"):
    """One token of `gla` for each of N sequences: q, k, gk [N, H, K], v, gv [N, H, V], u [H, K].
    state [N, H, K, V] is updated in place. Returns o [N, H, V].
    """
    return _step(
        "gla",
        {"q": q, "k": k, "v": v, "gk": gk, "gv": gv},
        {"u": u, "tau": tau, "scale": scale},
        state,
        backend,
    )


# --------------------------------------------------------------------------------------------------
# delta


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
    """Gated delta rule, S' = diag(e^g_t) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S'), o_t =
    scale q_t S_t.

    g absent: DeltaNet (arXiv 2406.06484); one decay per head [B, T, HV]: Gated DeltaNet
    (2412.06464); per key channel [B, T, HV, K]: KDA (2510.26692). q, k [B, T, H, K]; v [B, T, HV,
    V] with HV a multiple of H (value head h reads q and k of head h // (HV / H)); beta [B, T, HV]
    in [0, 2]. Keys must have norm <= 1 for the state to stay bounded: qk_l2norm normalises q and k.
    """
    _check("delta", q, k, v, cu_seqlens, initial_state, chunk_size, backend)
    B, T, HV, V = v.shape
    _check_shape("beta", beta, (B, T, HV))
    if g is not None and g.ndim == 3:
        _check_shape("g", g, (B, T, HV))
    else:
        _check_shape("g", g, (B, T, HV, q.shape[-1]))
    inputs, options = (
        {"q": q, "k": k, "v": v, "beta": beta, "g": g},
        {"qk_l2norm": qk_l2norm, "scale": scale},
    )
    return _run(
        "delta", inputs, options, initial_state, output_final_state, cu_seqlens, chunk_size, backend
    )


def delta_step(q, k, v, beta, g=None, *, state, qk_l2norm=False, scale=None, backend="auto"):
    """One token of `delta` for each of N sequences: q, k [N, H, K], v [N, HV, V], beta [N, HV], g
    [N, HV] or [N, HV, K]. state is updated in place; returns o.
    """
    inputs, options = (
        {"q": q, "k": k, "v": v, "beta": beta, "g": g},
        {"qk_l2norm": qk_l2norm, "scale": scale},
    )
    return _step("delta", inputs, options, state, backend)


# --------------------------------------------------------------------------------------------------
# Refusals


def resolve(backend, family, k, v, chunk_size=16):
    """The backend that "auto" is: triton on a GPU (for which the meta device stands) where it takes
    the family, the heads [.., K], [.., V] and the dtype, else chunk."""
    if backend != "auto":
        return backend
    fits = (
        family in BACKENDS["triton"]
        and {k.dtype, v.dtype} <= {torch.bfloat16, torch.float32}
        and chunk_size >= 16
    )
    heads = k.shape[-1], v.shape[-1]
    fits = (
        fits
        and NARROWEST[family] <= min(heads)
        and max(heads) <= 256
        and k.device.type in ("cuda", "meta")
        and INSTALLED
    )
    return "triton" if fits else "chunk"


def _check(family, q, k, v, cu_seqlens, initial_state, chunk_size, backend):
    if backend not in ("auto", "reference", *BACKENDS):
        raise ValueError(
            f"backend: no {backend!r}; there are auto, reference, {', '.join(BACKENDS)}"
        )
    if family not in BACKENDS.get(backend, (family,)):
        raise ValueError(f"backend: {backend} has no {family}; take auto")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: shape {list(x.shape)} is not [B, T, heads, channels]")
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name}: dtype {x.dtype} is not floating point")
    _check_shape("k", k, q.shape)
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"v: shape {list(v.shape)} does not start with [B, T] = {list(q.shape[:2])} of q"
        )
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"v: {v.shape[2]} heads are not a multiple of the {q.shape[2]} of q and k")
    if q.shape[1] == 0:
        raise ValueError("q: T = 0, there are no tokens")
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size: {chunk_size} is not a power of two")
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(
                f"cu_seqlens: packed documents need B = 1, not {q.shape[0]}; flatten the rows into"
                " one stream"
            )
        if (
            cu_seqlens.ndim != 1
            or cu_seqlens.shape[0] < 2
            or cu_seqlens.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError(
                f"cu_seqlens: {cu_seqlens.dtype} {list(cu_seqlens.shape)} is not int32 or int64"
                " [N+1] with N >= 1"
            )
    N = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check_shape("initial_state", initial_state, (N, v.shape[2], q.shape[-1], v.shape[-1]))


def _check_shape(name, x, shape):
    if x is None:
        return
    if x.shape != torch.Size(shape):
        raise ValueError(f"{name}: shape {list(x.shape)} should be {list(shape)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name}: dtype {x.dtype} is not floating point")
