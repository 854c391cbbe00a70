"""Train a configuration under several variants, one after another, and compare losses, tokens/s and memory.

    python benchmarks/train.py --config train_configs/debug.toml --steps 20 --out outputs/bench \
        gla="--model.mixer=gla" gla-compiled="--model.mixer=gla --compile.enable=true" -- --data.seq_len=512

A variant is NAME="words for train.py"; words after -- go to all of them. Prints a table and writes train.json and train.png to --out.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(config, words, steps, folder):
    command = [sys.executable, str(ROOT / "train.py"), f"--config={config}", f"--job.folder={folder}", f"--training.steps={steps}",
               "--metrics.log_every=1", "--metrics.tensorboard=false", "--checkpoint.every=0", *words]  # fmt: skip
    log = Path(folder) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.call(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    if code:
        print(f"{shlex.join(command)}\nended with {code}:\n" + "\n".join(log.read_text().splitlines()[-30:]), flush=True)
        return None
    entries = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


def main():
    words = sys.argv[1:]
    shared = words[words.index("--") + 1 :] if "--" in words else []
    words = words[: words.index("--")] if "--" in words else words
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "train_configs/debug.toml"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="outputs/benchmark")
    parser.add_argument("variants", nargs="+")
    args = parser.parse_args(words)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    print(f"{'variant':24} {'first':>8} {'last':>8} {'tok/s':>10} {'mfu':>6} {'GiB':>7}   (tok/s: median of the steps after the fifth)")
    for variant in args.variants:
        name, _, extra = variant.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            entries = run(args.config, [*shared, *shlex.split(extra)], args.steps, f"{folder}/{name}")
        if entries is None:
            continue
        rate = statistics.median(e["tokens_per_second"] for e in entries[5:] or entries)
        mfu = entries[-1]["mfu"] and statistics.median(e["mfu"] for e in entries[5:] or entries)
        results[name] = {
            "words": [*shared, *shlex.split(extra)], "loss": [e["loss"] for e in entries], "tokens_per_second": rate, "mfu": mfu,
            "memory_gib": max(e["memory_gib"] for e in entries), "entries": entries,
        }  # fmt: skip
        print(
            f"{name:24} {entries[0]['loss']:8.4f} {entries[-1]['loss']:8.4f} {rate:10,.0f} {100 * (mfu or 0):5.1f}% "
            f"{results[name]['memory_gib']:7.2f}",
            flush=True,
        )
    for name, result in results.items():
        other = results.get(name.removesuffix("-compiled"))
        if other and other is not result:
            gap = max(abs(a - b) for a, b in zip(result["loss"], other["loss"]))
            print(f"{name}: largest difference of a step's loss from {name.removesuffix('-compiled')}: {gap:.4f}")
    (out / "train.json").write_text(json.dumps(results, indent=1))
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, result in results.items():
        pyplot.plot([e["step"] for e in result["entries"]], result["loss"], label=name)
    pyplot.xlabel("step")
    pyplot.ylabel("loss (nats per token)")
    pyplot.legend()
    pyplot.savefig(out / "train.png", dpi=120)


if __name__ == "__main__":
    main()
