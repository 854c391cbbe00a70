import pytest
import torch

from lmoe.model.moe.balance import LocalBalanceGroup, add_loss, balance_loss, z_loss

ROWS, LEN, E, K, COEFF = 2, 12, 6, 2, 0.25
T = ROWS * LEN
KINDS = ["sequence", "megatron", "global_batch"]


def choose(ids):
    return torch.zeros(len(ids), E, dtype=torch.float64).scatter(1, ids, 1.0)


def loss_of(kind, logits, chosen, seq, group=None, score="softmax"):
    group = group or LocalBalanceGroup()
    return balance_loss(kind, COEFF, logits, chosen, seq, group, top_k=K, score=score)


def value(kind, logits, chosen, make_seq, group=None, layers=1):
    """The step's loss when the stream is the whole step of a model with `layers` such layers."""
    seq = make_seq(ROWS, LEN, sequence=1 / (ROWS * layers), token=1 / (T * layers), microbatch=1.0)
    return layers * loss_of(kind, logits, chosen, seq, group)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    "kind, balanced, one_hot",
    [
        ("sequence", 1, E / K),
        ("megatron", 1, E / K),
        ("global_batch", 1, E / K),
    ],
)
def test_known_values(make_seq, kind, balanced, one_hot, layers):
    summed = 1 if kind == "sequence" else layers
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
    counts = torch.stack(
        [(ids == e).sum() for e in range(E)]
    )  # Megatron-LM: sum(p.sum(0) * counts) * E * coeff / (K T^2)
    return (p.sum(0) * counts).sum() * E * COEFF / (K * T**2)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_equal_the_formula(make_seq, kind, score):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    ids = (
        (logits + torch.randn(E)).topk(K, dim=1).indices
    )  # a selection bias: not the K most probable
    seq = make_seq(ROWS, LEN, sequence=1 / ROWS, microbatch=1.0)
    actual = loss_of(kind, logits, choose(ids), seq, score=score)
    expected = naive(kind, logits, ids, score)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    a, b = torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_only_the_sequence_loss_is_the_same_in_any_layout(make_seq):
    logits = 3 * torch.randn(4 * LEN, E, dtype=torch.float64)
    chosen = choose(logits.topk(K, dim=1).indices)

    def step(kind, rows):
        """4 rows as microbatches of `rows` rows."""
        seq, size = make_seq(rows, LEN, sequence=1 / 4, microbatch=rows / 4), rows * LEN
        parts = zip(logits.split(size), chosen.split(size))
        return sum(loss_of(kind, *part, seq).item() for part in parts)

    assert step("sequence", 4) == pytest.approx(step("sequence", 1), rel=1e-12)
    for kind in KINDS[1:]:
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

    class Group:
        def sum_counts(self, counts):
            return counts + theirs

    balanced = value("global_batch", p, mine, make_seq, Group())
    torch.testing.assert_close(balanced.item(), COEFF)
    assert (
        value("global_batch", p, mine, make_seq).item()
        == value("megatron", p, mine, make_seq).item()
        != COEFF
    )


def test_z_loss(make_seq):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    actual = z_loss(0.1, logits, make_seq(ROWS, LEN, token=1 / T))
    expected = 0.1 * logits.exp().sum(1).log().pow(2).mean()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits)
    )
    assert z_loss(0.1, torch.full((T, E), 1e4), make_seq(ROWS, LEN, token=1 / T)).isfinite()


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_nothing_is_added_outside_training(make_seq, kind):
    logits = torch.randn(T, E)
    assert loss_of(kind, logits, torch.ones(T, E), make_seq(ROWS, LEN)) is None
    assert z_loss(1.0, logits, make_seq(ROWS, LEN)) is None


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
