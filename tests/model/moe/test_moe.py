import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from lmoe.model.config import ModelConfig, MoEConfig
from lmoe.model.init import init_weights
from lmoe.model.moe.balance import hf_pooled_loss, say_layout_dependent
from lmoe.model.moe.moe import MoE
from lmoe.model.moe.router import probabilities

ROWS, LEN, D = 3, 7, 16
T = ROWS * LEN
TRAINING = {"sequence": 0.3, "token": 0.02, "microbatch": 0.5}
FULL = {"shared": 24, "shared_gate": True, "balance_coeff": 0.1, "z_coeff": 0.05}


def inputs(dtype=torch.float64):
    return torch.randn(T, D, dtype=dtype, requires_grad=True), torch.randn(T, D, dtype=dtype)


def gradients(moe, x, loss):
    return torch.autograd.grad(loss, [x, *moe.parameters()])


def naive(moe, x):
    """(y, auxiliary losses): every expert on every token, the auxiliary losses as ordinary
    terms."""
    cfg, (ids, _, logits) = moe.cfg, moe.router(x)
    mask = torch.zeros_like(logits).scatter(1, ids, 1.0)
    scores = logits.softmax(1) if cfg.score == "softmax" else logits.sigmoid()
    weights = scores * mask
    if cfg.renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    w1, w3 = moe.experts.w13.unbind(1)
    hidden = F.silu(torch.einsum("td,eid->tei", x, w1)) * torch.einsum("td,eid->tei", x, w3)
    y = torch.einsum("te,tei,edi->td", weights * cfg.route_scale, hidden, moe.experts.w2)
    if moe.shared is not None:
        shared = moe.shared.w2(F.silu(moe.shared.w1(x)) * moe.shared.w3(x))
        y = y + (shared if moe.shared_gate is None else torch.sigmoid(moe.shared_gate(x)) * shared)
    p = probabilities(logits, cfg.score).view(ROWS, LEN, -1)
    share = mask.view(ROWS, LEN, -1).sum(1) / (LEN * cfg.top_k)
    balance = cfg.balance_coeff * TRAINING["sequence"] * cfg.experts * (share * p.mean(1)).sum()
    z = cfg.z_coeff * TRAINING["token"] * logits.logsumexp(1).pow(2).sum()
    return y, balance, z


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        FULL,
        FULL | {"score": "sigmoid", "route_scale": 2.0, "shared_gate": False},
        FULL | {"renormalize": False, "groups": 4, "top_groups": 2},
    ],
    ids=["plain", "shared, losses", "sigmoid", "groups"],
)
def test_equals_every_expert_on_every_token(make_moe, make_seq, impl, options):
    moe = make_moe(impl=impl, **options)
    x, dy = inputs()
    y, stats = moe(x, make_seq(ROWS, LEN, **TRAINING))
    expected, balance, z = naive(moe, x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        (stats.balance, stats.z), (balance.detach(), z.detach()), rtol=1e-11, atol=0
    )
    assert (
        torch.equal(stats.counts, moe.router(x).ids.flatten().bincount(minlength=8))
        and stats.counts.dtype == torch.int64
    )
    actual = gradients(moe, x, (y * dy).sum())  # the losses come in by themselves
    for a, b in zip(actual, gradients(moe, x, (expected * dy).sum() + balance + z)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["none", "switch", "megatron", "global_batch", "hf_pooled"])
def test_other_balance_losses_enter_the_gradient(make_moe, make_seq, kind):
    """The router's gradient with and without the loss differs by the gradient of its reported
    value."""
    moe = make_moe(balance=kind, balance_coeff=0.1)
    x, dy = inputs()

    def run(training):
        y, stats = moe(x, make_seq(ROWS, LEN, **(TRAINING if training else {})))
        loss = (y * dy).sum()
        if kind == "hf_pooled":
            loss = loss + hf_pooled_loss([stats], 0.1, TRAINING["microbatch"] if training else 0.0)
        return torch.autograd.grad(loss, moe.router.weight)[0], stats

    (with_loss, stats), (without, _) = run(True), run(False)
    assert torch.equal(with_loss, without) == (kind == "none")
    assert (stats.balance > 0) == (
        kind not in ("none", "hf_pooled")
    ) and not stats.balance.requires_grad
    assert stats.pooled.shape == ((8,) if kind == "hf_pooled" else (0,))
    if kind == "hf_pooled":
        torch.testing.assert_close(
            stats.pooled, moe.cfg.top_k * moe.router(x).logits.softmax(1).mean(0)
        )


