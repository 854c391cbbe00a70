"""train.py as users run it: resumed runs, signals, branches, what lies in the run's folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lmoe.checkpoint import read_extra
from lmoe.config import load_config
from lmoe.config.sections import ScheduleConfig
from lmoe.model.build import build_model
from lmoe.optimizer import learning_rate
from tests.harness.runs import (
    ROOT,
    command,
    entries,
    environment,
    losses,
    ranks_of,
    read_until,
    run,
    start,
)


def build(config):
    with torch.device("meta"):
        return build_model(config)


def tensors(checkpoint):
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """An uninterrupted run of six steps."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(corpus, folder)
    return folder


def copy_until(straight, folder, step):
    """The run's folder as it was when step `step` had been saved and the process was killed some
    steps later."""
    shutil.copytree(straight, folder)
    for path in (folder / "ckpt").iterdir():
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    return folder


@pytest.mark.xdist_group("train")
def test_the_folder_of_a_run(straight):
    assert sorted(p.name for p in (straight / "ckpt").iterdir()) == ["step-3", "step-6"]
    assert (straight / "config.toml").is_file() and any((straight / "tb").iterdir())
    assert [e["step"] for e in entries(straight)] == [1, 2, 3, 4, 5, 6]
    last = entries(straight)[-1]
    assert last.keys() >= {
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "mfu",
        "memory_gib",
        "expert_load",
        "skipped_steps",
    }
    assert len(last["expert_load"]) == 3 and min(last["expert_load"]) >= 1
    assert last["loss"] < entries(straight)[0]["loss"]
    schedule = ScheduleConfig(kind="cosine", warmup_steps=2)
    assert [e["lr"] for e in entries(straight)] == [
        learning_rate(schedule, 3e-3, step, 6) for step in range(1, 7)
    ]
    assert [e["tokens"] for e in entries(straight)] == [step * 4 * 64 for step in range(1, 7)]


@pytest.mark.xdist_group("train")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_repeats_every_bit(corpus, straight, tmp_path, workers):
    folder = copy_until(straight, tmp_path / "run", 3)
    run(corpus, folder, f"--data.workers={workers}")
    assert losses(folder) == losses(straight)
    assert [e["step"] for e in entries(folder)] == [1, 2, 3, 4, 5, 6]
    ours, theirs = tensors(folder / "ckpt/step-6"), tensors(straight / "ckpt/step-6")
    assert (
        ours.keys() == theirs.keys()
        and any("optim" in key for key in ours)
        and any("router.bias" in key for key in ours)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read_extra(folder / "ckpt/step-6") == read_extra(
        straight / "ckpt/step-6"
    )  # the data position too


@pytest.mark.xdist_group("train")
def test_a_run_goes_on_with_another_number_of_ranks(corpus, straight, tmp_path):
    """Two ranks without accumulation train on the same rows as one with two microbatches; then one
    rank goes on again."""
    folder = copy_until(straight, tmp_path / "run", 3)
    run(corpus, folder, ngpu=2)
    expected = losses(straight)
    for step, loss in losses(folder).items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    ours, theirs = tensors(folder / "ckpt/step-6"), tensors(straight / "ckpt/step-6")
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=2e-5, msg=key)
    run(corpus, folder, "--training.steps=7")
    assert max(losses(folder)) == 7


@pytest.mark.xdist_group("train")
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)],
    ids=lambda n: n.name,
)
def test_a_signal_saves_and_ends_well(corpus, tmp_path, number):
    """Through run_train.sh: exit code 0, a checkpoint of the last step, and the run goes on from
    it."""
    folder = tmp_path / "run"
    words = command(
        corpus,
        folder,
        ["--training.steps=100000", "--validation.every=100000", "--validation.steps=2"],
    )
    process = start(words, ngpu=1)
    output = read_until(process, "step 4/")
    process.send_signal(number)
    output += process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    stopped = int(re.search(r"stopped by \w+ after step (\d+)", output).group(1))
    assert (folder / f"ckpt/step-{stopped}").is_dir() and max(losses(folder)) == stopped
    assert [e["step"] for e in entries(folder) if "validation_loss" in e] == [
        0
    ]  # a stop does not wait for one
    run(corpus, folder, f"--training.steps={stopped + 2}")
    assert sorted(losses(folder)) == list(range(1, stopped + 3))


@pytest.mark.xdist_group("train")
def test_one_rank_asked_to_stop_stops_all(corpus, tmp_path):
    folder = tmp_path / "run"
    words = command(corpus, folder, ["--training.steps=100000"])
    process = start(words, ngpu=2)
    output = read_until(process, "step 3/")
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    output += process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    stopped = int(re.search(r"stopped by another rank after step (\d+)", output).group(1))
    assert (folder / f"ckpt/step-{stopped}").is_dir()


