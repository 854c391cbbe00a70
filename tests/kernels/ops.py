"""The ops under test: a new family joins every test of this folder with a line in OPS."""

from dataclasses import dataclass

import torch

from lmoe import kernels


@dataclass
class Op:
    name: str
    run: callable  # public function
    step: callable
    make: callable  # (B, T, H, HV, K, V, generator) -> dict of float64 inputs
    gates: tuple[str, ...] = ()  # inputs that are log decays
    grouped: bool = False  # HV may be a multiple of H
    fixed: tuple[str, ...] = ()  # inputs that do not run over tokens
    constant: tuple[str, ...] = ()  # inputs without a gradient
    options: tuple = ()  # further keyword arguments
    logits: tuple[str, ...] = ()  # inputs that are logits of gates

    @property
    def family(self):
        return self.run.__name__


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def decay(generator, *shape):
    """Log decays as gates make them: most of them slow, some fast."""
    return torch.nn.functional.logsigmoid(randn(generator, *shape) * 3 + 1)


def make_ssd(g=False, gamma=False, diag=False):
    def make(B, T, H, HV, K, V, generator):
        inputs = {
            "q": randn(generator, B, T, H, K),
            "k": randn(generator, B, T, H, K),
            "v": randn(generator, B, T, HV, V),
        }
        if g:
            inputs["g"] = decay(generator, B, T, HV)
        if gamma:
            inputs["gamma"] = decay(generator, HV)
        if diag:
            inputs["diag"] = randn(generator, B, T, HV)
        return inputs

    return make


def make_gla(gk=False, gv=False, u=False, tau=None):
    def make(B, T, H, HV, K, V, generator):
        inputs = {
            "q": randn(generator, B, T, H, K),
            "k": randn(generator, B, T, H, K),
            "v": randn(generator, B, T, H, V),
        }
        if gk:
            inputs["gk"] = (
                randn(generator, B, T, H, K) * 3 + 1 if tau else decay(generator, B, T, H, K)
            )
        if gv:
            inputs["gv"] = decay(generator, B, T, H, V)
        if u:
            inputs["u"] = randn(generator, H, K)
        return inputs

    return make


def make_delta(g=None):
    def make(B, T, H, HV, K, V, generator):
        inputs = {
            "q": randn(generator, B, T, H, K),
            "k": randn(generator, B, T, H, K),
            "v": randn(generator, B, T, HV, V),
        }
        inputs["beta"] = torch.rand(B, T, HV, generator=generator, dtype=torch.float64) * 2
        if g:
            inputs["g"] = decay(generator, B, T, HV, *[K] * (g == "vector"))
        return inputs

    return make


def _ssd(name, **parts):
    gates, constant = (tuple(x for x in (key,) if parts.get(x)) for key in ("g", "gamma"))
    return Op(
        name,
        kernels.ssd,
        kernels.ssd_step,
        make_ssd(**parts),
        gates,
        grouped=True,
        fixed=constant,
        constant=constant,
    )


def _gla(name, **parts):
    tau = parts.get("tau")
    gates = tuple(x for x in ("gk", "gv") if parts.get(x))
    logits, options = (("gk",), (("tau", tau),)) if tau else ((), ())
    fixed = ("u",) if parts.get("u") else ()
    return Op(
        name,
        kernels.gla,
        kernels.gla_step,
        make_gla(**parts),
        gates[len(logits) :],
        fixed=fixed,
        options=options,
        logits=logits,
    )


def _delta(name, g):
    return Op(
        name,
        kernels.delta,
        kernels.delta_step,
        make_delta(g),
        ("g",) if g else (),
        grouped=True,
        options=(("qk_l2norm", True),),
    )


OPS = [
    _ssd("bla"),
    _ssd("ssd_constant", gamma=True),
    _ssd("ssd", g=True),
    _ssd("ssd_diag", g=True, diag=True),
    _ssd("bla_diag", diag=True),
    _gla("gla_none"),
    _gla("gla", gk=True),
    _gla("gla_tau", gk=True, tau=2.0),
    _gla("gla_gv", gv=True),
    _gla("gla_gk_gv", gk=True, gv=True),
    _gla("gla_u", u=True),
    _gla("gla_gk_u", gk=True, u=True),
    _gla("gla_gk_gv_u", gk=True, gv=True, u=True),
    _gla("gla_tau_gv_u", gk=True, gv=True, u=True, tau=4.0),
    _delta("delta", None),
    _delta("delta_scalar", "scalar"),
    _delta("delta_vector", "vector"),
]


def make(op, B, T, H=2, HV=None, K=8, V=12, N=None, seed=0, dtype=torch.float64, device="cpu"):
    """Inputs as leaves that want gradients, with an initial state: (inputs, do, dS)."""
    generator = torch.Generator().manual_seed(seed)
    HV = HV or (2 * H if op.grouped else H)
    inputs = op.make(B, T, H, HV, K, V, generator)
    inputs["initial_state"] = randn(generator, N or B, HV, K, V)
    do, dS = randn(generator, B, T, HV, V), randn(generator, N or B, HV, K, V)
    state_dtype = torch.promote_types(dtype, torch.float32)
    wide = ("initial_state", "beta", "diag", *op.gates, *op.constant)
    inputs = {
        name: x.to(device, state_dtype if name in wide else dtype) for name, x in inputs.items()
    }
    inputs = {name: x.requires_grad_(name not in op.constant) for name, x in inputs.items()}
    return inputs, do.to(device, dtype), dS.to(device, state_dtype)


def run(op, inputs, do, dS, **options):
    """(o, S, gradients by name)"""
    o, S = op.run(**inputs, output_final_state=True, **dict(op.options), **options)
    return {"o": o.detach(), "S": S.detach()} | gradients(inputs, [o, S], [do, dS])


def gradients(inputs, outputs, cotangents):
    """The gradients of the inputs that want one: {"d" + name: gradient}."""
    wanted = {name: x for name, x in inputs.items() if x.requires_grad}
    return {
        "d" + name: g
        for name, g in zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), cotangents))
    }


def leaves(inputs, op):
    """Copies of the inputs that want gradients anew."""
    return {
        name: x.detach().clone().requires_grad_(name not in op.constant)
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
