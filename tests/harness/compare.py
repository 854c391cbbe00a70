"""The same two optimizer steps under any layout: loss, every gradient, clip norm, weights, router
state."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import train
from lmoe.checks import check_config
from lmoe.config import load_config
from lmoe.data.packing import IGNORE, HostBatch
from lmoe.model.build import build_model
from lmoe.optimizer import build_optimizer
from lmoe.parallel.context import make_builder
from lmoe.parallel.dims import build_dims, resolve_sizes
from lmoe.parallel.parallelize import parallelize
from lmoe.parallel.stats import loss_weights
from lmoe.resolve import resolve_batch_size
from tests.harness.weights import add_noise

# One layer of each mixer, experts with every router feature that the default has, tied to nothing
# random but the seed.
TINY = {
    "model": {
        "dim": 32,
        "layers": 3,
        "heads": 2,
        "pattern": ["gla", "gated_deltanet", "attention"],
        "vocab_size": 64,
        "loss_chunk": 16,
        "z_loss": 1e-3,
        "init_std": 0.2,
    },
    "mixer": {"chunk_size": 16},
    "moe": {
        "experts": 4,
        "top_k": 2,
        "hidden": 16,
        "impl": "loop",
        "balance_coeff": 0.1,
        "z_coeff": 0.01,
        "bias_rate": 0.05,
        "shared": 16,
        "shared_gate": True,
    },
    "data": {"seq_len": 48},
    "training": {"dtype": "float64", "batch_size": 1, "global_batch_size": 4, "max_norm": 0.5},
    "optimizer": {"lr": 1e-2},
}


def rows_of_step(config, step):
    """Make the step's global batch: (tokens, labels, borders) per row; documents of uneven lengths,
    unequal numbers of valid labels."""
    generator = torch.Generator().manual_seed(1000 + step)
    length, vocab = config.data.seq_len, config.model.vocab_size
    rows = []
    for row in range(config.training.global_batch_size):
        tokens = torch.randint(0, vocab, (length,), generator=generator)
        labels = torch.randint(0, vocab, (length,), generator=generator)
        borders = torch.randint(1, length, (row + 1,), generator=generator).unique()
        labels[borders - 1] = IGNORE
        labels[: 7 * row] = IGNORE
        rows.append((tokens, labels, borders))
    return rows


def microbatches_of(config, dims, build, step):
    """Make (this rank's microbatches, valid labels of the step) as the loader deals rows:
    microbatch m of rank r is the block number m * ranks + r."""
    rows, length, size = rows_of_step(config, step), config.data.seq_len, config.training.batch_size
    batches = []
    for m in range(len(rows) // (size * dims.data_world)):
        start = (m * dims.data_world + dims.data_rank) * size
        chosen = rows[start : start + size]
        borders = (
            [0]
            + [i * length + b for i, (_, _, bs) in enumerate(chosen) for b in [0, *bs.tolist()]][1:]
            + [size * length]
        )
        tokens, labels = (torch.cat([row[i] for row in chosen]) for i in (0, 1))
        borders = torch.tensor(borders, dtype=torch.int32)
        batches.append(build(HostBatch(tokens, labels, borders, length)))
    valid = sum(int((labels != IGNORE).sum()) for _, labels, _ in rows)
    return batches, float(valid)


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def build_run(words, toml=None, frozen=(), noise=0.01):
    """Put together what train.py does for the layout that `words` describe: (config, dims, model,
    Parallel, optimizer, SeqBuilder).

    frozen: names of parameters, or beginnings of names, that do not train. noise: of add_noise.
    """
    config = load_config(words, toml=toml or TINY)
    check_config(config, dist.get_world_size(), torch.device("cpu"))
    resolve_batch_size(config, dist.get_world_size())
    dims = dims_of(config)
    with torch.device("meta"):
        model = build_model(config)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(tuple(frozen)))
    parallel = parallelize(model, config, dims)
    add_noise(model, noise)
    optimizer = build_optimizer(config.optimizer, model)
    weights = [loss_weights(config, model.routers, child) for child in ("ffn", "mixer")]
    build = make_builder(config, dims, dense_mask=True, weights=weights)
    return config, dims, model, parallel, optimizer, build


_DIMS = {}


def dims_of(config):
    """Build the Dims of a configuration; kept, because process groups are never given back."""
    key = (dist.get_world_size(), *resolve_sizes(config, dist.get_world_size()).values())
    if key not in _DIMS:
        _DIMS[key] = build_dims(config, torch.device("cpu"))
    return _DIMS[key]


def run_layout(words, steps=2, toml=None, frozen=()):
    """Take steps under the layout that `words` describe -> everything that must not depend on it
    (whole tensors, on every rank)."""
    config, dims, model, parallel, optimizer, build = build_run(words, toml, frozen)
    result = {"initial": {name: full(p) for name, p in model.named_parameters()}, "steps": []}
    gradients = {}
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update(
            {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        )
    )
    for step in range(steps):
        batches, valid = microbatches_of(config, dims, build, step)
        losses, counts, norm, skip = train.train_step(
            model, parallel, optimizer, config, dims, batches, valid, config.optimizer.lr
        )
        result["steps"].append(
            {
                "losses": losses,
                "counts": counts,
                "norm": norm,
                "skip": skip,
                "gradients": dict(gradients),
            }
        )
        gradients.clear()
    result["weights"] = {
        name: full(t) for stage in model.stages for name, t in stage.state_dict().items()
    }
    return result


def differences(a, b):
    """Compare two nested results -> {path: max |a - b| over max |a|}."""
    if isinstance(a, torch.Tensor):
        a, b = a.double(), b.double()
        assert a.shape == b.shape, f"{tuple(a.shape)} and {tuple(b.shape)}"
        scale = a.abs().max().clamp(min=1e-12) if a.numel() else torch.ones(())
        worst = ((a - b).abs().max() / scale).item() if a.numel() else 0.0
        return {"": worst if worst == worst else float("inf")}
    items = a.items() if isinstance(a, dict) else enumerate(a)
    assert len(a) == len(b) and (not isinstance(a, dict) or a.keys() == b.keys()), (
        f"{a.keys()} and {b.keys()}"
    )
    return {
        f"{key}.{path}".rstrip("."): value
        for key, item in items
        for path, value in differences(item, b[key]).items()
    }


def held_part(whole, part):
    """Cut from a nested result what `part` has too: of tensors by name only those that this rank
    holds."""
    if isinstance(whole, dict):
        return {key: held_part(whole[key], item) for key, item in part.items()}
    return (
        [held_part(a, b) for a, b in zip(whole, part, strict=True)]
        if isinstance(whole, list)
        else whole
    )


_ALONE = {}  # what one rank found, for all the layouts that are compared with it


def compare_to_one_rank(pool, words, layout, tolerance=1e-9, toml=None, steps=2, run=run_layout):
    """Assert that `layout` (words) on the pool's ranks trains as one rank does, and that all ranks
    report the same."""
    key = (run, *words, steps, repr(toml))
    alone = _ALONE[key] = _ALONE.get(key) or run(words, steps, toml)
    ranks = pool.run(run, [*words, *layout], steps, toml)
    held = set()
    for rank, result in enumerate(ranks):
        held |= result["initial"].keys()  # of a pipeline a rank has only its layers
        for name, tensor in result["initial"].items():
            assert torch.equal(alone["initial"][name], tensor), (
                f"rank {rank} under {layout} starts from another {name}"
            )
        wrong = {
            path: value
            for path, value in differences(held_part(alone, result), result).items()
            if not value <= tolerance
        }
        assert not wrong, f"rank {rank} under {layout}: " + ", ".join(
            f"{path} {value:.1e}" for path, value in sorted(wrong.items())[:12]
        )
    assert held == alone["initial"].keys()
    return alone, ranks
