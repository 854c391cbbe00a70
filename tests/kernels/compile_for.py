"""Compiles Triton kernels for GPUs that are not there: python -m tests.kernels.compile_for '[[80,
["ssd", 64, 64, 64, "bf16", true]]]'

A case is an architecture and the arguments of launch_all, or the word "utilities" and those of
launch_utilities. The wrappers themselves launch, those of families on meta tensors, so that
whatever tiles they take are tried; a launch compiles and runs nothing. On stdout a JSON list with
each case's launches, and why it went no further if it did not. Needs a process without
TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lmoe.kernels.gpu import conv, cross_entropy, experts, norm, pointwise, tiles
from tests.kernels.ops import OPS, make

# Shared memory that a block may take, in KB.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Elsewhere:
    """Triton's driver on a machine whose GPU is of the architecture `arch`."""

    arch = None

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # Triton keeps what it has compiled by device

    def get_current_stream(self, device=None):
        return 0


def resources(kernel):
    """(registers a thread, bytes of its stack): a kernel of ours has nothing on the stack but what
    registers could not hold."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.check_output(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], text=True
        )
    return [int(re.search(rf"\b{word}:(\d+)", text)[1]) for word in ("REG", "STACK")]


def launch_all(op, K, V, C, dtype, documents):
    """Every op of the family once, as autograd and context parallelism call them."""
    op = next(x for x in OPS if x.name == op)
    for HV in (2, 4) if op.family.grouped else (2,):
        launch(op, HV, K, V, C, dtype, documents)


def launch(op, HV, K, V, C, dtype, documents):
    inputs, do, _ = make(op, 1, 8 * C, H=2, HV=HV, K=K, V=V, dtype=DTYPES[dtype], N=1)
    inputs = {name: x.detach().to("meta") for name, x in inputs.items() if name != "initial_state"}
    cu = torch.empty(3, dtype=torch.int32, device="meta") if documents else None
    call = op.call(cu, **inputs, chunk_size=C, backend="triton")
    tensors, scale = call.tensors, call.scale
    module, do = op.family.form("triton"), do.to("meta")
    module.state(*tensors[1:], cu, C)
    _, _, kept, S = module.fwd(*tensors, None, cu, None, scale, C, False)
    module.dstate(*tensors, do, cu, kept, scale, C)
    module.bwd(*tensors, kept, S, do, None, cu, scale, C, False)
    if hasattr(module, "step"):
        tokens = [x[0] if x is not None and x.ndim > 2 else x for x in tensors]
        N, (HV, V) = len(tokens[0]), tokens[2].shape[1:]
        module.step(*tokens, torch.empty(N, HV, K, V, device="meta"), scale)


def launch_utilities(D, dtype):
    """Every utility, forward and backward, with and without what is optional, at heads of D
    channels; on the CPU, as autograd needs."""
    T, H, dtype = 40, 3, DTYPES[dtype]
    x, gate = (torch.empty(T, H, D, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias, head = (torch.empty(n, requires_grad=True) for n in (H * D, H * D, D))
    flat, taps, positions = (
        x.flatten(1),
        torch.empty(H * D, 4, dtype=dtype, requires_grad=True),
        torch.empty(T, dtype=torch.int64),
    )
    halo, window = (
        torch.empty(3, H * D, dtype=dtype, requires_grad=True),
        torch.empty(T, 3, H * D, dtype=dtype),
    )
    for y in (
        norm.rms_norm(x, head, 1e-5),
        norm.rms_norm(x, None, 1e-5),
        norm.l2norm(x),
        norm.l2norm(x, wide=True),
        norm.gated_rms_norm(x, head, gate, 1e-5),
        norm.gated_rms_norm(x, head, gate, 1e-5, "sigmoid"),
        norm.wide_rms_norm(x, weight, gate, 1e-5, H * D, "silu", True),
        norm.wide_rms_norm(x, weight, None, 1e-5, H * D),
        norm.head_group_norm(x, weight, bias, gate, 1e-5),
        conv.short_conv(flat, taps, None, positions, None, "silu"),
        conv.short_conv(flat, taps, weight, positions, halo),
        conv.short_conv(flat, taps, weight, positions, halo, "silu"),
        pointwise.swiglu(x, gate),
        pointwise.swiglu(torch.cat([x, gate], -1)),
        pointwise.rope(x, positions, 1e4),
        pointwise.token_shift(flat, positions),
        pointwise.token_shift(flat, positions, halo),
    ):
        y.backward(torch.empty_like(y))
    for E, K in ((8, 2), (64, 8), (512, 1)):
        ids = experts.choose(torch.empty(T, E), K)
        rows, places, ends = experts.sort_by_expert(ids, E, 0)
        tokens, h = torch.empty(T, H * D, dtype=dtype), torch.empty(T * K, 2 * D, dtype=dtype)
        for weights in (torch.empty(T, K), None):
            gathered = experts.gather_rows(tokens, rows, ends, K, weights)
            experts.combine_rows(gathered, weights, places)
            a, dh = torch.empty(T * K, D, dtype=dtype), torch.empty_like(h)
            experts.swiglu_rows(h, ends, a)
            experts.swiglu_rows_bwd(a, h, weights, rows, ends, dh, weights)
    with torch.no_grad():
        conv.short_conv_step(flat, window, taps, None, "silu")
        conv.short_conv_step(flat, window, taps, weight)
        launch_cross_entropy(T, D, dtype)


def launch_cross_entropy(T, V, dtype):
    """Gradients in `dtype` of logits in fp32 and in `dtype`, of one rank and of two, and none."""
    labels, share = torch.empty(T, dtype=torch.int64), torch.empty(T)
    for of_logits in dict.fromkeys((torch.float32, dtype)):
        logits = torch.empty(T, V, dtype=of_logits)
        own = cross_entropy.parts(logits, labels)
        for ranks, gradient in ((1, None), (1, dtype), (2, dtype)):
            gathered = torch.stack([own] * ranks)
            cross_entropy.terms(logits, labels, own, gathered, share, 1e-3, gradient)


def main(cases):
    elsewhere, compile_and_run, launches, results = Elsewhere(), JITFunction.run, {}, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = compile_and_run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in launches:
            registers, stack = resources(kernel)
            constants = {k: v for k, v in kwargs.items() if k in self.arg_names}
            launches[kernel.hash] = {
                "kernel": self.fn.__name__,
                "tiles": constants,
                "warps": kernel.metadata.num_warps,
                "shared": kernel.metadata.shared,
                "registers": registers,
                "stack": stack,
            }

    JITFunction.run = compile_only
    driver.set_active(elsewhere)
    pointwise.INTERPRETED = True  # so that tensors on the CPU are welcome
    for arch, case in cases:
        tiles.ELSEWHERE.shared_memory_per_block_optin = SHARED[arch] * 1024
        elsewhere.arch, refused, failed = arch, None, None
        launches.clear()
        try:
            launch_utilities(*case[1:]) if case[0] == "utilities" else launch_all(*case)
        except ValueError as error:  # of the wrappers, before a launch
            refused = str(error)
        except (TritonError, RuntimeError) as error:
            failed = f"{type(error).__name__}: {error}"
        results.append({"refused": refused, "failed": failed, "launches": list(launches.values())})
    print(json.dumps(results))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
