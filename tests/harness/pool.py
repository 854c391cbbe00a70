"""A persistent pool of gloo ranks: starting torch costs seconds a rank, so the ranks stay and take one function after another."""

import io
import multiprocessing
import os
import tempfile
import traceback

import torch
import torch.distributed as dist


def join_alone():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _pack(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(rank, world, store_path, pipe):
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", store=dist.FileStore(store_path, world), rank=rank, world_size=world)
    while True:
        job = pipe.recv()
        if job is None:
            break
        function, arguments = _unpack(job)
        try:
            pipe.send(_pack((function(*arguments), None)))
        except BaseException:
            pipe.send(_pack((None, traceback.format_exc())))
    dist.destroy_process_group()


class Pool:
    """`world` processes in one gloo group. run(f, *args) calls f(*args) on every rank; f is a module-level function."""

    def __init__(self, world):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.world, self.pipes, self.processes = world, [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, f"{self.folder.name}/store", there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function, *arguments, timeout=300):
        """[f(*arguments) of rank 0, of rank 1, ...]; AssertionError with the traceback of the first rank that failed."""
        job = _pack((function, arguments))
        for pipe in self.pipes:
            pipe.send(job)
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(timeout), f"rank {rank} of {self.world} gave no answer in {timeout} s"
            answers.append(_unpack(pipe.recv()))
        for rank, (_, error) in enumerate(answers):
            assert error is None, f"rank {rank} of {self.world} failed:\n{error}"
        return [value for value, _ in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=10)
            process.kill()
        self.folder.cleanup()
