"""A training loop that fails in the way its first argument says, on the last rank, for
tests/test_watchdog.py."""

import ctypes
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from lmoe.parallel.collectives import Ranks, all_reduce
from lmoe.watchdog import Watchdog, connect_store


def say(text):
    os.write(1, f"{text}\n".encode())  # whole lines, whatever the other ranks write


def stuck():
    time.sleep(600)


def main():
    how, timeout, dead_after = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    rank, world = dist.get_rank(), dist.get_world_size()
    signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # as in training: a request to checkpoint, not the end
    culprit = rank == world - 1
    with Watchdog(
        connect_store(), rank, world, timeout, interval=0.25, dead_after=dead_after
    ) as watchdog:
        say(f"pid {rank} {os.getpid()}")
        for step in range(1, 7):
            watchdog.beat(step, "train")
            time.sleep(0.3)  # as long as a step may take: the thread has sent what the last one was
            if step == 5:
                say(f"trouble at {time.time()}")
            if step == 5 and culprit:
                if how in ("sleep", "sleep-op"):
                    stuck()
                elif how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif how == "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif how == "raise":
                    raise ValueError("the reason of it all")
                elif how == "gil":
                    ctypes.PyDLL(None).sleep(600)
            if how == "sleep-op":
                all_reduce(torch.ones(1), Ranks.of(dist.group.WORLD))
            else:
                dist.all_reduce(torch.ones(1))
            if step == 5 and culprit and how == "raise-after":
                raise ValueError("the reason of it all")
            if step == 4 and how == "validation":
                with watchdog.phase("validation"):
                    time.sleep(3 * timeout)
        dist.barrier()
    dist.destroy_process_group()
    say(f"rank {rank} went well")


main()
