"""Forms made of one differentiable function: gla against its own chunk form, and families whose
states are no matrices through the tests of all families."""

import pytest
import torch

from lmoe.kernels.families.gla import GLA
from tests.kernels import test_families, test_registered, test_transition
from tests.kernels.gla_again import GLA_AGAIN
from tests.kernels.ops import OPS, Op, compare, error, make, run
from tests.kernels.test_families import BORDER_LAYOUTS, LENGTHS, borders
from tests.toys.mini_batch import MINI_BATCH
from tests.toys.rotor import ROTOR

GATES = [op.gates for op in OPS if op.family is GLA]
AGAIN = [Op(GLA_AGAIN, gates) for gates in GATES]
NEW = [Op(family, family.gates[0]) for family in (MINI_BATCH, ROTOR)]
PROPERTIES = {
    "recurrence": lambda op: test_families.test_chunk_form_equals_recurrence(op, 4, 21),
    "documents": lambda op: test_families.test_many_documents(op, None),
    "no states": lambda op: test_families.test_documents_without_states(op, None),
    "borders": lambda op: test_families.test_states_of_the_borders(op, None),
    "leaks": lambda op: test_families.test_nothing_leaks_between_documents(op, None),
    "causality": test_families.test_outputs_do_not_see_later_tokens,
    "split": lambda op: test_families.test_split_in_two(op, 7),
    "dtypes": test_families.test_fp32_and_bf16,
    "strides": test_families.test_same_bits_twice_and_any_strides,
    "steps": lambda op: test_families.test_steps_equal_forward(op, torch.float64),
    "graph": test_registered.test_compiles_as_one_graph,
    "schema": lambda op: test_registered.test_opcheck(op, True),
}


@pytest.mark.parametrize("gates", GATES)
def test_gla_again_equals_its_chunk_form(gates):
    cu = borders(LENGTHS)
    inputs, do, dS = make(Op(GLA, gates), 1, int(cu[-1]), N=len(LENGTHS))
    want, got = (
        run(Op(family, gates), inputs, do, dS, cu_seqlens=cu, chunk_size=8)
        for family in (GLA, GLA_AGAIN)
    )
    compare(got, want, 1e-10)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("lengths", [None, *BORDER_LAYOUTS])
def test_ops_of_gla_again_equal_those_of_its_chunk_form(gates, lengths):
    """The states and gradients of segments, with documents that begin inside, end, or are empty."""
    cu = None if lengths is None else borders(lengths)
    inputs, do, dS = make(Op(GLA, gates), 2 if cu is None else 1, 13 if cu is None else int(cu[-1]))
    inputs = {name: x.detach() for name, x in inputs.items()}
    S, results = inputs.pop("initial_state"), []
    for family in (GLA, GLA_AGAIN):
        call = Op(family, gates).call(cu, **inputs, chunk_size=8)
        U, A, cache = call.state()
        o, S_out, kept, states = call.fwd(S, None, True)
        grads = call.bwd(kept, states, do, dS, True)
        G = call.dstate(do, None)
        results.append([U, A.exp(), G, o, S_out, *grads])
    assert all(error(x, y) < 1e-10 for x, y in zip(*results) if y.numel())
    assert [x.shape for x in results[0]] == [x.shape for x in results[1]]


@pytest.mark.parametrize("op", AGAIN, ids=lambda op: op.name)
@pytest.mark.parametrize("P", [2, 8])
def test_ranks_of_gla_again(op, P):
    test_transition.test_simulated_ranks_equal_one(op, P, None)


@pytest.mark.parametrize("op", [AGAIN[-1], *NEW], ids=lambda op: op.name)
@pytest.mark.parametrize("name", PROPERTIES)
def test_as_every_family(op, name):
    PROPERTIES[name](op)


@pytest.mark.parametrize("P", [2, 3, 8])
def test_ranks_of_complex_states(P):
    test_transition.test_simulated_ranks_equal_one(Op(ROTOR, ROTOR.gates[0]), P, None)


def test_without_a_transition_there_is_no_state_op():
    assert not hasattr(MINI_BATCH.ops, "state") and not hasattr(MINI_BATCH.ops, "dstate")
