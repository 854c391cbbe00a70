"""The layouts that are compared with one rank, and that docs/parallelism.md lists."""

import itertools

AXES = ("dp_shard", "dp_replicate", "tp", "cp", "pp", "ep")
# ep takes its ranks from those of another axis, so with dp_shard it is a layout of its own, of four ranks too.
PAIRS = list(itertools.combinations(AXES, 2))
TRIPLES = [
    {"tp": 2, "cp": 2, "dp_shard": 2},
    {"pp": 2, "ep": 2, "dp_shard": 4},
    {"pp": 2, "tp": 2, "cp": 2, "ep": 4},
    {"dp_replicate": 2, "dp_shard": 2, "cp": 2, "ep": 2},
    {"dp_replicate": 2, "tp": 2, "cp": 2, "ep": 4},
    {"pp": 2, "dp_replicate": 2, "dp_shard": 2},
    {"cp": 8},
    {"tp": 2, "dp_shard": 4, "ep": 8},
]


def words(sizes):
    """Command-line words of a layout; dp_shard takes what remains."""
    return [f"--parallel.{axis}={size}" for axis, size in sizes.items() if axis != "dp_shard"]
