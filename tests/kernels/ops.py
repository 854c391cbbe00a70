"""The scans under test: every family with every kind of gates that it declares, so that a new one
joins all tests of this folder by its line in the registry, and a few combinations more."""

from dataclasses import dataclass

import torch

from lmoe.kernels import FAMILIES, Scan
from lmoe.kernels.check import WITHOUT_GRADIENT, logits, named, sample
from lmoe.kernels.family import Family, log_decay_sample

FURTHER = {"ssd": ("diag",), "gla": ("u", "gk gv u", "gk gv u tau")}


@dataclass(frozen=True)
class Op:
    """A family with a kind of gates; run and step take tensors by name."""

    family: Family
    gates: str

    @property
    def name(self):
        return "-".join([self.family.name, *self.gates.replace(":", "").split()])

    @property
    def numbers(self):
        return {name: self.family.samples[name] for name in self.family.numbers if name in self}

    @property
    def fixed(self):
        """Arguments that do not run over tokens."""
        return {x.name for x in self.family.arguments if x.name in self and not x.per_token}

    @property
    def decays(self):
        """Log decays of tokens."""
        samples, tokens = self.family.samples, self.family.per_token - self.logits
        return [x for x in samples if x in self and x in tokens and samples[x] is log_decay_sample]

    @property
    def logits(self):
        return logits(self.gates)

    @property
    def wide(self):
        """Arguments in fp32 beside bf16: what is not q, k, v, logits or a plain constant."""
        tokens = self.family.per_token - {"q", "k", "v"} - self.logits
        return {x for x in named(self.gates) if x in tokens or x in self.family.samples}

    def __contains__(self, name):
        return name in named(self.gates)

    def scan(self, chunk_size=64, backend="auto", scale=None, **tensors):
        tokens = {name: tensors.pop(name) for name in [*tensors] if name in self.family.per_token}
        return Scan(
            self.family, tokens, tensors | self.numbers | {"scale": scale}, chunk_size, backend
        )

    def call(self, cu_seqlens=None, q=None, **given):
        scan = self.scan(**given)
        call = self.family.call(scan, cu_seqlens)
        return call if q is None else self.family.with_q(call, scan, q)

    def run(self, q, initial_state=None, output_final_state=False, cu_seqlens=None, **given):
        scan = self.scan(**given)
        return self.family.run(scan, q, initial_state, output_final_state, cu_seqlens)

    def step(self, q, state, **given):
        return self.family.step(self.scan(**given), q, state)


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


OPS = [
    Op(family, gates)
    for family in FAMILIES.values()
    for gates in (*family.gates, *FURTHER.get(family.name, ()))
]


def op_of(name, gates=None):
    """The op of a family with these gates, or with the most that there are."""
    of = [op for op in OPS if op.family.name == name and gates in (None, op.gates)]
    return max(of, key=lambda op: len(op.gates.split()))


def make(op, B, T, H=2, HV=None, K=8, V=12, N=None, seed=0, dtype=torch.float64, device="cpu"):
    """Inputs as leaves that want gradients, with an initial state: (inputs, do, dS)."""
    generator = torch.Generator().manual_seed(seed)
    HV = HV or (2 * H if op.family.grouped else H)
    sizes = {"H": H, "HV": HV, "K": K, "V": V}
    inputs, _ = sample(op.family, op.gates, (B, T), sizes, generator, torch.float64)
    state = (N or B, HV, *op.family.state_shape(K, V))
    inputs["initial_state"] = randn(generator, *state)
    do, dS = randn(generator, B, T, HV, V), randn(generator, *state)
    state_dtype = torch.promote_types(dtype, torch.float32)
    wide = {"initial_state", *op.wide}
    inputs = {
        name: x.to(device, state_dtype if name in wide else dtype) for name, x in inputs.items()
    }
    return leaves(inputs), do.to(device, dtype), dS.to(device, state_dtype)


def run(op, inputs, do, dS, **options):
    """(o, S, gradients by name)"""
    o, S = op.run(**inputs, output_final_state=True, **options)
    return {"o": o.detach(), "S": S.detach()} | gradients(inputs, [o, S], [do, dS])


def gradients(inputs, outputs, cotangents):
    """The gradients of the inputs that want one: {"d" + name: gradient}."""
    wanted = {name: x for name, x in inputs.items() if x.requires_grad}
    return {
        "d" + name: g
        for name, g in zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), cotangents))
    }


def leaves(inputs):
    """Copies of the inputs that want gradients anew."""
    return {
        name: x.detach().clone().requires_grad_(name not in WITHOUT_GRADIENT)
        for name, x in inputs.items()
    }


def error(x, y):
    """Root mean square of x - y relative to y's."""
    x, y = x.double(), y.double()
    return ((x - y).square().mean().sqrt() / y.square().mean().sqrt().clamp(min=1e-30)).item()


def compare(got, want, limit):
    assert got.keys() == want.keys()
    errors = {name: error(got[name], want[name]) for name in want}
    assert all(
        e <= (limit[name] if isinstance(limit, dict) else limit) for name, e in errors.items()
    ), errors
