"""Every family against its recurrence in float64, and the properties that fail silently."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe import kernels
from lmoe.kernels import grid, reference
from lmoe.kernels.check import WITHOUT_GRADIENT
from lmoe.kernels.chunk.common import diagonal_step
from tests.kernels.ops import OPS, compare, error, gradients, leaves, make, op_of, run

over_ops = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
LENGTHS = [
    3,
    0,
    1,
    17,
    16,
    15,
    0,
    5,
    0,
    0,
]  # documents, some of them empty; the last ones are padding of cu_seqlens


def borders(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@over_ops
@pytest.mark.parametrize("C, T", [(1, 9), (4, 21), (16, 37), (32, 33), (64, 70), (64, 16)])
def test_chunk_form_equals_recurrence(op, C, T):
    inputs, do, dS = make(op, 2, T, seed=T)
    want = run(op, inputs, do, dS, backend="reference")
    compare(run(op, inputs, do, dS, chunk_size=C), want, 1e-10)


@over_ops
def test_many_documents(op, order):
    cu, N = borders(LENGTHS), len(LENGTHS)
    inputs, do, dS = make(op, 1, int(cu[-1]), N=N)
    want = run(op, inputs, do, dS, cu_seqlens=cu, backend="reference")
    got = run(op, inputs, do, dS, cu_seqlens=cu.int(), chunk_size=8)
    compare(got, want, 1e-10)
    empty = cu.diff() == 0
    assert torch.equal(got["S"][empty], inputs["initial_state"][empty])
    assert torch.equal(got["dinitial_state"][empty], dS[empty])
    # Each document by itself.
    for n in torch.nonzero(~empty).flatten().tolist():
        piece = slice(int(cu[n]), int(cu[n + 1]))
        alone = {
            k: x if k in op.fixed else x[n : n + 1] if k == "initial_state" else x[:, piece]
            for k, x in inputs.items()
        }
        o, S = op.run(**alone, output_final_state=True, chunk_size=8)
        assert error(got["o"][:, piece], o) < 1e-12 and error(got["S"][n : n + 1], S) < 1e-12


@over_ops
def test_documents_without_states(op, order):
    cu = borders(LENGTHS)
    inputs, do, _ = make(op, 1, int(cu[-1]), N=len(LENGTHS))
    del inputs["initial_state"]
    results = []
    for backend in ("reference", "chunk"):
        o, S = op.run(**inputs, cu_seqlens=cu, chunk_size=8, backend=backend)
        assert S is None
        results.append({"o": o} | gradients(inputs, o, do))
    compare(results[1], results[0], 1e-10)


# One document; empty ones before, between and after others; as many chunks as there could be,
# without one beyond the last token.
BORDER_LAYOUTS = [[13], LENGTHS, [0, 0, 3, 0, 9, 0, 0], [0, 20, 0], [1, 1], [2, 9, 1]]


@contextmanager
def without_waiting():
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def with_border_states(op, cu, device="cpu", backend="chunk", C=8, **shape):
    """fwd and bwd with the state of the first token's document and the gradient of the last
    token's: alone, and among zeros for all others.

    Returns two lists: o, S_out, gradients, dS_in, and the gradient of the first token's incoming
    state by autograd.
    """
    (first, last), N = (
        grid.document_of(cu, torch.tensor([0, int(cu[-1]) - 1])).tolist(),
        len(cu) - 1,
    )
    inputs, do, dS = make(op, 1, int(cu[-1]), N=N, device=device, **shape)
    S = inputs.pop("initial_state").detach()
    all_S, all_dS = torch.zeros_like(S), torch.zeros_like(dS)
    all_S[first], all_dS[last], results = S[first], dS[last], []
    inputs = {name: x.detach() for name, x in inputs.items()}
    call = op.call(cu.to(device), **inputs, chunk_size=C, backend=backend)
    with without_waiting() if device == "cuda" and backend == "chunk" else nullcontext():
        for S_in, dS_out in ((S[first : first + 1], dS[last : last + 1]), (all_S, all_dS)):
            S_in = S_in.clone().requires_grad_()
            o, S_out, kept, states = call.fwd(S_in, None, True)
            grads = call.bwd(kept.detach(), states.detach(), do, dS_out, True)
            results.append([o, S_out, *grads, torch.autograd.grad(o, S_in, do)[0]])
    results[1][-1] = results[1][-1][first : first + 1]
    return results


@over_ops
def test_states_of_the_borders(op, order):
    for lengths in BORDER_LAYOUTS:
        one, every = with_border_states(op, borders(lengths))
        assert all(torch.equal(x, y) for x, y in zip(one, every)), lengths


class Allocated(TorchDispatchMode):
    """Counts the elements of the tensors that come into being, views left out."""

    def __init__(self):
        super().__init__()
        self.elements, self.alive = 0, []  # a tensor that lives keeps its address to itself

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.alive += [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        if all(
            out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for x in self.alive
        ):
            self.elements += out.numel()
        self.alive.append(out)
        return out


def test_states_of_the_borders_take_no_memory():
    """Beside what the chain is given and returns, not a state for every chunk or document."""
    cu, C, size = borders([16] * 8 + [0] * 24), 8, (2, 16, 16)
    chunks = grid.Grid(1, 128, cu, C, cu.device, stream_order=True)
    decay, local, out, state = (
        torch.ones(chunks.M, 2, 1, 1),
        torch.ones(chunks.M, *size),
        torch.ones(chunks.M, *size),
        torch.ones(1, *size),
    )
    for returned, run_chain in (
        (0, lambda: chunks.chain(diagonal_step, decay, local, state, out, False)),
        (out.numel(), lambda: chunks.chain_reverse(diagonal_step, decay, local, state, False)),
    ):
        with Allocated() as allocated:
            run_chain()
        assert allocated.elements - returned < 2 * state.numel()


@over_ops
def test_nothing_leaks_between_documents(op, order):
    """Borders at every offset in a chunk; the other documents' outputs and input gradients stay the
    same bit for bit."""
    C = 4
    for offset in range(1, 2 * C):
        cu = borders([offset, 5, 6])
        inputs, do, dS = make(op, 1, int(cu[-1]), H=1, K=4, V=4, N=3)
        before = run(op, inputs, do, dS, cu_seqlens=cu, chunk_size=C)
        middle = slice(int(cu[1]), int(cu[2]))
        changed = {k: x.detach().clone() for k, x in inputs.items()}
        for name, x in changed.items():
            if name not in op.fixed:
                x[1 if name == "initial_state" else (0, middle)] *= 1.7
        do = do.clone()
        do[:, middle] *= 3
        after = run(op, leaves(changed), do, dS, cu_seqlens=cu, chunk_size=C)
        for name in before.keys() - {"d" + x for x in op.fixed}:
            a, b = before[name], after[name]
            if name in ("S", "dinitial_state"):
                same, other = [0, 2], [1]
                assert torch.equal(a[same], b[same]) and not torch.equal(a[other], b[other]), name
            else:
                assert torch.equal(a[:, : middle.start], b[:, : middle.start]) and torch.equal(
                    a[:, middle.stop :], b[:, middle.stop :]
                ), name


@over_ops
def test_outputs_do_not_see_later_tokens(op):
    inputs, _, _ = make(op, 1, 21)
    o, _ = op.run(**inputs, chunk_size=8)
    for p in (0, 1, 7, 8, 13, 20):
        changed = {
            k: x if k in (*op.fixed, "initial_state") else x.detach().clone()
            for k, x in inputs.items()
        }
        for k in changed.keys() - {*op.fixed, "initial_state"}:
            changed[k][:, p:] *= 1.3
        later, _ = op.run(**changed, chunk_size=8)
        assert torch.equal(o[:, :p], later[:, :p]) and not torch.equal(o[:, p:], later[:, p:])


@over_ops
@pytest.mark.parametrize("t", [1, 7, 16, 36])
def test_split_in_two(op, t):
    """Through the carried state: drops a gradient of the initial or the final state and this turns
    red."""
    inputs, do, dS = make(op, 2, 37)
    whole = run(op, inputs, do, dS, chunk_size=8)
    S, outputs = inputs["initial_state"], []
    for piece in (slice(0, t), slice(t, None)):
        part = {
            k: x if k in op.fixed else x[:, piece]
            for k, x in inputs.items()
            if k != "initial_state"
        }
        o, S = op.run(**part, initial_state=S, output_final_state=True, chunk_size=8)
        outputs.append(o)
    o = torch.cat(outputs, 1)
    compare({"o": o, "S": S} | gradients(inputs, [o, S], [do, dS]), whole, 1e-12)


@pytest.mark.parametrize("op", [op for op in OPS if op.decays], ids=lambda op: op.name)
@pytest.mark.parametrize(
    "gate", [0.0, -1e-6, -30.0, -100.0, -1e4, float("-inf"), "mixed", "resets"]
)
def test_extreme_gates(op, gate):
    inputs, do, dS = make(op, 2, 37)
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
            elif (
                gate == "resets"
            ):  # whole tokens, the first and last of a block of 16 among them, beside slow decays
                g.mul_(0.01)[:, [0, 3, 15, 16, 31]] = -1e4
            else:
                g.fill_(gate)
    want = run(op, inputs, do, dS, backend="reference")
    assert all(torch.isfinite(x).all() for x in want.values())
    # A gate's gradient is what remains of sums that cancel: where nothing survives the gate it is
    # zero up to their rounding.
    sums = (*op.decays, *op.logits)
    size = max(want["d" + k].square().mean().sqrt() for k in ("q", "k", "v"))
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        got = run(
            op,
            leaves({k: x.to(dtype) for k, x in inputs.items()}),
            do.to(dtype),
            dS.to(dtype),
            chunk_size=16,
        )
        assert all(torch.isfinite(x).all() for x in got.values())
        for k in sums:
            assert (got["d" + k] - want["d" + k]).square().mean().sqrt() < limit * size
        others = want.keys() - {"d" + k for k in sums}
        compare({k: got[k] for k in others}, {k: want[k] for k in others}, limit)


@pytest.mark.parametrize("z", [-1e4, -100.0, 0.0, 30.0, 1e4, "mixed"])
@pytest.mark.parametrize("op", [op for op in OPS if op.logits], ids=lambda op: op.name)
def test_extreme_logits(op, z):
    """The log decay of a large logit is small and not zero: its gradient is there."""
    inputs, do, dS = make(op, 1, 37, K=16, V=16)
    values = torch.tensor([-1e4, -3.0, 0.0, 8.0, 30.0, 1e4], dtype=torch.float64)
    with torch.no_grad():
        for name in op.logits:
            which = torch.randint(6, inputs[name].shape, generator=torch.Generator().manual_seed(1))
            inputs[name].copy_(values[which] if z == "mixed" else torch.full_like(inputs[name], z))
    want, sums = run(op, inputs, do, dS, backend="reference"), (*op.decays, *op.logits)
    size = max(want["d" + k].square().mean().sqrt() for k in ("q", "k", "v"))
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        got = run(
            op,
            leaves({k: x.to(dtype) for k, x in inputs.items()}),
            do.to(dtype),
            dS.to(dtype),
            chunk_size=16,
        )
        assert all(x.isfinite().all() for x in got.values())
        assert all(
            (got["d" + k] - want["d" + k]).square().mean().sqrt() < limit * size for k in sums
        )
        others = want.keys() - {"d" + k for k in sums}
        compare({k: got[k] for k in others}, {k: want[k] for k in others}, limit)


@pytest.mark.parametrize(
    "op", [op for op in OPS if op.family.name == "delta"], ids=lambda op: op.name
)
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_delta_identical_and_zero_keys(op, beta):
    inputs, do, dS = make(op, 1, 37)
    with torch.no_grad():
        inputs["beta"].fill_(beta)
        inputs["k"][:, 5:25] = inputs["k"][:, 5:6]
        inputs["k"][:, 30:32] = 0
        inputs["q"].mul_(1e3)
    compare(
        run(op, inputs, do, dS, chunk_size=32), run(op, inputs, do, dS, backend="reference"), 1e-9
    )


@over_ops
def test_fp32_and_bf16(op):
    """Limits: rms error 1e-5 forward and 1e-4 backward in fp32; bf16 outputs and gradients are
    rounded to 8 bits, 5e-3 and 2e-2 (gates: fp32).
    """
    for dtype, forward, backward in ((torch.float32, 1e-5, 1e-4), (torch.bfloat16, 5e-3, 2e-2)):
        inputs, do, dS = make(op, 1, 130, K=16, V=16, dtype=dtype)
        wide = leaves({k: x.double() for k, x in inputs.items()})
        want = run(op, wide, do.double(), dS.double(), backend="reference")
        got = run(op, inputs, do, dS)
        assert (
            got["o"].dtype == dtype
            and got["S"].dtype == torch.float32
            and all(got["d" + k].dtype == x.dtype for k, x in inputs.items() if x.requires_grad)
        )
        compare(got, want, {k: forward if k in ("o", "S") else backward for k in want})


@over_ops
def test_same_bits_twice_and_any_strides(op):
    inputs, do, dS = make(op, 2, 37, dtype=torch.float32)
    first = run(op, inputs, do, dS)
    strided = {}
    for k, x in inputs.items():
        x = torch.stack([x.detach()] * 2, -1)[..., 0]
        assert not x.is_contiguous()
        strided[k] = x.requires_grad_(k not in WITHOUT_GRADIENT)
    with torch.autocast("cpu", torch.bfloat16):
        second = run(op, strided, do, dS)
    assert all(torch.equal(first[k], second[k]) for k in first)


@over_ops
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_equal_forward(op, dtype):
    inputs, _, _ = make(op, 3, 9, dtype=dtype)
    inputs = {k: x.detach() for k, x in inputs.items()}
    S = inputs.pop("initial_state")
    o, final = op.run(**inputs, initial_state=S, output_final_state=True, chunk_size=4)
    state, limits = S.clone(), {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}
    for t in range(9):
        token = {k: x if k in op.fixed else x[:, t] for k, x in inputs.items()}
        step = op.step(**token, state=state)
        assert step.dtype == dtype and error(step, o[:, t]) < limits[dtype]
    assert error(state, final) < min(limits[dtype], 1e-5)


def test_special_cases_agree():
    """A decay of zero is none; equal decays of all channels are one per head."""
    inputs, *_ = make(op_of("gla", "gk gv"), 1, 37)
    zero = {k: torch.zeros_like(x) if k in ("gk", "gv") else x for k, x in inputs.items()}
    plain = {k: x for k, x in inputs.items() if k not in ("gk", "gv")}
    assert error(kernels.gla(**zero)[0], kernels.gla(**plain)[0]) < 1e-12
    assert error(kernels.gla(**plain)[0], kernels.ssd(**plain)[0]) < 1e-12
    inputs, *_ = make(op_of("ssd", "g"), 1, 37, HV=2)
    q, k, v, g, S = inputs.values()
    vector = g[..., None].expand(q.shape)
    assert (
        error(
            kernels.gla(q, k, v, vector, initial_state=S)[0],
            kernels.ssd(q, k, v, g, initial_state=S)[0],
        )
        < 1e-12
    )
    gamma = g[0, 0].detach()
    constant = kernels.ssd(q, k, v, gamma=gamma, initial_state=S)[0]
    assert error(kernels.ssd(q, k, v, gamma.expand(g.shape), initial_state=S)[0], constant) < 1e-12
    once = kernels.ssd(q, k, v, g, diag=torch.ones_like(g), initial_state=S)[0]
    assert error(once, kernels.ssd(q, k, v, g, initial_state=S)[0]) < 1e-12
    inputs, *_ = make(op_of("delta", "beta g qk_l2norm"), 1, 37)
    vector = inputs | {"g": inputs["g"][..., None].expand(*inputs["g"].shape, 8)}
    options = {"qk_l2norm": True}
    assert (
        error(kernels.delta(**vector, **options)[0], kernels.delta(**inputs, **options)[0]) < 1e-12
    )
    none = {k: x for k, x in inputs.items() if k != "g"}
    assert (
        error(
            kernels.delta(**inputs | {"g": torch.zeros_like(inputs["g"])}, **options)[0],
            kernels.delta(**none, **options)[0],
        )
        < 1e-12
    )


def test_reference_is_the_textbook_recurrence():
    """One head written out: S = (I - beta k^T k) diag(e^g) S + beta k^T v, and the bonus of gla."""
    inputs, *_ = make(op_of("delta", "beta g:1 qk_l2norm"), 1, 5, H=1, HV=1)
    q, k, v, beta, g, S = (inputs[x][0] for x in ("q", "k", "v", "beta", "g", "initial_state"))
    S = S[0]
    o, final = reference.delta(*(x[None] for x in (q, k, v, beta, g)), 0.5, S[None, None], None)
    for t in range(5):
        kt = k[t]  # [1, K]
        S = (torch.eye(8, dtype=S.dtype) - beta[t] * kt.T @ kt) @ torch.diag(
            g[t, 0].exp()
        ) @ S + beta[t] * kt.T @ v[t]
        assert error(o[0, t], 0.5 * q[t] @ S) < 1e-12
    assert error(final[0, 0], S) < 1e-12
