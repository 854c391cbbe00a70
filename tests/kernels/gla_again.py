"""gla once more, with a form that is made of its recurrence token by token."""

import torch

from lmoe.kernels import reference
from lmoe.kernels.chunk.differentiated import differentiated
from lmoe.kernels.families.gla import GLA
from lmoe.kernels.family import Family
from lmoe.kernels.gates import log_decay


def run(*args):
    *tensors, S, cu_seqlens, scale, _ = args
    return reference.gla(*tensors, scale, S, cu_seqlens)


def decay(k, v, gk, gv, u, tau):
    pairs = (log_decay(gk, tau), k), (gv, v)
    return torch.cat([(torch.zeros_like(x) if g is None else g).sum(1) for g, x in pairs], -1)


GLA_AGAIN = Family(
    name="test_gla",
    arguments="q T H K, k T H K, v T H V, gk? T H K, gv? T H V, u? H K",
    numbers=GLA.numbers,
    tensors="q k v gk? gv? u? tau?",
    prepare=GLA.prepare,
    refuse=GLA.refuse,
    reference=reference.gla,
    forms={"chunk": __name__},
    transition=GLA.transition,
    gates=GLA.gates,
    samples=GLA.samples,
)
state, fwd, dstate, bwd, step, shapes = differentiated(GLA_AGAIN, run, decay)