def test_nothing_is_added_or_reported_in_evaluation(make_moe, make_seq):
    moe = make_moe(**FULL)
    x, dy = inputs()
    y, stats = moe(x, make_seq(ROWS, LEN))
    assert stats.balance == 0 and stats.z == 0 and stats.counts.sum() == T * 3
    expected, _, _ = naive(moe, x)
    for a, b in zip(gradients(moe, x, (y * dy).sum()), gradients(moe, x, (expected * dy).sum())):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", ["loop", "grouped"])
def test_forward_mutates_nothing(make_moe, make_seq, impl):
    moe = make_moe(impl=impl, **FULL)
    x, dy = inputs()
    before, x_before = copy.deepcopy(moe.state_dict()), x.detach().clone()
    attributes = {k: v for k, v in vars(moe).items() if not k.startswith("_")}
    (moe(x, make_seq(ROWS, LEN, **TRAINING))[0] * dy).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in moe.state_dict().items()) and torch.equal(
        x, x_before
    )
    assert attributes == {k: v for k, v in vars(moe).items() if not k.startswith("_")}


class CountOp(TorchDispatchMode):
    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is self.op
        return func(*args, **(kwargs or {}))


def save_routing(ctx, op, *args, **kwargs):
    return (
        CheckpointPolicy.MUST_SAVE
        if op is torch.ops.lmoe.route_topk.default
        else CheckpointPolicy.PREFER_RECOMPUTE
    )


