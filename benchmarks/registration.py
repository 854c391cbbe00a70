"""What registering an op costs the host per call: by lmoe.kernels.op, and by
torch.library.custom_op, which it stands in for.

    python benchmarks/registration.py

The op has the arguments of a scan and does nothing but allocate. Microseconds, medians over 15
turns of 500 calls each.
"""

import statistics
import time

import torch
from torch.library import custom_op

from lmoe.kernels.op import op

TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? diag"
REST = "Tensor? cu_seqlens, float scale, SymInt C, bool final, str backend"
FORWARD = f"({TENSORS}, Tensor? S_in, Tensor? cache, {REST}) -> (Tensor, Tensor, Tensor, Tensor)"
BACKWARD = (
    f"({TENSORS}, Tensor kept, Tensor S, Tensor do, Tensor? dS_out, {REST}) -> (Tensor, Tensor,"
    " Tensor, Tensor)"
)


def forward(q, *rest):
    return torch.empty_like(q), q.new_empty(0), q.new_empty(0), torch.empty_like(q)


def backward(q, k, v, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), q.new_empty(0)


def wire(fwd, bwd):
    def setup(ctx, inputs, output):
        *tensors, _, _, cu, ctx.scale, ctx.C, _, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, cu, *output[2:])

    def gradients(ctx, do, *_):
        *tensors, cu, kept, S = ctx.saved_tensors
        *grads, _ = bwd(*tensors, kept, S, do, None, cu, ctx.scale, ctx.C, False, ctx.backend)
        return *grads, *[None] * 9

    fwd.register_autograd(gradients, setup_context=setup)
    return fwd


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = {
        "op": wire(op("bench_fwd", FORWARD)(forward), op("bench_bwd", BACKWARD)(backward)),
        "custom_op": wire(
            custom_op("lmoe_bench::fwd", forward, mutates_args=(), schema=FORWARD),
            custom_op("lmoe_bench::bwd", backward, mutates_args=(), schema=BACKWARD),
        ),
    }
    leaves = [torch.randn(2, 256, 2, 128, device=device, requires_grad=True) for _ in range(3)]
    do, rest = torch.randn_like(leaves[0]), (None, None, None, None, None, 1.0, 64, False, "none")
    calls = {}
    for name, f in made.items():
        calls[f"{name}, forward"] = lambda f=f: f(*leaves, *rest)
        calls[f"{name}, forward + backward"] = lambda f=f: torch.autograd.grad(
            f(*leaves, *rest)[0], leaves, do
        )
    times = {name: [] for name in calls}
    for _ in range(15):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(500):
                call()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / 500 * 1e6)
    for name, x in times.items():
        print(f"{name:30} {statistics.median(x):6.0f} us")


if __name__ == "__main__":
    main()
