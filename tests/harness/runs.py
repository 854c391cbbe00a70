"""Runs of train.py as users start them, and the processes that belong to one."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PROC = Path("/proc")
TINY = [
    "--model.dim=32",
    "--model.layers=3",
    "--model.heads=2",
    '--model.pattern=["gla", "gated_deltanet", "attention"]',
    "--moe.experts=4",
    "--moe.hidden=16",
    "--data.source=text",
    "--data.seq_len=64",
    "--data.workers=1",
    "--training.batch_size=2",
    "--training.steps=6",
    "--training.global_batch_size=4",
    "--training.dtype=float32",
    "--schedule.warmup_steps=2",
    "--checkpoint.every=3",
    "--checkpoint.keep=0",
    "--metrics.log_every=1",
    "--data.validation_fraction=0.2",
    "--validation.every=0",
]


def write_corpus(folder):
    """Thirty small documents of words, some far longer than a sample."""
    generator = torch.Generator().manual_seed(0)
    words = ["alpha", "beta", "gamma", "delta", "\n", "epsilon", "zeta", "eta"]
    for i in range(30):
        picks = torch.randint(0, len(words), (5 + 17 * i,), generator=generator).tolist()
        (folder / f"{i:02d}.txt").write_text(" ".join(words[p] for p in picks))


def command(corpus, folder, words):
    return [
        *TINY,
        f"--data.paths={corpus}",
        f"--data.cache={corpus}.cache",
        f"--job.folder={folder}",
        *words,
    ]


def environment(**values):
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHON": sys.executable,
        **values,
    }


def start(words, ngpu=0, **options):
    """Begin a run (ngpu=0: without run_train.sh) whose lines come through a pipe."""
    alone = [sys.executable, "train.py", "--config=train_configs/debug.toml"]
    return subprocess.Popen(
        [*(["./run_train.sh"] if ngpu else alone), *words],
        cwd=ROOT,
        env=environment(NGPU=str(ngpu)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def read_until(process, *wanted):
    """Read a run's lines until each text was among them."""
    output = ""
    while not all(text in output for text in wanted):
        line = process.stdout.readline()
        assert line, output  # ended early
        output += line
    return output


def run(corpus, folder, *words, ngpu=0, code=0):
    """Run to the end and return what was printed."""
    process = start(command(corpus, folder, words), ngpu)
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def entries(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return {e["step"]: e["loss"] for e in entries(folder) if "loss" in e}


def parent_of(path):
    """The parent of a process that runs, given as its folder of /proc; else None."""
    try:
        state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


def environment_of(path):
    try:
        return (path / "environ").read_bytes().split(b"\0")
    except OSError:
        return []  # it is gone, or somebody else's


def children_of(pid):
    return [path for path in PROC.glob("[0-9]*") if parent_of(path) == pid]


def processes(job):
    """Folders in /proc of the processes that inherited JOB=job and still run."""
    mark = f"JOB={job}".encode()
    return [path for path in PROC.glob("[0-9]*") if mark in environment_of(path)]


def ranks_of(launcher):
    """rank -> process id, of the ranks that a run_train.sh has started."""
    found = {}
    for path in children_of(launcher.pid):
        for word in environment_of(path):
            if word.startswith(b"RANK="):
                found[int(word[5:])] = int(path.name)
    return found


def wait_for_the_end(job, seconds):
    end = time.monotonic() + seconds
    while left := processes(job):
        assert time.monotonic() < end, left
        time.sleep(0.01)


def listening(paths):
    """Addresses at which processes listen, as /proc/net writes them."""
    sockets = {}
    for kind in ("tcp", "tcp6"):
        for line in (PROC / "net" / kind).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[f"socket:[{fields[9]}]"] = fields[1].split(":")[0]
    links = []
    for path in paths:
        for link in (path / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                links.append(os.readlink(link))
    return [sockets[link] for link in links if link in sockets]
