"""A steady step of training has no host that waits for its device."""

import json
import subprocess
from unittest import mock

import pytest
import torch

from lmoe.data.packing import IGNORE, HostBatch
from lmoe.model.batch import SeqBuilder
from lmoe.parallel.collectives import Ranks
from lmoe.parallel.context import ContextParallel, SliceBuilder
from tests.harness.runs import ROOT, environment

# In CUDA's runtime and, without "cuda" before them, in its driver.
WAITS = {
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMemcpy2D",
    "cudaMemcpyToSymbol",
    "cudaMemcpyFromSymbol",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "cuMemcpyDtoH_v2",
    "cuMemcpyHtoD_v2",
}
RUN = [
    "--config=train_configs/debug.toml",
    "--data.source=mqar",
    "--training.dtype=bfloat16",
    "--training.batch_size=2",
    "--training.global_batch_size=8",
    "--training.steps=9",
    "--schedule.warmup_steps=2",
    "--metrics.log_every=1",
    "--checkpoint.every=0",
    "--validation.every=0",
]
# name: (GPUs, words)
CASES = {
    "eager": (1, []),
    "recomputed": (1, ["--activation_checkpoint.mode=full"]),
    "compiled": (1, ["--compile.enable=true", "--activation_checkpoint.mode=selective"]),
    "ep 2": (2, ["--parallel.ep=2"]),
    "ep 2, compiled": (2, ["--parallel.ep=2", "--compile.enable=true"]),
    "tp 2": (2, ["--parallel.tp=2", "--compile.enable=true"]),
}


def steady(events):
    """Those of a chrome trace that begin inside its range `steady`."""
    (window,) = (e for e in events if e.get("cat") == "user_annotation" and e["name"] == "steady")
    end = window["ts"] + window["dur"]
    return [e for e in events if e.get("ph") == "X" and window["ts"] <= e["ts"] <= end]


def waits(events):
    """List what may have made the host wait: calls, and copies of memory that is not pinned."""
    return [e["name"] for e in events if e["name"] in WAITS or "Pageable" in e["name"]]


def traces(folder, ranks, words):
    """[events] of the steady steps on every rank of a run of train.py."""
    script = str(ROOT / "tests/scripts/no_waits_train.py")
    (folder / "traces").mkdir()
    done = subprocess.run(
        ["./run_train.sh", *RUN, *words, f"--job.folder={folder}/run"],
        cwd=ROOT,
        env=environment(NGPU=str(ranks), TRAIN=script, WAITS=str(folder / "traces")),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))
    files = [folder / f"traces/rank{rank}.json" for rank in range(ranks)]
    return [steady(json.loads(file.read_text())["traceEvents"]) for file in files]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_steady_step_never_waits(tmp_path, name):
    """The one wait that is allowed, for the step before the last where the host is ahead of that,
    asks first whether the step has ended; one of this size has."""
    ranks, words = CASES[name]
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    for events in traces(tmp_path, ranks, words):
        launches = [e for e in events if "LaunchKernel" in e["name"]]
        assert len(launches) > 100, "nothing was traced"
        assert not waits(events)


def test_waits_are_seen_inside_the_steady_steps_alone():
    def event(name, ts, cat="cuda_runtime", dur=1, ph="X"):
        return {"name": name, "ts": ts, "dur": dur, "cat": cat, "ph": ph}

    quiet = [
        event("steady", 10, "user_annotation", 10),
        event("steady", 12, "gpu_user_annotation", 90),
        event("cudaDeviceSynchronize", 9),  # as the profiler does when it begins and ends
        event("cudaDeviceSynchronize", 21),
        *(event(name, 15) for name in ("cudaMemcpyAsync", "cudaEventQuery", "cudaStreamWaitEvent")),
        event("Memcpy HtoD (Pinned -> Device)", 15, "gpu_memcpy"),
        {"name": "process_name", "ph": "M", "args": {}},
    ]
    assert waits(steady(quiet)) == []
    for name in (*WAITS, "Memcpy DtoH (Device -> Pageable)"):
        assert waits(steady([*quiet, event(name, 20)])) == [name]


@pytest.mark.parametrize("dense_mask", [True, False])
@pytest.mark.parametrize("ranks", [0, 1, 4])
def test_a_microbatch_is_one_copy(ranks, dense_mask):
    """It is of 32-bit numbers, made into what the layers expect on the device."""
    common = {"dense_mask": dense_mask, "windows": {0, 3}}
    build = SeqBuilder("cpu", **common)
    if ranks:
        context = ContextParallel(Ranks("none", ranks, ranks - 1), "lasp2")
        common |= {"ranks": context.ranks, "context": context, "tp": 2, "tp_index": 1}
        build = SliceBuilder("cpu", **common)
    tokens, labels = torch.arange(32) + 2**30, torch.arange(32) - 1
    labels[::5] = IGNORE
    borders = torch.tensor([0, 5, 16, 17, 32], dtype=torch.int32)
    with mock.patch.object(build, "move", wraps=build.move) as move:
        made, targets, seq = build(HostBatch(tokens, labels, borders, 16))
    assert move.call_count == 1
    start = 24 if ranks == 4 else 0
    assert torch.equal(made, tokens[start:]) and torch.equal(targets, labels[start:])
    assert torch.equal(seq.positions, torch.cat([torch.arange(n) for n in (5, 11, 1, 15)])[start:])
    assert seq.cu_seqlens.tolist()[:5] == [max(0, b - start) for b in borders.tolist()]
    assert seq.cu_seqlens.dtype == torch.int32 and len(seq.cu_seqlens) == 65
    if ranks:
        assert seq.row_of.tolist() == ([1] * 4 if ranks == 4 else [1] * 16)
    # The packed one is free once it is unpacked.
    sizes = {t.untyped_storage().nbytes() // t.element_size() - t.numel() for t in (made, targets)}
    assert sizes == {0}