@pytest.mark.parametrize("mode", ["full", "saved ids"])
def test_recomputation_counts_once_and_gives_the_same_bits(make_moe, make_seq, mode):
    moe, seq = make_moe(**FULL), make_seq(ROWS, LEN, **TRAINING)
    x, dy = inputs()
    y, stats = moe(x, seq)
    expected = gradients(moe, x, (y * dy).sum())
    contexts = (
        {"context_fn": functools.partial(create_selective_checkpoint_contexts, save_routing)}
        if mode == "saved ids"
        else {}
    )
    with CountOp(torch.ops.lmoe.route_topk.default) as count:
        again, again_stats = checkpoint(moe, x, seq, use_reentrant=False, **contexts)
        actual = gradients(moe, x, (again * dy).sum())
    assert count.calls == (1 if mode == "saved ids" else 2)
    assert torch.equal(y, again) and all(torch.equal(a, b) for a, b in zip(stats, again_stats))
    assert all(torch.equal(a, b) for a, b in zip(expected, actual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [FULL, {"score": "sigmoid", "balance": "hf_pooled", "groups": 4, "top_groups": 2}],
    ids=["full", "pooled"],
)
def test_compiles_as_one_graph(make_moe, make_seq, dtype, options):
    """Training and evaluation, whose loss weights differ; bf16 with the router left in fp32, as
    mixed precision leaves it."""
    moe = make_moe(dtype=torch.float32, **options)
    for name, p in moe.named_parameters():
        p.data = p.data if name.startswith("router") else p.data.to(dtype)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    for seq in (make_seq(ROWS, LEN, **TRAINING), make_seq(ROWS, LEN)):
        x, dy = inputs(dtype)
        (y, stats), (again, again_stats) = moe(x, seq), compiled(x, seq)
        tolerance = (
            {"rtol": 0.02, "atol": 0.02}
            if dtype == torch.bfloat16
            else {"rtol": 1e-4, "atol": 1e-5}
        )
        torch.testing.assert_close(again, y, **tolerance)
        assert torch.equal(stats.counts, again_stats.counts)
        torch.testing.assert_close(again_stats, stats, rtol=1e-5, atol=1e-6)
        for a, b in zip(gradients(moe, x, (again * dy).sum()), gradients(moe, x, (y * dy).sum())):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("options", [{}, FULL])
def test_flops_are_those_of_the_products(make_moe, make_seq, options):
    moe = make_moe(impl="loop", dtype=torch.float32, **options)
    with FlopCounterMode(display=False) as counter:
        moe(torch.randn(T, D), make_seq(ROWS, LEN))
    assert counter.get_total_flops() == T * moe.flops_per_token()


def test_initial_weights():
    moe = MoE(
        ModelConfig(dim=64, layers=8, init_std=0.02),
        MoEConfig(hidden=64, shared=64, shared_gate=True),
    )
    moe.router.bias.fill_(torch.nan)
    init_weights(moe, 1)
    out = {"experts.w2", "shared.w2.weight"}
    for name, p in moe.named_parameters():
        expected = 0.02 / 4 if name in out else 0.02
        assert p.std().item() == pytest.approx(expected, rel=0.35 if p.numel() < 100 else 0.1), name
    assert moe.router.bias.dtype == torch.float32 and (moe.router.bias == 0).all()


def test_routing_depends_on_the_token_alone(make_moe, make_seq):
    """Dropless: permuting the tokens permutes the output."""
    for impl in ("loop", "grouped"):
        moe = make_moe(impl=impl)
        x, order = torch.randn(T, D, dtype=torch.float64), torch.randperm(T)
        y, _ = moe(x, make_seq(ROWS, LEN))
        permuted, _ = moe(x[order], make_seq(ROWS, LEN))
        torch.testing.assert_close(permuted, y[order], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "options, key",
    [
        ({"top_k": 9}, "moe.top_k"),
        ({"groups": 3}, "moe.groups"),
        ({"groups": 4, "top_groups": 5}, "moe.top_groups"),
        ({"groups": 4, "top_k": 3}, "moe.top_k"),
        ({"shared_gate": True}, "moe.shared"),
    ],
)
def test_impossible_settings_are_refused(options, key):
    with pytest.raises(ValueError, match=key):
        MoE(ModelConfig(dim=16), MoEConfig(**options))


def test_losses_that_depend_on_the_layout_say_so_once(caplog):
    say_layout_dependent.cache_clear()
    for _ in range(3):
        MoE(ModelConfig(dim=16), MoEConfig(balance="switch"))
        MoE(ModelConfig(dim=16), MoEConfig())
    assert [r.message for r in caplog.records if "switch" in r.message] == [
        r.message for r in caplog.records
    ] and len(caplog.records) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_bfloat16_layer_on_a_gpu(make_moe, make_seq, compiled):
    """Against float64 with the same routing, in mixed precision, without waiting for the GPU; the
    same bits twice."""
    moe = make_moe(
        dim=256,
        dtype=torch.float32,
        std=0.05,
        hidden=128,
        experts=16,
        top_k=4,
        shared=128,
        balance_coeff=0.1,
    ).cuda()
    for name, p in moe.named_parameters():
        p.data = p.data if name.startswith("router") else p.data.bfloat16()
    truth = copy.deepcopy(moe).double()
    seq = make_seq(4, 512, **TRAINING)
    x, dy = (torch.randn(2048, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    layer = torch.compile(moe, fullgraph=True) if compiled else moe

    def run(layer, module, x, dy):
        y, stats = layer(x, seq)
        return [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)], stats

    run(layer, moe, x, dy)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, stats = run(layer, moe, x, dy)
        second, _ = run(layer, moe, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    x64 = x.detach().double().requires_grad_()
    expected, expected_stats = run(truth, truth, x64, dy.double())
    assert (
        stats.counts - expected_stats.counts
    ).abs().sum() <= 8  # a tie or two may break the other way in fp32
    for a, b in zip(first, expected):
        assert ((a.double() - b).norm() / b.norm()) < 0.03
