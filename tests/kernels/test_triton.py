"""The Triton kernels against the recurrence in float64: in Triton's interpreter on a CPU, in fp32;
on a GPU in bf16 too."""

import pytest
import torch

from lmoe import kernels
from lmoe.kernels.check import WITHOUT_GRADIENT
from tests.kernels.ops import OPS, compare, error, gradients, leaves, make, op_of, run
from tests.kernels.test_families import BORDER_LAYOUTS, LENGTHS, borders, with_border_states
from tests.kernels.test_transition import LAYOUTS, simulate

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = [op for op in OPS if "triton" in op.family.forms]
# Every kind of gate once; the slow suite has the combinations.
FEW = ("ssd", "ssd-gamma", "ssd-g-diag", "gla-gk-tau", "gla-gk-gv", "gla-gk-u")
FEWER = ("ssd-g-diag", "gla-gk-u")


def over(fast):
    return pytest.mark.parametrize(
        "op",
        [
            pytest.param(op, id=op.name, marks=() if op.name in fast else pytest.mark.slow)
            for op in TRITON
        ],
    )


def limits(names, forward=1e-5, backward=1e-4):
    return {name: forward if name in ("o", "S") else backward for name in names}


def both(op, inputs, do, dS, want=None, **options):
    """Compare with the recurrence in float64."""
    wide = leaves({k: x.double() for k, x in inputs.items()})
    cu = {"cu_seqlens": options["cu_seqlens"]} if "cu_seqlens" in options else {}
    want = run(op, wide, do.double(), dS.double(), backend="reference", **cu)
    compare(run(op, inputs, do, dS, backend="triton", **options), want, limits(want))


@over(FEW)
# One chunk and less; odd sizes; more tiles than one; a sequence that is cut into segments; value
# heads of their own or shared (HV = 4).
@pytest.mark.parametrize(
    "B, T, HV, K, V, C",
    [
        (1, 1, 4, 16, 16, 16),
        (2, 15, 2, 20, 24, 16),
        (1, 70, 4, 80, 72, 32),
        (1, 145, 2, 16, 16, 16),
    ],
)
def test_equals_recurrence(op, B, T, HV, K, V, C):
    HV = HV if op.family.grouped else 2
    both(
        op,
        *make(op, B, T, HV=HV, K=K, V=V, seed=T, dtype=torch.float32, device=DEVICE),
        chunk_size=C,
    )


@over(FEW)
def test_in_bf16(op):
    """The interpreter does the kernels' bf16 products in fp32, of operands that it rounds towards
    zero."""
    inputs, do, dS = make(op, 1, 37, HV=2, K=16, V=16, dtype=torch.bfloat16, device=DEVICE)
    wide = leaves({k: x.double() for k, x in inputs.items()})
    want = run(op, wide, do.double(), dS.double(), backend="reference")
    compare(run(op, inputs, do, dS, backend="triton", chunk_size=16), want, 2e-2)


@over(FEW)
@pytest.mark.parametrize("wide", ["q k", "v", "gates"])
def test_mixed_dtypes(op, wide):
    """One tensor in fp32 and products are exact, whatever the dtype of the others."""
    V = op.family.min_head_dim
    inputs, do, dS = make(op, 1, 37, HV=2, K=16, V=V, dtype=torch.float32, device=DEVICE)
    rounded = {
        "q k": ("v", *op.decays, *op.logits),
        "v": ("q", "k", *op.logits),
        "gates": ("q", "k", "v"),
    }[wide]
    inputs = leaves({k: x.bfloat16() if k in rounded else x for k, x in inputs.items()})
    want = run(
        op,
        leaves({k: x.double() for k, x in inputs.items()}),
        do.double(),
        dS.double(),
        backend="reference",
    )
    got = run(op, inputs, do.to(inputs["v"].dtype), dS, backend="triton", chunk_size=16)
    compare(got, want, {k: 1e-5 if k == "S" and wide != "gates" else 2e-2 for k in want})


@over(FEWER)
def test_many_documents(op):
    """With states of their own, empty ones among them."""
    cu = borders(LENGTHS).to(DEVICE)
    both(
        op,
        *make(
            op, 1, int(cu[-1]), H=1, K=16, V=16, N=len(LENGTHS), dtype=torch.float32, device=DEVICE
        ),
        cu_seqlens=cu,
        chunk_size=16,
    )


