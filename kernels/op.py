"""Ops of torch.library, single nodes for torch.compile and for recomputation, whose autograd costs
the host little."""

from itertools import zip_longest

import torch
from torch.library import Library, infer_schema, register_fake

from lmoe.kernels.compat import aliased, below_autograd

LIBRARY = Library("lmoe", "FRAGMENT")


def op(name, schema=None):
    """A decorator that makes an op lmoe::name of a function that mutates nothing and returns none
    of its inputs; for what there is not, among several results, it returns None and the op an empty
    tensor. The result has the methods register_fake and register_autograd of
    torch.library.custom_op, whose own autograd costs the host more than a launch does. schema:
    "(Tensor x, ..) -> Tensor", without defaults; None: by the annotations."""
    return lambda run: Op(
        name, infer_schema(run, mutates_args=()) if schema is None else schema, run
    )


def filled(args, output):
    """Put empty tensors in the place of None among several outputs."""
    if isinstance(output, torch.Tensor):
        return output
    like = next(x for x in args if isinstance(x, torch.Tensor))
    return tuple(like.new_empty(0) if x is None else x for x in output)


class Op:
    def __init__(self, name, schema, run):
        self.name = name
        self.run = run
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, self._checked(run), "CompositeExplicitAutograd")
        self._opoverload = getattr(torch.ops.lmoe, name).default
        self.backward = self._has_no_gradient
        self.setup = lambda ctx, inputs, output: None
        LIBRARY.impl(name, self._autograd(), "Autograd")

    def __call__(self, *args):
        return self._opoverload(*args)

    def register_fake(self, fake):
        def run(*args):
            return filled(args, fake(*args))

        return register_fake(f"lmoe::{self.name}", run, lib=LIBRARY)

    def register_autograd(self, backward, *, setup_context):
        """backward(ctx, *gradients of outputs) -> gradients of the first inputs, those of which
        nobody needs one among them or not; setup_context(ctx, inputs, output)."""
        self.backward = backward
        self.setup = setup_context

    def _checked(self, run):
        def checked(*args):
            output = filled(args, run(*args))
            if aliased(args, output if isinstance(output, tuple) else (output,)):
                raise RuntimeError(
                    f"lmoe::{self.name} returns one of its inputs, or one output twice; return a"
                    " copy"
                )
            return output

        return checked

    def _has_no_gradient(self, ctx, *grads):
        raise NotImplementedError(f"lmoe::{self.name} has no gradient")

    def _autograd(self):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):
                with below_autograd():
                    output = self._opoverload(*args)
                self.setup(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx, *grads):
                found = self.backward(ctx, *grads)
                found = found if isinstance(found, tuple) else (found,)
                pairs = zip_longest(ctx.needs_input_grad, found)
                return tuple(x if needed else None for needed, x in pairs)

        def autograd(*args):
            if torch.is_grad_enabled() and any(
                isinstance(x, torch.Tensor) and x.requires_grad for x in args
            ):
                return Function.apply(*args)
            with below_autograd():
                return self._opoverload(*args)

        return autograd
