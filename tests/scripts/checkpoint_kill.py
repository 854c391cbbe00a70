"""Kill a process that saves asynchronously at random moments, `kills` times, and check each time
that what is left resumes.

    python tests/scripts/checkpoint_kill.py FOLDER KILLS SEED

Weights and moments are functions of the step, so that a checkpoint put together from two steps is
seen.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from lmoe.checkpoint import Checkpointer

KEEP = 2


def build(step):
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 100, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    fill(model, optimizer, step)
    return model, optimizer


@torch.no_grad()
def fill(model, optimizer, step):
    for parameter in model.parameters():
        parameter.fill_(step)
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.full_like(parameter, step + 0.25),
            "exp_avg_sq": torch.full_like(parameter, step + 0.5),
        }


def resume(folder):
    model, optimizer = build(-1)
    checkpointer = Checkpointer(folder, keep=KEEP)
    extra = checkpointer.load(model, [optimizer])
    step = extra["step"] if extra else 0
    for parameter, state in optimizer.state.items():
        expected = (step, step, step + 0.25, step + 0.5) if extra else (-1, -1, -0.75, -0.5)
        for tensor, value in zip(
            (parameter, state["step"], state["exp_avg"], state["exp_avg_sq"]), expected
        ):
            assert (tensor == value).all(), (
                f"step {step}: {tensor.flatten()[:3]} instead of {value}"
            )
    return model, optimizer, checkpointer, step


def train(folder, published):
    model, optimizer, checkpointer, step = resume(folder)
    while True:
        step += 1
        fill(model, optimizer, step)
        checkpointer.save(step, model, [optimizer], {"step": step}, {"config.toml": "a = 1\n"})
        fill(model, optimizer, -7)  # training goes on
        if step % 3 == 0:
            checkpointer.wait()
            os.write(published, f"{step}\n".encode())


def main():
    folder, kills, generator = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    torch.set_num_threads(1)  # a forked child has no OpenMP threads
    before = 0
    for _ in range(kills):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            train(folder, write)
        os.close(write)
        time.sleep(generator.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read) as lines:
            published = [
                int(line) for line in lines.read().splitlines(keepends=True) if line.endswith("\n")
            ]
        step = resume(folder)[-1]
        assert step >= max(published, default=before), f"step {step} after {published[-1:]}"
        assert step >= before
        before = step
        assert (
            len(list(folder.glob("*"))) <= KEEP + 3
        )  # one being written, one being removed, one just published
    print(f"{kills} kills, {before} steps")


main()
