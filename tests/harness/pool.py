"""A persistent pool of gloo ranks: starting torch costs seconds a rank, so the ranks stay and take
one function after another."""

import functools
import io
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback

import torch
import torch.distributed as dist
from torch.distributed import device_mesh

from lmoe.parallel import dims


def join_alone():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _pack(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def _share_the_device():
    """Else every gloo group has a thread of its own that looks around a hundred times a second for
    as long as the group lives."""
    gloo = dist.ProcessGroupGloo
    device = gloo.create_default_device()

    class SharedGloo(gloo):
        def __init__(self, store, rank, size, timeout):
            options = gloo._Options()
            options._timeout, options._devices = timeout, [device]
            super().__init__(store, rank, size, options)

    dist.distributed_c10d.ProcessGroupGloo = SharedGloo


def _keep_groups_few():
    """The meshes of all jobs share the groups of equal ranks; the list that is returned gets the
    others that a job makes."""
    make, made, of_ranks = dist.new_group, [], {}

    def shared(ranks, **kwargs):
        if (key := tuple(ranks)) not in of_ranks:
            of_ranks[key] = make(ranks, **kwargs)
        return of_ranks[key]

    device_mesh.new_group = shared
    dims.init_device_mesh, dims._blocks = (
        functools.cache(dims.init_device_mesh),
        functools.cache(dims._blocks),
    )

    def new_group(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    dist.new_group = new_group
    return made


def _serve(rank, world, store_path, pipe):
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    _share_the_device()
    dist.init_process_group(
        "gloo", store=dist.FileStore(store_path, world), rank=rank, world_size=world
    )
    groups = _keep_groups_few()
    while True:
        job = pipe.recv()
        if job is None:
            break
        function, arguments = _unpack(job)
        try:
            answer = _pack((function(*arguments), None))
        except BaseException:
            answer = _pack((None, traceback.format_exc()))
        while groups:
            group = groups.pop()
            if isinstance(group, dist.ProcessGroup):  # and this rank is in it
                dist.destroy_process_group(group)
        pipe.send(answer)
    dist.destroy_process_group()


class Pool:
    """`world` processes in one gloo group. run(f, *args) calls f(*args) on every rank; f is a
    module-level function."""

    def __init__(self, world):
        self.world = world
        self.start()

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.world, f"{self.folder.name}/store", there),
                daemon=True,
            )
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function, *arguments, timeout=300):
        """[f(*arguments) of rank 0, of rank 1, ...]; AssertionError with the traceback of the first
        rank that failed.

        Where one fails, the others may wait for it for ever: then the pool starts anew.
        """
        job = _pack((function, arguments))
        for pipe in self.pipes:
            pipe.send(job)
        answers, failed, end = {}, [], time.monotonic() + timeout
        while len(answers) < self.world and time.monotonic() < end:
            for pipe in multiprocessing.connection.wait(self.pipes, timeout=1):
                rank = self.pipes.index(pipe)
                try:
                    answers[rank] = _unpack(pipe.recv())
                except EOFError:
                    answers[rank] = None, "it died"
                if answers[rank][1] is not None:
                    failed.append(rank)
                    end = min(end, time.monotonic() + 5)
        if failed or len(answers) < self.world:
            for process in self.processes:
                process.kill()
                process.join()
            self.start()
        if failed:
            raise AssertionError(
                f"rank {failed[0]} of {self.world} failed (and"
                f" {failed[1:]}):\n{answers[failed[0]][1]}"
            )
        missing = sorted(set(range(self.world)) - answers.keys())
        assert not missing, f"ranks {missing} of {self.world} gave no answer in {timeout} s"
        return [answers[rank][0] for rank in range(self.world)]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=10)
            process.kill()
        self.folder.cleanup()
