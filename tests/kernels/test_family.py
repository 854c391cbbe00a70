"""What a family says of its arguments and states."""

import torch

from lmoe.kernels.family import Family, parse_arguments


def test_head_dims():
    """Tensor parallelism cuts an argument along its heads; one of all heads stays whole."""
    text = "q T H K, v T HV V, g? T HV | T HV K, u? H K, A K HV, rates b, mix T"
    dims = {x.name: (x.optional, x.per_token, x.head_dim()) for x in parse_arguments(text)}
    assert dims == {
        "q": (False, True, 0),
        "v": (False, True, 0),
        "g": (True, True, 0),
        "u": (True, False, 0),
        "A": (False, False, 1),
        "rates": (False, False, None),
        "mix": (False, True, None),
    }


def test_several_states_travel_as_one():
    family = Family(
        name="test_states",
        arguments="q T H K, k T H K, v T H V",
        tensors="q k v",
        reference=None,
        forms={},
        transition=None,
        states=lambda K, V: {"W": (K, V), "b": (V,), "count": (1,)},
    )
    assert family.state_shape(4, 3) == (4 * 3 + 3 + 1,)
    state = torch.arange(2 * 5 * 16.0).view(2, 5, 16)
    views = family.views(state, 4, 3)
    assert {name: x.shape[2:] for name, x in views.items()} == family.states(4, 3)
    assert torch.equal(torch.cat([x.flatten(2) for x in views.values()], -1), state)
    views["b"].zero_()  # of the same memory
    assert not state[..., 12:15].any() and state[..., :12].any() and state[..., 15:].all()


def test_the_only_state_is_itself():
    family = Family(
        name="test_state",
        arguments="q T H K, k T H K, v T H V",
        tensors="q k v",
        reference=None,
        forms={},
        transition=None,
    )
    state = torch.randn(2, 5, 4, 3)
    assert family.state_shape(4, 3) == (4, 3) and family.views(state, 4, 3)["S"] is state
