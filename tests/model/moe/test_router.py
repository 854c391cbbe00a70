import itertools

import pytest
import torch

from lmoe.model.config import MoEConfig
from lmoe.model.moe.router import Router, route_topk, update_bias

VARIANTS = list(
    itertools.product(["softmax", "sigmoid"], [True, False], [(1, 1), (4, 2)], [False, True])
)


def make_router(bias=None, dim=16, dtype=torch.float64, **options):
    router = Router(dim, MoEConfig(**({"experts": 8, "top_k": 3} | options)), std=1.0)
    torch.nn.init.normal_(router.weight)
    if bias is not None:
        router.bias.copy_(bias)
    return router.to(dtype)


def reference(x, router):
    """One token at a time, from the formulas."""
    cfg, all_ids, all_weights = router.cfg, [], []
    for token in x:
        logits = router.weight @ token
        score = logits.softmax(0) if cfg.score == "softmax" else logits.sigmoid()
        choice = (logits if cfg.score == "softmax" else score).detach() + router.bias
        groups = choice.view(cfg.groups, -1)
        best = (
            groups.topk(2, dim=1).values.sum(1) if cfg.score == "sigmoid" else groups.max(1).values
        )
        if cfg.groups > 1:
            kept = set(best.topk(cfg.top_groups).indices.tolist())
            size = cfg.experts // cfg.groups
            choice = torch.stack(
                [
                    c if e // size in kept else torch.tensor(-torch.inf, dtype=c.dtype)
                    for e, c in enumerate(choice)
                ]
            )
        ids = sorted(sorted(range(cfg.experts), key=lambda e: (-choice[e].item(), e))[: cfg.top_k])
        weights = score[ids]
        if cfg.renormalize:
            weights = weights / weights.sum()
        all_ids.append(ids)
        all_weights.append(weights * cfg.route_scale)
    return torch.tensor(all_ids), torch.stack(all_weights)


