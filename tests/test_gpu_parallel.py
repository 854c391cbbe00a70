"""Two GPUs: every parallelism over NCCL trains as one GPU does."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from filelock import FileLock

from tests.harness.runs import (
    ROOT,
    entries,
    environment,
    listening,
    processes,
    ranks_of,
    read_until,
    start,
    wait_for_the_end,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
COMMON = [
    "--config=train_configs/debug.toml",
    '--model.pattern=["gla", "gated_deltanet", "attention", "gla"]',
    "--attention.head_dim=32",
    "--training.global_batch_size=16",
    "--training.batch_size=4",
    "--training.steps=6",
    "--schedule.steps=400",
    "--metrics.log_every=1",
    "--checkpoint.every=0",
    "--validation.every=6",
    "--job.hang_timeout=15",
    "--optimizer.eps=1e-4",
    "--moe.shared=64",
    "--metrics.tensorboard=false",
]
LAYOUTS = {
    "fsdp": [],
    "hsdp": ["--parallel.dp_replicate=2"],
    "tp": ["--parallel.tp=2"],
    "tp async": ["--parallel.tp=2", "--parallel.async_tp=true"],
    "cp": ["--parallel.cp=2"],
    "cp all_to_all": ["--parallel.cp=2", "--parallel.cp_method=all_to_all"],
    "ep": ["--parallel.ep=2"],
    "pp": ["--parallel.pp=2"],
    "pp gpipe": ["--parallel.pp=2", "--parallel.schedule=gpipe"],
    "pp interleaved": ["--parallel.pp=2", "--parallel.schedule=interleaved"],
}
MODES = {
    "fp32": ["--training.dtype=float32"],
    "bf16 recomputed": ["--training.dtype=bfloat16", "--activation_checkpoint.mode=full"],
    "bf16 compiled": [
        "--training.dtype=bfloat16",
        "--compile.enable=true",
        "--activation_checkpoint.mode=selective",
    ],
}


def losses(folder, words, ranks, cache):
    program = ["./run_train.sh"] if ranks > 1 else [sys.executable, "train.py"]
    run = subprocess.run(
        [*program, *COMMON, *words, f"--job.folder={folder}", f"--data.cache={cache}"],
        cwd=ROOT,
        env=environment(NGPU=str(ranks), TORCHINDUCTOR_COMPILE_THREADS="4"),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    records = entries(folder)
    trained = [e for e in records if "loss" in e]
    return (
        [e["loss"] for e in trained],
        [e["grad_norm"] for e in trained],
        [e["validation_loss"] for e in records if "validation_loss" in e],
    )


@pytest.fixture
def one_gpu(tmp_path_factory, worker_id):
    """mode -> (its losses on one GPU, the folder of its data), found once for all workers of a
    run."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent

    def find(mode):
        folder = base / f"one {mode}"
        known = folder / "losses.json"
        with FileLock(f"{folder}.lock"):
            if not known.exists():
                found = losses(folder / "run", MODES[mode], 1, folder / "cache")
                known.write_text(json.dumps(found))
        return json.loads(known.read_text()), folder / "cache"

    return find


# Compiled runs take longest and so come first: `pytest -m gpu -n 9` runs nine at a time. Only the
# compiler can do "tp async".
CASES = [
    (mode, name)
    for mode in reversed(MODES)
    for name in LAYOUTS
    if mode == "bf16 compiled" or name != "tp async"
]


@pytest.mark.parametrize("mode, name", CASES)
def test_two_gpus_follow_one(tmp_path, one_gpu, mode, name):
    one, cache = one_gpu(mode)
    two = losses(tmp_path / "two", [*MODES[mode], *LAYOUTS[name]], 2, cache)
    tolerance = 1e-4 if mode == "fp32" else 1e-2
    for a, b, factor in zip(
        one, two, (1, 20, 1), strict=True
    ):  # a norm of few steps is steeper than a loss
        assert b == pytest.approx(a, rel=tolerance * factor)


def test_nccl_listens_on_loopback_only_and_a_signal_saves(tmp_path, monkeypatch):
    """Two jobs of run_train.sh: one that saves and ends, one whose launcher is killed."""
    words = [*COMMON, "--training.steps=100000", "--parallel.tp=2", "--checkpoint.every=100000"]
    for kill in (False, True):
        folder = tmp_path / str(kill)
        monkeypatch.setenv("JOB", str(folder))
        process = start([*words, f"--job.folder={folder}", f"--data.cache={tmp_path}/cache"], 2)
        output = read_until(process, "step 3/")
        addresses = listening(processes(folder))
        assert len(addresses) >= 3 and set(addresses) == {"0100007F"}
        if kill:
            process.kill()
        else:
            process.send_signal(signal.SIGTERM)
            output += process.communicate(timeout=100)[0]
            stopped = int(re.search(r"after step (\d+)", output).group(1))
            assert process.returncode == 0 and (folder / f"ckpt/step-{stopped}").is_dir(), output
        wait_for_the_end(folder, 20)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hung"])
def test_a_lost_rank_ends_the_job_and_is_named(tmp_path, monkeypatch, number):
    monkeypatch.setenv("JOB", str(tmp_path))
    words = [*COMMON, "--training.steps=100000", "--job.hang_timeout=8", "--parallel.cp=2"]
    process = start([*words, f"--job.folder={tmp_path}/run", f"--data.cache={tmp_path}/cache"], 2)
    output = read_until(process, "step 5/")
    os.kill(ranks_of(process)[1], number)
    output += process.communicate(timeout=100)[0]
    assert process.returncode != 0 and re.search(r"rank +(: )?1 ", output), output
    wait_for_the_end(tmp_path, 20)
