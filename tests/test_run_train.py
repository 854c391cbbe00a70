"""run_train.sh, mostly with a script in place of train.py: words, exit codes, signals, two nodes on
one machine, what listens, what is left of a job."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid

import pytest

from lmoe import launch
from tests.harness.runs import (
    ROOT,
    environment_of,
    listening,
    processes,
    ranks_of,
    read_until,
    wait_for_the_end,
)

TINY = [
    "--model.dim=32",
    "--model.layers=2",
    "--model.pattern=LN",
    "--model.heads=2",
    "--moe.experts=4",
    "--moe.hidden=32",
    "--data.seq_len=64",
    "--training.batch_size=4",
    "--training.steps=100000",
    "--metrics.tensorboard=false",
]
pytestmark = pytest.mark.xdist_group("torchrun")


def start(mode, *words, under="env", **environment):
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

    def heard():  # what a shell starts in the background, or under nohup, ignores them
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    return subprocess.Popen(
        [under, ROOT / "run_train.sh", *words],
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
    output = read_until(process, "ready 0", "ready 1")
    process.send_signal(getattr(signal, name))
    code, rest = finish(process)
    assert code == 0, output + rest
    for rank in range(2):
        assert f"rank {rank} got ['{name}']" in rest  # once each


def test_a_hangup_is_a_stop_unless_it_was_ignored_before():
    process = start("wait")
    output = read_until(process, "ready 0", "ready 1")
    process.send_signal(signal.SIGHUP)
    code, rest = finish(process)
    assert code == 0 and "rank 0 got ['SIGTERM']" in rest, output + rest
    process = start("wait", under="nohup")
    output = read_until(process, "ready 0", "ready 1")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    code, rest = finish(process)
    assert code == 0 and "rank 0 got ['SIGUSR1']" in rest, output + rest


def test_a_hangup_is_called_by_its_name():
    line = "stopped by SIGHUP before the first step: nothing to save"
    assert launch.explain(0, 143, [signal.SIGHUP]) == (129, line)


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


def train(folder, *words, **environment):
    """A job of two ranks that really train, in processes that inherit JOB."""
    environment = {"TRAIN": str(ROOT / "train.py"), "JOB": uuid.uuid4().hex} | environment
    return start("", *TINY, f"--job.folder={folder}", *words, **environment), environment["JOB"]


def test_nothing_listens_beyond_loopback_and_nothing_outlives_a_killed_launcher(tmp_path):
    words = ["--data.source=mqar", "--data.workers=1", "--data.prefetch=64"]
    process, job = train(tmp_path, *words, "--job.hang_timeout=0")
    try:
        read_until(process, "step 1/")
        found = processes(job)
        addresses = listening(found)
    finally:
        process.kill()
    assert len(found) >= 5  # the launcher, two ranks and their loaders
    assert len(addresses) >= 3 and set(addresses) == {"0100007F"}
    wait_for_the_end(job, 10)


def test_a_refusal_is_the_last_line(tmp_path):
    process, _ = train(tmp_path, "--data.source=mqar", "--model.dim=33")
    code, output = finish(process)
    assert code == 1 and output.splitlines()[-1].startswith("error: mixer."), output
    assert output.count("error") == 1 and "Traceback" not in output


def test_a_killed_rank_is_told_in_the_last_line():
    process = start("wait")
    read_until(process, "ready 0", "ready 1")
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    code, output = finish(process)
    assert code == 128 + signal.SIGKILL, output
    assert output.splitlines()[-1].startswith("error: rank 1 was ended by SIGKILL: "), output


def test_a_second_interrupt_ends_at_once():
    process = start("wait", TOY_SECONDS="60")
    read_until(process, "ready 0", "ready 1")
    process.send_signal(signal.SIGINT)
    read_until(process, "heard 0", "heard 1")
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130 and output.splitlines()[-1] == "ended by a second Ctrl-C without saving"


@pytest.mark.parametrize("wait", [0, 0.05, 0.2, 1])
def test_an_early_interrupt_says_one_line(wait):
    process = start("wait", TOY_IMPORTS="1")
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code in (130, -signal.SIGINT) and len(output.splitlines()) <= 1, output


def test_help_starts_nothing():
    code, output = finish(start("end", "--help"))
    assert code == 0 and "rank" not in output.split()
    assert all(name in output for name in ("NGPU", "CONFIG", "NNODES", "train.py --help"))


@pytest.mark.parametrize("words", [["--help=data"], ["--job.seed=2", "--help"], ["-h", "data"]])
def test_help_is_train_pys(words, monkeypatch):
    monkeypatch.setattr(launch, "Signals", lambda: None)
    monkeypatch.setattr(launch, "start", lambda *given: pytest.fail("the job is started"))
    monkeypatch.setattr(os, "execv", lambda program, given: sys.exit(str(given[2:])))
    with pytest.raises(SystemExit, match=re.escape(str(words))):
        launch.main(words)


@pytest.mark.parametrize(
    "environment",
    [
        {"NGPU": "two"},
        {"NGPU": "0"},
        {"NGPU": "1" * 5000},
        {"NNODES": "2", "MASTER_ADDR": ""},
        {"MASTER_PORT": "-1"},
        {"MASTER_PORT": "70000"},
    ],
)
def test_an_environment_that_does_not_fit_is_one_line(environment):
    code, output = finish(start("end", **environment))
    assert code == 2 and len(output.splitlines()) == 1 and next(iter(environment)) in output


def test_a_rank_that_cannot_join_is_one_line(tmp_path, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "LMOE_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, ROOT / "train.py", *TINY, f"--job.folder={tmp_path}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1, run
    assert run.stderr.startswith("error: rank 0 cannot join the job: "), run
    assert "MASTER_ADDR" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_interrupts_tokenising(tmp_path, name):
    slow = {"TRAIN": str(ROOT / "tests/scripts/slow_train.py"), "SLOW": "tokenise"}
    process, job = train(tmp_path, "--data.source=stdlib", **slow)
    read_until(process, "a document")
    process.send_signal(getattr(signal, name))
    began = time.monotonic()
    code, output = finish(process)
    assert code == 128 + getattr(signal, name) and time.monotonic() - began < 10
    assert output.splitlines()[-1] == f"stopped by {name} before the first step: nothing to save"
    assert "Traceback" not in output and "watchdog" not in output
    wait_for_the_end(job, 5)


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_before_the_first_step(tmp_path):
    slow = {"TRAIN": str(ROOT / "tests/scripts/slow_train.py"), "SLOW": "tokenise"}
    process, job = train(tmp_path, "--data.source=stdlib", **slow)
    read_until(process, "a document")
    (rank,) = [path for path in processes(job) if b"RANK=1" in environment_of(path)]
    os.kill(int(rank.name), signal.SIGTERM)
    code, output = finish(process)
    assert code == 143 and output.splitlines()[-1] == "error: rank 1 was ended by SIGTERM", output


@pytest.mark.slow
def test_tokenising_for_longer_than_the_watchdog_waits_is_no_hang(tmp_path):
    slow = {"TRAIN": str(ROOT / "tests/scripts/slow_train.py"), "SLOW": "tokenise"}
    for k in range(90):
        (tmp_path / f"{k}.txt").write_text(f"document {k} " * 100)
    words = ["--data.source=text", f'--data.paths=["{tmp_path}"]', "--training.steps=2"]
    words.append("--schedule.warmup_steps=0")
    process, _ = train(tmp_path / "run", *words, "--job.hang_timeout=1", **slow)
    code, output = finish(process)
    assert code == 0 and "done at step 2" in output and "watchdog" not in output, output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_interrupts_validation_and_the_run_saves(tmp_path, name):
    slow = {"TRAIN": str(ROOT / "tests/scripts/slow_train.py"), "SLOW": "validate"}
    words = ["--validation.every=2", "--validation.steps=20", "--metrics.log_every=1"]
    process, _ = train(tmp_path, "--data.source=mqar", *words, **slow)
    output = read_until(process, "step 1/")
    output += read_until(process, "a batch")
    process.send_signal(getattr(signal, name))
    code, rest = finish(process)
    assert code == 0 and (tmp_path / "ckpt/step-2").is_dir(), output + rest
    assert rest.count("a batch") < 8  # of 20
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"step": 2' in lines[-1] and "validation_loss" not in lines[-1]
