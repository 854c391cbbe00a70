"""Train a configuration under several variants, one after another, and compare losses, tokens/s,
memory, times of a step and where they go.

    python benchmarks/train.py --config train_configs/debug.toml --steps 20 --out outputs/bench \
        gla="--model.mixer=gla" gla-compiled="--model.mixer=gla --compile.enable=true" two="ngpu=2"
        -- --data.seq_len=512

A variant is NAME="words for train.py"; words after -- go to all of them. The word ngpu=N trains on
N GPUs. All variants of one N run in the same processes (benchmarks/steps.py); where one fails, its
last words are shown and the others go on in new processes. Memory on a CPU is that of the process,
and so of the largest variant so far.

    passes     forward and backward, ms on the device's clock
    optimizer  the rest of train_step: sums of loose gradients, norm, AdamW, sums of metrics

Both, like tokens/s, are medians of the steps after the fifth. Then --trace steps more are traced on
the first rank and taken apart (benchmarks/parts.py): shares of a timed step in which the GPU worked
on each part; idle is what is left of it. Prints a table and writes train.json and train.png to
--out.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import ROOT, pyplot

COMMON = [
    "--schedule.steps=100000",  # the first steps of a long run
    "--metrics.log_every=1",
    "--metrics.tensorboard=false",
    "--checkpoint.every=0",
]


def processes(ngpu: int, job: str) -> list[str]:
    """The command that runs benchmarks/steps.py on so many GPUs."""
    # The address by number: torchrun would take the host's name, which some containers cannot
    # resolve.
    several = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={ngpu}",
    ]
    script = str(ROOT / "benchmarks/steps.py")
    return [sys.executable, *(several if ngpu > 1 else []), script, job]


def by_ngpu(variants: dict[str, list[str]]) -> dict[int, dict[str, list[str]]]:
    """Sort variants {name: words} by their number of GPUs, which is no word for train.py."""
    groups = {}
    for name, words in variants.items():
        counts = [int(word.removeprefix("ngpu=")) for word in words if word.startswith("ngpu=")]
        rest = [word for word in words if not word.startswith("ngpu=")]
        groups.setdefault(max([1, *counts]), {})[name] = rest
    return groups


def run(config: str, variants: dict[str, list[str]], ngpu: int, steps: int, trace: int):
    """Yield (name, result) of each of the variants {name: words} that does not fail, when it is
    there."""
    waiting = dict(variants)
    threads = os.environ.get(
        "OMP_NUM_THREADS", str(max(1, os.cpu_count() // ngpu))
    )  # torchrun alone would give each process one
    while waiting:
        with tempfile.TemporaryDirectory() as folder:
            shared = [*COMMON, f"--data.cache={folder}/data"]
            job = {
                "config": config,
                "steps": steps,
                "trace": trace,
                "folder": folder,
                "variants": {name: [*shared, *words] for name, words in waiting.items()},
            }
            (Path(folder) / "job.json").write_text(json.dumps(job))
            results = Path(folder) / "results.jsonl"
            results.touch()
            log = Path(folder) / "log.txt"
            with log.open("w") as file, results.open() as lines:
                process = subprocess.Popen(
                    processes(ngpu, f"{folder}/job.json"),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": threads},
                )
                try:
                    ended = False
                    while not ended:
                        ended = process.poll() is not None
                        while (line := next_line(lines)) is not None:
                            name = next(iter(waiting))
                            waiting.pop(name)
                            result = json.loads(line)
                            if "error" in result:
                                print(f"{name}: {result['error']}", flush=True)
                            else:
                                yield name, result
                        time.sleep(0 if ended else 0.2)
                finally:
                    process.terminate()
                    process.wait()
            if waiting:
                name = next(iter(waiting))
                words = waiting.pop(name)
                said = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
                print(f"{name} ({shlex.join(words)}) ended with {process.returncode}:\n{said}")
                sys.stdout.flush()


def next_line(file):
    """The next line of a file that grows, or None where it is not whole yet."""
    place = file.tell()
    line = file.readline()
    if line.endswith("\n"):
        return line
    file.seek(place)
    return None


def row(name: str, result: dict) -> str:
    loss = result["loss"]
    return (
        f"{name:24} {loss[0]:8.4f} {loss[-1]:8.4f} {result['tokens_per_second']:10,.0f}"
        f" {100 * (result['mfu'] or 0):5.1f}% {result['memory_gib']:7.2f}"
        f" {result['forward_backward_ms']:9.1f} {result['optimizer_ms']:9.1f}"
    )


def compare(
    config: str, variants: dict[str, list[str]], steps: int, path: Path, trace: int = 0
) -> dict:
    """Train under variants {name: words}. Prints a row each, and returns and writes to `path`
    {name: result} of those that did not fail. trace: steps that are traced after these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    results = {}
    print(
        f"{'variant':24} {'first':>8} {'last':>8} {'tok/s':>10} {'mfu':>6} {'GiB':>7}"
        f" {'passes':>9} {'optimizer':>9}   (ms)"
    )
    for ngpu, group in by_ngpu(variants).items():
        for name, result in run(config, group, ngpu, steps, trace):
            found[name] = {"words": variants[name], "ngpu": ngpu} | result
            print(row(name, result), flush=True)
            if result["left_gib"] > 0.05:
                print(f"    {result['left_gib']:.2f} GiB of earlier variants were still there")
            if "parts" in result:
                shares = result["parts"]["share"].items()
                print("    " + "  ".join(f"{part} {100 * x:.1f}%" for part, x in shares))
            results = {name: found[name] for name in variants if name in found}
            path.write_text(json.dumps(results, indent=1))
    return results