@pytest.mark.parametrize("score, renormalize, groups, biased", VARIANTS)
def test_every_variant_equals_the_formulas(score, renormalize, groups, biased):
    options = {
        "score": score,
        "renormalize": renormalize,
        "groups": groups[0],
        "top_groups": groups[1],
        "route_scale": 2.5,
    }
    router = make_router(torch.randn(8) if biased else None, **options)
    x = torch.randn(41, 16, dtype=torch.float64, requires_grad=True)
    ids, weights, logits = router(x)
    expected_ids, expected = reference(x, router)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-14)
    dw = torch.randn_like(weights)
    actual_grads = torch.autograd.grad(weights, (x, router.weight), dw)
    expected_grads = torch.autograd.grad(expected, (x, router.weight), dw)
    for a, b in zip(actual_grads, expected_grads):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_softmax_then_top_k_renormalised_is_top_k_then_softmax():
    router = make_router()
    x = torch.randn(50, 16, dtype=torch.float64)
    ids, weights, logits = router(x)
    best = logits.topk(3, dim=1)
    expected = torch.zeros_like(logits).scatter(1, best.indices, best.values.softmax(1))
    torch.testing.assert_close(
        torch.zeros_like(logits).scatter(1, ids, weights), expected, rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_selects_and_never_enters_a_weight(score):
    bias = torch.zeros(8)
    bias[5] = 100.0
    x = torch.randn(20, 16, dtype=torch.float64)
    plain, biased = (
        make_router(score=score, renormalize=False),
        make_router(bias, score=score, renormalize=False),
    )
    biased.weight.data.copy_(plain.weight)
    ids, weights, logits = biased(x)
    assert (ids == 5).any(1).all() and not (plain(x).topk_ids == 5).any(1).all()
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    assert torch.equal(weights, scores.gather(1, ids))
    assert (
        not any(name == "bias" for name, _ in biased.named_parameters())
        and "bias" in biased.state_dict()
    )


def test_ties_go_to_the_lower_index_and_ids_ascend():
    scores = torch.zeros(3, 64)
    scores[1, [60, 7]] = 1.0
    scores[2] = torch.arange(64) // 2
    ids = route_topk(scores, 4, 1, 1, 1)
    assert ids.tolist() == [[0, 1, 2, 3], [0, 1, 7, 60], [60, 61, 62, 63]]
    assert route_topk(scores, 3, 1, 1, 1)[2].tolist() == [60, 62, 63]
    assert route_topk(torch.zeros(1, 8), 2, 4, 2, 2).tolist() == [[0, 1]]
    assert route_topk(torch.zeros(0, 8), 2, 1, 1, 1).shape == (0, 2)


def test_groups_limit_the_choice():
    scores = torch.randn(200, 16)
    ids = route_topk(scores, 4, 4, 2, 2)
    assert max(len(set(row)) for row in (ids // 4).tolist()) == 2
    # A group of two good experts beats one with the single best expert, and loses to it where only
    # the best counts.
    scores = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.6, 0.5, 0.0, 0.0]])
    assert route_topk(scores, 2, 2, 1, 2).tolist() == [[4, 5]]
    assert route_topk(scores, 2, 2, 1, 1).tolist() == [[0, 1]]
    # Masked experts never win, however low the others are.
    assert (route_topk(torch.randn(50, 8) - 1e30, 4, 2, 1, 2) // 4).float().std(1).max() == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_logits_stay_finite(score, renormalize, size):
    """Sigmoids that underflow and biases that choose improbable experts included."""
    router = make_router(
        100 * torch.randn(8), score=score, renormalize=renormalize, dtype=torch.float32
    )
    x = (torch.randn(30, 16) * size).requires_grad_()
    with torch.no_grad():
        router.weight.copy_(-router.weight.abs())
    ids, weights, logits = router(x)
    (weights * torch.randn_like(weights)).sum().backward()
    assert (
        weights.isfinite().all() and x.grad.isfinite().all() and router.weight.grad.isfinite().all()
    )
    if renormalize:
        torch.testing.assert_close(weights.sum(1), torch.ones(30))


def test_bfloat16_inputs_are_routed_in_fp32():
    router = make_router(dtype=torch.float32)
    x = torch.randn(30, 16).bfloat16()
    ids, weights, logits = router(x)
    assert logits.dtype == weights.dtype == torch.float32 and router.weight.keep_fp32
    assert torch.equal(logits, x.float() @ router.weight.t())


def test_registered_op():
    torch.library.opcheck(torch.ops.lmoe.route_topk.default, (torch.randn(7, 8), 3, 4, 2, 2))
    torch.library.opcheck(torch.ops.lmoe.route_topk.default, (torch.randn(0, 8), 3, 1, 1, 1))


GO = torch.zeros(())


def test_update_bias_pushes_towards_the_mean_without_drift():
    bias = torch.randn(4)
    before = bias.clone()
    update_bias(
        bias, torch.tensor([10, 2, 2, 2]), 1e-3, GO
    )  # mean 4: signs -1 1 1 1, whose mean is 1/2
    torch.testing.assert_close(
        bias - before, 1e-3 * torch.tensor([-1.5, 0.5, 0.5, 0.5]), rtol=1e-3, atol=1e-7
    )
    torch.testing.assert_close(bias.sum(), before.sum())
    before = bias.clone()
    update_bias(bias, torch.tensor([4, 4, 4, 4]), 1e-3, GO)
    assert torch.equal(bias, before)
    update_bias(
        bias, torch.tensor([2**40 + 1, 2**40, 2**40, 2**40 - 1]), 1e-3, GO
    )  # beyond what fp32 could tell apart
    torch.testing.assert_close(
        bias - before, 1e-3 * torch.tensor([-1.0, 0.0, 0.0, 1.0]), rtol=1e-3, atol=1e-7
    )


def test_a_void_step_leaves_the_bias_alone():
    bias = torch.randn(4)
    before = bias.clone()
    update_bias(bias, torch.tensor([10, 2, 2, 2]), 1e-3, torch.ones(()))
    assert torch.equal(bias, before)


def test_the_bias_balances_a_skewed_router():
    router = make_router(dtype=torch.float32, bias_rate=0.02)
    x = torch.randn(500, 16) + 1.0

    def load():
        counts = router(x).topk_ids.flatten().bincount(minlength=8)
        return counts, (counts.max() / counts.float().mean()).item()

    before = load()[1]
    for _ in range(400):
        update_bias(router.bias, load()[0], 0.02, GO)
    assert before > 1.8 and load()[1] < 1.2
