"""Segments: the monoid of transitions, and a sequence computed on several simulated ranks, as
context parallelism will."""

import operator

import pytest
import torch

from lmoe.kernels.transition import Complex, Dense, Diagonal, Scalar, prefix, suffix
from tests.kernels.ops import OPS, compare, error, gradients, make, op_of, randn

N, H, K, V = 2, 3, 5, 4
over_kinds = pytest.mark.parametrize("kind", [Scalar, Diagonal, Dense, Complex])


def state(kind, generator):
    return randn(generator, N, H, K, V, *[2] * (kind is Complex))


def segment(kind, generator):
    U = state(kind, generator)
    A = randn(generator, N, H, *kind.shape(U.shape[2:]))
    return (A if kind is Dense else -A.abs()), U


def compose(kind, later, earlier):
    return (operator.matmul if kind is Dense else operator.add)(later, earlier)


def combine(kind, later, earlier):
    """Join two neighbouring segments, each (A, U)."""
    (A2, U2), (A1, U1) = later, earlier
    return compose(kind, A2, A1), kind.apply(A2, U1) + U2


@over_kinds
def test_combine_is_associative_and_folds_agree(kind):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (segment(kind, generator) for _ in range(3))
    left, right = combine(kind, combine(kind, c, b), a), combine(kind, c, combine(kind, b, a))
    assert all(error(x, y) < 1e-12 for x, y in zip(left, right))
    A, U = zip(a, b, c)
    S = state(kind, generator).requires_grad_()
    out = prefix(kind, A, U, 3, S)
    assert error(out, kind.apply(left[0], S) + left[1]) < 1e-12
    # suffix is the gradient of prefix.
    ends = [state(kind, generator) for _ in range(3)]
    loss = sum((prefix(kind, A, U, r, S) * ends[r]).sum() for r in range(3))
    (want,) = torch.autograd.grad(loss, S)
    assert error(kind.transposed(A[0], suffix(kind, A, ends, 0)) + ends[0], want) < 1e-12


@over_kinds
def test_reset(kind):
    generator = torch.Generator().manual_seed(0)
    A, U = segment(kind, generator)
    A = kind.reset(A, torch.tensor([True, False]))
    S = kind.apply(A, U)
    assert (S[0] == 0).all() and (S[1] != 0).all()
    assert torch.equal(kind.apply(compose(kind, segment(kind, generator)[0], A), U)[0], S[0])


def test_complex_is_a_product_of_complex_numbers():
    A, U = segment(Complex, torch.Generator().manual_seed(0))
    factor = torch.exp(torch.view_as_complex(A))[..., None]
    want = factor * torch.view_as_complex(U)
    assert error(Complex.apply(A, U), torch.view_as_real(want)) < 1e-12


def simulate(op, inputs, do, cu, P, C, backend="chunk"):
    """Run the stream on P ranks: state, gather and prefix, fwd with the incoming state, dstate,
    suffix, bwd with the outgoing gradient.

    A rank sees its slice of the tokens and cu_seqlens clamped to it, so that documents elsewhere
    are empty. It knows whether its first token continues a document; if not, it resets what arrives
    and sends no gradient back.
    """
    kind, width = op.family.transition, inputs["q"].shape[1] // P
    pieces = [slice(r * width, (r + 1) * width) for r in range(P)]
    starts = [bool((cu == piece.start).any()) for piece in pieces]
    graphs = []
    for piece in pieces:
        local = {x: t if x in op.fixed else t[:, piece] for x, t in inputs.items()}
        bounds = cu.clamp(piece.start, piece.stop) - piece.start
        graphs.append(op.call(bounds, **local, chunk_size=C, backend=backend))
    calls = [
        call._replace(tensors=[x if x is None else x.detach() for x in call.tensors])
        for call in graphs
    ]

    U, A, cache = zip(*(call.state() for call in calls))
    cache = [x if x.numel() else None for x in cache]
    A = [kind.reset(x, torch.tensor([start], device=cu.device)) for x, start in zip(A, starts)]
    S_in = [None if starts[r] else prefix(kind, A, U, r) for r in range(P)]
    o, _, kept, S = zip(*(calls[r].fwd(S_in[r], cache[r], False) for r in range(P)))
    kept = [x if x.numel() else y for x, y in zip(kept, cache)]

    G = [calls[r].dstate(do[:, pieces[r]], kept[r]) for r in range(P)]
    G = [torch.zeros_like(x) if start else x for x, start in zip(G, starts)]
    total = dict.fromkeys(("d" + name for name, x in inputs.items() if x.requires_grad), 0)
    for r in range(P):
        dS = suffix(kind, A, G, r)
        grads = calls[r].bwd(kept[r], S[r], do[:, pieces[r]], dS, False)
        # From the tensors of the ops back to the arguments.
        pairs = [(x, g) for x, g in zip(graphs[r].tensors, grads) if x is not None]
        pairs = [pair for pair in pairs if pair[0].requires_grad]
        found = gradients(inputs, *zip(*pairs))
        total = {name: g + found[name] for name, g in total.items()}
    return {"o": torch.cat(o, 1)} | total


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


@pytest.mark.parametrize(
    "op", [op for op in OPS if op.family.transition is not None], ids=lambda op: op.name
)
@pytest.mark.parametrize("P", [2, 3, 4, 8])
def test_simulated_ranks_equal_one(op, P, order):
    for lengths in LAYOUTS:
        cu = torch.tensor([0, *lengths, 0]).cumsum(0)
        inputs, do, _ = make(op, 1, 48, H=1, K=5, V=4, N=len(cu) - 1)
        del inputs["initial_state"]
        o, _ = op.run(**inputs, cu_seqlens=cu, chunk_size=4)
        want = {"o": o.detach()} | gradients(inputs, o, do)
        compare(simulate(op, inputs, do, cu, P, 4), want, 1e-11)


def test_order_of_dense_transitions_matters():
    """The cases above would see a wrong order of products: swapping two transitions changes the
    state."""
    op = op_of("delta", "beta g:1 qk_l2norm")
    inputs, *_ = make(op, 1, 16, H=1)
    inputs = {name: x.detach() for name, x in inputs.items() if name != "initial_state"}
    pieces = [{name: x[:, s : s + 4] for name, x in inputs.items()} for s in range(0, 16, 4)]
    U, A, _ = zip(*(op.call(**piece, chunk_size=4).state() for piece in pieces))
    assert error(prefix(Dense, A, U, 4), prefix(Dense, [A[0], A[2], A[1], A[3]], U, 4)) > 1e-3
