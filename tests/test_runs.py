"""Whole runs and their folder: a second owner, disks that fill up, steps that are lost, sums
over resumptions."""

import json
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch

import train
from lmoe.checkpoint_files import checkpoints
from lmoe.config import load_config
from lmoe.data.tokenizer import load_tokenizer
from lmoe.metrics import AHEAD
from lmoe.model.build import build_model
from lmoe.parallel.dims import build_dims
from lmoe.resolve import resolve_batch_size
from lmoe.watchdog import Watchdog
from tests.harness.runs import (
    ROOT,
    command,
    entries,
    environment,
    read_until,
    run,
    start,
)

pytestmark = pytest.mark.xdist_group("runs")


def test_a_folder_in_use_is_refused_until_its_owner_is_gone(corpus, tmp_path):
    folder = tmp_path / "run"
    words = ["--training.steps=100000", "--checkpoint.every=100000"]
    first = start(command(corpus, folder, words))
    read_until(first, "step 2/")
    before = (folder / "config.toml").read_text()
    output = run(corpus, folder, "--training.steps=9", code=1)
    assert f"is being trained in by process {first.pid}" in output and "Traceback" not in output
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (folder / "config.toml").read_text() == before
    run(corpus, folder, "--training.steps=9")
    assert sorted(e["step"] for e in entries(folder)) == list(range(1, 10))
    assert entries(folder / "earlier-1")  # of the first, which left no checkpoint


def test_sums_go_on_and_a_finished_run_has_nothing_to_do(corpus, tmp_path):
    folder = tmp_path / "run"
    rows = "--data.seq_len=512"  # longer than many a document
    run(corpus, folder, "--training.steps=3", rows)
    run(corpus, folder, "--training.steps=5", "--training.global_batch_size=8", rows)
    last = entries(folder)[-1]
    assert last["samples"] == 3 * 4 + 2 * 8 and last["tokens"] == 512 * last["samples"]
    # Documents are shorter than rows, so attention costs less than in whole rows.
    with torch.device("meta"):
        model = build_model(load_config([f"--config={folder}/config.toml"]))
    whole = 3 * last["tokens"] * model.flops_per_token(512)
    assert 0.5 * whole < last["flops"] < 0.999 * whole
    output = run(corpus, folder, "--training.steps=5", rows)
    assert "nothing to do: step 5 is done" in output
    before = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "config.toml")}
    # Over other data, though nothing would be done.
    words = ("--training.steps=2", "--data.validation_fraction=0.4", rows)
    output = run(corpus, folder, *words, code=1)
    assert "error: data.accept_changes = false: " in output and "Traceback" not in output
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_a_lost_run_ends_and_keeps_its_last_healthy_checkpoint(corpus, tmp_path):
    folder = tmp_path / "run"
    run(corpus, folder, "--training.steps=3", "--checkpoint.keep=1")
    words = ["--checkpoint.keep=1", "--checkpoint.every=1", "--optimizer.lr=1e20"]
    words += ["--training.steps=60", "--training.max_skipped_steps=5"]
    output = run(corpus, folder, *words, code=1)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    # Step 4 takes the weights out of range.
    assert "5 steps in a row" in line and "up to step 9," in line and "of step 3 or before" in line
    assert re.search(r"the lowest layer whose output is not finite is layer \d \(\w+\)", line)
    assert "Traceback" not in output and output.splitlines()[-1] == line
    kept = {path.name: path for path in checkpoints(folder / "ckpt")}
    healthy = {
        name
        for name, path in kept.items()
        if json.loads((path / "meta.json").read_text())["healthy"]
    }
    assert len(kept) == 2 and healthy == {"step-3"}


def test_a_run_that_is_lost_on_its_last_steps_has_not_ended_well(corpus, tmp_path):
    words = ["--optimizer.lr=1e20", "--schedule.warmup_steps=0", "--training.max_skipped_steps=3"]
    output = run(corpus, tmp_path / "run", *words, "--training.steps=4", code=1)
    assert "the run is lost: 3 steps in a row" in output and "done at" not in output


