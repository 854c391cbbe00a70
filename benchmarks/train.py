"""Train a configuration under several variants, one after another, and compare losses, tokens/s and
memory.

    python benchmarks/train.py --config train_configs/debug.toml --steps 20 --out outputs/bench \
        gla="--model.mixer=gla" gla-compiled="--model.mixer=gla --compile.enable=true" two="ngpu=2"
        -- --data.seq_len=512

A variant is NAME="words for train.py"; words after -- go to all of them. The word ngpu=N starts N
processes through torchrun. Prints a table and writes train.json and train.png to --out.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(config: str, words: list[str], steps: int, folder: str) -> list[dict] | None:
    """Train and return the entries of metrics.jsonl, one a step, or None where training failed."""
    ngpu = max(
        [1, *(int(word.removeprefix("ngpu=")) for word in words if word.startswith("ngpu="))]
    )
    words = [word for word in words if not word.startswith("ngpu=")]
    # The address by number: torchrun would take the host's name, which some containers cannot
    # resolve.
    several = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={ngpu}",
    ]
    command = [
        sys.executable,
        *(several if ngpu > 1 else []),
        str(ROOT / "train.py"),
        f"--config={config}",
        f"--job.folder={folder}",
        f"--training.steps={steps}",
        "--schedule.steps=100000",  # the first steps of a long run
        "--metrics.log_every=1",
        "--metrics.tensorboard=false",
        "--checkpoint.every=0",
        *words,
    ]
    threads = os.environ.get(
        "OMP_NUM_THREADS", str(max(1, os.cpu_count() // ngpu))
    )  # torchrun alone would give each process one
    log = Path(folder) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.call(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
    if code:
        print(
            f"{shlex.join(command)}\nended with {code}:\n"
            + "\n".join(log.read_text().splitlines()[-30:]),
            flush=True,
        )
        return None
    entries = [
        json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()
    ]
    return [entry for entry in entries if "loss" in entry]


def compare(config: str, variants: dict[str, list[str]], steps: int, path: Path) -> dict:
    """Train under variants {name: words}. Prints a row each, and returns and writes to `path`
    {name: result} of those that did not fail."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    print(
        f"{'variant':24} {'first':>8} {'last':>8} {'tok/s':>10} {'mfu':>6} {'GiB':>7}   (tok/s:"
        " median of the steps after the fifth)"
    )
    for name, words in variants.items():
        with tempfile.TemporaryDirectory() as folder:
            entries = run(config, words, steps, f"{folder}/{name}")
        if entries is None:
            continue
        rate = statistics.median(e["tokens_per_second"] for e in entries[5:] or entries)
        mfu = entries[-1]["mfu"] and statistics.median(e["mfu"] for e in entries[5:] or entries)
        results[name] = {
            "words": words,
            "loss": [e["loss"] for e in entries],
            "tokens_per_second": rate,
            "mfu": mfu,
            "memory_gib": max(e["memory_gib"] for e in entries),
            "entries": entries,
        }
        print(
            f"{name:24} {entries[0]['loss']:8.4f} {entries[-1]['loss']:8.4f} {rate:10,.0f}"
            f" {100 * (mfu or 0):5.1f}% {results[name]['memory_gib']:7.2f}",
            flush=True,
        )
        path.write_text(json.dumps(results, indent=1))
    return results


def gaps(result: dict, other: dict) -> list[float]:
    """Measure how far two runs' losses are apart at every step."""
    return [abs(a - b) for a, b in zip(result["loss"], other["loss"])]


def plot(results: dict, path: Path) -> None:
    """Draw the losses, where matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for variant, result in results.items():
        pyplot.plot([e["step"] for e in result["entries"]], result["loss"], label=variant)
    pyplot.xlabel("step")
    pyplot.ylabel("loss (nats per token)")
    pyplot.legend()
    pyplot.savefig(path, dpi=120)


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
    parser.add_argument("--out", default="outputs/benchmark")
    parser.add_argument("variants", nargs="+")
    args = parser.parse_args(words)
    variants = {}
    for variant in args.variants:
        name, _, extra = variant.partition("=")
        variants[name] = [*shared, *shlex.split(extra)]
    results = compare(args.config, variants, args.steps, Path(args.out) / "train.json")
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
