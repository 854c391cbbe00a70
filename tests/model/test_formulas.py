"""Every mixer of one document against its paper's formulas, written out token by token from the
layer's weights."""

import pytest
import torch
import torch.nn.functional as F

from lmoe.model.rope import rope
from tests.model.variants import SHAPE, make_mixer, make_options, make_seq, window_of

LENGTH = 21


def heads(x, size):
    return x.unflatten(-1, (-1, size))


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def gated_output(mixer, x, o):
    return mixer.wo(
        (rms(o, mixer.norm.weight, 1e-5) * F.silu(heads(mixer.wg(x), mixer.V))).flatten(-2)
    )


def gla(mixer, x, options):
    act = F.silu if options.feature_map == "silu" else lambda t: t
    q, k, v = act(mixer.wq(x)), act(mixer.wk(x)), mixer.wv(x)
    alpha = torch.sigmoid(
        x @ mixer.decay_in.weight.T @ mixer.decay_out.weight.T + mixer.decay_out.bias
    ) ** (1 / 16)
    q, k, v, alpha = heads(q, mixer.K), heads(k, mixer.K), heads(v, mixer.V), heads(alpha, mixer.K)
    S, o = torch.zeros(q.shape[1], mixer.K, mixer.V, dtype=x.dtype), []
    for t in range(len(x)):
        S = alpha[t][..., None] * S + k[t][..., None] * v[t][:, None]
        o.append((q[t][..., None] * S).sum(1) * mixer.K**-0.5)
    return gated_output(mixer, x, torch.stack(o))


def gated_deltanet(mixer, x, options):
    def conv(module, y):
        padded = torch.cat([y.new_zeros(3, y.shape[1]), y])
        return F.silu(sum(module.weight[:, d] * padded[d : d + len(y)] for d in range(4)))

    q, k = (
        heads(conv(c, w(x)), mixer.K)
        for c, w in ((mixer.conv_q, mixer.wq), (mixer.conv_k, mixer.wk))
    )
    v = heads(conv(mixer.conv_v, mixer.wv(x)), mixer.V)
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    groups = v.shape[1] // q.shape[1]
    q, k = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1)
    beta = torch.sigmoid(mixer.wb(x))
    alpha = torch.exp(-mixer.decay.A_log.exp() * F.softplus(mixer.wa(x) + mixer.decay.dt_bias))
    S, o = torch.zeros(v.shape[1], mixer.K, mixer.V, dtype=x.dtype), []
    for t in range(len(x)):
        kk = (
            torch.eye(mixer.K, dtype=x.dtype)
            - beta[t][:, None, None] * k[t][..., None] * k[t][:, None]
        )
        S = (
            alpha[t][:, None, None] * kk @ S
            + beta[t][:, None, None] * k[t][..., None] * v[t][:, None]
        )
        o.append((q[t][..., None] * S).sum(1) * mixer.K**-0.5)
    return gated_output(mixer, x, torch.stack(o))


def rotated(x, position, theta):
    """x [H, d] as complex numbers (first half real, second half imaginary), turned by position *
    theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = torch.tensor(
        [position * theta ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=x.dtype
    )
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def attention(mixer, x, options):
    q, k, v = (heads(w(x), mixer.head_dim) for w in (mixer.wq, mixer.wk, mixer.wv))
    if options.qk_norm:
        q, k = (
            rms(q, mixer.norm_q.weight, SHAPE.norm_eps),
            rms(k, mixer.norm_k.weight, SHAPE.norm_eps),
        )
    if options.rope:
        q, k = (
            torch.stack([rotated(t[i], i, options.rope_theta) for i in range(len(x))])
            for t in (q, k)
        )
    outputs = []
    for t in range(len(x)):
        first = max(0, t - options.window + 1) if options.window else 0
        row = []
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            p = (k[first : t + 1, g] @ q[t, h] * mixer.head_dim**-0.5).softmax(0)
            row.append(p @ v[first : t + 1, g])
        outputs.append(torch.cat(row))
    return mixer.wo(torch.stack(outputs))


FORMULAS = {"gla": gla, "gated_deltanet": gated_deltanet, "attention": attention}
VARIANTS = [
    "gla-uniform",
    "gla-faithful",
    "gated_deltanet-uniform",
    "gated_deltanet-gva",
    "attention-uniform",
    "attention-gqa",
    "attention-window",
    "attention-norope",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixer_is_its_formula(variant):
    name, options = make_options(variant)
    mixer = make_mixer(variant)
    torch.manual_seed(0)
    for p in mixer.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)  # biases and norms are 0 and 1 at first
    x, dy = torch.randn(2, LENGTH, SHAPE.dim, dtype=torch.float64)
    seq = make_seq([LENGTH], variant)
    y, _, _ = mixer(x, seq)
    expected = FORMULAS[name](mixer, x, options)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    parameters = list(mixer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(y, parameters, dy),
        torch.autograd.grad(expected, parameters, dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert window_of(variant) == getattr(options, "window", 0)


def test_rope_turns_by_the_base_it_is_given():
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    positions = torch.tensor([0, 3, 1, 70000, 2])
    for theta in (100.0, 1e6):
        expected = torch.stack([rotated(x[i], int(p), theta) for i, p in enumerate(positions)])
        torch.testing.assert_close(rope(x, positions, theta), expected, rtol=1e-9, atol=1e-9)
    half = rope(x.bfloat16(), positions, 1e4)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(
        half.double(), rope(x.bfloat16().double(), positions, 1e4), rtol=8e-3, atol=8e-3
    )  # angles in fp32


@pytest.mark.parametrize("backend, chunk_size", [("reference", 16), ("chunk", 8), ("chunk", 32)])
@pytest.mark.parametrize("variant", ["gla-uniform", "gated_deltanet-gva"])
def test_backends_and_chunk_sizes_agree(variant, backend, chunk_size, monkeypatch):
    """And the options reach the op."""
    mixer = make_mixer(variant)
    x, dy = torch.randn(2, 40, SHAPE.dim, dtype=torch.float64)
    seq, parameters = make_seq([7, 0, 32, 1], variant), list(mixer.parameters())
    expected, _, _ = mixer(x, seq)
    mixer.options.backend, mixer.options.chunk_size = backend, chunk_size
    seen, call = [], mixer.family.call
    monkeypatch.setattr(mixer.family, "call", lambda *args: seen.append(call(*args)) or seen[-1])
    y, _, _ = mixer(x, seq)
    assert (seen[0].backend, seen[0].chunk_size) == (backend, chunk_size)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad(y, parameters, dy),
        torch.autograd.grad(expected, parameters, dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
