"""run_train.sh with a script in place of train.py: words, exit codes, signals, two nodes on one
machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("torchrun")


def start(mode, *words, **environment):
    environment = {
        "NGPU": "2",
        "TRAIN": str(ROOT / "tests/scripts/signal_toy.py"),
        "PYTHON": sys.executable,
        "TOY": mode,
    } | environment
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_NUM_THREADS", "CONFIG", "NNODES", "MASTER_PORT")
    }
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  what a shell starts in the background ignores it
    return subprocess.Popen(
        [ROOT / "run_train.sh", *words],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heard,
    )


def finish(process):
    output, _ = process.communicate(timeout=90)
    return process.returncode, output


def test_further_words_reach_the_script():
    code, output = finish(start("end", "--training.steps=3", "--a=x y"))
    assert code == 0, output
    words = [f"--config={ROOT}/train_configs/debug.toml", "--training.steps=3", "--a=x y"]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank in range(2):
        assert f"rank {rank} of 2 threads {threads} words {words}" in output


def test_config_and_threads_of_the_environment():
    code, output = finish(start("end", NGPU="1", CONFIG="some.toml", OMP_NUM_THREADS="7"))
    assert code == 0 and "rank 0 of 1 threads 7 words ['--config=some.toml']" in output, output


def test_a_failing_worker_fails_the_job():
    code, output = finish(start("fail"))
    assert code == 3 and output.splitlines()[-1] == "error: rank 1 ended with exit code 3", output


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_reach_the_workers_and_the_job_ends_well(name):
    process = start("wait")
    output = read_until(process, ["ready 0", "ready 1"])
    process.send_signal(getattr(signal, name))
    code, rest = finish(process)
    assert code == 0, output + rest
    for rank in range(2):
        assert f"rank {rank} got ['{name}']" in rest  # once each


def test_a_signal_before_the_workers_run_ends_the_job():
    process = start("wait")
    time.sleep(0.3)  # the traps are set; torchrun still imports torch
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code != 0 and "ready" not in output, output


@pytest.mark.slow
def test_two_nodes_on_one_machine():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    nodes = [
        start(
            "gather",
            NNODES="2",
            NODE_RANK=str(node),
            NGPU="1",
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
        )
        for node in range(2)
    ]
    results = [finish(node) for node in nodes]
    assert [code for code, _ in results] == [0, 0], results
    output = "".join(text for _, text in results)
    assert "rank 0 sum 1.0" in output and "rank 1 sum 1.0" in output


def test_several_nodes_need_an_address():
    code, output = finish(start("end", NNODES="2", MASTER_ADDR=""))
    assert code == 2 and "MASTER_ADDR" in output


def read_until(process, wanted):
    output = ""
    while not all(text in output for text in wanted):
        line = process.stdout.readline()
        assert line, output  # ended early
        output += line
    return output
