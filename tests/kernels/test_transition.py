"""Segments: the monoid of transitions, and a sequence computed on several simulated ranks, as
context parallelism will."""

from dataclasses import replace

import pytest
import torch

from lmoe import kernels
from lmoe.kernels.transition import Dense, Diagonal, Scalar, combine, fold, fold_reverse
from tests.kernels.ops import OPS, compare, error, gradients, make, randn

N, H, K, V = 2, 3, 5, 4


def segment(kind, generator):
    shapes = {Scalar: (N, H), Diagonal: (N, H, K + V), Dense: (N, H, K, K)}
    A = randn(generator, *shapes[kind])
    return (A if kind is Dense else -A.abs()), randn(generator, N, H, K, V)


@pytest.mark.parametrize("kind", [Scalar, Diagonal, Dense])
def test_combine_is_associative_and_folds_agree(kind):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (segment(kind, generator) for _ in range(3))
    left, right = combine(kind, combine(kind, c, b), a), combine(kind, c, combine(kind, b, a))
    assert all(error(x, y) < 1e-12 for x, y in zip(left, right))
    A, U = zip(a, b, c)
    S = randn(generator, N, H, K, V).requires_grad_()
    out = fold(kind, A, U, 3, S)
    assert error(out, kind.apply(left[0], S) + left[1]) < 1e-12
    # The reverse fold is the gradient of the fold
    ends = [randn(generator, N, H, K, V) for _ in range(3)]
    loss = sum((fold(kind, A, U, r, S) * ends[r]).sum() for r in range(3))
    (want,) = torch.autograd.grad(loss, S)
    assert error(kind.transposed(A[0], fold_reverse(kind, A, ends, 0)) + ends[0], want) < 1e-12


@pytest.mark.parametrize("kind", [Scalar, Diagonal, Dense])
def test_forget(kind):
    generator = torch.Generator().manual_seed(0)
    A, U = segment(kind, generator)
    A = kind.forget(A, torch.tensor([True, False]))
    S = kind.apply(A, U)
    assert (S[0] == 0).all() and (S[1] != 0).all()
    assert torch.equal(kind.apply(kind.compose(segment(kind, generator)[0], A), U)[0], S[0])


def simulate(op, inputs, do, cu, P, C, backend="chunk"):
    """The stream on P ranks: state, gather and fold, fwd with the incoming state, dstate, reverse
    fold, bwd with the outgoing gradient.

    A rank sees its slice of the tokens and cu_seqlens clamped to it, so that documents elsewhere
    are empty. It knows whether its first token continues a document; if not, it forgets what
    arrives and sends no gradient back.
    """
    family, width = kernels.FAMILIES[op.family], inputs["q"].shape[1] // P
    pieces = [slice(r * width, (r + 1) * width) for r in range(P)]
    local = [
        family.prepare(
            {x: t if x in op.fixed else t[:, piece] for x, t in inputs.items()}, dict(op.options)
        )[0]
        for piece in pieces
    ]
    scale = family.prepare(inputs, dict(op.options))[1]
    bounds = [cu.clamp(piece.start, piece.stop) - piece.start for piece in pieces]
    starts = [bool((cu == piece.start).any()) for piece in pieces]

    U, A, cache = (
        list(x) for x in zip(*(family.state(*x[1:], b, C, backend) for x, b in zip(local, bounds)))
    )
    cache = [x if x.numel() else None for x in cache]
    A = [
        family.transition.forget(x, torch.tensor([start], device=cu.device))
        for x, start in zip(A, starts)
    ]

    S_in = [None if starts[r] else fold(family.transition, A, U, r) for r in range(P)]
    o, _, kept, S = zip(
        *(
            family.fwd(*local[r], S_in[r], bounds[r], cache[r], scale, C, False, backend)
            for r in range(P)
        )
    )
    kept = [x if x.numel() else y for x, y in zip(kept, cache)]

    G = [
        family.dstate(*local[r], do[:, pieces[r]], bounds[r], kept[r], scale, C, backend)
        for r in range(P)
    ]
    G = [torch.zeros_like(x) if start else x for x, start in zip(G, starts)]
    dS = [fold_reverse(family.transition, A, G, r) for r in range(P)]
    grads = zip(
        *(
            family.bwd(
                *local[r],
                kept[r],
                S[r],
                do[:, pieces[r]],
                dS[r],
                bounds[r],
                scale,
                C,
                False,
                backend,
            )[:-1]
            for r in range(P)
        )
    )
    grads = {
        x: sum(g) if x in op.fixed else torch.cat(g, 1)
        for x, g in zip(family.names, grads)
        if x in inputs
    }
    return {"o": torch.cat(o, 1)} | {"d" + x: g for x, g in grads.items()}


def without_norm(op):
    """The op of q and k as they are: a norm's gradient is not the family's affair."""
    return replace(op, options=tuple(x for x in op.options if x[0] != "qk_l2norm"))


# Documents over 48 tokens: one alone, borders on, before and after those of the ranks (every 6 of 8
# ranks), ranks wholly inside a document.
LAYOUTS = [
    [48],
    [24, 24],
    [6, 6, 0, 12, 24],
    [5, 2, 16, 25],
    [7, 10, 1, 30],
    [23, 1, 1, 23],
    [11, 0, 26, 11],
    [1] * 7 + [41],
]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("P", [2, 3, 4, 8])
def test_simulated_ranks_equal_one(op, P, order):
    op = without_norm(op)
    for lengths in LAYOUTS:
        cu = torch.tensor([0, *lengths, 0]).cumsum(0)
        inputs, do, _ = make(op, 1, 48, H=1, K=5, V=4, N=len(cu) - 1)
        del inputs["initial_state"]
        if op.family == "delta":
            inputs["k"] = kernels.l2norm(inputs["k"].detach()).requires_grad_()
        o, _ = op.run(**inputs, cu_seqlens=cu, chunk_size=4, **dict(op.options))
        want = {"o": o.detach()} | gradients(inputs, o, do)
        compare(simulate(op, {x: t.detach() for x, t in inputs.items()}, do, cu, P, 4), want, 1e-11)


def test_order_of_dense_transitions_matters():
    """The cases above would see a wrong order of products: swapping two transitions changes the
    folded state."""
    inputs, *_ = make({op.name: op for op in OPS}["delta_vector"], 1, 16, H=1)
    inputs["k"] = kernels.l2norm(inputs["k"])
    inputs = [inputs[x].detach() for x in ("k", "v", "beta", "g")]
    pairs = [
        kernels.FAMILIES["delta"].state(*(x[:, s : s + 4] for x in inputs), None, 4, "chunk")[:2]
        for s in range(0, 16, 4)
    ]
    U, A = zip(*pairs)
    assert error(fold(Dense, A, U, 4), fold(Dense, [A[0], A[2], A[1], A[3]], U, 4)) > 1e-3
