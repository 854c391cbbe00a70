"""Bringing tokens to their experts and back.

A dispatch has two methods; expert and tensor parallelism replace the local one by others:

    begin  sort the choices by expert; ranks begin to exchange what they need to know for it
    run    bring the tokens to the experts that are here, run these, bring their outputs back

`run` gets a function of the experts (x [S, D], weights [S, k] or None, Plan) -> y [S, D], which
sums, for each token of x, over its choices that are here.
"""

from collections.abc import Callable

from torch import Tensor

from lmoe.kernels.experts import Plan, sort_by_expert


class LocalDispatch:
    """Dispatch to `experts` experts that are all here. ranks: those that share the work, if any."""

    reads_sizes = False  # on the host, which no compiled region can do

    def __init__(self, experts: int, ranks=None):
        self.experts = experts
        self.ranks = ranks

    def begin(self, topk_ids: Tensor) -> Plan:
        """Sort by expert. topk_ids [T, K] -> what `run` needs."""
        return sort_by_expert(topk_ids, self.experts)

    def run(self, experts: Callable, x: Tensor, weights: Tensor, pending) -> Tensor:
        """Run every token through its experts. x [T, D], weights [T, K], `pending` of `begin` ->
        y [T, D]."""
        return experts(x, weights, pending)
