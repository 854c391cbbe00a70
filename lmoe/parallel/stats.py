"""Statistics of a step by name, added up over microbatches and ranks.

A router is named by its block and the child that owns it ("3.ffn"). Every loss that a layer reports
is a part, weighted so that the sum over a step is its value.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from lmoe.config import Config
from lmoe.model.batch import LossWeights
from lmoe.model.model import Output
from lmoe.parallel.dims import Dims

# {child of a block that owns a router: (its losses' names, its load's name)}
REPORTED = {
    "ffn": (("balance_loss", "router_z_loss"), "expert_load"),
    "mixer": (("mixer_balance_loss", "mixer_router_z_loss"), "memory_load"),
}


def child_of(router: str) -> str:
    return router.rpartition(".")[2]


def loss_weights(config: Config, routers: dict[str, int], child: str) -> LossWeights:
    """Make the auxiliary losses of the routers of a child (ffn, mixer) means over layers and a
    step's tokens. routers: Model.routers."""
    rows = config.training.global_batch_size
    parallel = config.parallel
    layers = max(1, sum(child_of(name) == child for name in routers))
    # Over so many ranks is a microbatch; tensor parallel ranks share the tokens of ffn routers.
    split = parallel.cp * (parallel.tp if child == "ffn" else 1)
    return LossWeights(
        1 / (rows * layers),
        1 / (rows * config.data.seq_len * layers),
        config.training.batch_size / (rows * split),
    )


def reduce_stats(
    outputs: list[Output], routers: dict[str, int], dims: Dims
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sum what the microbatches of a step report, in one all-reduce -> (losses {name: 0-dim},
    counts {router: [E] tokens}), float64 on the device, the same on every rank.

    outputs: of this rank's microbatches and stages; routers: Model.routers.
    """

    zero = outputs[0].loss.new_zeros((), dtype=torch.float64)

    def total(reports, size):
        return torch.stack(reports).double().sum(0) if reports else zero.new_zeros(size)

    names = ["loss", "z_loss"]
    parts = [total([torch.stack([o.loss, o.z_loss]) for o in outputs], 2)]
    for child in dict.fromkeys(["ffn", *map(child_of, routers)]):
        stats = [s for o in outputs for name, s in o.stats.items() if child_of(name) == child]
        names += REPORTED[child][0]
        parts.append(total([torch.stack([s.balance, s.z]) for s in stats], 2))
    for name, size in routers.items():  # those of other stages are zero here
        parts.append(total([o.stats[name].counts for o in outputs if name in o.stats], size))
    vector = torch.cat(parts)
    if dims.world > 1:
        dist.all_reduce(vector)
    losses = vector[: len(names)]
    counts = vector[len(names) :].split(list(routers.values()))
    return dict(zip(names, losses, strict=True)), dict(zip(routers, counts, strict=True))


def loads(counts: dict[str, Tensor], ep: int) -> dict[str, list[float]]:
    """{"expert_load": the largest count over the mean, of each router in the order of depth};
    "memory_load" for those of mixers; with ep > 1, "rank_load": of the ranks that share experts.
    Counts on the device would make the host wait."""
    values = {}
    for name, count in counts.items():
        child = child_of(name)
        shares = {REPORTED[child][1]: count}
        if child == "ffn" and ep > 1:
            shares["rank_load"] = count.view(ep, -1).sum(1)
        for load, share in shares.items():
            values.setdefault(load, []).append((share.max() / share.mean()).item())
    return values


class OnTheWay:
    """Tensors {name: tensor} on their way to the host, in one copy for which it does not wait."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.shapes = {name: t.shape for name, t in tensors.items()}
        vector = torch.cat([t.detach().double().flatten() for t in tensors.values()])
        self.vector = vector.to("cpu", non_blocking=True)  # into pinned memory

    def read(self) -> dict[str, Tensor]:
        """Give them as float64 on the host; only once the device has got to the copy."""
        parts = self.vector.split([shape.numel() for shape in self.shapes.values()])
        return {name: x.view(self.shapes[name]) for name, x in zip(self.shapes, parts, strict=True)}
