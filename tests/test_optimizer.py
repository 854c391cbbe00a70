"""Schedules, decay groups, clipping, and steps that must leave no trace."""

import copy
import math

import pytest
import torch
from torch.distributed.tensor import DTensor

import train
from lmoe.checkpoint_state import model_tensors, optimizer_tensors
from lmoe.config.sections import OptimizerConfig, ScheduleConfig
from lmoe.optimizer import build_optimizer, clip_and_step, learning_rate, total_norm
from tests.harness.compare import build_run, full, microbatches_of

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(
    "kind, options, expected",
    [
        ("constant", {}, {1: 0.25, 2: 0.5, 4: 1.0, 5: 1.0, 20: 1.0}),
        ("linear", {}, {1: 0.25, 4: 1.0, 5: 1 - 0.9 / 16, 12: 0.55, 20: 0.1}),
        (
            "cosine",
            {},
            {1: 0.25, 4: 1.0, 8: 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, 12: 0.55, 20: 0.1},
        ),
        (
            "wsd",
            {"decay_steps": 6},
            {1: 0.25, 4: 1.0, 5: 1.0, 14: 1.0, 15: 0.85, 17: 0.55, 20: 0.1},
        ),
        ("wsd", {}, {4: 1.0, 18: 1.0, 19: 0.55, 20: 0.1}),  # the last tenth
        ("linear", {"warmup_steps": 0}, {1: 1 - 0.9 / 20, 20: 0.1}),
        ("constant", {}, {21: 1.0, 99: 1.0}),  # beyond its steps a schedule stays
        *((kind, {}, {21: 0.1, 99: 0.1}) for kind in ("linear", "cosine", "wsd")),
    ],
)
def test_schedules(kind, options, expected):
    config = ScheduleConfig(**{"kind": kind, "warmup_steps": 4, "min_lr_ratio": 0.1, **options})
    for step, factor in expected.items():
        assert learning_rate(config, 2.0, step, 20) == pytest.approx(2 * factor), step


def test_matrices_decay_and_vectors_do_not():
    _, _, model, _, optimizer, _ = build_run(["--optimizer.weight_decay=0.5"])
    before = {name: full(p) for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
        assert len({isinstance(p, DTensor) for p in group["params"]}) == 1
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1.0 if p.ndim == 1 else 1 - 0.1 * 0.5
        torch.testing.assert_close(full(p), before[name] * factor, rtol=1e-12, atol=0, msg=name)
    vectors = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.ndim == 1}
    assert vectors == {"weight", "bias", "A_log", "dt_bias"}  # norms and biases among them


@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.parametrize("max_norm", [1.0, 0.3, 0.0])
def test_clipping_is_that_of_torch(scale, max_norm):
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5))
    theirs = copy.deepcopy(ours)
    optimizer = build_optimizer(
        OptimizerConfig(lr=0.1, eps=1.0), ours
    )  # with this eps the step depends on the gradient's size
    reference = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in theirs.parameters()],
        lr=0.1,
        betas=(0.9, 0.95),
        eps=1.0,
    )
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = scale * torch.randn_like(p)
            q.grad = p.grad.clone()
        norm = total_norm(list(ours.parameters()))
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf)
        torch.testing.assert_close(norm, expected)
        assert clip_and_step(optimizer, norm, max_norm, 0.1).item() == 0
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def spoiled_run(words, value, rank=0):
    """Four steps, of which the second has one gradient element `value` on one rank. Returns what
    changed in it (names), what each step reported as skipped, and the weights at the end; without
    `value`, that step is left out."""
    config, dims, model, parallel, optimizer, build = build_run(words)
    spoil = [False]

    def passes(microbatches, normaliser):
        outputs = parallel.forward_backward(microbatches, normaliser)
        if spoil[0] and dims.rank == rank:
            gradient = next(
                p.grad
                for p in model.parameters()
                if isinstance(p.grad, DTensor) and p.grad.to_local().numel()
            )
            gradient.to_local().view(-1)[0] = value
        return outputs

    spoiled = parallel._replace(forward_backward=passes)

    def state():
        return {
            key: full(tensor)
            for key, tensor in (
                model_tensors(model) | optimizer_tensors(model, [optimizer])
            ).items()
        }

    skips, changed = [], None
    for step in range(4):
        spoil[0] = step == 1
        if step == 1 and value is None:
            continue
        before = state() if step == 1 else None
        batches, valid = microbatches_of(config, dims, build, step)
        *_, skipped = train.train_step(
            model, spoiled, optimizer, config, dims, batches, valid, 1e-2
        )
        skips.append(skipped.item())
        if step == 1:
            after = state()
            assert (
                before.keys() == after.keys()
                and any(key.endswith(".step") for key in after)
                and any("bias" in key for key in after)
            )
            changed = [key for key in after if not torch.equal(before[key], after[key])]
    return changed, skips, state()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_step_leaves_no_trace(value):
    """Weights, moments, step counts and router biases keep every bit, and the run goes on as if
    that step had not been."""
    changed, skips, end = spoiled_run([], value)
    assert changed == [] and skips == [0, 1, 0, 0]
    _, _, expected = spoiled_run([], None)
    assert all(torch.equal(end[key], expected[key]) for key in expected)


@pytest.mark.xdist_group("world4")
def test_all_ranks_skip_what_one_cannot_use(pools):
    for changed, skips, _ in pools(4).run(spoiled_run, ["--parallel.dp_replicate=2"], math.nan, 3):
        assert changed == [] and skips == [0, 1, 0, 0]


def test_router_biases_move_against_the_load():
    """Once per step by bias_rate, whatever the number of microbatches; towards the experts with
    fewer tokens than the mean."""
    config, dims, model, parallel, optimizer, build = build_run([])
    batches, valid = microbatches_of(config, dims, build, 0)
    assert len(batches) == 4
    _, counts, _, _ = train.train_step(
        model, parallel, optimizer, config, dims, batches, valid, 1e-2
    )
    assert list(counts) == ["0.ffn", "1.ffn", "2.ffn"]
    for layer, n in zip(model.moe_layers(), counts.values(), strict=True):
        assert n.sum() == 4 * 48 * 2
        sign = torch.sign(n.mean() - n)
        torch.testing.assert_close(layer.router.bias, 0.05 * (sign - sign.mean()))


def test_auxiliary_losses_are_means_over_the_step():
    """Weights of next to nothing make every logit 0: the sequence loss is its coefficient, the
    z-losses theirs times the squared log of the width."""
    words = ["--model.init_std=1e-30"]
    config, dims, model, parallel, optimizer, build = build_run(words, noise=0.0)
    batches, valid = microbatches_of(config, dims, build, 0)
    losses, *_ = train.train_step(model, parallel, optimizer, config, dims, batches, valid, 0.0)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {
            "loss": math.log(64),
            "z_loss": 1e-3 * math.log(64) ** 2,
            "balance_loss": 0.1,
            "router_z_loss": 0.01 * math.log(4) ** 2,
        },
        rel=1e-7,
    )