@pytest.mark.xdist_group("train")
def test_a_killed_run_goes_on_as_if_nothing_had_happened(corpus, straight, tmp_path):
    folder = tmp_path / "run"
    process = start(command(corpus, folder, []))
    while not (folder / "ckpt/step-3").is_dir():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    run(corpus, folder)
    assert losses(folder) == losses(straight)


@pytest.mark.xdist_group("train2")
def test_validation_has_no_side_effects(corpus, straight, tmp_path):
    folder = tmp_path / "run"
    run(
        corpus,
        folder,
        "--validation.every=2",
        "--validation.steps=2",
        "--validation.shuffle_context=true",
    )
    assert losses(folder) == losses(straight)
    assert [e["step"] for e in entries(folder)] == list(range(7))  # in the entries of their steps
    measured = {e["step"]: e["validation_loss"] for e in entries(folder) if "validation_loss" in e}
    assert sorted(measured) == [0, 2, 4, 6] and measured[6] < measured[0]


@pytest.mark.slow
@pytest.mark.xdist_group("train2")
def test_two_ranks_validate_as_one(corpus, tmp_path):
    words, measured = ["--validation.every=6", "--validation.steps=2"], []
    for ngpu in (0, 2):
        run(corpus, tmp_path / str(ngpu), *words, ngpu=ngpu)
        measured.append(
            {
                e["step"]: e["validation_loss"]
                for e in entries(tmp_path / str(ngpu))
                if "validation_loss" in e
            }
        )
    one, two = measured
    assert two[0] == pytest.approx(one[0], rel=1e-6) and two[6] == pytest.approx(one[6], rel=1e-4)


@pytest.mark.xdist_group("train2")
def test_a_branch_takes_only_the_weights(corpus, straight, tmp_path):
    """Another sequence length, schedule and data; moments and position start afresh; the router
    bias comes along."""
    folder = tmp_path / "branch"
    words = [
        f"--checkpoint.load={straight}/ckpt",
        "--data.seq_len=128",
        "--schedule.kind=wsd",
        "--training.steps=2",
        "--optimizer.lr=0",
    ]
    words += ["--schedule.warmup_steps=0"]
    # What shapes no tensor may change.
    words += ["--attention.rope_theta=5000", "--attention.window=16", "--moe.top_k=1"]
    output = run(corpus, folder, "--checkpoint.load_only_model=true", *words)
    for change in ("rope_theta = 5000.0, was 10000.0", "window = 16, was 0", "top_k = 1, was 2"):
        assert change in output
    model = build(load_config([f"--config={folder}/config.toml"]))
    assert f"{3 * model.flops_per_token(128) / 1e9:.4f} GFLOP a token" in output
    assert "a new branch" in output and sorted(losses(folder)) == [1, 2]
    ours, theirs = tensors(folder / "ckpt/step-2"), tensors(straight / "ckpt/step-6")
    for key in ours:
        if key.startswith("model.") and "router.bias" not in key:
            assert torch.equal(ours[key], theirs[key]), key
    words[-1] = "--model.dim=64"
    output = run(corpus, tmp_path / "wider", "--checkpoint.load_only_model=true", *words, code=1)
    assert "has shape" in output and "model.dim = 64, was 32" in output


@pytest.mark.xdist_group("train2")
def test_a_full_start_from_another_folder_goes_on_there(corpus, straight, tmp_path):
    folder = tmp_path / "run"
    run(corpus, folder, f"--checkpoint.load={straight}/ckpt/step-3")
    assert {step: loss for step, loss in losses(straight).items() if step > 3} == losses(folder)


@pytest.mark.xdist_group("train2")
@pytest.mark.parametrize(
    "words, message",
    [
        (["--model.dim=64"], "error: model.dim = 64 but .* holds a model with 32"),
        (["--data.seq_le=64"], "error: unknown key data.seq_le; did you mean seq_len"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["--data.tokenizer=/nowhere.tiktoken"], "error: .*data.tokenizer.*"),
                (["--parallel.dp_replicate=2"], "error: parallel.dp_replicate = 2 does not divide"),
                (
                    ["--job.folder=/proc/self/environ/run"],
                    "error: job.folder = '/proc/self/environ/run': Not a directory",
                ),
            )
        ),
    ],
)
def test_refusals_are_one_line(corpus, straight, words, message):
    output = run(corpus, straight, *words, code=1)
    assert re.search(message, output) and "Traceback" not in output
    assert len([line for line in output.splitlines() if "error" in line]) == 1


@pytest.mark.xdist_group("train2")
@pytest.mark.parametrize(
    "word, message",
    [
        pytest.param("--data.seq_le=64", "unknown key data.seq_le", marks=pytest.mark.slow),
        ("--model.dim=64", "model.dim = 64 but"),
    ],
)
def test_two_ranks_refuse_in_one_line(corpus, straight, word, message):
    """Mistakes of all ranks, before and after they meet."""
    output = run(corpus, straight, word, ngpu=2, code=1)
    assert (
        len([line for line in output.splitlines() if line.startswith("error: ")]) == 1
        and message in output
    ), output


