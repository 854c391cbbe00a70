"""Save and prune as fast as possible, or read beside that, for some seconds; prints how often.

python tests/scripts/checkpoint_race.py write|read|branch|replace FOLDER SECONDS
"""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from lmoe.checkpoint import Checkpointer, load_model, main, newest, verify


def build(step):
    """A model whose weights tell the step, in the files of three layers."""
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(3)))
    for parameter in model.parameters():
        nn.init.constant_(parameter, step)
    return model


def write(folder, step):
    same = {"replace": 1}.get(sys.argv[1], step)
    Checkpointer(folder, keep=1).save(same, build(step), [], {"step": step}, sync=True)


def read(folder, _):
    model = build(-1)
    step = load_model(model, folder)["step"]
    assert all((parameter == step).all() for parameter in model.parameters()), step
    assert newest(folder) is not None
    assert main(["verify", str(folder)]) == 0


def branch(folder, _):
    """As a run that starts from another's checkpoint does."""
    checkpointer = Checkpointer(folder.parent / "none")
    path = checkpointer.find(folder)
    time.sleep(0.02)
    assert not verify(path)
    checkpointer.load(build(-1), [], path)


def race():
    kind, folder, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    work = {"write": write, "replace": write, "read": read, "branch": branch}[kind]
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        count += 1
        work(folder, count)
    print(f"{kind} {count} times")


race()