def gaps(result: dict, other: dict) -> list[float]:
    """Measure how far two runs' losses are apart at every step."""
    return [abs(a - b) for a, b in zip(result["loss"], other["loss"])]


def plot(results: dict, path: Path) -> None:
    """Draw the losses and, of those that were traced, the shares of a step."""
    plt = pyplot()
    if plt is None or not results:
        return
    traced = {name: r["parts"]["share"] for name, r in results.items() if "parts" in r}
    figure, axes = plt.subplots(1, 2 if traced else 1, figsize=(14 if traced else 7, 5))
    losses, *rest = axes if traced else [axes]
    for variant, result in results.items():
        losses.plot([e["step"] for e in result["entries"]], result["loss"], label=variant)
    losses.set_xlabel("step")
    losses.set_ylabel("loss (nats per token)")
    losses.legend()
    for axis in rest:
        left = [0.0] * len(traced)
        for part in next(iter(traced.values())):
            widths = [share[part] for share in traced.values()]
            axis.barh(list(traced), widths, left=left, label=part)
            left = [x + width for x, width in zip(left, widths)]
        axis.set_xlabel("share of a step")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Split into the words before -- and those after it."""
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def main():
    words, shared = split_words(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "train_configs/debug.toml"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trace", type=int, default=4, help="steps to trace; 0: none, else 2 up")
    parser.add_argument("--out", default="outputs/benchmark")
    parser.add_argument("variants", nargs="+")
    args = parser.parse_args(words)
    if args.trace == 1:
        parser.error("--trace=1: the first traced step is left out; take 2 or more, or 0")
    variants = {}
    try:
        for variant in args.variants:
            name, _, extra = variant.partition("=")
            variants[name] = [*shared, *shlex.split(extra)]
        by_ngpu(variants)
    except ValueError as error:
        parser.error(f'{name}: {error}; write NAME="words for train.py", ngpu=N among them')
    path = Path(args.out) / "train.json"
    results = compare(args.config, variants, args.steps, path, args.trace)
    for name, result in results.items():
        other = results.get(name.removesuffix("-compiled"))
        if other and other is not result:
            print(
                f"{name}: largest difference of a step's loss from"
                f" {name.removesuffix('-compiled')}: {max(gaps(result, other)):.4f}"
            )
    plot(results, Path(args.out) / "train.png")


if __name__ == "__main__":
    main()
