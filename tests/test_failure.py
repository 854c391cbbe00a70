"""train.py in every layout with a fault on one rank: the whole job ends within a minute, and says
that it was this rank and no other."""

import os
import re
import signal
import subprocess
import time
import uuid

import pytest

from tests.harness.runs import ROOT, environment, processes

pytestmark = pytest.mark.xdist_group("torchrun")

DEADLINE = 60  # seconds from a fault to the end of the last process
STARTS = 200  # seconds that a busy machine may take to get there
TINY = [
    "--model.dim=32",
    "--model.layers=4",
    "--model.heads=2",
    '--model.pattern=["gla", "gated_deltanet", "attention", "gla"]',
    "--moe.experts=4",
    "--moe.hidden=16",
    "--data.source=mqar",
    "--data.seq_len=64",
    "--data.workers=1",
    "--training.steps=100000",
    "--training.batch_size=1",
    "--training.global_batch_size=4",
    "--training.dtype=float32",
    "--checkpoint.every=0",
    "--validation.every=0",
    "--metrics.tensorboard=false",
    "--job.hang_timeout=15",
]
RANKS = {"tp=2": 2, "cp=2": 2, "ep=2": 2, "pp=2": 2, "pp=2 schedule=interleaved": 2, "pp=2 cp=2": 4}
REASON = "the reason of it all"


def run(folder, layout, fault, *words):
    """-> what the job has said, after asserting that it has failed and that nothing was left of it
    in time."""
    job = uuid.uuid4().hex
    words = [
        *TINY,
        f"--job.folder={folder}",
        *(f"--parallel.{word}" for word in layout.split()),
        *words,
    ]
    script = str(ROOT / "tests/scripts/fault_train.py")
    env = environment(NGPU=str(RANKS[layout]), TRAIN=script, FAULT=fault, JOB=job)
    output = folder / "output"
    with open(output, "w") as file:
        process = subprocess.Popen(
            ["./run_train.sh", *words],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.time() + STARTS
        struck = False
        while process.poll() is None or processes(job):
            time.sleep(0.1)
            if not struck and (
                struck := re.search(r"^fault at (\S+)$", output.read_text(), re.MULTILINE)
            ):
                end = float(struck[1]) + DEADLINE
            assert time.time() < end, f"{processes(job)} are still there\n{output.read_text()}"
    finally:
        for path in processes(job):
            os.kill(int(path.name), signal.SIGKILL)
        process.wait()
    assert struck and process.returncode != 0, output.read_text()
    return output.read_text()


def verdicts(output):
    """What the watchdogs' lines blame, one for each rank that was there to write one; an echo's own
    error is not what it blames."""
    lines = [
        line.split("-- after this: ")[-1]
        for line in output.splitlines()
        if line.startswith("[watchdog]")
    ]
    return [re.split(r"; the other ranks are |\(rank \d+ ends ", line)[0] for line in lines]


def check(output, layout, fault):
    place, action, rank = fault.split()
    said = verdicts(output)
    assert {int(r) for line in said for r in re.findall(r"rank (\d+)", line)} == {int(rank)}, output
    wanted = {
        "raise": rf"rank {rank} failed at step \d+ in train: ValueError: {REASON}",
        "stop": rf"rank {rank} failed at step \d+ in train: StopIteration: no message, at train.py",
        # it may have died before it told of a step
        "kill": rf"rank {rank} (is dead or frozen|\(does not answer)",
        "hang": (
            rf"no progress for \d+ s; waiting for rank {rank} \(at step \d+ in train at"
            r" fault_train.py:\d+ \(stuck\)\)"
        ),
    }[action]
    if place == "data" and action == "kill":
        wanted = (
            rf"rank {rank} failed at step \d+ in train: (RuntimeError: DataLoader"
            r" worker|EOFError|ConnectionResetError)"
        )
    if place == "data" and action == "raise":  # taken for a broken file: one line of that rank
        wanted = rf"rank {rank} failed at step \d+ in train: {REASON}"
        assert f"error: rank {rank}: {REASON}\n" in output
    if place == "data" and action == "hang":
        wanted = rf"no progress for \d+ s; waiting for rank {rank} \(at step \d+ in train at "
    assert all(re.search(wanted, line) for line in said), output
    silent = action == "kill" and place != "data" or action == "raise" and place == "data"
    assert len(said) == RANKS[layout] - silent, output  # every other rank has said so
    last = output.splitlines()[-1].split("; the other ranks are ")[0]
    assert last.startswith("error: ") and set(re.findall(r"rank (\d+)", last)) == {rank}, output


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, fault", [("cp=2", "forward kill 1"), ("pp=2", "backward raise 0")]
)
def test_a_rank_that_fails_in_a_split_model_is_named(tmp_path, layout, fault):
    check(
        run(tmp_path, layout, fault, "--data.workers=0"), layout, fault
    )  # a loader process outlives its rank for seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["forward raise", "backward raise", "forward kill", "forward hang", "backward hang"]
)
@pytest.mark.parametrize(
    "layout, rank",
    [("tp=2", 0), ("cp=2", 1), ("ep=2", 1), ("pp=2", 0), ("pp=2", 1), ("pp=2 cp=2", 2)],
)
def test_the_rank_at_fault_is_named_in_every_layout(tmp_path, layout, rank, fault):
    """With others in collectives with it, in those of other ranks, and inside a pipeline's
    schedule, which waits for messages."""
    check(run(tmp_path, layout, f"{fault} {rank}"), layout, f"{fault} {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["forward raise 1", "forward kill 0"])
def test_the_rank_at_fault_is_named_where_it_runs_several_stages(tmp_path, fault):
    layout = "pp=2 schedule=interleaved"
    check(run(tmp_path, layout, fault), layout, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["data raise 1", "data stop 0", "data kill 1", "data hang 1"])
@pytest.mark.parametrize("layout", ["tp=2", "ep=2", "pp=2 cp=2"])
def test_a_rank_without_data_is_no_hang(tmp_path, layout, fault):
    """A source that fails, ends, takes its process along or never answers, on one rank only."""
    output = run(tmp_path, layout, fault)
    check(output, layout, fault)
    assert fault.split()[1] == "hang" or "no progress" not in output


@pytest.mark.slow
def test_a_rank_without_data_in_its_own_process(tmp_path):
    output = run(tmp_path, "cp=2", "data raise 1", "--data.workers=0")
    check(output, "cp=2", "data raise 1")
