"""Two GPUs: every parallelism over NCCL trains as one GPU does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ROOT = Path(__file__).resolve().parent.parent
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


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def losses(folder, words, ranks, cache):
    command = [sys.executable, "train.py"]
    if ranks > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            f"--master_port={free_port()}",
            "train.py",
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    run = subprocess.run(
        [*command, *COMMON, *words, f"--job.folder={folder}", f"--data.cache={cache}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [e for e in entries if "loss" in e]
    return (
        [e["loss"] for e in trained],
        [e["grad_norm"] for e in trained],
        [e["validation_loss"] for e in entries if "validation_loss" in e],
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
