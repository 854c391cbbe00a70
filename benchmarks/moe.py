"""Times of the routed experts, from tokens x, choices and routing weights to y: gather, products,
SwiGLU, combine; forward, and forward + backward with the gradients of x, weights and experts.

    python benchmarks/moe.py --shapes a b --tokens 8192 16384 32768 --out outputs/moe

Every moe.impl, eager and compiled as one graph, with balanced routing (each expert gets as many
tokens) and Zipf's (an expert's chance is 1 / its rank), all of a case in turns. TFLOP/s count the
products, 6 T K D I forward and 18 T K D I in all. saved: distinct storages that autograd keeps
from the forward to the backward pass, parameters excluded, x included; peak: memory beside the
inputs, forward and backward with the gradients; ratio: to the first row of the case. error: of y,
relative to the first row's. Prints a table and writes moe.json and, with matplotlib, moe.png to
--out. Without a GPU: --shapes tiny --tokens 64 --dtype float32.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import medians, pyplot, synchronise
from lmoe.files import in_one_line
from lmoe.model.config import ModelConfig, MoEConfig
from lmoe.model.init import materialise, narrow
from lmoe.model.moe.experts import IMPLEMENTATIONS
from lmoe.model.moe.moe import MoE
from lmoe.model.moe.router import Routing

# D, I, E, K: of A0.3B-2B, of A1B-7B (arXiv 2503.05447, table 2), and for a CPU
SHAPES = {
    "a": (1024, 896, 64, 8),
    "b": (2048, 1024, 64, 8),
    "tiny": (32, 16, 8, 2),
}
MODES = ("eager", "compiled")
DIRECTIONS = {"forward": 6, "both": 18}  # name -> FLOPs over T K D I


def balanced(T, E, K, generator):
    """Choose K different experts a token, each expert equally often where E / K divides T."""
    if E % K:
        raise ValueError(f"balanced routing needs top {K} to divide {E} experts")
    rounds = -(-T * K // E)
    ids = torch.rand(rounds, E, generator=generator).argsort(1)
    return ids.view(-1, K)[:T]


def zipf(T, E, K, generator):
    """Choose K different experts a token, expert e with a weight of 1 / (e + 1)."""
    weights = 1 / torch.arange(1, E + 1, dtype=torch.float64)
    return torch.multinomial(weights.expand(T, E), K, generator=generator)


ROUTING = {"balanced": balanced, "zipf": zipf}


def build(shape, impl, device, dtype):
    """The layer with its weights in `dtype`, as FSDP hands them to it."""
    D, I, E, K = SHAPES[shape]
    with torch.device("meta"):
        layer = MoE(
            ModelConfig(dim=D), MoEConfig(experts=E, top_k=K, hidden=I, impl=impl, shared=0)
        )
    materialise(layer, device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in layer.experts.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    narrow(layer, dtype)
    return layer


def make_inputs(shape, tokens, routing, device, dtype):
    """(x [T, D], Routing, dy [T, D])"""
    D, _, E, K = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    ids = ROUTING[routing](tokens, E, K, generator).to(device)
    weights = torch.rand(tokens, K, generator=generator).softmax(1).to(device)
    x, dy = (torch.randn(tokens, D, generator=generator).to(device, dtype) for _ in range(2))
    logits = weights.new_zeros(tokens, E)
    return x.requires_grad_(), Routing(ids, weights.requires_grad_(), logits), dy


def passes(run, layer, x, routing, dy):
    """{"forward": a function, "both": a function}"""
    leaves = [x, routing.weights, *layer.experts.parameters()]

    def forward():
        with torch.no_grad():
            return run(x, routing)

    def both():
        return torch.autograd.grad(run(x, routing), leaves, dy)

    return {"forward": forward, "both": both}


def saved_bytes(run, layer, x, routing):
    """Bytes of the distinct storages that autograd keeps, those of parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(x, routing)
    del y
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


