"""ssd: linear attention with one decay per head and token, constant, or absent."""

from lmoe.kernels import reference, transition
from lmoe.kernels.family import Family, Scan, log_decay_sample


def prepare(given):
    gamma = given.pop("gamma", None)
    return given if gamma is None else given | {"g": gamma}


def refuse(given):
    gamma = given.get("gamma")
    if gamma is not None and (given.get("g") is not None or gamma.requires_grad):
        raise ValueError(
            "gamma: decays that do not vary over tokens stand alone and have no gradient; pass g "
            "[B, T, HV] instead"
        )


SSD = Family(
    name="ssd",
    arguments="q T H K, k T H K, v T HV V, g? T HV, diag? T HV, gamma? HV",
    tensors="q k v g? diag?",
    prepare=prepare,
    refuse=refuse,
    reference=reference.ssd,
    forms={"chunk": "lmoe.kernels.chunk.ssd", "triton": "lmoe.kernels.gpu.ssd"},
    transition=transition.Scalar,
    gates=("", "g", "gamma", "g diag"),
    samples={"g": log_decay_sample, "gamma": log_decay_sample},
    min_head_dim=1,
)


def ssd(
    q,
    k,
    v,
    g=None,
    gamma=None,
    *,
    diag=None,
    scale=None,
    chunk_size=64,
    backend="auto",
    **states,
):
    """Run linear attention with a scalar decay, S_t = e^g_t S_{t-1} + k_t^T v_t, o_t = scale q_t
    S_t (Mamba2, arXiv 2405.21060).

    q, k [B, T, H, K]; v [B, T, HV, V] with HV a multiple of H (value head h reads q and k of head
    h // (HV / H)). The log decay, <= 0: g [B, T, HV], or gamma [HV], constant over tokens and
    without a gradient (RetNet, arXiv 2307.08621), or neither (arXiv 2006.16236). diag [B, T, HV]:
    the weight of a token in its own output, instead of 1 (Mamba3, arXiv 2603.15569). states:
    initial_state, output_final_state, cu_seqlens (ops.py).
    """
    inputs = {"k": k, "v": v, "g": g, "diag": diag}
    constants = {"gamma": gamma, "scale": scale}
    scan = Scan(SSD, inputs, constants, chunk_size, backend)
    return SSD.run(scan, q, **states)


def ssd_step(q, k, v, g=None, gamma=None, *, diag=None, state, scale=None, backend="auto"):
    """Run one token of `ssd` for each of N sequences: q, k [N, H, K], v [N, HV, V], g, diag [N,
    HV], gamma [HV]. state [N, HV, K, V] is updated in place; returns o [N, HV, V].
    """
    inputs = {"k": k, "v": v, "g": g, "diag": diag}
    constants = {"gamma": gamma, "scale": scale}
    return SSD.step(Scan(SSD, inputs, constants, backend=backend), q, state)
