"""Ranks that hang, fail or die, through the real torchrun: the whole job ends, soon, with a
non-zero code and the culprit named."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmoe.config import load_config
from lmoe.watchdog import Watchdog, _behind

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("torchrun")


def run(how, timeout=2, dead_after=5, ranks=2):
    """-> (exit code, output, seconds from the trouble to the end), after asserting that every
    process of the job is gone."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--rdzv-backend=c10d",
    ]
    command += [
        "--rdzv-endpoint=localhost:0",
        "tests/scripts/watchdog_toy.py",
        how,
        str(timeout),
        str(dead_after),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    pids = [int(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("pid ")]
    assert len(pids) == ranks, done.stdout
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    trouble = [
        float(line.split()[-1])
        for line in done.stdout.splitlines()
        if line.startswith("trouble at")
    ]
    return done.returncode, done.stdout, time.time() - max(trouble)


def said(output):
    return [line for line in output.splitlines() if line.startswith("[watchdog]")]


def root_cause(output):
    """The rank that torchrun takes for it: the first to leave."""
    return int(re.search(r"Root Cause.*?rank +: (\d+)", output, re.DOTALL).group(1))


# The others in a collective of torch.distributed, and in one of lmoe's ops.
@pytest.mark.parametrize("how", [pytest.param("sleep", marks=pytest.mark.slow), "sleep-op"])
def test_a_rank_that_hangs_is_named_with_stacks(how):
    code, output, seconds = run(how)
    assert code != 0 and seconds < 2 + 20  # the bound that users are promised: timeout + 20 s
    lines = said(output)
    assert len(lines) == 2, output
    assert all(
        re.search(
            r"waiting for rank 1 \(at step 5 in train at watchdog_toy.py:\d+ \(stuck\)\)", line
        )
        for line in lines
    ), output
    assert (
        "in stuck" in output and "all_reduce" in output
    )  # stacks of the culprit and of those who wait
    assert root_cause(output) == 1


def test_a_killed_rank_is_named():
    code, output, seconds = run("kill")
    assert code != 0 and seconds < 20
    assert any("rank 1 is dead or frozen" in line for line in said(output)), output


def test_an_exception_before_a_collective_is_named_on_every_rank():
    code, output, seconds = run("raise")
    assert code != 0 and seconds < 20
    assert (
        sum(
            "rank 1 failed at step 5 in train: ValueError: the reason of it all" in line
            for line in said(output)
        )
        >= 2
    ), output
    assert 'raise ValueError("the reason of it all")' in output  # the traceback
    assert root_cause(output) == 1


@pytest.mark.slow
def test_a_long_validation_is_no_hang():
    code, output, _ = run("validation", timeout=1)
    assert code == 0 and not said(output) and output.count("went well") == 2, output


@pytest.mark.slow
def test_an_exception_after_a_collective_is_named():
    code, output, seconds = run("raise-after")
    assert code != 0 and seconds < 20
    assert any("rank 1 failed at step 5" in line for line in said(output)), output


@pytest.mark.slow  # torchrun gives a process that does not answer 30 s before it kills it
@pytest.mark.parametrize("how", ["freeze", "gil"])
def test_a_process_that_cannot_even_run_a_thread_is_named(how):
    code, output, seconds = run(how, timeout=20, dead_after=3)
    assert code != 0 and seconds < 3 + 20 + 30
    assert any("rank 1 is dead or frozen, last seen at step 5" in line for line in said(output)), (
        output
    )


@pytest.mark.parametrize("steps, ends", [(3, True), (2, False)])
def test_one_process_without_a_store(steps, ends):
    """The full timeout counts from the third step on; before it ten times as much."""
    program = f"""
import time
from lmoe.watchdog import Watchdog
with Watchdog(None, 0, 1, timeout=0.5, interval=0.1) as watchdog:
    for step in range({steps}):
        watchdog.beat(step, "data")
    time.sleep(3)
print("went well")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode != 0) == ends == ("went well" not in done.stdout)
    if ends:
        assert "no progress" in done.stderr and "at step 2 in data" in done.stderr


def test_a_loader_process_that_dies_meanwhile_does_not_end_the_report():
    """torch's data loader has a handler that raises when one of its processes dies, and a broken
    pipe is often seen before that."""
    program = """
import os, signal
from lmoe.watchdog import Watchdog

def handler(*_):
    raise RuntimeError("DataLoader worker is killed")

class Reason(Exception):
    def __str__(self):
        os.kill(os.getpid(), signal.SIGCHLD)
        return "the reason of it all"

signal.signal(signal.SIGCHLD, handler)
with Watchdog(None, 0, 1, timeout=5):
    raise Reason
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (
        done.returncode != 0
        and "[watchdog] rank 0 failed in start: Reason: the reason of it all" in done.stderr
    ), done.stderr


def test_behind():
    stand = {0: [9, True, "a"], 1: [9, True, "a"], 2: [8, True, "a"], 3: [9, False, "b"]}
    assert _behind(stand) == [2]  # fewest beats
    assert _behind({**stand, 2: [9, True, "a"]}) == [3]  # outside of the collective
    assert _behind({0: [1, False, "a"], 1: [1, False, "b"], 2: [1, False, "a"]}) == [
        1
    ]  # alone at its place
    assert _behind({0: [1, False, "a"], 1: [1, False, "b"]}) == []  # one against one says nothing
    assert _behind({0: [1, True, "a"], 1: [1, True, "a"]}) == []


def test_zero_watches_nothing():
    watchdog = Watchdog(None, 0, 1, timeout=0)
    assert watchdog._thread is None
    watchdog.beat(1)
    watchdog.stop()
    with pytest.raises(ValueError, match="job.hang_timeout"):
        load_config(["--job.hang_timeout=-1"])
