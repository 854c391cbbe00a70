"""Stands in for train.py in tests/test_run_train.py: prints what it was given, then waits for a
signal or ends as it is told."""

import os
import signal
import sys
import time

if os.environ.get("TOY_IMPORTS"):  # as long as torch's take
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    time.sleep(2)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
received = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))

threads = os.environ["OMP_NUM_THREADS"]
print(f"rank {rank} of {world} threads {threads} words {sys.argv[1:]}", flush=True)
mode = os.environ["TOY"]
if mode == "fail":
    sys.exit(3 if rank == world - 1 else 0)
if mode == "gather":
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    print(f"rank {rank} sum {total.item()}", flush=True)
    dist.destroy_process_group()
if mode == "wait":
    print(f"ready {rank}", flush=True)
    end = time.monotonic() + 60
    while not received and time.monotonic() < end:
        time.sleep(0.05)
    print(f"heard {rank}", flush=True)
    time.sleep(float(os.environ.get("TOY_SECONDS", 1)))  # a checkpoint takes a while
    print(f"rank {rank} got {received}", flush=True)
