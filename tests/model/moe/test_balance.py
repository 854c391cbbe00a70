import pytest
import torch
import torch.nn.functional as F

from lmoe.model.config import MoEConfig
from lmoe.model.moe.balance import add_loss, balance_loss, hf_pooled_loss, z_loss
from lmoe.model.moe.dispatch import LocalWorld
from lmoe.model.moe.moe import MoEStats

ROWS, LEN, E, K, COEFF = 2, 12, 6, 2, 0.25
T = ROWS * LEN
PER_LAYER = ["sequence", "megatron", "global_batch", "switch"]


def config(kind, **options):
    return MoEConfig(experts=E, top_k=K, balance=kind, balance_coeff=COEFF, **options)


def choose(ids):
    return torch.zeros(len(ids), E, dtype=torch.float64).scatter(1, ids, 1.0)


def stats_of(logits, chosen):
    return MoEStats(chosen.sum(0).long(), None, None, K * logits.softmax(1).mean(0))


def value(kind, logits, chosen, make_seq, world=None, layers=1):
    """The step's loss when the stream is the whole step of a model with `layers` such layers."""
    seq = make_seq(ROWS, LEN, sequence=1 / (ROWS * layers), token=1 / (T * layers), microbatch=1.0)
    if kind == "hf_pooled":
        return hf_pooled_loss([stats_of(logits, chosen)] * layers, COEFF, seq.weights.microbatch)
    return layers * balance_loss(config(kind), logits, chosen, seq, world or LocalWorld())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    "kind, balanced, one_hot",
    [
        ("sequence", 1, E / K),
        ("megatron", 1, E / K),
        ("global_batch", 1, E / K),
        ("switch", 1, E),
        ("hf_pooled", K, E),
    ],
)
def test_known_values(make_seq, kind, balanced, one_hot, layers):
    summed = layers if kind in ("megatron", "global_batch", "switch") else 1
    logits, turns = torch.zeros(T, E, dtype=torch.float64), torch.arange(T)
    chosen = choose(torch.stack([turns % E, (turns + 1) % E], 1))
    torch.testing.assert_close(
        value(kind, logits, chosen, make_seq, layers=layers).item(), COEFF * balanced * summed
    )
    logits = torch.full((T, E), -1e3, dtype=torch.float64)
    logits[:, 4] = 0.0
    chosen = choose(torch.tensor([[1, 4]] * T))
    torch.testing.assert_close(
        value(kind, logits, chosen, make_seq, layers=layers).item(), COEFF * one_hot * summed
    )


def naive(kind, logits, ids, score="softmax"):
    """The formulas, spelled out with loops."""
    p = (
        logits.softmax(1)
        if score == "softmax"
        else logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    )
    if kind == "sequence":  # arXiv 2412.19437 eq. 17-20, mean over the rows
        loss = 0.0
        for row in range(ROWS):
            tokens = range(row * LEN, (row + 1) * LEN)
            for e in range(E):
                f = E / (K * LEN) * sum(e in ids[t].tolist() for t in tokens)
                loss = loss + f * sum(p[t, e] for t in tokens) / LEN / ROWS
        return COEFF * loss
    if kind == "switch":  # arXiv 2101.03961 eq. 4-6
        return (
            COEFF * E * sum((p.argmax(1) == e).double().mean() * p[:, e].mean() for e in range(E))
        )
    counts = torch.stack(
        [(ids == e).sum() for e in range(E)]
    )  # Megatron-LM: sum(p.sum(0) * counts) * E * coeff / (K T^2)
    return (p.sum(0) * counts).sum() * E * COEFF / (K * T**2)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", PER_LAYER)
def test_value_and_gradient_equal_the_formula(make_seq, kind, score):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    ids = (
        (logits + torch.randn(E)).topk(K, dim=1).indices
    )  # a selection bias: not the K most probable
    seq = make_seq(ROWS, LEN, sequence=1 / ROWS, microbatch=1.0)
    actual = balance_loss(config(kind, score=score), logits, choose(ids), seq, LocalWorld())
    expected = naive(kind, logits, ids, score)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    a, b = torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_hf_pooled_equals_the_formula_of_transformers():
    """All layers' logits concatenated; the share of every slot; a sum over slots (so K, not 1, when
    balanced)."""
    layers = [torch.randn(T, E, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    chosen = [choose(logits.topk(K, dim=1).indices) for logits in layers]
    actual = hf_pooled_loss([stats_of(*pair) for pair in zip(layers, chosen)], COEFF, 0.5)
    p = torch.cat(layers).softmax(1)
    mask = F.one_hot(p.topk(K, dim=1).indices, E)
    expected = 0.5 * COEFF * E * (mask.double().mean(0) * p.mean(0).unsqueeze(0)).sum()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(actual, layers), torch.autograd.grad(expected, layers)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


def test_only_the_sequence_loss_is_the_same_in_any_layout(make_seq):
    logits = 3 * torch.randn(4 * LEN, E, dtype=torch.float64)
    chosen = choose(logits.topk(K, dim=1).indices)

    def step(kind, rows):
        """4 rows as microbatches of `rows` rows."""
        seq, size = make_seq(rows, LEN, sequence=1 / 4, microbatch=rows / 4), rows * LEN
        parts = zip(logits.split(size), chosen.split(size))
        return sum(balance_loss(config(kind), *part, seq, LocalWorld()).item() for part in parts)

    assert step("sequence", 4) == pytest.approx(step("sequence", 1), rel=1e-12)
    for kind in PER_LAYER[1:]:
        assert step(kind, 4) != pytest.approx(step(kind, 1), rel=1e-3)


def test_global_batch_takes_the_counts_of_all_ranks(make_seq):
    """Two ranks that are unbalanced alone and balanced together."""
    p = torch.randn(T, E, dtype=torch.float64)
    mine, theirs = (
        choose(torch.tensor([[0, 1]] * (T // 2) + [[2, 1]] * (T // 2))),
        torch.zeros(E, dtype=torch.float64),
    )
    theirs[3:] = 2 * T / 3
    theirs[:3] = 2 * T / 3 - mine.sum(0)[:3]

    class World:
        def sum_counts(self, counts):
            return counts + theirs

    balanced = value("global_batch", p, mine, make_seq, World())
    torch.testing.assert_close(balanced.item(), COEFF)
    assert (
        value("global_batch", p, mine, make_seq).item()
        == value("megatron", p, mine, make_seq).item()
        != COEFF
    )


def test_z_loss(make_seq):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    cfg = MoEConfig(z_coeff=0.1)
    actual = z_loss(cfg, logits, make_seq(ROWS, LEN, token=1 / T))
    expected = 0.1 * logits.exp().sum(1).log().pow(2).mean()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits)
    )
    assert z_loss(cfg, torch.full((T, E), 1e4), make_seq(ROWS, LEN, token=1 / T)).isfinite()


@pytest.mark.parametrize("kind", ["none", *PER_LAYER])
def test_nothing_is_added_outside_training(make_seq, kind):
    logits = torch.randn(T, E)
    assert (
        balance_loss(config(kind), logits, torch.ones(T, E), make_seq(ROWS, LEN), LocalWorld())
        is None
    )
    assert z_loss(config(kind, z_coeff=1.0), logits, make_seq(ROWS, LEN)) is None


def test_add_loss_passes_its_tensor_through_and_gives_the_loss_gradient_one():
    x, w = (
        torch.randn(5, 3, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    )
    y = add_loss(x, w.square().sum())
    assert torch.equal(y, x)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)  # whatever the size of dy
    assert torch.equal(dx, dy) and torch.equal(dw, 2 * w)