@pytest.mark.slow
@pytest.mark.xdist_group("train2")
def test_rank_0_hears_why_rank_1_refuses(corpus, tmp_path):
    script = tmp_path / "only_rank_1.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, os.getcwd())\n"
        "import train\n"
        "real = train.load_tokenizer\n"
        "def lacking(name):\n"
        "    if os.environ['RANK'] == '1': raise ValueError('data.tokenizer: no such file here')\n"
        "    return real(name)\n"
        "train.load_tokenizer = lacking\n"
        "train.main(sys.argv[1:])\n"
    )
    words = command(corpus, tmp_path / "run", [])
    env = environment(NGPU="2", TRAIN=str(script))
    result = subprocess.run(
        ["./run_train.sh", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
    )
    assert (
        result.returncode != 0
        and "error: rank 1: data.tokenizer: no such file here" in result.stderr
    ), result.stderr
    assert "rank 1 refused to start: data.tokenizer" in result.stderr  # as rank 0 says


@pytest.mark.xdist_group("train2")
def test_deterministic_recomputed_and_traced(corpus, straight, tmp_path):
    """Flags that must not change the result: recomputation is bitwise, and a trace is written on
    the way."""
    folder = tmp_path / "run"
    run(
        corpus,
        folder,
        "--job.deterministic=true",
        "--activation_checkpoint.mode=full",
        "--profiling.trace_step=2",
        "--job.gc_every=0",
    )
    assert losses(folder) == losses(straight)
    assert json.loads((folder / "profile/trace-rank0.json").read_text())["traceEvents"]


@pytest.mark.xdist_group("train2")
def test_generate_continues_from_a_checkpoint(straight):
    def generate(*words):
        program = [sys.executable, "-m", "lmoe.generate", *words]
        return subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True)

    greedy = ["--prompt=alpha beta", "--max-tokens=20", "--temperature=0", "--device=cpu"]
    one, again = generate(f"{straight}/ckpt/step-6", *greedy), generate(f"{straight}/ckpt", *greedy)
    assert one.returncode == 0, one.stderr
    assert (
        one.stdout == again.stdout
        and one.stdout.startswith("alpha beta")
        and len(one.stdout) > len("alpha beta\n")
    )
    batch = generate(f"{straight}/ckpt", *greedy, "--prompt=zeta", "--seed=1")
    assert batch.stdout.startswith(one.stdout.rstrip("\n")) and "zeta" in batch.stdout
    wrong = generate(f"{straight}/nothing")
    assert wrong.returncode != 0 and "Traceback" not in wrong.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("train2")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hung"])
def test_a_lost_rank_ends_the_job_and_is_named(corpus, tmp_path, number):
    words = command(
        corpus,
        tmp_path / "run",
        ["--training.steps=100000", "--job.hang_timeout=8", "--checkpoint.every=0"],
    )
    process = start(words, ngpu=2)
    output = read_until(process, "step 5/")
    workers = ranks_of(process)
    os.kill(workers[1], number)
    began = time.time()
    output += process.communicate(timeout=100)[0]
    assert process.returncode != 0 and time.time() - began < 60, output
    assert re.search(r"rank +(: )?1 ", output), output
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())


@pytest.mark.slow
def test_the_default_run(tmp_path):
    """./run_train.sh alone: 2.0 nats per byte or less on validation, worse without the order of the
    context; then more steps, and text."""
    env = environment(
        OMP_NUM_THREADS="2", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    folder = tmp_path / "run"
    for words in ([], ["--training.steps=410"]):
        result = subprocess.run(
            ["./run_train.sh", f"--job.folder={folder}", *words],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    measured = {e["step"]: e for e in entries(folder) if "validation_loss" in e}
    assert sorted(measured) == [0, 100, 200, 300, 400, 410]
    assert measured[400]["validation_loss"] <= 2.0
    assert measured[400]["context_shuffled_loss"] > measured[400]["context_loss"] + 0.5
    assert (folder / "ckpt/step-400").is_dir() and any((folder / "tb").iterdir())
    program = [
        sys.executable,
        "-m",
        "lmoe.generate",
        f"{folder}/ckpt",
        "--prompt=def ",
        "--max-tokens=50",
    ]
    text = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True)
    assert text.stdout.startswith("def ") and len(text.stdout) > 20, text.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("train2")
def test_two_nodes_on_one_machine(corpus, straight, tmp_path):
    """Two run_train.sh with one process each meet through the rendezvous and train as two ranks of
    one node do."""
    folder = tmp_path / "run"
    processes = [
        subprocess.Popen(
            ["./run_train.sh", *command(corpus, folder, [])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(
                NGPU="1",
                NNODES="2",
                NODE_RANK=str(node),
                MASTER_ADDR="localhost",
                MASTER_PORT="29617",
            ),
        )
        for node in range(2)
    ]
    outputs = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for step, loss in losses(folder).items():
        assert loss == pytest.approx(losses(straight)[step], rel=1e-5)
