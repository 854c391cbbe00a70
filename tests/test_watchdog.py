"""Ranks that hang, fail or die, through the real torchrun: the whole job ends, soon, with a
non-zero code and the culprit named."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import lmoe.watchdog
from lmoe.config import load_config
from lmoe.messages import UNREADABLE, clean, read_beat, read_stand, read_text, read_verdict
from lmoe.parallel.dims import PATIENCE, leave_hangs_to_the_watchdog
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


HOSTILE = [
    b"",
    b"\xff\xfe",
    b"{",
    b"null",
    b"17",
    b"[" * 100_000,
    b"1" * 5000,
    b"[]",
    b'{"line": "x", "kind": "hang"}',
    b"[1, 2, 3, 4]",
    b'[true, 1, "x", true]',
    b'["x", "failure", [99], 1]',
    b'["x", "failure", [-1], 1]',
    b'["x", "failure", [true], 1]',
    b'["x", "failure", ["0"], 1]',
    b'["x", "failure", 0, 1]',
    b'["x", "failure", [], 0]',
    b'["x", "failure", [], 1e999]',
    b'["x", "mercy", [], 1]',
    b'[{}, "failure", [], 1]',
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_message_is_unreadable(data):
    assert read_verdict(data, 2) == UNREADABLE
    assert read_beat(data) is read_stand(data) is read_text(data) is None


def test_texts_of_others_are_cut_and_hold_nothing_that_a_terminal_obeys():
    text = clean("a\x1b[2J\n\u202e\ud800b" + "x" * 10_000)
    assert text.startswith("a?[2J???bxx") and len(text) == 600 and text.isprintable()
    line = read_verdict(b'["\\u001b[31mred\\n\\ud800", "failure", [1], 1]', 2).line
    assert line == "?[31mred??"


@pytest.mark.parametrize("text", ["\xff", "[" * 10_000, '["x", "failure", [9], 1]'])
def test_hostile_values_under_every_key_make_no_traceback(text):
    """A rank whose neighbour's beat is garbage; then the verdict is, and the job ends."""
    program = f"""
import time
import torch.distributed as dist
from lmoe.watchdog import Watchdog
store = dist.HashStore()
for key in ("beat/1", "stand/0", "stand/1", "refused/1", "refusals", "done/0", "advanced", "said"):
    store.set(key, {text!r})
with Watchdog(store, 0, 2, timeout=5, interval=0.1):
    time.sleep(1)
    print("still there", flush=True)
    store.set("verdict", {text!r})
    time.sleep(20)
print("went well")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout == "still there\n"
    assert "[watchdog] what the job's store holds as the verdict cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_hostile_values_where_a_hang_is_looked_into(monkeypatch):
    monkeypatch.setattr(lmoe.watchdog, "_GATHER_SECONDS", 0)
    store = dist.HashStore()
    for key in ("beat/1", "beat/2", "stand/1", "stand/2"):
        store.set(key, "[" * 1000)
    watchdog = Watchdog(store, 0, 3, timeout=0, interval=0.01)
    line, first = watchdog._blame()
    assert line.count("does not answer; last before its first step") == 2 and first == []


def test_hostile_values_where_ranks_refuse(capsys):
    store = dist.HashStore()
    store.set("refused/0", b"\xff")
    store.set("refusals", "many")
    Watchdog(store, 1, 2, timeout=0, interval=0.01).refuse("no\x1b[2J such file")
    assert capsys.readouterr().err == "error: rank 1: no?[2J such file\n"


@pytest.mark.parametrize("advances, ends", [(True, False), (False, True)])
def test_a_rank_that_waits_for_one_that_advances_is_not_hung(advances, ends):
    program = f"""
import time
import torch.distributed as dist
from lmoe.watchdog import Watchdog
store = dist.HashStore()
waits, works = (Watchdog(store, rank, 2, timeout=0.1, interval=0.05) for rank in range(2))
for _ in range({30 if advances else 200}):  # ten times the timeout is allowed
    time.sleep(0.1)
    if {advances}:
        works.advance()
print("went well")
waits.stop()
works.stop()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode != 0) == ends == ("no progress" in done.stderr), done.stderr
    assert ("went well" in done.stdout) != ends


def test_no_collective_gives_up_before_the_watchdog(one_rank):
    group = dist.new_group()
    try:
        leave_hangs_to_the_watchdog()
        for each in (group, dist.group.WORLD):
            assert each._get_backend(torch.device("cpu")).options._timeout == PATIENCE
    finally:
        dist.destroy_process_group(group)