@over(FEW)
def test_documents_without_states(op):
    """Documents as in training: chunks hold several of them, their borders lie anywhere."""
    cu = borders([3, 0, 1, 17, 16, 15, 0, 5, 40, 0]).to(DEVICE)
    inputs, do, _ = make(
        op, 1, int(cu[-1]), K=16, V=16, N=len(cu) - 1, dtype=torch.float32, device=DEVICE
    )
    del inputs["initial_state"]
    results = []
    for given, backend in (
        (inputs, "triton"),
        (leaves({k: x.double() for k, x in inputs.items()}), "reference"),
    ):
        o, S = op.run(**given, cu_seqlens=cu, chunk_size=16, backend=backend)
        assert S is None
        results.append({"o": o.detach()} | gradients(given, o, do.to(o.dtype)))
    compare(*results, limits(results[0]))


@pytest.mark.parametrize(
    "op, lengths",
    [
        pytest.param(op, lengths, id=f"{op.name}-{lengths}", marks=() if fast else pytest.mark.slow)
        for op in TRITON
        for lengths in BORDER_LAYOUTS
        for fast in [op.name in ("ssd-gamma", "gla-gk-u") and lengths == [2, 9, 1]]
    ],
)
def test_states_of_the_borders(op, lengths):
    one, every = with_border_states(
        op, borders(lengths), DEVICE, H=1, K=16, V=16, dtype=torch.float32, backend="triton", C=16
    )
    assert all(error(x, y) < 1e-5 for x, y in zip(one, every) if x.numel())


@over(FEWER)
def test_nothing_leaks_between_documents(op):
    """The other documents' outputs and input gradients stay the same bit for bit, wherever the
    borders lie in a chunk."""
    for first in (1, 7, 15, 16, 17):
        cu = borders([first, 21, 14]).to(DEVICE)
        inputs, do, _ = make(
            op, 1, int(cu[-1]), H=1, K=16, V=16, N=3, dtype=torch.float32, device=DEVICE
        )
        del inputs["initial_state"]
        middle, results = slice(int(cu[1]), int(cu[2])), []
        for factor in (1.0, 1.7):
            changed = {k: x.detach().clone() for k, x in inputs.items()}
            for name in changed.keys() - set(op.fixed):
                changed[name][:, middle] *= factor
            cotangent = do.clone()
            cotangent[:, middle] *= factor
            changed = leaves(changed)
            o, _ = op.run(**changed, cu_seqlens=cu, chunk_size=16, backend="triton")
            results.append({"o": o.detach()} | gradients(changed, o, cotangent))
        before, after = results
        for name in before.keys() - {"d" + x for x in op.fixed}:
            a, b = before[name], after[name]
            others = torch.ones(int(cu[-1]), dtype=torch.bool, device=DEVICE)
            others[middle] = False
            assert torch.equal(a[:, others], b[:, others]) and not torch.equal(
                a[:, middle], b[:, middle]
            ), (first, name)