def steps_of(folder):
    return [entry["step"] for entry in entries(folder)]


def test_a_lost_run_has_all_its_entries(corpus, tmp_path):
    """Also of the step that was under way when the last of too many was seen."""
    folder = tmp_path / "run"
    words = ["--optimizer.lr=1e20", "--schedule.warmup_steps=0", "--training.max_skipped_steps=2"]
    output = run(corpus, folder, *words, "--training.steps=60", "--checkpoint.every=0", code=1)
    assert "2 steps in a row" in output.splitlines()[-1] and "up to step 3," in output
    assert steps_of(folder) == [1, 2, 3, 3 + AHEAD]


def test_a_checkpoint_comes_after_the_entries_of_its_steps(corpus, tmp_path):
    folder = tmp_path / "run"
    code = (
        "import os, sys, train\n"
        "train.Checkpointer.save = lambda *_, **__: os._exit(7)\n"
        "train.main(sys.argv[1:])"
    )
    words = ["--config=train_configs/debug.toml", *command(corpus, folder, [])]
    killed = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, env=environment())
    assert killed.returncode == 7 and steps_of(folder) == [1, 2, 3]


def test_a_run_that_fails_has_the_entries_of_the_steps_before(corpus, tmp_path):
    folder = tmp_path / "run"
    script = str(ROOT / "tests/scripts/fault_train.py")
    failed = subprocess.run(
        ["./run_train.sh", *command(corpus, folder, [])],
        cwd=ROOT,
        env=environment(NGPU="1", TRAIN=script, FAULT="forward raise 0"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert failed.returncode != 0 and "the reason of it all" in failed.stderr, failed.stderr
    assert steps_of(folder) == [1, 2, 3, 4]


def limit_files(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_is_full_for_reports_ends_no_run(corpus, tmp_path):
    folder = tmp_path / "run"
    run(corpus, folder, "--training.steps=2")
    limit = 20 << 20  # far more than a file of a checkpoint
    with (folder / "metrics.jsonl").open("a") as file:
        room = limit - file.tell() - len(json.dumps({"step": 2, "pad": ""})) - 20
        file.write(json.dumps({"step": 2, "pad": "x" * room}) + "\n")
    words = ["--training.steps=6", "--metrics.tensorboard=false"]
    process = start(command(corpus, folder, words), preexec_fn=limit_files(limit))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert (folder / "ckpt/step-6").is_dir() and entries(folder)[-1]["step"] == 2


def test_a_damaged_shard_in_mid_run_is_one_line(corpus, tmp_path):
    folder = tmp_path / "run"
    words = ["--training.steps=100000", f"--data.cache={tmp_path}/cache", "--data.workers=0"]
    words += ["--checkpoint.every=0"]
    process = start(command(corpus, folder, words))
    read_until(process, "step 2/")
    for path in (tmp_path / "cache").rglob("*.tokens"):
        path.write_bytes(b"")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in output, output
    assert re.search(r"^error: .*data.paths: shard .* is damaged", output.splitlines()[-1])
    steps = steps_of(folder)
    assert steps == list(range(1, len(steps) + 1)) and f"step {steps[-1]}/" in output
    assert f"step {steps[-1] + 1}/" not in output


def test_a_damaged_shard_is_one_line_in_validation_too(corpus, tmp_path, capsys, one_rank):
    words = ["--validation.every=4", f"--data.cache={tmp_path}/cache"]
    config = load_config(command(corpus, tmp_path, words))
    resolve_batch_size(config, 1)
    watchdog = Watchdog(None, 0, 1, 0)
    dims = build_dims(config, torch.device("cpu"))
    tokenizer = load_tokenizer("byte")
    _, validation = train.build_loaders(config, tokenizer, dims, None, watchdog)
    assert len(list(train.reading(validation, watchdog.refuse))) == len(validation) > 0
    for path in (tmp_path / "cache").rglob("*.tokens"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit):
        list(train.reading(validation, watchdog.refuse))
    assert re.search(r"^error: .*data.paths: shard .* is damaged", capsys.readouterr().err)
