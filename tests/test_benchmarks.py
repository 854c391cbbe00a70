"""The benchmarks at sizes of a CPU: variants in one process train as train.py does, every moe.impl
has its rows, and a trace is taken apart rightly."""

import json
import shlex
import subprocess
import sys

import pytest
import torch

from benchmarks.parts import PARTS, attribute
from benchmarks.train import COMMON
from lmoe.model.moe.experts import IMPLEMENTATIONS
from tests.harness.runs import ROOT, TINY, environment, losses, run


def benchmark(name, *words):
    """Run benchmarks/NAME.py to its end."""
    return subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.slow
def test_variants_in_one_process_train_as_train_py(corpus, tmp_path, no_gpu):
    """Also after one that is refused, and one that ends its process; on two ranks as well."""
    small = ["--model.layers=2", "--model.pattern=LN", "--checkpoint.every=0", "--data.workers=0"]
    shared = [*TINY, f"--data.paths={corpus}", *small]
    compiled = "--compile.enable=true --compile.backend=aot_eager"
    variants = {
        "first": "",
        "compiled": compiled,
        "refused": "--moe.top_k=99",
        "again": "--activation_checkpoint.mode=full",
        "lost": f"--data.tokenizer={tmp_path}/nowhere",
        "last": "",
        "two": "ngpu=2 --training.batch_size=1",
    }
    words = [f"{name}={words}" for name, words in variants.items()]
    out = benchmark("train", "--steps=3", "--trace=2", f"--out={tmp_path}", *words, "--", *shared)
    assert out.returncode == 0, out.stderr
    assert "refused: moe.top_k = 99 exceeds moe.experts = 4; lower it" in out.stdout
    assert "lost (" in out.stdout and "Traceback" not in out.stdout
    results = json.loads((tmp_path / "train.json").read_text())
    assert list(results) == ["first", "compiled", "again", "last", "two"]

    run(corpus, tmp_path / "alone", *COMMON, "--training.steps=3", *small)
    alone = list(losses(tmp_path / "alone").values())
    for name, result in results.items():
        tolerance = 1e-5 if name in ("compiled", "two") else 0
        assert result["loss"] == pytest.approx(alone, abs=tolerance, rel=tolerance), name
        assert result["forward_backward_ms"] > 0 and result["optimizer_ms"] > 0
        parts = result["parts"]["ms"]
        assert min(parts[part] for part in ("mixer", "experts", "head", "optimizer", "fsdp")) > 0
        assert sum(parts[part] for part in PARTS) <= parts["span"]
        assert parts["mixer"] > 2 * parts["other"], name


def test_every_implementation_of_the_experts(tmp_path, no_gpu):
    words = shlex.split("--shapes tiny --tokens 16 --dtype float32 --backend aot_eager --rounds 1")
    out = benchmark("moe", *words, f"--out={tmp_path}")
    assert out.returncode == 0, out.stderr
    rows = json.loads((tmp_path / "moe.json").read_text())["rows"]
    assert {row["impl"] for row in rows} == set(IMPLEMENTATIONS)
    for row in rows:
        if (row["impl"], row["mode"]) == ("loop", "compiled") and "error" in row:
            continue  # it reads counts on the host
        assert row["y_error"] < 1e-6 and row["both_ms"] > 0, row
        # x, H or what it is made of, and the weights, at least
        assert row["saved_mib"] * 2**20 > 16 * 4 * (32 + 2 * 2 * 16 + 2)


@pytest.mark.slow
def test_the_peer(tmp_path, no_gpu):
    pytest.importorskip("transformers")
    small = (
        "--model.layers=4 --model.dim=64 --model.heads=4 --moe.experts=8 --moe.top_k=2"
        " --moe.hidden=32 --data.seq_len=64 --model.vocab_size=512 --data.tokenizer=byte"
        " --data.workers=0 --compile.backend=aot_eager --schedule.warmup_steps=1"
    ).split()
    words = ["--rows=2", "--steps=2", "--backend=aot_eager", f"--out={tmp_path}"]
    out = benchmark("peers", *words, "--", *small)
    assert out.returncode == 0, out.stderr
    results = json.loads((tmp_path / "peers.json").read_text())["results"]
    assert all("error" not in result for result in results.values()), out.stdout
    assert all(result["loss"][0] < 7 for result in results.values())


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@on_gpu
def test_kernels_have_their_parts(corpus, tmp_path):
    """Compiled and eager, the parts of a step are all found."""
    large = "--model.dim=256 --moe.hidden=128 --data.seq_len=256 --training.dtype=bfloat16"
    shared = [*TINY, f"--data.paths={corpus}", "--checkpoint.every=0", *large.split()]
    variants = ["eager=", "eager-compiled=--compile.enable=true"]
    words = ["--steps=8", "--trace=3", f"--out={tmp_path}", *variants, "--", *shared]
    out = benchmark("train", *words)
    assert out.returncode == 0, out.stderr
    results = json.loads((tmp_path / "train.json").read_text())
    assert list(results) == ["eager", "eager-compiled"], out.stdout
    for name, result in results.items():
        ms = result["parts"]["ms"]
        assert min(ms[part] for part in ("mixer", "experts", "head", "optimizer")) > 0, name
        assert ms["other"] < 0.25 * result["parts"]["busy_ms"], name
        assert result["parts"]["busy_ms"] <= ms["span"]
        assert result["left_gib"] < 0.1  # cuBLAS keeps a workspace of 0.06


