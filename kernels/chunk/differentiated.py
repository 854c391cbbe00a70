"""A portable form of a family made from one function in differentiable PyTorch, whose backward is
autograd's: right for any recurrence, at the price of a second forward pass and of its memory.

    run(*tensors, S, cu_seqlens, scale, C) -> (o like v, S_out)
    decay(*tensors[1:]) -> A [B, HV, ..]

run takes the tensors of the ops in their order [B, T, ..], states S [N, HV, ..] of every document,
and cu_seqlens [N+1], among them empty ones, or None for N = B rows; S_out [N, HV, ..] may depend on
everything. decay, where segments compose, gives the transition of rows as if no document began
inside them. Both compute in the dtype that they are given, float32 or float64.
"""

from collections.abc import Callable

import torch

from lmoe.kernels.chunk.common import segment
from lmoe.kernels.compat import above_autograd
from lmoe.kernels.family import Family
from lmoe.kernels.grid import document, sequences
from lmoe.kernels.norm import compute_dtype


def own(x):
    """Copy a result: what an op returns may share no memory."""
    return x.clone(memory_format=torch.contiguous_format)


def differentiated(family: Family, run: Callable, decay: Callable | None = None) -> tuple:
    """Make the functions of the form, (state, fwd, dstate, bwd, step, shapes); state and dstate are
    None for a family without a transition, as is decay.

    step runs streams of one token, of tensors that have names of arguments per token.
    """

    def widened(tensors):
        dtype = compute_dtype(tensors[1])
        return [x if x is None else x.to(dtype) for x in tensors]

    def states(given, like, where, cu_seqlens):
        """Return states [N, HV, ..] of all documents: given [N, ..], or [1, ..] of the document
        `where` beside zeros, or None for zeros. like: the tensors."""
        shape, dtype = shapes(*like[1:], cu_seqlens, None)[1:]
        if given is not None and len(given) == shape[0]:
            return own(given.to(dtype))
        S = like[1].new_zeros(shape, dtype=dtype)
        if given is not None:
            S[document(cu_seqlens, where)] = given.to(dtype)
        return S

    def gradients(tensors, S, do, dS_out, cu_seqlens, scale, C):
        """Return the gradients of all tensors that there are and of S [N, ..]."""
        with above_autograd(), torch.enable_grad():
            leaves = [x if x is None else x.detach().requires_grad_() for x in tensors]
            S = S.detach().requires_grad_()
            out = run(*widened(leaves), S, cu_seqlens, scale, C)
            pairs = [(out[0], do.to(out[0].dtype))]
            if dS_out is not None:
                pairs.append((out[1], dS_out))
            wanted = [x for x in leaves if x is not None]
            outputs, cotangents = zip(*pairs)
            found = torch.autograd.grad(
                outputs, [*wanted, S], cotangents, allow_unused=True, materialize_grads=True
            )
        *found, dS = map(own, found)
        found = iter(found)
        return *[x if x is None else next(found) for x in leaves], dS

    @torch.no_grad()
    def state(*args):
        *rest, cu_seqlens, C = args
        tensors = [torch.zeros_like(rest[0]), *rest]
        S = states(None, tensors, 0, cu_seqlens)
        _, S = run(*widened(tensors), S, cu_seqlens, 1.0, C)
        A = own(decay(*widened(tensors)[1:]))
        U, A = segment(family.transition, S, A, cu_seqlens, rest[1].shape[1])
        return own(U), A, None

    @torch.no_grad()
    def fwd(*args):
        *tensors, S_in, cu_seqlens, _, scale, C, output_final_state = args
        S = states(S_in, tensors, 0, cu_seqlens)
        o, S_out = run(*widened(tensors), S, cu_seqlens, scale, C)
        S_out = own(S_out) if output_final_state else None
        return own(o.to(tensors[2].dtype)), S_out, None, S

    def dstate(*args):
        *tensors, do, cu_seqlens, _, scale, C = args
        S = states(None, tensors, 0, cu_seqlens)
        *_, dS = gradients(tensors, S, do, None, cu_seqlens, scale, C)
        return own(dS[document(cu_seqlens, 0)])

    def bwd(*args):
        *tensors, _, S, do, dS_out, cu_seqlens, scale, C, input_state_grad = args
        if dS_out is not None:
            dS_out = states(dS_out, tensors, tensors[2].shape[1] - 1, cu_seqlens)
        *found, dS = gradients(tensors, S, do, dS_out, cu_seqlens, scale, C)
        absent = [name in family.numbers for name in family.tensors]
        found = [None if no else g for no, g in zip(absent, found)]
        return *found, dS if input_state_grad else None

    @torch.no_grad()
    def step(*args):
        *tensors, S, scale = args
        pairs = list(zip(family.tensors, tensors))
        rows = [x[:, None] if x is not None and n in family.per_token else x for n, x in pairs]
        o, new = run(*widened(rows), S, None, scale, 1)
        S.copy_(new)
        return own(o[:, 0])

    def shapes(k, v, *args):
        *_, cu_seqlens, _ = args
        return (0,), family.states_shape(k, v, sequences(v, cu_seqlens)), compute_dtype(k)

    if family.transition is None:
        state = dstate = None
    return state, fwd, dstate, bwd, step, shapes
