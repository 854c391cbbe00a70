"""train.py with a fault on one rank, for tests/test_failure.py.

FAULT = "PLACE ACTION RANK". PLACE: forward or backward of the third block that this rank runs in
step 5, or data, where its twelfth row is read. ACTION: raise, stop (StopIteration), kill or hang.
It says when it strikes.
"""

import itertools
import os
import signal
import sys
import time

sys.path.insert(0, os.getcwd())

import torch  # noqa: E402

import train  # noqa: E402
from lmoe.data.sources import MqarSource  # noqa: E402
from lmoe.model.block import Block  # noqa: E402
from lmoe.watchdog import Watchdog  # noqa: E402

STEP, CALL, ROW = 5, 3, 12
calls = itertools.count(1)


def strike(action):
    os.write(
        1, f"fault at {time.time()}\n".encode()
    )  # a whole line, whatever the other ranks write
    if action == "raise":
        raise ValueError("the reason of it all")
    if action == "stop":
        raise StopIteration
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    stuck()


def stuck():
    time.sleep(3600)


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, action):
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        strike(ctx.action)


def plant(place, action):
    beat, mix, row = Watchdog.beat, Block.mix, MqarSource.row

    def counting_beat(self, step, phase="train"):
        global calls
        if step != self._step:
            calls = itertools.count(1) if step == STEP else itertools.repeat(0)
        beat(self, step, phase)

    def faulty_mix(self, *args):
        strikes = next(calls) == CALL
        if strikes and place == "forward":
            strike(action)
        x, *rest = mix(self, *args)
        return InBackward.apply(x, action) if strikes else x, *rest

    def faulty_row(self, *args):
        if next(calls) == ROW:
            strike(action)
        return row(self, *args)

    if place == "data":
        MqarSource.row = faulty_row
    else:
        Watchdog.beat, Block.mix = counting_beat, faulty_mix


place, action, rank = os.environ["FAULT"].split()
if os.environ["RANK"] == rank:
    plant(place, action)
train.main(sys.argv[1:])
