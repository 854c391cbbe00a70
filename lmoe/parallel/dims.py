"""Sizes of the parallel axes, and the device meshes and process groups made of them.

The ranks form a grid (pp, dp_replicate, dp_shard, cp, tp), the last axis fastest: tensor parallel
ranks are neighbours, the stages of a pipeline far apart. Expert parallelism adds no ranks; it takes
`ep` neighbours out of dp_shard x cp x tp.

    weights sharded over      by FSDP over            copies
    tp, or not at all         fsdp = dp_shard x cp    dp_replicate       mesh `dense`  (pp,
                              dp_replicate, fsdp, tp)
    ep                        efsdp = the rest        dp_replicate       mesh `sparse` (pp,
                              dp_replicate, efsdp, ep)
"""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lmoe.files import in_one_line

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
# Where the watchdog tells who hangs, no collective gives up by itself.
PATIENCE = timedelta(days=365)
SHARED_BYTES = 8192  # of what share() sends


@dataclass
class Dims:
    """Sizes of the axes, this rank's place, and the groups that talk to each other.

    data_rank / data_world: this rank's share of every step's samples; the ranks of one data rank
    (over cp, tp and pp) see the same. stage_group: the ranks with this pipeline stage.
    sequence_group: cp x tp, the ranks that share a microbatch's tokens. host_group: gloo, all
    ranks, for small values that live on the host.
    """

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int
    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    dense: DeviceMesh
    sparse: DeviceMesh
    stage_group: object
    sequence_group: object
    host_group: object

    @property
    def data_world(self):
        return self.dp_replicate * self.dp_shard

    @property
    def data_rank(self):
        return self.rank // (self.cp * self.tp) % self.data_world

    @property
    def stage_world(self):
        return self.world // self.pp

    def group(self, axis):
        return (self.sparse if axis == "ep" else self.mesh).get_group(axis)

    def index(self, axis):
        """This rank's place along an axis."""
        return (self.sparse if axis == "ep" else self.mesh).get_local_rank(axis)

    def sum_over_data(self, values):
        """Sum of a host tensor over the ranks that hold different data; the same on every rank.
        Never touches the device."""
        if self.world > 1:
            dist.all_reduce(values, group=self.host_group)
            values /= self.world // self.data_world
        return values

    def any_rank(self, flag: bool) -> bool:
        """Tell whether any rank says so; the same on every rank. Never touches the device."""
        return self.sum_over_data(torch.tensor([float(flag)])).item() > 0

    def share(self, make: Callable[[], str]) -> str:
        """Call make() on the first rank and give its short text, or what is wrong as a ValueError,
        to all; wait for it however long, and hear signals meanwhile."""
        if self.world == 1:
            return make()
        data = torch.zeros(SHARED_BYTES, dtype=torch.uint8)
        if self.rank == 0:
            try:
                said = make(), None
            except (ValueError, OSError) as error:
                said = None, in_one_line(error)[: SHARED_BYTES // 16]  # JSON escapes
            raw = list(json.dumps(said).encode())
            data[: len(raw)] = torch.tensor(raw, dtype=torch.uint8)
        work = dist.broadcast(data, 0, group=self.host_group, async_op=True)
        while not work.is_completed():
            time.sleep(0.02)
        work.wait()
        text, wrong = json.loads(bytes(data.tolist()).rstrip(b"\0"))
        if wrong is not None:
            raise ValueError(wrong)
        return text


def resolve_sizes(config, world):
    """{axis: size} over pp, dp_replicate, dp_shard, cp, tp and ep for a Config; ValueError (one
    line) where they do not fit."""
    sizes = {axis: getattr(config.parallel, axis) for axis in (*AXES, "ep")}
    if not sizes["ep"]:
        # Tensor parallel ranks then hold whole experts, whose products are wider than slices'.
        experts = config.moe.experts
        sizes["ep"] = sizes["tp"] if experts and experts % sizes["tp"] == 0 else 1
    fixed = [axis for axis in AXES if axis != "dp_shard"]
    rest = 1
    for axis in fixed:
        rest *= sizes[axis]
        if world % rest:
            axes = [a for a in fixed if sizes[a] > 1]
            product = f"{' x '.join(axes)} = {' x '.join(str(sizes[a]) for a in axes)}"
            raise ValueError(f"parallel.{product} does not divide the world size {world}")
    if sizes["dp_shard"] == -1:
        sizes["dp_shard"] = world // rest
    if sizes["dp_shard"] * rest != world:
        raise ValueError(
            "parallel.pp x dp_replicate x dp_shard x cp x tp ="
            f" {' x '.join(str(sizes[a]) for a in AXES)} is not the world size {world};"
            " parallel.dp_shard = -1 takes all ranks that remain"
        )
    inner = sizes["dp_shard"] * sizes["cp"] * sizes["tp"]
    if inner % sizes["ep"]:
        raise ValueError(
            f"parallel.ep = {sizes['ep']} does not divide dp_shard x cp x tp = {inner}, the ranks"
            " that share a copy of the experts"
        )
    return sizes


def local_device():
    """The GPU of this rank's place on its node, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if index >= gpus:
        raise ValueError(
            f"process {index} of this node has no GPU: there are {gpus}; start at most as many"
            " processes (NGPU)"
        )
    return torch.device("cuda", index)


def stay_on_loopback():
    """Let gloo and NCCL listen on the loopback interface only, where all ranks are on this machine
    and the user has not chosen."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
        return
    names = {name for _, name in socket.if_nameindex()}
    for name in names & {"lo", "lo0"}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # exactly that one


def init_distributed():
    """Join the process group that torchrun describes, or make one of this process alone. Returns
    this rank's device."""
    device = local_device()
    stay_on_loopback()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **({} if "RANK" in os.environ else alone))
    return device


def leave_hangs_to_the_watchdog():
    """Let every collective of the groups that there are wait for as long as it takes: else NCCL's
    end a process after ten minutes, whatever the watchdog allows."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(PATIENCE, group)


def _blocks(world, size):
    """The group of this rank among blocks of `size` neighbours; None of a rank alone.
    Collective."""
    if size == 1:
        return None
    if size == world:
        return dist.group.WORLD
    return dist.new_subgroups_by_enumeration(
        [list(range(start, start + size)) for start in range(0, world, size)]
    )[0]


def build_dims(config, device):
    """The Dims of this run. Collective: every rank calls it."""
    world = dist.get_world_size()
    rank = dist.get_rank()
    sizes = resolve_sizes(config, world)
    pp, replicate, shard, cp, tp, ep = sizes.values()
    host_backend = "fake" if dist.get_backend() == "fake" else "gloo"

    def mesh(names, *shape):
        return init_device_mesh(device.type, (pp, replicate, *shape), mesh_dim_names=names)

    return Dims(
        **sizes,
        rank=rank,
        world=world,
        device=device,
        mesh=mesh(AXES, shard, cp, tp),
        dense=mesh(("pp", "dp_replicate", "fsdp", "tp"), shard * cp, tp),
        sparse=mesh(("pp", "dp_replicate", "efsdp", "ep"), shard * cp * tp // ep, ep),
        stage_group=_blocks(world, world // pp),
        sequence_group=_blocks(world, cp * tp),
        host_group=dist.new_group(backend=host_backend, timeout=PATIENCE),
    )
