"""Sizes of the parallel axes and the device meshes made of them."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass
class Dims:
    """Sizes that multiply to the world size, and what they mean for the data.

    mesh: axes (dp_replicate, dp_shard). data_rank / data_world: this rank's share of every step's samples.
    host_group: gloo, for small values that live on the host.
    """

    dp_replicate: int
    dp_shard: int
    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    host_group: object

    @property
    def data_world(self):
        return self.dp_replicate * self.dp_shard

    @property
    def data_rank(self):
        return self.rank  # the data-parallel axes are all there are

    def sum_over_data(self, values):
        """Sum of a host tensor over the ranks that hold different data; the same on every rank. Never touches the device."""
        if self.data_world > 1:
            dist.all_reduce(values, group=self.host_group)
        return values


def resolve_sizes(config, world):
    """(dp_replicate, dp_shard) for a ParallelConfig and a world size; ValueError (one line) where they do not fit."""
    for axis in ("tp", "cp", "pp", "ep"):
        if getattr(config, axis) != 1:
            raise ValueError(f"parallel.{axis} = {getattr(config, axis)} is not supported: only dp_replicate and dp_shard may exceed 1")
    if config.dp_replicate < 1 or world % config.dp_replicate:
        raise ValueError(f"parallel.dp_replicate = {config.dp_replicate} does not divide the world size {world}")
    shard = world // config.dp_replicate if config.dp_shard == -1 else config.dp_shard
    if shard < 1 or config.dp_replicate * shard != world:
        raise ValueError(
            f"parallel.dp_replicate x dp_shard = {config.dp_replicate} x {config.dp_shard} is not the world size {world}; "
            f"parallel.dp_shard = -1 takes all ranks that remain"
        )
    return config.dp_replicate, shard


def local_device():
    """The GPU of this rank's place on its node, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= gpus:
        raise ValueError(f"process {index} of this node has no GPU: there are {gpus}; start at most as many processes (NGPU)")
    return torch.device("cuda", index)


def init_distributed():
    """Join the process group that torchrun describes, or make one of this process alone. Returns this rank's device."""
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def build_dims(config, device):
    """The Dims of this run. Collective: every rank calls it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    replicate, shard = resolve_sizes(config, world)
    mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
    host_group = dist.new_group(backend="gloo")
    return Dims(replicate, shard, rank, world, device, mesh, host_group)