def peak_bytes(both):
    """Bytes allocated at the most beside what is there; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    synchronise()
    return torch.cuda.max_memory_allocated() - before


def measure_cases(shape, tokens, args, device):
    """Yield the rows of a shape and a number of tokens, under every routing."""
    dtype = getattr(torch, args.dtype)
    torch.compiler.reset()  # it gives up on a function that it has compiled for eight cases
    layers = {}
    for impl in args.impls:
        layer = build(shape, impl, device, dtype)
        compiled = torch.compile(
            layer.routed_experts, fullgraph=True, dynamic=False, backend=args.backend
        )
        for mode, run in zip(MODES, (layer.routed_experts, compiled)):
            if mode in args.modes:
                layers[impl, mode] = (run, layer)
    for routing in args.routing:
        yield from measure_case(shape, tokens, routing, layers, args.rounds, device, dtype)


def measure_case(shape, tokens, routing, layers, rounds, device, dtype):
    D, I, _, K = SHAPES[shape]
    x, chosen, dy = make_inputs(shape, tokens, routing, device, dtype)
    rows = {}
    functions = {}
    first = None
    for (impl, mode), (run, layer) in layers.items():
        row = {"shape": shape, "tokens": tokens, "routing": routing, "impl": impl, "mode": mode}
        rows[impl, mode] = row
        try:
            f = passes(run, layer, x, chosen, dy)
            y = f["forward"]().double()
            f["both"]()
            row["saved_mib"] = saved_bytes(run, layer, x, chosen) / 2**20
            peak = peak_bytes(f["both"])
            row["peak_mib"] = None if peak is None else peak / 2**20
        except Exception as error:  # what one cannot do is a row too
            row["error"] = in_one_line(error)[:120]
            continue
        first = y if first is None else first
        row["y_error"] = ((y - first).norm() / first.norm()).item()
        functions[impl, mode] = f
    for direction, factor in DIRECTIONS.items():
        calls = {name: f[direction] for name, f in functions.items()}
        for name, ms in medians(calls, device, rounds).items():
            rows[name][f"{direction}_ms"] = ms
            rows[name][f"{direction}_tflops"] = factor * tokens * K * D * I / ms / 1e9
    measured = [row for row in rows.values() if "error" not in row]
    for row in measured:
        row["ratio"] = measured[0]["both_ms"] / row["both_ms"]
    return list(rows.values())


HEAD = (
    "shape  tokens routing  impl       mode       fwd ms TFLOP/s  both ms TFLOP/s  ratio   saved"
    "    peak MiB    error"
)


def show(row):
    text = f"{row['shape']:5} {row['tokens']:7} {row['routing']:8} {row['impl']:10} {row['mode']:9}"
    if "error" in row:
        return f"{text} {row['error']}"
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    return (
        f"{text} {row['forward_ms']:7.3f} {row['forward_tflops']:7.1f} {row['both_ms']:8.3f}"
        f" {row['both_tflops']:7.1f} {row['ratio']:6.2f} {row['saved_mib']:7.1f} {peak:>11}"
        f" {row['y_error']:8.1e}"
    )


def plot(rows, path):
    plt = pyplot()
    if plt is None:
        return
    cases = list(dict.fromkeys((r["shape"], r["tokens"], r["routing"]) for r in rows))
    names = list(dict.fromkeys((r["impl"], r["mode"]) for r in rows))
    figure, axes = plt.subplots(2, 1, figsize=(4 + 0.9 * len(cases), 7), sharex=True)
    width = 0.8 / len(names)
    keys = {"both_tflops": "forward + backward, TFLOP/s", "saved_mib": "saved, MiB"}
    for axis, (key, title) in zip(axes, keys.items()):
        for i, (impl, mode) in enumerate(names):
            found = {
                (r["shape"], r["tokens"], r["routing"]): r[key]
                for r in rows
                if (r["impl"], r["mode"]) == (impl, mode)
            }
            heights = [found.get(case, 0) for case in cases]
            places = [n + i * width for n in range(len(cases))]
            axis.bar(places, heights, width, label=f"{impl}, {mode}")
        axis.set_ylabel(title)
    axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1))
    labels = [f"{shape}\n{tokens}\n{routing}" for shape, tokens, routing in cases]
    axes[1].set_xticks([n + 0.4 - width / 2 for n in range(len(cases))], labels)
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["a", "b"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 16384, 32768])
    parser.add_argument("--routing", nargs="+", default=list(ROUTING), choices=ROUTING)
    parser.add_argument(
        "--impls", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS)
    )
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", default="outputs/moe")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    about = {"gpu": gpu, "torch": torch.__version__, "arguments": vars(args)}
    rows = []
    print(HEAD)
    for shape in args.shapes:
        for tokens in args.tokens:
            for row in measure_cases(shape, tokens, args, device):
                rows.append(row)
                print(show(row), flush=True)
            (out / "moe.json").write_text(json.dumps(about | {"rows": rows}, indent=1))
    if measured := [row for row in rows if "error" not in row]:
        plot(measured, out / "moe.png")


if __name__ == "__main__":
    main()
