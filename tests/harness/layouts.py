"""The layouts that are compared with one rank, and that docs/parallelism.md lists."""

import itertools

AXES = ("dp_shard", "dp_replicate", "tp", "cp", "pp", "ep")
# ep takes its ranks from those of another axis, so with dp_shard it is a layout of its own, of four
# ranks too.
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


# What tp and ep do with experts otherwise than by default.
EXPERTS = [
    {"tp": 2, "ep": 1},
    {"tp": 2, "cp": 2, "ep": 1},
    {"ep": 2, "ep_method": "all_to_all"},
    {"ep": 4, "ep_method": "gather"},
    {"tp": 2, "ep": 4, "ep_method": "all_to_all"},
    {"cp": 2, "ep": 4, "ep_method": "gather"},
]
COMPILED = [
    {"tp": 2},
    {"tp": 2, "ep": 1},
    {"ep": 2},
    {"ep": 2, "ep_method": "all_to_all"},
    {"cp": 2},
    {"cp": 2, "cp_method": "all_to_all"},
    {"dp_shard": 2},
    {"dp_replicate": 2},
    {"pp": 2},
]
RECOMPUTED = [
    {"cp": 4},
    {"dp_replicate": 2, "tp": 2},
    {"tp": 2, "cp": 2},
    {"cp": 2, "ep": 4},
    {"pp": 2, "dp_shard": 2},
]


def words(sizes):
    """Command-line words of a layout; dp_shard takes what remains."""
    return [f"--parallel.{axis}={size}" for axis, size in sizes.items() if axis != "dp_shard"]


def table():
    """What is compared with one rank, as the table of docs/parallelism.md: y four ranks, Y eight
    ranks and more axes too."""
    pairs = {frozenset(pair) for pair in PAIRS}
    triples = {frozenset(pair) for sizes in TRIPLES for pair in itertools.combinations(sizes, 2)}
    lines = [
        "| | " + " | ".join(f"`{axis}`" for axis in AXES) + " | compiled | recomputed |",
        "|---" * (len(AXES) + 3) + "|",
    ]
    for row in AXES:
        cells = [
            "alone"
            if row == column
            else ("Y" if {row, column} in triples else "y" if {row, column} in pairs else "")
            for column in AXES
        ]
        cells += [
            "y" if any(row in sizes for sizes in kind) else "" for kind in (COMPILED, RECOMPUTED)
        ]
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
