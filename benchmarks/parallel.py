"""What layouts of several GPUs cost: whole runs compared with one GPU, and the exchanges of context
parallelism layer by layer.

    python benchmarks/parallel.py layouts --config train_configs/a0.3b_2b.toml --gpus 2 --rows 8
    --steps 20 -- --data.source=stdlib
trains on one GPU and under every layout of --gpus, on the same --rows rows in each step, and
compares losses, tokens/s, memory and times (of rank 0), each world size in one set of processes.
Words after -- go to train.py; for all else see benchmarks/train.py. Writes layouts.json and
layouts.png to --out.

    torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 benchmarks/parallel.py exchanges
    --config train_configs/a0.3b_2b.toml
runs single mixers, without FSDP, whose collectives would lie between theirs, on one document cut
over the ranks, --tokens to each:
    none, 1 rank            no context parallelism: the baseline, as many tokens and so a document
                            world times shorter
    lasp2, all_to_all       over all ranks; and over 1 rank, which is the method's own work with
                            nobody to wait for
Times are medians of --repeats calls that follow each other without a pause, on the slowest rank. On
CUDA each direction is then traced on its own, and of every collective is given how long its NCCL
kernel ran (`kernel`, mean of the ranks), for how long all ranks ran it (`both`: it starts when a
rank arrives, and this leaves out the wait for the last one) and how long no other kernel ran
meanwhile (`exposed`). Eager kernels are launched one by one, so the GPU may idle beside a
collective because the host is late; --compile launches fewer. Without CUDA there are wall times
only. Writes exchanges.json, which benchmarks/cost_model.py reads, to --out.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where train.py is
from benchmarks.timing import ROOT, mark, merged, milliseconds
from benchmarks.train import compare, gaps, plot, split_words
from lmoe.config import load_config
from lmoe.kernels import transition
from lmoe.model.batch import SeqBuilder
from lmoe.model.build import attention_windows, mixer_options, needs_dense_mask
from lmoe.model.init import init_weights, materialise, narrow
from lmoe.model.mixers import MIXERS
from lmoe.model.mixers.attention import attend
from lmoe.parallel import compat
from lmoe.parallel.collectives import Ranks
from lmoe.parallel.context import ContextParallel, SliceBuilder
from lmoe.parallel.dims import build_dims, init_distributed
from lmoe.parallel.parallelize import DTYPES

# --------------------------------------------------------------------------------------------------
# Layouts


def layouts(gpus, rows):
    """{name: words}: a step is always the same rows, in one microbatch but for the pipeline's 2 x
    gpus."""
    alike = {"one": [], "tp": [f"--parallel.tp={gpus}"], "cp": [f"--parallel.cp={gpus}"]}
    alike["cp-all_to_all"] = [*alike["cp"], "--parallel.cp_method=all_to_all"]
    split = {"fsdp": [], "ep": [f"--parallel.ep={gpus}"]}
    found = {name: [f"--training.batch_size={rows}", *words] for name, words in alike.items()}
    found |= {
        name: [f"--training.batch_size={rows // gpus}", *words] for name, words in split.items()
    }
    found["pp"] = [f"--training.batch_size={max(1, rows // (2 * gpus))}", f"--parallel.pp={gpus}"]
    return {
        name: [
            f"ngpu={1 if name == 'one' else gpus}",
            f"--training.global_batch_size={rows}",
            *found[name],
        ]
        for name in found
    }


def train_layouts(args, shared):
    chosen = layouts(args.gpus, args.rows)
    out = Path(args.out)
    variants = {name: [*shared, *chosen[name]] for name in args.only or chosen}
    results = compare(args.config, variants, args.steps, out / "layouts.json", args.trace)
    for name, result in results.items():
        if "one" in results and name != "one":
            apart = gaps(result, results["one"])
            worst = max(apart)
            ratio = result["tokens_per_second"] / results["one"]["tokens_per_second"]
            print(
                f"{name}: a step's loss is at most {worst:.4f} from one GPU's "
                f"(step {1 + apart.index(worst)}); {ratio:.2f} times its tokens/s"
            )
    plot(results, out / "layouts.png")


# --------------------------------------------------------------------------------------------------
# Time


def median_ms(parts, device, repeats):
    """Median time of each of `parts`, functions of the result of the one before, called in turn,
    `repeats` times without a pause."""
    marks = []
    for _ in range(repeats + 2):  # the first two warm up
        value, row = None, [mark(device)]
        for part in parts:
            value = part(value)
            row.append(mark(device))
        marks.append(row)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [
        statistics.median(milliseconds(row[i], row[i + 1]) for row in marks[2:])
        for i in range(len(parts))
    ]


def exposed(interval, busy):
    """How much of an interval lies outside the disjoint intervals `busy`."""
    start, end = interval
    return end - start - sum(max(0.0, min(end, b) - max(start, a)) for a, b in busy)


def traced(run):
    """run(), and of the device's work in it: ([(µs, µs exposed)] of the NCCL kernels in order, µs
    in which anything else ran)."""
    with profile(
        activities=[ProfilerActivity.CUDA]
    ) as profiler:  # operators of the host would slow down launches
        value = run()
        torch.cuda.synchronize()
    events = [
        e
        for e in profiler.events()
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    ]
    spans = {True: [], False: []}
    for event in events:
        spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    busy = merged(spans[False])
    kernels = [(end - start, exposed((start, end), busy)) for start, end in sorted(spans[True])]
    return value, (kernels, sum(end - start for start, end in busy))


# --------------------------------------------------------------------------------------------------
# Exchanges

COLLECTIVES = ("all_gather", "reduce_scatter", "all_to_all")


class Recorder:
    """Notes each collective that a mixer starts. bytes: of all_gather what a rank gives, of
    reduce_scatter what it gets, of all_to_all what it sends in all, itself included, of p2p the
    message."""

    def __init__(self, softmax):
        shared = "keys, values" if softmax else "states"
        self.purposes = {  # by the function that starts it
            "all_gather_states": (shared, "all_gather"),
            "all_gather": (shared, "all_gather"),
            "reduce_scatter": (shared, "reduce_scatter"),
            "_all_to_all": ("tokens, heads", "all_to_all"),
            "_shift_rows": ("halo", "p2p"),
            "_mirror_rows": ("mirror", "p2p"),
        }
        self.found = []

    def run(self, function, *args):
        """(function(*args), what it started)"""
        self.found = []
        with mock.patch.multiple(
            compat,
            **{
                f"start_{name}": self.noting(getattr(compat, f"start_{name}"))
                for name in COLLECTIVES
            },
        ):
            return function(*args), self.found

    def noting(self, start):
        def noted(x, *args):
            purpose, collective = self.purposes[sys._getframe(1).f_code.co_name]
            rows = len(x)
            if collective == "reduce_scatter":
                rows //= args[0]
            elif collective == "p2p":  # at the stream's ends a rank only sends or only receives
                rows = max(sum(args[0]), sum(args[1]))
            self.found.append(
                {
                    "purpose": purpose,
                    "collective": collective,
                    "bytes": rows * math.prod(x.shape[1:]) * x.element_size(),
                }
            )
            return start(x, *args)

        return noted


def build_mixer(config, name, device):
    """A mixer with the dtypes that mixed precision gives it in a model."""
    dtype = DTYPES[config.training.dtype]
    with torch.device("meta"):
        mixer = MIXERS[name](config.model, mixer_options(config, name))
    materialise(mixer, device)
    init_weights(mixer, config.job.seed)
    narrow(mixer, dtype)
    return mixer


def sequences(config, dims, alone, tokens):
    """[(method, ranks, SeqInfo)]: one document over the ranks, `tokens` to each. alone: the Ranks
    of this one."""
    dtype, found = DTYPES[config.training.dtype], []
    common = {
        "dense_mask": needs_dense_mask(config, dims.device, dtype),
        "windows": attention_windows(config),
    }

    def document(builder, length):
        return builder.seq_info(torch.tensor([0, length], dtype=torch.int32), 1, length)

    plain = document(SeqBuilder(dims.device, **common), tokens)
    found.append(("none", 1, plain))
    together = Ranks.of(dims.group("cp"))
    for method in ("lasp2", "all_to_all"):
        context = ContextParallel(alone, method)
        builder = SliceBuilder(
            dims.device, **common, ranks=alone, context=context, tp=1, tp_index=0
        )
        seq = dataclasses.replace(
            plain,
            context=builder.context,
            starts_with_document=torch.ones(1, dtype=torch.bool, device=dims.device),
        )
        if method == "lasp2":
            seq.masks = {window: builder.masks(seq, window) for window in builder.windows}
        else:
            seq.whole = plain
        found.append((method, 1, seq))
        if dims.cp > 1:
            context = ContextParallel(together, method)
            builder = SliceBuilder(
                dims.device, **common, ranks=together, context=context, tp=1, tp_index=0
            )
            found.append((method, dims.cp, document(builder, tokens * dims.cp)))
    return found


def of_all_ranks(value, dims):
    """`value` of every rank, through the host."""
    values = [None] * dims.world
    dist.all_gather_object(values, value, group=dims.host_group)
    return values


def measure(mixer, seq, ranks, x, dims, args):
    """{direction: times and exchanges} of a mixer on `seq`, the same on every rank."""
    gradient = torch.randn_like(x).div_(len(x))
    inputs = [x, *mixer.parameters()]

    def forward(_=None):
        return mixer(x, seq)[0]

    def backward(y):
        torch.autograd.grad(y, inputs, gradient)

    recorder, eager = Recorder(mixer.family is None), mixer.forward
    y, first = recorder.run(forward)
    _, second = recorder.run(backward, y)
    del y
    if args.compile:
        # each method and length compiles anew; too many in one cache would end the run
        torch.compiler.reset()
        mixer.forward = torch.compile(eager, fullgraph=True)
    walls = [
        max(times)
        for times in zip(
            *of_all_ranks(median_ms([forward, backward], dims.device, args.repeats), dims)
        )
    ]
    traces = {"forward": [], "backward": []}
    for _ in range(args.traces if dims.device.type == "cuda" else 0):
        dist.barrier(dims.host_group)  # on the host: no kernel, and the ranks begin together
        y, trace = traced(forward)
        traces["forward"].append(trace)
        dist.barrier(dims.host_group)
        _, trace = traced(lambda y=y: backward(y))
        traces["backward"].append(trace)
        del y
    mixer.forward = eager
    found = {}
    for direction, wall, started in zip(traces, walls, (first, second)):
        exchanges = started if ranks > 1 else []  # a rank alone copies to itself
        found[direction] = {
            "wall_ms": wall,
            "exchanges": exchanges,
            **summarise(of_all_ranks(traces[direction], dims), exchanges),
        }
    return found


def summarise(ranks, exchanges):
    """Of the traces of all ranks: times of a direction; where there is a kernel for each of
    `exchanges`, theirs are added to them."""
    traces = [trace for rank in ranks for trace in rank]
    if not traces:
        return {}
    times = {
        "compute_ms": statistics.median(busy for _, busy in traces) / 1e3,
        "kernel_us": statistics.median(sum(k[0] for k in kernels) for kernels, _ in traces),
        "exposed_us": statistics.median(sum(k[1] for k in kernels) for kernels, _ in traces),
    }
    if exchanges and any(len(kernels) != len(exchanges) for kernels, _ in traces):
        return times | {"unattributed": [len(kernels) for kernels, _ in traces]}
    for i, exchange in enumerate(exchanges):
        calls = [[rank[t][0][i] for rank in ranks] for t in range(len(ranks[0]))]
        exchange["kernel_us"] = statistics.median(
            statistics.mean(k[0] for k in call) for call in calls
        )
        exchange["both_us"] = statistics.median(min(k[0] for k in call) for call in calls)
        exchange["exposed_us"] = statistics.median(
            statistics.mean(k[1] for k in call) for call in calls
        )
    return times


def parts(mixer, seq, x, dims, repeats):
    """Times that benchmarks/cost_model.py needs, on one rank: of a linear mixer what hides the
    gather of the states, and one step of their fold; of softmax attention the scores, forward and
    backward."""
    device, found = dims.device, {"tokens": len(x)}
    if mixer.family is None:
        qkv = [
            torch.randn(len(x), w.weight.shape[0], device=device, dtype=x.dtype)
            for w in (mixer.wq, mixer.wk, mixer.wv)
        ]
        qkv = [t.unflatten(1, (-1, mixer.head_dim)).requires_grad_() for t in qkv]
        found["heads"] = qkv[1].shape[1]
        scores = [
            lambda _: seq.context.attend(attend, qkv[0], qkv[1:], seq, mixer.options.window),
            lambda o: torch.autograd.grad(o, qkv, o),
        ]
        found["scores_ms"] = median_ms(scores, device, repeats)
        return found
    _, found["heads"], K, V = mixer.scan_shapes()["S"]
    state = mixer.family.state_shape(K, V)
    with torch.no_grad():
        found["hidden_ms"] = median_ms(
            [lambda _: (mixer.project_q(x, None, seq, None), mixer.project_gate(x))],
            device,
            repeats,
        )[0]
        kind, steps = mixer.family.transition, 16
        U, A = (
            torch.rand(steps, 1, found["heads"], *shape, device=device).div(-K)
            for shape in (state, kind.shape(state))
        )
        found["fold_ms"] = (
            median_ms([lambda _: transition.prefix(kind, A, U, steps)], device, repeats)[0] / steps
        )
    return found


def show(case):
    for direction in ("forward", "backward"):
        times = case[direction]
        line = (
            f"{case['mixer']:16} {case['method']:10} {case['ranks']:5} {case['tokens']:7}"
            f" {direction:8} {times['wall_ms']:9.3f}"
        )
        if "compute_ms" in times:
            line += (
                f" {times['compute_ms']:9.3f} {times['kernel_us']:9.1f} {times['exposed_us']:9.1f} "
            )
            line += f"{times['exposed_us'] / times['wall_ms'] / 10:6.1f}%"
        print(line)
        for purpose in dict.fromkeys(e["purpose"] for e in times["exchanges"]):
            calls = [e for e in times["exchanges"] if e["purpose"] == purpose]
            line = (
                f"    {purpose}: {len(calls)} x {calls[0]['collective']},"
                f" {sum(e['bytes'] for e in calls):,} bytes"
            )
            if "kernel_us" in calls[0]:
                line += "".join(
                    f", {name} {sum(e[f'{name}_us'] for e in calls):.1f} µs"
                    for name in ("kernel", "both", "exposed")
                )
            print(line)
        if "unattributed" in times:
            print(
                f"    {times['unattributed']} NCCL kernels in the traces, not"
                f" {len(times['exchanges'])}: not told apart"
            )
    sys.stdout.flush()


def measure_exchanges(args, words):
    device = init_distributed()
    rank, world, path = dist.get_rank(), dist.get_world_size(), Path(args.out) / "exchanges.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "world": world,
        "device": "cpu",
        "compile": args.compile,
        "torch": torch.__version__,
        "cases": [],
        "parts": [],
    }
    if device.type == "cuda":
        result["device"] = torch.cuda.get_device_name(device)
        traced(lambda: torch.ones(1, device=device))  # the first trace of a process starts late
    elif rank == 0:
        print("no CUDA: wall times of gloo on the host only; they say nothing about GPUs")
    if rank == 0:
        traces = (
            f" {'compute':>9} {'nccl µs':>9} {'exposed':>9} {'of wall':>7}"
            if device.type == "cuda"
            else ""
        )
        print(
            f"{'mixer':16} {'method':10} {'ranks':>5} {'tokens':>7} {'':8} {'wall ms':>9}{traces}"
        )
    dims = alone = None
    for name in args.mixers:
        mixer_word = [] if name == "attention" else [f"--model.mixer={name}"]
        config = load_config(
            [
                f"--config={args.config}",
                *mixer_word,
                "--parallel.dp_shard=1",
                f"--parallel.cp={world}",
                *words,
            ]
        )
        dims = dims or build_dims(config, device)
        alone = alone or Ranks.of(dist.new_subgroups(group_size=1)[0])
        mixer = build_mixer(config, name, device)
        for tokens in args.tokens:
            torch.manual_seed(rank)
            x = torch.randn(
                tokens,
                config.model.dim,
                device=device,
                dtype=DTYPES[config.training.dtype],
                requires_grad=True,
            )
            for method, ranks, seq in sequences(config, dims, alone, tokens):
                case = {
                    "mixer": name,
                    "method": method,
                    "ranks": ranks,
                    "tokens": tokens,
                    **measure(mixer, seq, ranks, x, dims, args),
                }
                result["cases"].append(case)
                if method == "none":
                    result["parts"].append(
                        {"mixer": name, **parts(mixer, seq, x, dims, args.repeats)}
                    )
                if rank == 0:
                    show(case)
                    path.write_text(json.dumps(result, indent=1))
    dist.destroy_process_group()


def main():
    words, shared = split_words(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    for name, function in (("layouts", train_layouts), ("exchanges", measure_exchanges)):
        mode = modes.add_parser(name)
        mode.set_defaults(function=function)
        mode.add_argument("--config", default=str(ROOT / "train_configs/debug.toml"))
        mode.add_argument("--out", default="outputs/parallel")
    layout, exchange = modes.choices["layouts"], modes.choices["exchanges"]
    layout.add_argument("--gpus", type=int, default=2, help="processes of every layout but `one`")
    layout.add_argument(
        "--rows", type=int, default=8, help="rows of a step (training.global_batch_size)"
    )
    layout.add_argument("--steps", type=int, default=20)
    layout.add_argument("--trace", type=int, default=4, help="steps to trace; 0: none, else 2 up")
    layout.add_argument("--only", nargs="+", help="the layouts to run: " + ", ".join(layouts(2, 8)))
    exchange.add_argument("--mixers", nargs="+", default=["gla", "gated_deltanet", "attention"])
    exchange.add_argument(
        "--tokens", nargs="+", type=int, default=[4096, 65536], help="tokens a rank"
    )
    exchange.add_argument("--repeats", type=int, default=8)
    exchange.add_argument("--traces", type=int, default=3)
    exchange.add_argument(
        "--compile",
        action="store_true",
        help="compile the mixers, as compile.enable does with blocks",
    )
    args = parser.parse_args(words)
    args.function(args, shared)


if __name__ == "__main__":
    main()
