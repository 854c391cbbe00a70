"""Helpers of all benchmarks: times, unions of intervals, and what is drawn of them."""

import statistics
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def mark(device):
    """A point in time, on the device's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start, end):
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def walls(functions, repeats, rounds=15):
    """ms per call of calls one after another, which the host runs ahead of where it can: {name:
    median over the rounds}. In turns, because the host's speed varies over seconds."""
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            synchronise()
            start = time.perf_counter()
            for _ in range(repeats):
                f()
            synchronise()
            times[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(x) * 1e3 for name, x in times.items()}


def medians(functions, device, rounds, warmup=3):
    """ms of a call that finds the L2 cache empty: {name: median over the rounds}. In turns, so that
    ratios are of one clock and temperature."""
    cache = torch.empty(2**28 if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    marks = {name: [] for name in functions}
    for _ in range(warmup + rounds):
        for name, f in functions.items():
            cache.zero_()
            start = mark(device)
            f()
            marks[name].append((start, mark(device)))
    synchronise()
    return {
        name: statistics.median(milliseconds(*pair) for pair in pairs[warmup:])
        for name, pairs in marks.items()
    }


def merged(intervals):
    """The union of (start, end) intervals as disjoint ones in order."""
    union = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1][1] = max(union[-1][1], end)
        else:
            union.append([start, end])
    return union


def length(intervals):
    """How long the union of (start, end) intervals is."""
    return sum(end - start for start, end in merged(intervals))


def pyplot():
    """matplotlib's pyplot without a display; None, and a line that says so, where it is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install -e '.[plot]')")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
