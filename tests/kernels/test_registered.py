"""The families as registered ops: compiled, recomputed, refused; and on a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lmoe import kernels
from lmoe.kernels.op import op as op_named
from tests.kernels.ops import OPS, compare, gradients, leaves, make, op_of, run
from tests.kernels.test_families import (
    BORDER_LAYOUTS,
    LENGTHS,
    borders,
    over_ops,
    with_border_states,
    without_waiting,
)


def function_of(op, cu):
    def f(inputs):
        q, *rest = inputs.values()
        inputs = dict(inputs, q=q * 2)
        o, S = op.run(**inputs, output_final_state=True, cu_seqlens=cu, chunk_size=8)
        return o.sin() + 1, S

    return f


@over_ops
def test_compiles_as_one_graph(op):
    cu = borders(LENGTHS)
    inputs, do, dS = make(op, 1, int(cu[-1]), N=len(LENGTHS))
    f = function_of(op, cu)
    torch.compiler.reset()  # one code object serves all ops, and it may only be compiled so often
    g = torch.compile(f, backend="aot_eager", fullgraph=True)
    results = [(out, gradients(inputs, out, [do, dS])) for out in (f(inputs), g(inputs))]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("op", map(op_of, kernels.FAMILIES), ids=lambda op: op.name)
@pytest.mark.parametrize("packed", [True, False])
def test_opcheck(op, packed):
    family = op.family
    cu = borders([3, 0, 9]) if packed else None
    inputs, do, dS = make(op, 1 if packed else 2, 12, H=1, HV=1, K=4, V=4, N=3 if packed else 2)
    S = inputs.pop("initial_state")
    x = op.call(cu, **inputs).tensors
    x = [t if t is None else t.detach().requires_grad_() for t in x]
    tests = ["test_schema", "test_faketensor"]

    def check(suffix, *args, tests=tests):
        made = getattr(family.ops, suffix)
        torch.library.opcheck(made._opoverload, (*args, "chunk"), test_utils=tests)

    for final in (True, False):
        autograd = [*tests, "test_autograd_registration"]
        check("fwd", *x, S, cu, None, 0.5, 4, final, tests=autograd)
    if family.transition is not None:
        check("state", *x[1:], cu, 4)
        cache = family.ops.state(*x[1:], cu, 4, "chunk")[2]
        check("fwd", *x, S, cu, cache, 0.5, 4, True)
        check("dstate", *x, do, cu, cache, 0.5, 4)
    _, _, kept, states = family.ops.fwd(*x, S, cu, None, 0.5, 4, True, "chunk")
    for state_grad in (True, False):
        check("bwd", *x, kept.detach(), states.detach(), do, dS, cu, 0.5, 4, state_grad)
    token = [t[:, 0] if name in family.per_token else t for name, t in zip(family.tensors, x)]
    check("step", *token, S[: len(do)].detach().clone(), 0.5)


def test_ops_return_tensors_of_their_own():
    both = op_named("test_first_twice", "(Tensor x) -> (Tensor, Tensor)")(lambda x: (y := x + 1, y))
    for made in (op_named("test_input", "(Tensor x) -> Tensor")(lambda x: x[1:]), both):
        with pytest.raises(RuntimeError, match="return a copy"):
            made(torch.randn(3))


def test_second_derivatives_are_refused():
    q = torch.randn(1, 4, 1, 4, requires_grad=True)
    (dq,) = torch.autograd.grad(
        kernels.ssd(q, q * 2, q * 3)[0].square().sum(), q, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="lmoe::ssd_bwd has no gradient"):
        dq.sum().backward()


@pytest.mark.parametrize(
    "op", [op for op in OPS if hasattr(kernels, op.family.name)], ids=lambda op: op.name
)
def test_calls_are_the_public_functions(op):
    """Arguments by name lead the ops to the bits of the public functions; without q, and without
    the batch dim, the tensors are the same."""
    public, public_step = (getattr(kernels, op.family.name + x) for x in ("", "_step"))
    inputs, _, _ = make(op, 1, 12, dtype=torch.bfloat16)
    inputs = {name: x.detach() for name, x in inputs.items()}
    S = inputs.pop("initial_state")
    for scale in (None, 0.3):
        call = op.call(**inputs, scale=scale, chunk_size=8)
        assert call.scale == (scale or 8**-0.5)
        o = call.fwd(None, None, False)[0]
        given = inputs | op.numbers | {"scale": scale}
        assert torch.equal(o, public(**given, chunk_size=8)[0])
        token = {
            name: x if name in op.fixed else x[0] for name, x in given.items() if name in inputs
        }
        states = [torch.cat([S] * 12) for _ in range(2)]
        o = [f(**given | token, state=x) for f, x in zip((op.step, public_step), states)]
        assert torch.equal(*o) and torch.equal(*states)
        without = {name: x for name, x in inputs.items() if name != "q"}
        without = op.call(**without, scale=scale).tensors
        flat = {name: x if name in op.fixed else x[0] for name, x in inputs.items()}
        flat = op.call(**flat, scale=scale).tensors
        assert without[0] is None
        for name, x, y, z in zip(op.family.tensors, call.tensors, without, flat):
            assert x is y is z is None or name == "q" or torch.equal(x, y)
            assert x is None or torch.equal(x, z)


@over_ops
def test_tensors_of_the_ops_are_the_arguments(op):
    """As given, but for what the numbers make of them."""
    inputs, _, _ = make(op, 1, 12, dtype=torch.bfloat16)
    del inputs["initial_state"]
    tensors = dict(zip(op.family.tensors, op.call(**inputs).tensors))
    for name in inputs.keys() & tensors:
        normed = "qk_l2norm" in op and name in ("q", "k")
        want = kernels.l2norm(inputs[name].float()) if normed else inputs[name]
        assert torch.equal(tensors[name], want)
    renamed = {"gamma": "g"}
    given = {renamed.get(name, name) for name in inputs} | op.numbers.keys()
    assert {name for name, x in tensors.items() if x is not None} == given - {"qk_l2norm"}
    with pytest.raises(AssertionError, match="nope"):
        op.call(**inputs, nope=inputs["k"])


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", kernels.FAMILIES)
def test_recomputation_sees_single_nodes(name):
    """The op is one call to a dispatch mode, and one that selective recomputation may keep: it does
    not run twice then."""
    op = op_of(name)
    inputs, do, _ = make(op, 1, 12)
    kernel = f"lmoe::{name}_fwd"
    f = function_of(op, None)

    def policy(ctx, func, *args, **kwargs):
        return (
            CheckpointPolicy.MUST_SAVE
            if func.name() == kernel
            else CheckpointPolicy.PREFER_RECOMPUTE
        )

    counts = {}
    for saved in (True, False):
        context = (
            {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if saved else {}
        )
        with Count() as count:
            o, _ = checkpoint(f, inputs, use_reentrant=False, **context)
            o.sum().backward()
        counts[saved] = count.names.count(kernel)
        assert not any(
            x.startswith("aten::bmm") or x.startswith("aten::addcmul") for x in count.names
        )
    assert counts == {True: 1, False: 2}


def test_refusals():
    q = torch.randn(2, 6, 4, 8)
    v = torch.randn(2, 6, 8, 8)
    cases = [
        ("backend: no 'nope'", lambda: kernels.gla(q, q, q, backend="nope")),
        (r"v: shape \[2, 6, 8, 8\] should be \[2, 6, 4, V\]", lambda: kernels.gla(q, q, v)),
        (
            "v: 6 heads are not a multiple",
            lambda: kernels.delta(q, q, v[:, :, :6], torch.ones(2, 6, 6)),
        ),
        ("q: shape", lambda: kernels.gla(q, q[..., :4], q)),
        ("gk: shape", lambda: kernels.gla(q, q, q, q[..., :1])),
        ("g: shape", lambda: kernels.ssd(q, q, v, torch.zeros(2, 6, 4))),
        ("gamma: shape", lambda: kernels.ssd(q, q, v, gamma=torch.zeros(4))),
        (
            "gamma: decays that do not vary",
            lambda: kernels.ssd(q, q, v, torch.zeros(2, 6, 8), torch.zeros(8)),
        ),
        (
            "gamma: decays that do not vary",
            lambda: kernels.ssd(q, q, v, gamma=torch.zeros(8, requires_grad=True)),
        ),
        ("beta: shape", lambda: kernels.delta(q, q, v, torch.ones(2, 6, 4))),
        ("g: shape", lambda: kernels.delta(q, q, v, torch.ones(2, 6, 8), torch.ones(2, 6, 4))),
        (
            "cu_seqlens: packed documents need B = 1",
            lambda: kernels.gla(q, q, q, cu_seqlens=torch.tensor([0, 6])),
        ),
        (
            "cu_seqlens: torch.float32",
            lambda: kernels.gla(q[:1], q[:1], q[:1], cu_seqlens=torch.tensor([0.0, 6.0])),
        ),
        (
            "cu_seqlens: should ascend",
            lambda: kernels.gla(q[:1], q[:1], q[:1], cu_seqlens=torch.tensor([0, 5])),
        ),
        (
            "initial_state: shape",
            lambda: kernels.gla(q, q, q, initial_state=torch.zeros(1, 4, 8, 8)),
        ),
        ("chunk_size: 48", lambda: kernels.gla(q, q, q, chunk_size=48)),
        ("q: T = 0", lambda: kernels.gla(q[:, :0], q[:, :0], q[:, :0])),
        ("q: dtype torch.int64", lambda: kernels.gla(q.long(), q, q)),
        ("v: dtype torch.int64", lambda: kernels.delta(q, q, v.long(), torch.ones(2, 6, 8))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@over_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_against_float64(op, dtype):
    """H = 8, K = V = 128, packed: against the recurrence in float64, without waiting for the
    device; the same bits twice."""
    cu = borders([1, 300, 0, 64, 65, 400, 0]).cuda()
    inputs, do, dS = make(
        op, 1, int(cu[-1]), H=8, HV=8, K=128, V=128, N=7, dtype=dtype, device="cuda"
    )
    wide = leaves({k: x.double() for k, x in inputs.items()})
    want = run(op, wide, do.double(), dS.double(), cu_seqlens=cu, backend="reference")
    with without_waiting():
        got, again = (run(op, inputs, do, dS, cu_seqlens=cu) for _ in range(2))
    forward, backward = (1e-5, 1e-4) if dtype == torch.float32 else (5e-3, 2e-2)
    compare(got, want, {k: forward if k in ("o", "S") else backward for k in want})
    assert all(torch.equal(got[k], again[k]) for k in got)


@pytest.mark.gpu
@over_ops
def test_gpu_states_of_the_borders(op):
    """Without waiting for the device, as the helper sees to."""
    for lengths in BORDER_LAYOUTS:
        one, every = with_border_states(
            op, borders(lengths), "cuda", H=2, K=16, V=16, dtype=torch.float32
        )
        assert all(torch.equal(x, y) for x, y in zip(one, every)), lengths


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, gates",
    [("ssd", "g"), ("gla", "gk"), ("delta", "beta g qk_l2norm"), ("delta", "beta g:1 qk_l2norm")],
)
def test_gpu_memory(name, gates):
    """16k tokens of 8 heads of 128 channels, forward and backward, take less than 2 GiB beside the
    inputs and their gradients."""
    op = op_of(name, gates)
    cu = borders([2048] * 8 + [0] * 56).cuda()
    inputs, do, _ = make(
        op, 1, 16384, H=8, HV=8, K=128, V=128, N=64, dtype=torch.bfloat16, device="cuda"
    )
    del inputs["initial_state"]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, _ = op.run(**inputs, cu_seqlens=cu)
    gradients(inputs, o, do)
    peak = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in inputs.values())
    assert peak < 2 * 2**30, peak