@pytest.mark.parametrize(
    "op", [op for op in TRITON if op.decays and op.name in FEW], ids=lambda op: op.name
)
@pytest.mark.parametrize("gate", [0.0, -30.0, float("-inf"), "mixed", "resets"])
def test_extreme_gates(op, gate):
    inputs, do, dS = make(op, 1, 37, K=16, V=16, dtype=torch.float32, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in op.decays:
            g = inputs[name]
            if gate == "mixed":
                g.copy_(
                    torch.tensor([0.0, -1e-3, -100.0, -1e4])[
                        torch.randint(4, g.shape, generator=generator)
                    ]
                )
            elif gate == "resets":
                g.mul_(0.01)[:, [0, 3, 15, 16, 31]] = -1e4
            else:
                g.fill_(gate)
    want = run(
        op,
        leaves({k: x.double() for k, x in inputs.items()}),
        do.double(),
        dS.double(),
        backend="reference",
    )
    got = run(op, inputs, do, dS, chunk_size=16, backend="triton")
    assert all(torch.isfinite(x).all() for x in got.values())
    size = max(want["d" + k].square().mean().sqrt() for k in ("q", "k", "v"))
    for k in op.decays:  # what remains of sums that cancel
        assert (got["d" + k] - want["d" + k]).square().mean().sqrt() < 2e-5 * size
    # A state that nothing survives is zero up to the weakest decay that the kernels know, e^-30.
    others = [
        k
        for k in want
        if k[1:] not in op.decays and not (k == "dinitial_state" and want[k].abs().max() < 1e-9)
    ]
    compare({k: got[k] for k in others}, {k: want[k] for k in others}, 2e-5)


@over(FEWER)
@pytest.mark.parametrize("t", [7, pytest.param(32, marks=pytest.mark.slow)])
def test_split_in_two(op, t):
    inputs, do, dS = make(op, 2, 50, K=16, V=16, dtype=torch.float32, device=DEVICE)
    whole = run(op, inputs, do, dS, chunk_size=16, backend="triton")
    S, outputs = inputs["initial_state"], []
    for piece in (slice(0, t), slice(t, None)):
        part = {
            k: x if k in op.fixed else x[:, piece]
            for k, x in inputs.items()
            if k != "initial_state"
        }
        o, S = op.run(
            **part, initial_state=S, output_final_state=True, chunk_size=16, backend="triton"
        )
        outputs.append(o)
    o = torch.cat(outputs, 1)
    compare({"o": o, "S": S} | gradients(inputs, [o, S], [do, dS]), whole, limits(whole))


@over(FEW)
def test_steps_equal_forward(op):
    inputs, _, _ = make(op, 3, 5, K=20, V=40, dtype=torch.float32, device=DEVICE)
    inputs = {k: x.detach() for k, x in inputs.items()}
    S = inputs.pop("initial_state")
    o, final = op.run(**inputs, initial_state=S, output_final_state=True, backend="reference")
    state = S.clone()
    for t in range(5):
        token = {k: x if k in op.fixed else x[:, t] for k, x in inputs.items()}
        assert error(op.step(**token, state=state, backend="triton"), o[:, t]) < 1e-6
    assert error(state, final) < 1e-6


@over(FEWER)
def test_same_bits_twice_and_any_strides(op):
    inputs, do, dS = make(op, 1, 40, K=16, V=16, dtype=torch.float32, device=DEVICE)
    first = run(op, inputs, do, dS, chunk_size=16, backend="triton")
    strided = {
        k: torch.stack([x.detach()] * 2, -1)[..., 0].requires_grad_(k not in WITHOUT_GRADIENT)
        for k, x in inputs.items()
    }
    second = run(op, strided, do, dS, chunk_size=16, backend="triton")
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def poisoned():
    """New tensors are full of NaN until something is written to them."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@over(FEWER)
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nothing_is_read_before_it_is_written(op, packed, poisoned):
    assert torch.empty(3, device=DEVICE).isnan().all()
    cu = {"cu_seqlens": borders([3, 0, 21, 17]).to(DEVICE)} if packed else {}
    both(
        op,
        *make(op, 1, 41, K=20, V=24, N=4 if packed else 1, dtype=torch.float32, device=DEVICE),
        chunk_size=16,
        **cu,
    )


@over(FEWER)
def test_simulated_ranks_equal_one(op):
    """Segments of a longer stream: their states, transitions and gradients."""
    for lengths in LAYOUTS[3:5]:
        cu = torch.tensor([0, *lengths, 0]).cumsum(0).to(DEVICE)
        inputs, do, _ = make(
            op, 1, 48, H=1, K=16, V=16, N=len(cu) - 1, dtype=torch.float32, device=DEVICE
        )
        del inputs["initial_state"]
        wide = leaves({k: x.double() for k, x in inputs.items()})
        o, _ = op.run(**wide, cu_seqlens=cu, backend="reference")
        want = {"o": o.detach()} | gradients(wide, o, do.double())
        got = simulate(op, inputs, do, cu, 3, 16, "triton")
        compare(got, want, limits(want))


@pytest.mark.parametrize(
    "name, gates, packed",
    [
        ("ssd", "g diag", True),
        ("gla", "gk gv u", False),
        pytest.param("gla", "gk gv u", True, marks=pytest.mark.slow),
    ],
)
def test_the_fake_ones_promise_what_comes(name, gates, packed):
    op, family = op_of(name, gates), kernels.FAMILIES[name]
    cu, B, N = (borders([3, 0, 19]).to(DEVICE), 1, 3) if packed else (None, 2, 2)
    inputs, do, dS = make(op, B, 22, H=1, HV=1, K=16, V=16, N=N, dtype=torch.float32, device=DEVICE)
    S = inputs.pop("initial_state")
    x = op.call(cu, **inputs).tensors

    def check(suffix, *args):
        made, tests = getattr(family.ops, suffix)._opoverload, ["test_schema", "test_faketensor"]
        torch.library.opcheck(made, (*args, "triton"), test_utils=tests)

    check("state", *x[1:], cu, 16)
    for final, given in ((True, S), (False, S), (False, None)):
        forward = *x, given, cu, None, 0.5, 16, final
        check("fwd", *forward)
        _, _, kept, states = family.ops.fwd(*forward, "triton")
        dS_out = dS if final else None
        rest = kept.detach(), states.detach(), do, dS_out, cu, 0.5, 16, given is not None
        check("bwd", *x, *rest)


def test_refusals():
    q = torch.randn(1, 6, 2, 16, device=DEVICE)
    wide = torch.randn(1, 6, 2, 272, device=DEVICE)
    beta = torch.ones(1, 6, 2, device=DEVICE)
    cases = [
        ("backend: triton has no delta", lambda: kernels.delta(q, q, q, beta, backend="triton")),
        (
            "chunk_size: 8; the triton backend takes",
            lambda: kernels.ssd(q, q, q, chunk_size=8, backend="triton"),
        ),
        (
            "heads of 272 and 16 channels; the triton backend takes up to 256",
            lambda: kernels.gla(wide, wide, q, backend="triton"),
        ),
        (
            "heads of 16 and 8 channels; the triton backend of gla takes 16 and",
            lambda: kernels.gla(q, q, q[..., :8], backend="triton"),
        ),
        (
            "float64, torch.float64; the triton backend takes",
            lambda: kernels.ssd(q.double(), q.double(), q.double(), backend="triton"),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("op", TRITON, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "K, V",
    [(128, 128), (64, 64), (32, 32), (60, 100), (16, 256), (256, 64), (128, 16), (16, 16), (64, 1)],
)
@pytest.mark.parametrize("states", [False, True])
def test_gpu_against_float64(op, dtype, K, V, states):
    """Packed, as in training and with states of the documents; the same bits twice; in fp32 no
    worse than the portable form, which in bf16 too multiplies in fp32."""
    V = max(V, op.family.min_head_dim)
    cu = borders([1, 150, 0, 64, 65, 90, 0])
    inputs, do, dS = make(op, 1, int(cu[-1]), H=4, K=K, V=V, N=7, dtype=dtype, device="cpu")
    if not states:
        del inputs["initial_state"]

    def results(given, device="cuda", **options):
        given = leaves({k: x.to(device) for k, x in given.items()})
        o, S = op.run(
            **given,
            output_final_state=states,
            cu_seqlens=cu.to(device),
            **options,
        )
        outputs, cotangents = ([o, S], [do.to(o), dS.to(S)]) if states else ([o], [do.to(o)])
        found = (
            {"o": o.detach()}
            | ({"S": S.detach()} if states else {})
            | gradients(given, outputs, cotangents)
        )
        return {k: x.cpu() for k, x in found.items()}

    want = results({k: x.double() for k, x in inputs.items()}, "cpu", backend="reference")
    got, again = (results(inputs, backend="triton") for _ in range(2))
    allowed = (
        limits(want)
        if dtype == torch.float32
        else {k: 2e-2 if k[1:] in (*op.decays, *op.logits, "diag", "u") else 5e-3 for k in want}
    )
    compare(got, want, allowed)
    assert all(torch.equal(got[k], again[k]) for k in got)
    if dtype == torch.float32:
        portable = results(inputs, backend="chunk")
        assert all(
            error(got[k], want[k]) < 1.5 * error(portable[k], want[k]) + allowed[k] / 10
            for k in want
        )


@pytest.mark.gpu
@pytest.mark.parametrize("op", TRITON, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_same_bits_twenty_times(op, dtype, poisoned):
    cu = borders([5, 700, 0, 64, 300, 900]).cuda()
    inputs, do, _ = make(op, 1, int(cu[-1]), H=4, K=64, V=64, N=6, dtype=dtype, device="cuda")
    del inputs["initial_state"]

    def results():
        given = leaves(inputs)
        o, _ = op.run(**given, cu_seqlens=cu, backend="triton")
        return {"o": o.detach()} | gradients(given, [o], [do])

    first = results()
    assert all(x.isfinite().all() for x in first.values())
    for _ in range(19):
        again = results()
        assert all(torch.equal(again[k], first[k]) for k in first)


@pytest.mark.gpu
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("name", ["ssd", "gla"])
def test_gpu_more_than_2_31_elements(name):
    """The end of a stream is as if it were alone, as all before has decayed: outputs, and for ssd,
    for which there is room, gradients."""
    T, H, D, last = 2**19 + 100, 64, 64, 2048
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("needs 70 GiB that nothing else uses: run it without xdist's workers")
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    g = torch.full((1, T, H) if name == "ssd" else (1, T, H, D), -1.0, device="cuda")
    assert q.numel() > 2**31
    results = []
    for part in (slice(None), slice(T - last - 64 * 3 - 36, None)):  # both start with a chunk
        inputs = [x[:, part].detach().requires_grad_(name == "ssd") for x in (q, k, v, g)]
        o, _ = getattr(kernels, name)(*inputs, backend="triton")
        grads = torch.autograd.grad(o, inputs, do[:, part]) if name == "ssd" else ()
        results.append([x[:, -last:].float() for x in (o.detach(), *grads)])
        del o, grads, inputs
    assert all(error(a, b) < 1e-2 for a, b in zip(*results, strict=True))
