"""Mixers against the recurrences of their papers, written out token by token from the layer's own
weights: one document, float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from lmoe.model.mixers.lightning import alibi, decay_slopes
from tests.model.variants import SHAPE, make_mixer, make_seq

T = 11


def heads(x, size):
    return x.unflatten(-1, (-1, size))


def rms(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def conv(layer, x):
    """Causal, depthwise, SiLU."""
    width, rows = layer.width, []
    padded = torch.cat([x.new_zeros(width - 1, x.shape[1]), x])
    for t in range(len(x)):
        rows.append(
            (padded[t : t + width] * layer.weight.T).sum(0)
            + (0 if layer.bias is None else layer.bias)
        )
    return F.silu(torch.stack(rows))


def recur(q, k, v, decay):
    """S = decay(t, S) + k^T v, o = q S: q, k [T, H, K], v [T, H, V]."""
    S, out = torch.zeros(q.shape[1], q.shape[2], v.shape[2], dtype=q.dtype), []
    for t in range(len(q)):
        S = decay(t, S) + k[t][:, :, None] * v[t][:, None, :]
        out.append((q[t][:, None, :] @ S).squeeze(1))
    return torch.stack(out)


def repeat(x, count):
    return x.repeat_interleave(count // x.shape[1], dim=1)


def mamba2(m, x):
    groups, H, N, P = m.options.shape(SHAPE)
    inner = heads(conv(m.conv_x, m.wx(x)), P)
    B, C = (
        repeat(heads(conv(getattr(m, f"conv_{n}"), getattr(m, f"w{n}")(x)), N), H) for n in "BC"
    )
    dt = F.softplus(m.wdt(x) + m.decay.dt_bias)
    A = m.decay.A_log.exp()
    y = (
        recur(C, B * dt[..., None], inner, lambda t, S: (-A * dt[t]).exp()[:, None, None] * S)
        + m.D[:, None] * inner
    )
    y = (y * F.silu(heads(m.wz(x), P))).flatten(1).unflatten(1, (groups, -1))
    return m.wo(rms(y, 1.0, 1e-5).flatten(1) * m.norm.weight)


def turned(x, phi):
    """The first dims of x, by twos, as complex numbers times e^(i phi)."""
    R = phi.shape[-1]
    z = torch.view_as_complex(
        x[..., : 2 * R].reshape(*x.shape[:-1], R, 2).contiguous()
    ) * torch.polar(torch.ones_like(phi), phi)
    return torch.cat([torch.view_as_real(z).flatten(-2), x[..., 2 * R :]], -1)


def mamba3(m, x):
    _, H, N, P = m.options.shape(SHAPE)
    inner, dt = heads(m.wx(x), P), F.softplus(m.wdt(x) + m.dt_bias)
    share, a = torch.sigmoid(m.wtrap(x)), m.wA(x)
    A = (
        -(a.clamp(min=0) + 1 / (1 - a.clamp(max=0)))
        if m.options.heavy_tail
        else -F.softplus(a).clamp(min=1e-4)
    )
    phi = (dt[..., None] * math.pi * torch.tanh(m.wangle(x))[:, None]).cumsum(0)
    B = turned(repeat(rms(heads(m.wB(x), N), m.norm_B.weight, 1e-5), H) + m.bias_B, phi)
    C = turned(repeat(rms(heads(m.wC(x), N), m.norm_C.weight, 1e-5), H) + m.bias_C, phi)
    h, out = torch.zeros(H, N, P, dtype=x.dtype), []
    for t in range(len(x)):
        alpha = (A[t] * dt[t]).exp()[:, None, None]
        h = alpha * h
        if t:
            h = (
                h
                + ((1 - share[t]) * dt[t])[:, None, None]
                * alpha
                * B[t - 1][:, :, None]
                * inner[t - 1][:, None, :]
            )
        h = h + (share[t] * dt[t])[:, None, None] * B[t][:, :, None] * inner[t][:, None, :]
        out.append((C[t][:, None, :] @ h).squeeze(1) + m.D[:, None] * inner[t])
    return m.wo((torch.stack(out) * F.silu(heads(m.wz(x), P))).flatten(1))


def bla(m, x):
    q, k, v = heads(m.map(m.wq(x)), m.K), heads(m.map(m.wk(x)), m.K), heads(m.wv(x), m.V)
    scale = m.K**-0.5
    o = recur(q * scale, k, v, lambda t, S: S)
    if m.options.normalise:
        o = o / (recur(q * scale, k, torch.ones_like(v[..., :1]), lambda t, S: S) + 1e-6)
    if m.options.norm:
        o = rms(o, m.norm.weight, 1e-5)
    return m.wo((o if m.wg is None else o * F.silu(heads(m.wg(x), m.V))).flatten(1))


def lightning(m, x):
    slopes = (
        torch.tensor(
            decay_slopes(m.options.slopes, SHAPE.heads, 1, SHAPE.layers), dtype=torch.float64
        )
        .float()
        .double()
    )
    q, k, v = heads(F.silu(m.wq(x)), m.K), heads(F.silu(m.wk(x)), m.K), m.wv(x)
    v = heads(F.silu(v) if m.options.silu_v else v, m.V)
    o = recur(
        q if m.options.silu_v else q * m.K**-0.5,
        k,
        v,
        lambda t, S: (-slopes).exp()[:, None, None] * S,
    )
    if m.options.full_width_norm:
        return m.wo(rms(o.flatten(1), m.norm.weight, 1e-6) * torch.sigmoid(m.wg(x)))
    return m.wo((rms(o, m.norm.weight, 1e-5) * F.silu(heads(m.wg(x), m.V))).flatten(1))


def retnet(m, x):
    gammas = torch.arange(m.wq.out_features // m.K, dtype=torch.float64)
    q, k, v = heads(m.wq(x), m.K), heads(m.wk(x), m.K), heads(m.wv(x), m.V)
    if m.options.rope:
        exponents = torch.linspace(0, 1, m.K // 2, dtype=x.dtype)
        angles = torch.arange(T, dtype=x.dtype)[:, None, None] * 10000.0**-exponents
        q, k = turned(q, angles.expand_as(q[..., ::2])), turned(k, angles.expand_as(k[..., ::2]))
    else:
        q, k = F.silu(q), F.silu(k)
    gamma = 1 - 2.0 ** (-5 - gammas)
    o = recur(q * m.K**-0.5, k, v, lambda t, S: gamma[:, None, None] * S)
    if m.options.decay_norm:  # torchscale: mask / mask.sum(-1).sqrt()
        sums = (gamma ** torch.arange(T, dtype=x.dtype)[:, None]).cumsum(0)
        o = o / sums.sqrt()[..., None]
    o = rms(o, 1.0, 1e-6) if m.norm.weight is None else rms(o, m.norm.weight, 1e-5)
    return m.wo((o * F.silu(heads(m.wg(x), m.V))).flatten(1))


def hgrn2(m, x):
    q, f, v = heads(F.silu(m.wq(x)), m.K), torch.sigmoid(m.wk(x)), heads(m.wv(x), m.V)
    if m.options.lower_bounds:
        p = torch.softmax(m.hgrn2_bounds.logits, 0)
        gamma = p.cumsum(0)[1] - p[0]
        f = gamma + (1 - gamma) * f
    f = heads(f, m.K)
    o = recur(q * m.K**-0.5, 1 - f, v, lambda t, S: f[t][:, :, None] * S)
    return m.wo(
        rms(o.flatten(1), m.norm.weight, 1e-5)
        if m.options.full_width_norm
        else rms(o, m.norm.weight, 1e-5).flatten(1)
    )


def gsa(m, x):
    q, k, v = (heads(F.silu(w(x)), size) for w, size in ((m.wq, m.K), (m.wk, m.K), (m.wv, m.V)))
    alpha = heads(torch.sigmoid(m.wf(x)) ** (1 / m.options.gate_logit_normalizer), m.options.slots)
    scores = recur(q, k, 1 - alpha, lambda t, S: S * alpha[t][:, None, :])
    o = F.silu(
        recur(torch.softmax(scores, -1), 1 - alpha, v, lambda t, S: S * alpha[t][:, :, None])
    )
    return m.wo(
        rms(o.flatten(1), m.norm.weight, 1e-5)
        if m.options.full_width_norm
        else rms(o, m.norm.weight, 1e-5).flatten(1)
    )


def rwkv6(m, x):
    delta = torch.cat([torch.zeros_like(x[:1]), x[:-1]]) - x
    low = torch.tanh((x + delta * m.mix.mu) @ m.mix.A.weight.T).chunk(5, -1)
    w, k, v, r, g = (x + delta * (m.mix.lambdas[i] + low[i] @ m.mix.B[i]) for i in range(5))
    r, k, v, g = heads(m.wr(r), m.K), heads(m.wk(k), m.K), heads(m.wv(v), m.V), F.silu(m.wg(g))
    decay = heads(torch.exp(-torch.exp(m.decay_out(torch.tanh(m.decay_in(w))) + m.decay_bias)), m.K)
    S, out = torch.zeros(r.shape[1], m.K, m.V, dtype=x.dtype), []
    for t in range(T):
        kv = k[t][:, :, None] * v[t][:, None, :]
        out.append((r[t][:, None, :] @ (S + m.u[:, :, None] * kv)).squeeze(1))
        S = decay[t][:, :, None] * S + kv
    o = torch.stack(out)
    o = F.group_norm(o.flatten(1), o.shape[1], m.norm.weight, m.norm.bias, eps=64e-5)
    return m.wo(o * g)


PAPERS = {
    "bla": bla,
    "lightning": lightning,
    "retnet": retnet,
    "mamba2": mamba2,
    "mamba3": mamba3,
    "hgrn2": hgrn2,
    "gsa": gsa,
    "rwkv6": rwkv6,
}
VARIANTS = [f"{name}-{preset}" for name in PAPERS for preset in ("uniform", "faithful")]
VARIANTS += ["mamba2-groups", "mamba3-groups", "lightning-transnormer"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recurrence_of_the_paper(variant):
    mixer = make_mixer(variant)
    torch.manual_seed(0)
    x = torch.randn(T, SHAPE.dim, dtype=torch.float64)
    with torch.no_grad():
        # Constant decays are kept in fp32.
        tolerance = 1e-6 if variant.startswith(("lightning", "retnet")) else 1e-9
        torch.testing.assert_close(
            mixer(x, make_seq([T]))[0],
            PAPERS[variant.split("-")[0]](mixer, x),
            rtol=tolerance,
            atol=tolerance,
        )


def test_slopes():
    assert alibi(8) == [2.0**-h for h in range(1, 9)] and alibi(16)[::2] == [
        2 ** (-0.5 - h) for h in range(8)
    ]
    assert alibi(12) == [2.0**-h for h in range(1, 9)] + [2.0 ** (-h / 2) for h in (1, 3, 5, 7)]
    assert decay_slopes("minimax", 8, 0, 12)[0] == pytest.approx(0.5, rel=1e-4)
    assert decay_slopes("minimax", 8, 11, 12)[0] == pytest.approx(0.5e-5, rel=0.2)
    assert decay_slopes("transnormer", 8, 6, 12) == [h * 0.5 for h in range(8)]
