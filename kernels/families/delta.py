"""delta: the delta rule, with no decay, one per head or one per key channel."""

from lmoe.kernels import reference, transition
from lmoe.kernels.family import Family, Scan, log_decay_sample
from lmoe.kernels.norm import l2norm


def prepare(given):
    if given.pop("qk_l2norm", False):
        # Kept in fp32: rounded to bf16, a key's squared norm is 1 +- 4e-3, and with beta near 2
        # such a step is no contraction any more.
        given |= {name: l2norm(given[name], wide=True) for name in ("q", "k") if name in given}
    return given


def flops(K, V, C):
    return C * (6 * K + 4 * V) + 6 * K * V + 2 * C * C / 3


DELTA = Family(
    name="delta",
    arguments="q T H K, k T H K, v T HV V, beta T HV, g? T HV | T HV K",
    numbers=("qk_l2norm",),
    tensors="q k v beta g?",
    prepare=prepare,
    reference=reference.delta,
    forms={"chunk": "lmoe.kernels.chunk.delta"},
    transition=transition.Dense,
    caches=True,
    flops=flops,
    gates=("beta qk_l2norm", "beta g qk_l2norm", "beta g:1 qk_l2norm"),
    samples={"g": log_decay_sample, "beta": lambda x: 2 * x.sigmoid(), "qk_l2norm": True},
)


def delta(
    q,
    k,
    v,
    beta,
    g=None,
    *,
    qk_l2norm=False,
    scale=None,
    chunk_size=64,
    backend="auto",
    **states,
):
    """Run the gated delta rule, S' = diag(e^g_t) S_{t-1}, S_t = S' + beta_t k_t^T (v_t - k_t S'),
    o_t = scale q_t S_t.

    g absent: DeltaNet (arXiv 2406.06484); one decay per head [B, T, HV]: Gated DeltaNet
    (2412.06464); per key channel [B, T, HV, K]: KDA (2510.26692). q, k [B, T, H, K]; v [B, T, HV,
    V] with HV a multiple of H (value head h reads q and k of head h // (HV / H)); beta [B, T, HV]
    in [0, 2]. Keys must have norm <= 1 for the state to stay bounded: qk_l2norm normalises q and k.
    states: initial_state, output_final_state, cu_seqlens (ops.py).
    """
    inputs = {"k": k, "v": v, "beta": beta, "g": g}
    constants = {"qk_l2norm": qk_l2norm, "scale": scale}
    scan = Scan(DELTA, inputs, constants, chunk_size, backend)
    return DELTA.run(scan, q, **states)


def delta_step(q, k, v, beta, g=None, *, state, qk_l2norm=False, scale=None, backend="auto"):
    """Run one token of `delta` for each of N sequences: q, k [N, H, K], v [N, HV, V], beta [N, HV],
    g [N, HV] or [N, HV, K]. state is updated in place; returns o.
    """
    inputs = {"k": k, "v": v, "beta": beta, "g": g}
    constants = {"qk_l2norm": qk_l2norm, "scale": scale}
    return DELTA.step(Scan(DELTA, inputs, constants, backend=backend), q, state)
