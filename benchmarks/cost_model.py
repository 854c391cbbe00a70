"""The time of one mixer layer on many ranks, from what was measured on few.

    torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 benchmarks/cost_model.py
    --layers outputs/parallel/exchanges.json
measures the collectives on the ranks at hand, takes the layers' own times from
benchmarks/parallel.py, and writes cost_model.json (with all that was measured) and cost_model.png
to --out.
    python benchmarks/cost_model.py --measured outputs/parallel/cost_model.json
predicts anew from such a file, anywhere.

A collective on W ranks takes  c + (W - 1) (alpha + m / beta)  where m bytes go to or through each
                               other rank; a message  alpha + m / beta.
Fitted by least squares of the relative errors over sizes and groups of 1, 2, 4 .. ranks (1: only c,
    which the layers' own times hold).
A layer takes its own time on one rank, plus
    lasp2       the exchanges seen on several ranks, less what hides the gather of states, plus W -
                1 steps of their fold in each direction;
                for softmax attention the exchanges, and W - 1 times the scores of its own slice
    ring        for linear mixers (LASP-1, arXiv 2404.02882): W - 1 times, one after the other, a
                state's message and one step of the fold,
                all else as in lasp2. For softmax attention (ring attention, arXiv 2310.01889,
                evenly spread over the ranks): W - 1 times the longer of a slice's scores and the
                message of its keys and values, in backward with their gradients. Neither exists
                here, so neither is measured
    all_to_all  the exchanges of tokens for heads, as far as there are heads; for softmax attention
                the scores as in lasp2
All links are taken to be like those measured, which links between nodes are not: measure on ranks
of several nodes for those. A row for more ranks than were measured is marked as a prediction.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import pyplot

METHODS = ("lasp2", "ring", "all_to_all")


def measure_collectives(sizes, repeats):
    """([collective, ranks, bytes m, µs], whether this process reports): on all ranks and on groups
    of them, on the slowest rank."""
    import torch
    import torch.distributed as dist

    from benchmarks.parallel import median_ms
    from lmoe.parallel import collectives
    from lmoe.parallel.dims import init_distributed

    device, rows = init_distributed(), []
    host, rank, world = dist.new_group(backend="gloo"), dist.get_rank(), dist.get_world_size()

    def calls(ranks, m):
        pieces, one = torch.randn(ranks.size, m // 4, device=device), [1] * ranks.size
        yield "all_gather", lambda _: collectives.all_gather(pieces[:1], ranks)
        yield "reduce_scatter", lambda _: collectives.reduce_scatter(pieces, ranks)
        yield "all_to_all", lambda _: collectives.all_to_all(pieces, one, one, ranks)
        if ranks.size > 1:
            yield "p2p", lambda _: collectives.previous_rows(pieces[:1], ranks)

    for size in (n for n in (2**i for i in range(11)) if world % n == 0):
        ranks = collectives.Ranks.of(dist.new_subgroups(group_size=size)[0])
        for m in sizes if size > 1 else sizes[:1]:  # one rank alone copies, which is not c
            for name, call in calls(ranks, m):
                times = [None] * world
                dist.all_gather_object(
                    times, 1e3 * median_ms([call], device, repeats)[0], group=host
                )
                rows.append([name, size, m, max(times)])
    dist.destroy_process_group()
    return rows, rank == 0


def fit(rows):
    """{collective: c and alpha in µs, 1 / beta in µs a byte, and the largest relative error of the
    fit}; no term is below 0."""
    found = {}
    for name in dict.fromkeys(row[0] for row in rows):
        ranks, m, times = np.array([row[1:] for row in rows if row[0] == name], float).T
        hops = ranks - 1
        terms = (
            np.stack([np.zeros_like(m) if name == "p2p" else np.ones_like(m), hops, hops * m], 1)
            / times[:, None]
        )
        kept, x = [i for i in range(3) if terms[:, i].any()], np.zeros(3)
        while True:
            solved = np.linalg.lstsq(terms[:, kept], np.ones(len(times)), rcond=None)[0]
            if solved.min() >= 0:
                break
            kept.pop(int(solved.argmin()))
        x[kept] = solved
        found[name] = dict(
            zip(("c", "alpha", "per_byte"), x.tolist()), error=float(np.abs(terms @ x - 1).max())
        )
    return found


def predict(fits, layers, mixer, tokens, W):
    """{method: ms of a layer's forward and backward on W ranks, or None where it cannot run}"""

    def cost(collective, m):
        """ms that the other ranks add to a call."""
        f = fits[collective]
        return (1 if collective == "p2p" else W - 1) * (f["alpha"] + m * f["per_byte"]) / 1e3

    def exchange(e):
        return cost(
            e["collective"], e["bytes"] / W if e["collective"] == "all_to_all" else e["bytes"]
        )

    cases = {
        (c["method"], c["ranks"] > 1): c
        for c in layers["cases"]
        if (c["mixer"], c["tokens"]) == (mixer, tokens)
    }
    part = next(p for p in layers["parts"] if (p["mixer"], p["tokens"]) == (mixer, tokens))
    total = dict.fromkeys(METHODS, 0.0)
    for direction in ("forward", "backward"):
        own = {
            method: cases[method, False][direction]["wall_ms"]
            for method in ("none", "lasp2", "all_to_all")
        }
        exchanges = cases["lasp2", True][direction]["exchanges"]
        gather = next(e for e in exchanges if e["collective"] in ("all_gather", "reduce_scatter"))
        others = sum(exchange(e) for e in exchanges if e is not gather)
        for_heads = sum(exchange(e) for e in cases["all_to_all", True][direction]["exchanges"])
        if "fold_ms" in part:
            hidden = part["hidden_ms"] if direction == "forward" else 0.0
            # The gradient of a state is as large as the state, which backward gathers without its
            # transition.
            state = next(
                e["bytes"]
                for e in cases["lasp2", True]["backward"]["exchanges"]
                if e["purpose"] == "states"
            )
            total["lasp2"] += (
                own["lasp2"]
                + others
                + max(0.0, exchange(gather) - hidden)
                + (W - 1) * part["fold_ms"]
            )
            total["ring"] += (
                own["lasp2"]
                + others
                + max(0.0, (W - 1) * (cost("p2p", state) + part["fold_ms"]) - hidden)
            )
            total["all_to_all"] += own["all_to_all"] + for_heads
        else:
            forward = direction == "forward"
            scores = part["scores_ms"][0 if forward else 1]
            message = cost("p2p", gather["bytes"] * (1 if forward else 2))
            total["lasp2"] += own["lasp2"] + others + exchange(gather) + (W - 1) * scores
            total["ring"] += own["none"] + (W - 1) * max(scores, message)
            total["all_to_all"] += own["all_to_all"] + for_heads + (W - 1) * scores
    return total if part["heads"] % W == 0 else total | {"all_to_all": None}


def table(measured, fits):
    """Print a table for each layer and return its rows."""
    layers, rows = measured["layers"], []
    at_hand = min(layers["world"], max(row[1] for row in measured["collectives"]))

    def shown(values, method):
        return f"{values[method]:11.3f}" if values.get(method) is not None else f"{'-':>11}"

    for part in layers["parts"]:
        mixer, tokens = part["mixer"], part["tokens"]
        print(f"\n{mixer}, {tokens} tokens a rank: ms of one layer, forward and backward")
        print(
            f"{'ranks':>6}{'lasp2':>11}{'measured':>11}{'ring':>11}{'all_to_all':>11}{'measured':>11}"
        )
        for W in (2**i for i in range(1, 11)):
            predicted, seen = predict(fits, layers, mixer, tokens, W), {}
            for c in layers["cases"]:
                if (c["mixer"], c["tokens"], c["ranks"]) == (mixer, tokens, W):
                    seen[c["method"]] = c["forward"]["wall_ms"] + c["backward"]["wall_ms"]
            columns = [
                (predicted, "lasp2"),
                (seen, "lasp2"),
                (predicted, "ring"),
                (predicted, "all_to_all"),
                (seen, "all_to_all"),
            ]
            print(
                f"{W:6}"
                + "".join(shown(*column) for column in columns)
                + ("   prediction" if W > at_hand else "")
            )
            rows.append(
                {
                    "mixer": mixer,
                    "tokens": tokens,
                    "ranks": W,
                    "prediction": W > at_hand,
                    "predicted": predicted,
                    "measured": seen,
                }
            )
    return rows


def plot(rows, path):
    plt = pyplot()
    if plt is None:
        return
    kinds = list(dict.fromkeys((row["mixer"], row["tokens"]) for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 4), squeeze=False)
    for axis, (mixer, tokens) in zip(axes[0], kinds):
        mine = [row for row in rows if (row["mixer"], row["tokens"]) == (mixer, tokens)]
        for number, method in enumerate(METHODS):
            points = [
                (row["ranks"], row["predicted"][method])
                for row in mine
                if row["predicted"][method] is not None
            ]
            (
                axis.plot(*zip(*points), "--", color=f"C{number}", label=f"{method}, predicted")
                if points
                else None
            )
            points = [
                (row["ranks"], row["measured"][method]) for row in mine if method in row["measured"]
            ]
            (
                axis.plot(*zip(*points), "o", color=f"C{number}", label=f"{method}, measured")
                if points
                else None
            )
        axis.set(
            xscale="log",
            yscale="log",
            title=f"{mixer}, {tokens} tokens a rank",
            xlabel="ranks",
            ylabel="ms",
        )
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", help="exchanges.json of benchmarks/parallel.py")
    parser.add_argument("--measured", help="cost_model.json of an earlier run: measure nothing")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[1 << n for n in range(16, 27, 2)], help="bytes m"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", default="outputs/parallel")
    args = parser.parse_args()
    if not args.layers and not args.measured:
        parser.error("give --layers, to measure the collectives for them, or --measured")
    measured, reports = (
        json.loads(Path(args.measured).read_text())["measured"] if args.measured else {},
        True,
    )
    if not args.measured:
        measured["collectives"], reports = measure_collectives(sorted(args.sizes), args.repeats)
    if args.layers:
        measured["layers"] = json.loads(Path(args.layers).read_text())
    if measured["layers"]["world"] == 1:
        parser.error(
            "the layers were measured on one rank: run benchmarks/parallel.py exchanges on several"
        )
    if not reports:
        return
    fits = fit(measured["collectives"])
    print(f"{measured['layers']['device']}, layers on {measured['layers']['world']} ranks")
    for name, f in fits.items():
        beta = f"{1e-3 / f['per_byte']:.2f}" if f["per_byte"] else "inf"
        print(
            f"{name:15} c {f['c']:7.1f} µs   alpha {f['alpha']:7.1f} µs   beta {beta:>7} GB/s  "
            f" fitted within {100 * f['error']:.0f} %"
        )
    rows = table(measured, fits)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "cost_model.json").write_text(
        json.dumps({"measured": measured, "fits": fits, "rows": rows}, indent=1)
    )
    plot(rows, out / "cost_model.png")


if __name__ == "__main__":
    main()
