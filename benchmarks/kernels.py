"""Times of the scans, forward and forward + backward, against what the memory and the tensor cores
could do.

    python benchmarks/kernels.py --ops gla ssd --shapes short long --backends triton chunk fla --out
    outputs/kernels

kernels: the sum of the GPU kernels' own times (profiler), what a captured graph or a busy stream
would pay; wall: of calls one after another, which the host may not launch as fast as they run, the
backends in turns; extra: memory beside the inputs. The floor is the larger of the bytes that must
move (q, k, v, gates and o once; backward the same, do, and their gradients) at --bandwidth and the
FLOPs of the chunk form at --flops. chunk is compiled with torch.compile's defaults. fla is
flash-linear-attention, where it is installed; --lift-refusals times its gated backward where it
refuses to run because of a Triton that miscompiles it. --jobs 16 first runs every case once in a
process of its own, 16 side by side, so that all is compiled when it is measured (fla tries hundreds
of variants of its kernels, minutes for one op). Without a GPU there are wall times only. Prints a
table and writes kernels.json and, with matplotlib, kernels.png to --out.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where train.py is
from benchmarks.timing import pyplot, synchronise, walls
from lmoe import kernels

# B, T, H, HV, K, V, and the lengths of documents (None: rows)
SHAPES = {
    "short": (8, 2048, 8, 8, 128, 128, None),
    "long": (1, 16384, 8, 8, 128, 128, None),
    "narrow": (8, 2048, 16, 16, 64, 64, None),
    "mamba2": (8, 2048, 1, 32, 128, 64, None),
    "ragged": (1, 16384, 8, 8, 128, 128, [1 + (i * 7919) % 1023 for i in range(64)]),
    "tiny": (2, 256, 2, 2, 32, 32, None),
}
TAU = 16.0  # of gates that are given as logits
# name -> (function, the gates that it has)
OPS = {
    "bla": (kernels.ssd, ()),
    "retnet": (kernels.ssd, ("gamma",)),
    "ssd": (kernels.ssd, ("g",)),
    "gla": (kernels.gla, ("gk",)),
    "gla_logits": (kernels.gla, ("gk logits",)),
    "rwkv6": (kernels.gla, ("gk", "u")),
    "gfw": (kernels.gla, ("gk", "gv")),
    "deltanet": (kernels.delta, ("beta",)),
    "gated_deltanet": (kernels.delta, ("beta", "g")),
    "kda": (kernels.delta, ("beta", "gk")),
}


def borders(lengths, T):
    """cu_seqlens of the documents, repeated until they fill T tokens."""
    ends = [0]
    while lengths and ends[-1] < T:
        ends.append(min(T, ends[-1] + lengths[(len(ends) - 1) % len(lengths)]))
    return ends


def make(op, shape, device, dtype):
    """(inputs by name, do, cu_seqlens or None)"""
    B, T, H, HV, K, V, lengths = shape
    function, gates = OPS[op]
    if function is kernels.gla and H != HV:
        return None
    torch.manual_seed(0)

    def randn(*size, dtype=dtype):
        return torch.randn(*size, device=device, dtype=dtype)

    inputs = {"q": randn(B, T, H, K), "k": randn(B, T, H, K), "v": randn(B, T, HV, V)}
    logs = {"g": (B, T, HV), "gk": (B, T, HV, K), "gv": (B, T, HV, V)}
    for gate in gates:
        if gate in logs:
            name = "g" if function is kernels.delta else gate
            inputs[name] = (
                torch.nn.functional.logsigmoid(randn(*logs[gate], dtype=torch.float32)) / 16
            )
        elif gate == "beta":
            inputs["beta"] = torch.sigmoid(randn(B, T, HV, dtype=torch.float32))
        elif gate == "gamma":
            inputs["gamma"] = torch.log1p(
                -(2.0 ** (-5 - torch.arange(HV, device=device, dtype=torch.float32)))
            )
        elif gate == "gk logits":
            inputs["gk"] = randn(B, T, HV, K)
        elif gate == "u":
            inputs["u"] = randn(H, K, dtype=torch.float32)
    for name, x in inputs.items():
        x.requires_grad_(name != "gamma")
    cu = (
        None
        if lengths is None
        else torch.tensor(borders(lengths, T), device=device, dtype=torch.int32)
    )
    return inputs, randn(B, T, HV, V), cu


def floor(op, shape, inputs, bandwidth, flops):
    """(forward, forward + backward) in ms: bytes and FLOPs of the chunk form with chunks of 64."""
    B, T, H, HV, K, V, _ = shape
    moved = sum(x.nbytes for x in inputs.values())
    o = B * T * HV * V * inputs["v"].element_size()
    token = B * T * HV
    C = 64
    if OPS[op][0] is kernels.delta:
        work, more = (
            C * (6 * K + 4 * V) + 6 * K * V + 2 * C * C / 3,
            C * (14 * K + 12 * V) + 16 * K * V,
        )
    else:
        work, more = 2 * C * (K + V) + 4 * K * V, 2 * C * (3 * K + 2 * V) + 10 * K * V
    forward = max((moved + o) / bandwidth, token * work / flops) * 1e3
    backward = max((2 * moved + o) / bandwidth, token * more / flops) * 1e3
    return forward, forward + backward


def fla_call(op, inputs, cu, lift):
    """The same by flash-linear-attention, or None where it has no such op."""
    import fla.ops as fla

    if lift:
        import fla.ops.common.chunk_o as chunk_o

        chunk_o.TRITON_ABOVE_3_7_1 = True
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if q.shape[2] != v.shape[2]:  # its ops without a delta rule know no grouped heads
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    rest = {"cu_seqlens": None if cu is None else cu.long()}
    calls = {
        "bla": lambda: fla.chunk_linear_attn(q, k, v, normalize=False),
        "retnet": lambda: fla.chunk_retention(q, k, v, **rest),
        "ssd": lambda: fla.chunk_simple_gla(q, k, v, inputs["g"], **rest),
        "gla": lambda: fla.chunk_gla(q, k, v, inputs["gk"], **rest),
        "gla_logits": lambda: fla.chunk_gla(
            q, k, v, torch.nn.functional.logsigmoid(inputs["gk"].float()) / TAU, **rest
        ),
        "rwkv6": lambda: fla.chunk_rwkv6(q, k, v, inputs["gk"], inputs["u"], **rest),
        "deltanet": lambda: fla.chunk_delta_rule(
            q, k, v, inputs["beta"].to(q.dtype), use_qk_l2norm_in_kernel=True, **rest
        ),
        "gated_deltanet": lambda: fla.chunk_gated_delta_rule(
            q, k, v, inputs["g"], inputs["beta"], use_qk_l2norm_in_kernel=True, **rest
        ),
        "kda": lambda: fla.chunk_kda(
            q, k, v, inputs["g"], inputs["beta"], use_qk_l2norm_in_kernel=True, **rest
        ),
    }
    return calls.get(op)


def options_of(op):
    return (
        {"qk_l2norm": True}
        if OPS[op][0] is kernels.delta
        else {"tau": TAU}
        if op == "gla_logits"
        else {}
    )


def own_call(op, inputs, cu, backend):
    function, options = OPS[op][0], options_of(op)

    def call():
        return function(**inputs, **options, cu_seqlens=cu, backend=backend)

    if backend != "chunk" or not inputs["q"].is_cuda:
        return call
    torch.compiler.reset()  # it gives up on a function that it has compiled for eight cases
    return torch.compile(call)


def kernel_time(f, repeats):
    """(ms of the GPU's kernels per call, launches per call)"""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repeats):
            f()
        synchronise()
    rows = [e for e in trace.key_averages() if e.self_device_time_total > 0]
    return (
        sum(e.self_device_time_total for e in rows) / repeats / 1e3,
        sum(e.count for e in rows) / repeats,
    )


def passes(call, inputs, do):
    """{"forward": a function, "both": a function}"""
    leaves = [x for x in inputs.values() if x.requires_grad]

    def forward():
        with torch.no_grad():
            call()

    def both():
        out = call()
        torch.autograd.grad(
            out[0] if isinstance(out, tuple) else out, leaves, do, allow_unused=True
        )

    return {"forward": forward, "both": both}


def measure(functions, repeats):
    """What needs no comparison: time of the first call, and on a GPU its kernels and memory."""
    start = time.perf_counter()
    functions["both"]()
    synchronise()
    row = {"first_s": time.perf_counter() - start}
    for name, f in functions.items():
        f()
        synchronise()
        if torch.cuda.is_available():
            row[f"{name}_kernels_ms"], row[f"{name}_launches"] = kernel_time(f, repeats)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        functions["both"]()
        synchronise()
        row["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def measure_case(op, shape, args, device):
    """A row for each backend."""
    made = make(op, SHAPES[shape], device, getattr(torch, args.dtype))
    if made is None:
        return []
    inputs, do, cu = made
    low = floor(op, SHAPES[shape], inputs, args.bandwidth, args.flops)
    rows, functions = {}, {}
    for backend in args.backends:
        row = {
            "op": op,
            "shape": shape,
            "backend": backend,
            "forward_floor_ms": low[0],
            "both_floor_ms": low[1],
        }
        try:
            call = (
                fla_call(op, inputs, cu, args.lift_refusals)
                if backend == "fla"
                else own_call(op, inputs, cu, backend)
            )
            if call is None:
                continue
            functions[backend] = passes(call, inputs, do)
            if args.once:
                functions[backend]["both"]()
                synchronise()
                sys.exit()
            row |= measure(functions[backend], args.repeats)
        except Exception as error:  # what one cannot do is a row too
            functions.pop(backend, None)
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        rows[backend] = row
    for name in ("forward", "both"):
        for backend, ms in walls(
            {backend: f[name] for backend, f in functions.items()}, args.repeats
        ).items():
            rows[backend][f"{name}_wall_ms"] = ms
    return list(rows.values())


def show(row):
    if "error" in row:
        return f"{row['op']:15} {row['shape']:8} {row['backend']:8} {row['error']}"
    forward, both = (
        row.get(f"{name}_kernels_ms", row[f"{name}_wall_ms"]) for name in ("forward", "both")
    )
    return (
        f"{row['op']:15} {row['shape']:8} {row['backend']:8} {forward:8.3f} {both:8.3f}"
        f" {row['both_floor_ms']:7.3f} {row['both_wall_ms']:8.3f}"
        f" {row.get('both_launches', 0):8.0f} {row.get('extra_mib', 0):6.0f} {row['first_s']:8.2f}"
    )


def replayed(f, times=20):
    """A function that calls f that often, on a GPU by replaying a graph."""
    if not torch.cuda.is_available():
        return lambda: [f() for _ in range(times)]
    for _ in range(2):
        f()
    synchronise()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            f()
    return graph.replay


@torch.no_grad()
def decode(args, device, N=128, H=8, D=128, times=20):
    """One token for each of N sequences against a copy of their states, which reads and writes them
    once, as a step must. ms."""
    state = torch.zeros(N, H, D, D, device=device)
    other = torch.empty_like(state)
    for op in args.ops:
        inputs, _, _ = make(op, (N, 1, H, H, D, D, None), device, getattr(torch, args.dtype))
        token = {name: x[:, 0] if x.shape[:2] == (N, 1) else x for name, x in inputs.items()}
        step = {
            kernels.ssd: kernels.ssd_step,
            kernels.gla: kernels.gla_step,
            kernels.delta: kernels.delta_step,
        }[OPS[op][0]]
        calls = {
            "step": lambda step=step, token=token, op=op: step(
                **token, **options_of(op), state=state
            ),
            "copy": lambda: other.copy_(state),
        }
        ms = walls({name: replayed(f, times) for name, f in calls.items()}, args.repeats)
        print(
            f"{op:15} step {ms['step'] / times:.4f} ms, copy of the states"
            f" {ms['copy'] / times:.4f} ms"
        )


def compile_ahead(args):
    """Every case once, --jobs of them side by side, each in its own process: what they compile
    stays on disk."""
    options = ["--dtype", args.dtype, "--once", *["--lift-refusals"] * args.lift_refusals]
    cases = [
        (op, shape, backend)
        for op in args.ops
        for shape in args.shapes
        for backend in args.backends
    ]
    # What fla measures while others run beside it must not be remembered.
    environment = os.environ | {"FLA_CACHE_RESULTS": "0"}

    def run(case):
        words = [word for pair in zip(("--ops", "--shapes", "--backends"), case) for word in pair]
        subprocess.run(
            [sys.executable, __file__, *words, *options],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    start = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        for n, _ in enumerate(pool.map(run, cases), 1):
            print(
                f"\rcompiled {n} of {len(cases)}, {time.perf_counter() - start:.0f} s",
                end="",
                flush=True,
            )
    print()


def plot(rows, path):
    plt = pyplot()
    if plt is None:
        return
    key = "both_kernels_ms" if any("both_kernels_ms" in row for row in rows) else "both_wall_ms"
    cases = list(dict.fromkeys((row["op"], row["shape"]) for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure, axes = plt.subplots(figsize=(1 + 0.9 * len(cases), 4))
    width = 0.8 / len(backends)
    for i, backend in enumerate(backends):
        found = {
            (row["op"], row["shape"]): row.get(key) for row in rows if row["backend"] == backend
        }
        heights = [found.get(case) or 0 for case in cases]
        axes.bar([n + i * width for n in range(len(cases))], heights, width, label=backend)
    floors = {(row["op"], row["shape"]): row["both_floor_ms"] for row in rows}
    axes.plot(
        [n + 0.4 - width / 2 for n in range(len(cases))],
        [floors[case] for case in cases],
        "k_",
        markersize=18,
        label="floor",
    )
    axes.set_xticks(
        [n + 0.4 - width / 2 for n in range(len(cases))], [f"{op}\n{shape}" for op, shape in cases]
    )
    axes.set_ylabel("forward + backward, ms")
    axes.set_yscale("log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ops", nargs="+", default=["bla", "retnet", "ssd", "gla", "rwkv6"], choices=OPS
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["short", "long", "narrow", "mamba2", "ragged"],
        choices=SHAPES,
    )
    parser.add_argument(
        "--backends", nargs="+", default=["triton", "chunk"], choices=["triton", "chunk", "fla"]
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--bandwidth", type=float, default=3.0e12, help="bytes/s that a copy reaches"
    )
    parser.add_argument(
        "--flops", type=float, default=760e12, help="FLOP/s that a large matrix product reaches"
    )
    parser.add_argument(
        "--lift-refusals",
        action="store_true",
        help="time fla's gated backward on a GPU where it refuses",
    )
    parser.add_argument(
        "--jobs", type=int, default=0, help="processes that compile all cases first; 0: none"
    )
    parser.add_argument("--once", action="store_true", help="run one case once and print nothing")
    parser.add_argument(
        "--decode",
        action="store_true",
        help="time one token of 128 sequences instead, by replay of a graph on a GPU",
    )
    parser.add_argument("--out", default="outputs/kernels")
    args = parser.parse_args()
    if args.jobs:
        compile_ahead(args)
    device, rows = "cuda" if torch.cuda.is_available() else "cpu", []
    if args.decode:
        return decode(args, device)
    print(
        "op              shape    backend    fwd ms  fwd+bwd   floor     wall launches    MiB "
        " first s"
    )
    for op in args.ops:
        for shape in args.shapes:
            for row in measure_case(op, shape, args, device):
                rows.append(row)
                print(show(row), flush=True)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    (out / "kernels.json").write_text(
        json.dumps(
            {"gpu": gpu, "torch": torch.__version__, "arguments": vars(args), "rows": rows},
            indent=1,
        )
    )
    if measured := [row for row in rows if "error" not in row]:
        plot(measured, out / "kernels.png")


if __name__ == "__main__":
    main()
