"""gla: linear attention with decays per key and value channel, from log decays or logits."""

from lmoe.kernels import reference, transition
from lmoe.kernels.family import Family, Scan, log_decay_sample
from lmoe.kernels.norm import compute_dtype


def prepare(given):
    tau = given.pop("tau", None)
    if tau is None or "gk" not in given:
        return given
    return given | {"tau": given["gk"].new_full((1,), tau, dtype=compute_dtype(given["k"]))}


def refuse(given):
    tau = given.get("tau")
    if tau is not None and (given.get("gk") is None or not tau > 0):
        raise ValueError(
            f"tau: {tau} divides the log decays of logits gk; it is above 0, and stands beside gk"
        )


GLA = Family(
    name="gla",
    arguments="q T H K, k T H K, v T H V, gk? T H K, gv? T H V, u? H K",
    numbers=("tau",),
    tensors="q k v gk? gv? u? tau?",
    prepare=prepare,
    refuse=refuse,
    reference=reference.gla,
    forms={"chunk": "lmoe.kernels.chunk.gla", "triton": "lmoe.kernels.gpu.gla"},
    transition=transition.Diagonal,
    gates=("", "gk", "gv", "gk gv", "gk u", "gk tau"),
    samples={"gk": log_decay_sample, "gv": log_decay_sample, "tau": 4.0},
)


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
    chunk_size=64,
    backend="auto",
    **states,
):
    """Run gated linear attention, S_t = diag(e^gk_t) S_{t-1} diag(e^gv_t) + k_t^T v_t, o_t = scale
    q_t S_t (arXiv 2312.06635).

    q, k [B, T, H, K]; v [B, T, H, V]; log decays gk [B, T, H, K] and gv [B, T, H, V], each <= 0 or
    absent. With the bonus u [H, K] outputs read the state before their token: o_t = scale q_t
    (S_{t-1} + diag(u) k_t^T v_t) (RWKV6, arXiv 2404.05892). With tau, a number, gk are logits in
    any dtype, and the log decays logsigmoid(gk) / tau in float32. states: initial_state,
    output_final_state, cu_seqlens (ops.py).
    """
    inputs = {"k": k, "v": v, "gk": gk, "gv": gv}
    constants = {"u": u, "tau": tau, "scale": scale}
    scan = Scan(GLA, inputs, constants, chunk_size, backend)
    return GLA.run(scan, q, **states)


def gla_step(q, k, v, gk=None, gv=None, u=None, *, state, tau=None, scale=None, backend="auto"):
    """Run one token of `gla` for each of N sequences: q, k, gk [N, H, K], v, gv [N, H, V], u [H,
    K]. state [N, H, K, V] is updated in place; returns o [N, H, V].
    """
    inputs = {"k": k, "v": v, "gk": gk, "gv": gv}
    constants = {"u": u, "tau": tau, "scale": scale}
    return GLA.step(Scan(GLA, inputs, constants, backend=backend), q, state)