@pytest.mark.gpu
@on_gpu
def test_memory_and_speed_of_the_experts(tmp_path):
    out = benchmark("moe", "--shapes=tiny", "--tokens=64", "--rounds=3", f"--out={tmp_path}")
    assert out.returncode == 0, out.stderr
    for row in json.loads((tmp_path / "moe.json").read_text())["rows"]:
        if row["impl"] == "loop" and "error" in row:
            continue
        assert row["y_error"] < 2e-2 and row["both_tflops"] > 0 and row["peak_mib"] > 0, row


# --------------------------------------------------------------------------------------------------
# A trace by hand


def host(name, ts, dur, tid=1, cat="cpu_op", **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def ranged(name, ts, dur):
    return host(f"benchmark:{name}", ts, dur, cat="user_annotation")


class Trace:
    """Kernels that begin `lag` after their launch."""

    def __init__(self, lag=0):
        self.lag = lag
        self.events = []

    def launch(self, ts, dur=1, name="kernel", tid=1, delay=0):
        args = {"correlation": len(self.events)}
        self.events.append(host("cudaLaunchKernel", ts, 0.5, tid, "cuda_runtime", **args))
        start = ts + self.lag + delay
        self.events.append(host(name, start, dur, 7, "kernel", **args))


def step(trace, t, compiled):
    """A step of 100 us of the host: 20 forward, 30 backward on a thread of its own."""
    trace.events += [ranged("step", t, 99), ranged("optimizer", t, 98), ranged("passes", t, 60)]
    trace.launch(t + 0.2, 0.5)  # the embedding
    op = {"Sequence number": int(t) + 1}
    node = {**op, "Fwd thread id": 1}
    if compiled:
        trace.events += [ranged("block", t + 1, 10), host("CompiledFunction", t + 1.1, 9.8, **op)]
        for ts, name in ((3, "aten::mm"), (6, "aten::mm"), (8, "lmoe::grouped_mm")):
            kind = ["float" if ts == 6 else "c10::BFloat16"]
            trace.events.append(host(name, t + ts, 0.9, **{"Input type": kind}))
    else:
        trace.events += [ranged("experts", t + 1, 10), ranged("mixer", t + 1.1, 3)]
        trace.events.append(host("aten::mm", t + 2.5, 1, **{"Sequence number": int(t)}))
        trace.events.append(host("aten::mm", t + 8, 1, **op))
    for ts in (2, 3.1, 5, 6.1, 8.1, 9.2):
        trace.launch(t + ts)  # forward: two of the mixer, four of the experts
    name = "autograd::engine::evaluate_function: Backward"
    if compiled:
        trace.events.append(host(name, t + 30, 12, 2))
        trace.events.append(host("CompiledFunctionBackward", t + 30.5, 11, 2, **node))
        # The compiler puts the experts' weights' gradient last.
        grouped = (32, "lmoe::grouped_mm"), (40, "lmoe::grouped_outer")
        for ts, name in (*grouped, (34, "aten::mm"), (37, "aten::mm")):
            kind = ["float" if ts == 34 else "c10::BFloat16"]
            trace.events.append(host(name, t + ts, 0.9, 2, **{"Input type": kind}))
    else:
        trace.events.append(host(name, t + 30, 7.05, 2, **node))
        first = {"Sequence number": int(t), "Fwd thread id": 1}
        trace.events.append(host(name, t + 37.06, 2, 2, **first))
        trace.events.append(host(name, t + 40, 1, 2, **node))
    for ts in (32.1, 34.1, 37.1, 38.4, 40.1):
        trace.launch(t + ts, tid=2)  # three of the experts, two of the mixer
    trace.events.append(host("FSDP::post_backward_reduce", t + 50, 5, 2, "user_annotation"))
    trace.launch(t + 51, 2, tid=2)
    trace.launch(t + 52, 4, "ncclDevKernel_ReduceScatter", tid=2)  # 1 beside the copy
    trace.launch(t + 70, 10)  # the optimizer


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lag", [0, 130])
def test_a_trace_is_taken_apart(compiled, lag):
    trace = Trace(lag)
    for t in (0, 100, 200):
        step(trace, t, compiled)
    ms = {name: 1e3 * value for name, value in attribute(trace.events).items()}
    want = {"mixer": 4, "experts": 7, "head": 0, "optimizer": 10, "other": 0.5}
    want |= {"fsdp": 2, "communication": 3, "span": 100, "all communication": 4}
    assert ms == pytest.approx(want)
