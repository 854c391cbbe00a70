"""What only a GPU shows: no waiting for the device, varlen attention, inductor without recompiles,
traces of memory."""

import copy
import functools
import gc
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from lmoe.checkpoint_files import checkpoints
from lmoe.checks import check_config
from lmoe.config import load_config
from lmoe.data.packing import HostBatch
from lmoe.generate import Decoder, generate
from lmoe.metrics import AHEAD
from lmoe.model.batch import SeqBuilder, positions_of
from lmoe.model.build import build_model, needs_dense_mask
from lmoe.model.mixers import MIXERS
from lmoe.model.mixers.attention import Attention, AttentionOptions, attend
from lmoe.optimizer import build_optimizer
from lmoe.parallel.collectives import Ranks
from lmoe.parallel.context import SliceBuilder, make_builder
from lmoe.parallel.dims import build_dims
from lmoe.parallel.parallelize import DTYPES, parallelize
from lmoe.resolve import resolve_batch_size
from tests.harness.compare import microbatches_of
from tests.harness.runs import ROOT, start
from tests.harness.weights import add_noise
from tests.model.variants import MIXER_VARIANTS, SHAPE, make_model, make_seq, window_of
from tests.test_metrics import entries, make_log, result

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CONFIG = {
    "model": {
        "dim": 128,
        "layers": 3,
        "heads": 2,
        "pattern": ["gla", "gated_deltanet", "attention"],
        "vocab_size": 512,
    },
    "moe": {"experts": 8, "top_k": 2, "hidden": 64, "shared": 64},
    "data": {"seq_len": 256},
    "training": {"batch_size": 2, "global_batch_size": 4},
}


@pytest.fixture(scope="module")
def cuda_group():
    import torch.distributed as dist

    if not dist.is_initialized():
        torch.cuda.set_device(0)
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)


def make_run(words, toml=CONFIG, vocabulary=None, noise=0.005):
    """(a training step, its batches by its number): documents of uneven lengths, of tokens below
    `vocabulary`. noise: of add_noise, of the size of a large model's weights."""
    device = torch.device("cuda", 0)
    config = load_config(words, toml=toml)
    check_config(config, 1, device)
    resolve_batch_size(config, 1)
    dims = build_dims(config, device)
    with torch.device("meta"):
        model = build_model(config)
    parallel = parallelize(model, config, dims)
    add_noise(model, noise)
    optimizer = build_optimizer(config.optimizer, model)
    run = functools.partial(train.train_step, model, parallel, optimizer, config, dims)
    build = make_builder(
        config, dims, dense_mask=needs_dense_mask(config, device, DTYPES[config.training.dtype])
    )
    data = copy.deepcopy(config)
    data.model.vocab_size = vocabulary or config.model.vocab_size
    return run, lambda step: microbatches_of(data, dims, build, step)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--activation_checkpoint.mode=full"],
        ["--compile.enable=true", "--activation_checkpoint.mode=selective"],
    ],
    ids=str,
)
def test_a_step_never_waits_for_the_device(cuda_group, tmp_path, words):
    """Nor does it recompile when documents and routing change."""
    torch._dynamo.reset()
    run, batches = make_run(words)
    log = make_log(tmp_path, device="cuda:0")
    for step in range(2):
        made, valid = batches(step)
        run(made, valid, 1e-3)
    for step in range(2, 6):
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch._dynamo.config.patch(error_on_recompile=True):
                made, valid = batches(step)
                losses, counts, norm, skip = run(made, valid, 1e-3)
                log.add(step, 1e-3, 1.0, (losses, counts, norm, skip), True)
                assert log.catch_up() is None
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert log.sent[0].values.vector.is_pinned()
        assert all(loss.isfinite() for loss in losses.values())
        assert norm.isfinite() and skip.item() == 0
        assert [n.sum().item() for n in counts.values()] == [2 * 4 * 256] * 3
    log.catch_up(0)
    assert [entry["step"] for entry in entries(tmp_path)] == [2, 3, 4, 5]
    assert entries(tmp_path)[-1]["loss"] == losses["loss"].item()


def test_entries_come_behind_a_slow_device(tmp_path):
    """A step ahead of it at most; rates are the device's, and a lost run is seen in time."""
    log = make_log(tmp_path, "--training.max_skipped_steps=3", device="cuda:0")
    skips = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    results = [result(step, skip, "cuda:0") for step, skip in enumerate(skips, 1)]
    for step, given in enumerate(results, 1):
        torch.cuda._sleep(20_000_000)  # ten milliseconds
        log.add(step, 0.1, 1.0, given, True)
        assert step < 3 or not log.clock.reached(log.sent[-1].end)  # the first are slow to start
        assert log.catch_up() == (6 if step == 6 + AHEAD else None)
    written = entries(tmp_path)
    assert [e["step"] for e in written] == list(range(1, 8)) and written[-1]["skipped_steps"] == 6
    assert [e["loss"] for e in written] == [pytest.approx(1 / step) for step in range(1, 8)]
    rates = [e["tokens_per_second"] for e in written[2:]]  # of 100 tokens a step
    assert max(rates) < 100 / 0.005 and max(rates) < 2 * min(rates), rates


@pytest.mark.parametrize("dense_mask", [True, False])
def test_batches_behind_a_slow_device_are_those_of_the_host(dense_mask):
    """Copied ahead of it, from pinned memory that is used again and again."""
    build = SeqBuilder("cuda", dense_mask=dense_mask, windows={0})
    on_host = SeqBuilder("cpu", dense_mask=dense_mask, windows={0})
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(50):
        tokens, labels = torch.randint(0, 2**31 - 1, (2, 4096), generator=generator)
        inner = torch.randint(1, 4096, (40,), generator=generator).unique()
        borders = torch.cat([torch.tensor([0]), inner, torch.tensor([4096])]).int()
        batches.append(HostBatch(tokens, labels, borders, 4096))
    made = []
    for batch in batches:
        torch.cuda._sleep(2_000_000)
        *ids, seq = build(batch)
        made.append([*ids, seq.cu_seqlens, seq.positions])
    for batch, got in zip(batches, made, strict=True):
        *ids, seq = on_host(batch)
        for a, b in zip([*ids, seq.cu_seqlens, seq.positions], got, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b.cpu())


def test_memory_is_flat(cuda_group):
    run, batches = make_run([])
    levels = []
    for step in range(12):
        made, valid = batches(step)
        run(made, valid, 1e-3)
        del made
        torch.cuda.synchronize()
        levels.append(torch.cuda.memory_allocated())
    assert (
        max(levels[5:]) - min(levels[5:]) <= 2**20
    )  # the host decides when to free a step's small inputs


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2}, {"window": 70}], ids=str)
def test_varlen_attention_is_sdpa(options):
    lengths, shape = [100, 1, 155, 256], SHAPE.__class__(dim=128, heads=4, layers=2)
    mixer = Attention(shape, AttentionOptions(**options)).cuda().bfloat16()
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x, dy = torch.randn(2, 512, 128, device="cuda", dtype=torch.bfloat16)
    results = []
    for dense_mask in (True, False):
        build = SeqBuilder("cuda", dense_mask=dense_mask, windows={options.get("window", 0)})
        seq = build.seq_info(borders, 2, 256)
        leaf = x.clone().requires_grad_()
        y, _, _ = mixer(leaf, seq)
        y.backward(dy)
        results.append((y.detach().float(), leaf.grad.float()))
    for dense, packed in zip(*results, strict=True):
        assert (dense - packed).norm() / dense.norm() < 1e-2


@pytest.mark.parametrize(
    "queries, keys",
    [
        ((0, 96), (0, 512)),
        ((200, 331), (0, 512)),
        ((400, 512), (0, 512)),
        ((128, 256), (59, 256)),
        ((0, 128), (-69, 128)),
    ],
)
def test_varlen_attention_of_a_slice_is_sdpa(queries, keys):
    """Queries of a slice over all keys, or over its own and the window before: outputs, and
    gradients of keys that nobody reads."""
    lengths, window = [100, 0, 1, 155, 256, 0], 70 if keys[1] - keys[0] < 512 else 0
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x, dy = torch.randn(2, 4, 512 - min(0, keys[0]), 2, 64, device="cuda", dtype=torch.bfloat16)
    size = queries[1] - queries[0], keys[1] - keys[0]
    results = []
    for dense_mask in (True, False):
        build = SliceBuilder(
            "cuda",
            dense_mask=dense_mask,
            ranks=Ranks("", 4, 0),
            context=None,
            tp=1,
            tp_index=0,
        )
        (padded,) = build.move(build.padded(borders, 512))
        positions = positions_of(borders, 512).cuda()
        seq = SimpleNamespace(cu_seqlens=padded, positions=positions, row_len=512)
        mask = build.span_mask(seq, queries, keys, window)
        q, k, v = (t[:n].clone().requires_grad_() for t, n in zip(x, (size[0], size[1], size[1])))
        o = attend(q[None], (k[None], v[None]), mask, window, slice(None))[0]
        o.backward(dy[0, : size[0]])
        results.append([t.detach().float() for t in (o, q.grad, k.grad, v.grad)])
    for dense, packed in zip(*results, strict=True):
        assert (dense - packed).norm() / dense.norm() < 1e-2


@pytest.mark.parametrize("variant", MIXER_VARIANTS)
def test_generation_on_the_gpu_is_the_forward_pass(variant):
    model = make_model(variant).cuda()
    decoder = Decoder(
        model, torch.device("cuda"), torch.float64, dense_mask=True, windows={window_of(variant)}
    )
    prompts = [[5], list(range(30)), [7, 8, 9]]
    answers = generate(decoder, prompts, 20, eos=-1, vocab_size=60, temperature=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        sequence = torch.tensor(prompt + answer)
        seq = make_seq([len(sequence)], variant, device="cuda")
        with torch.no_grad():
            logits = model(sequence.cuda(), seq)[:, :60]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer


def test_train_py_on_the_gpu(tmp_path):
    """bf16, compiled, with a memory snapshot; then a resumed run, and text from its checkpoint."""
    (tmp_path / "corpus").mkdir()
    for i in range(20):
        (tmp_path / f"corpus/{i}.txt").write_text(" ".join(f"number {i * j}" for j in range(300)))
    words = [
        f"--job.folder={tmp_path}/run",
        "--data.source=text",
        f"--data.paths={tmp_path}/corpus",
        "--training.dtype=bfloat16",
        "--compile.enable=true",
        "--training.steps=8",
        "--checkpoint.every=4",
        "--validation.every=4",
        "--profiling.memory_snapshot=true",
        "--schedule.warmup_steps=2",
        "--metrics.log_every=1",
        "--data.validation_fraction=0.2",
    ]
    for extra in ([], ["--training.steps=10"]):
        subprocess.run(
            [sys.executable, "train.py", "--config=train_configs/debug.toml", *words, *extra],
            cwd=ROOT,
            check=True,
        )
    entries = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    losses = [e["loss"] for e in entries if "loss" in e]
    assert len(losses) == 10 and losses[-1] < losses[0] and entries[-1]["mfu"] > 0
    assert (tmp_path / "run/profile/memory-rank0.pickle").stat().st_size > 0
    program = [
        sys.executable,
        "-m",
        "lmoe.generate",
        f"{tmp_path}/run/ckpt",
        "--prompt=number",
        "--max-tokens=10",
    ]
    assert subprocess.run(
        program, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.startswith("number")


@pytest.mark.parametrize("words", [["--compile.enable=true"], []], ids=["compiled", "eager"])
def test_a_lost_run_ends_and_names_the_layer(tmp_path, words):
    words = [
        *words,
        f"--job.folder={tmp_path}/run",
        "--data.source=mqar",
        "--training.steps=100",
        "--training.dtype=bfloat16",
        "--training.max_skipped_steps=5",
        "--schedule.warmup_steps=0",
        "--optimizer.lr=1e20",
        "--checkpoint.every=1",
        "--checkpoint.keep=1",
        "--validation.every=0",
    ]
    process = start(words, ngpu=1)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    line = output.splitlines()[-1]
    # Step 1 takes the weights out of range.
    assert line.startswith("error: ") and "5 steps in a row" in line, output
    assert "up to step 6," in line
    assert re.search(r"the lowest layer whose output is not finite is (layer \d|the)", line), line
    kept = {
        path.name: json.loads((path / "meta.json").read_text())["healthy"]
        for path in checkpoints(tmp_path / "run/ckpt")
    }
    assert len(kept) == 1 and not any(kept.values())  # what step 1 left gives no finite loss


def test_a_deterministic_run_repeats_every_bit(tmp_path):
    """job.deterministic on the GPU, in bf16 with every mixer: two runs, the same losses and
    gradient norms."""
    words = [
        "--config=train_configs/debug.toml",
        '--model.pattern=["gla", "gated_deltanet", "attention"]',
        "--model.layers=3",
        "--training.dtype=bfloat16",
        "--training.steps=6",
        "--schedule.warmup_steps=2",
        "--checkpoint.every=0",
        "--validation.every=0",
        "--metrics.log_every=1",
        "--job.deterministic=true",
        f"--data.cache={tmp_path}/cache",
    ]
    runs = []
    for name in ("one", "two"):
        subprocess.run(
            [sys.executable, "train.py", *words, f"--job.folder={tmp_path}/{name}"],
            cwd=ROOT,
            check=True,
        )
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        runs.append([(e["loss"], e["grad_norm"]) for e in map(json.loads, lines)])
    assert len(runs[0]) == 6 and runs[0] == runs[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled_gradients_are_eager_ones(cuda_group, dtype):
    """One step of the same weights and batch with compile off and on: losses, counts, gradient
    norm."""
    results = []
    for words in ([], ["--compile.enable=true"]):
        torch._dynamo.reset()
        run, batches = make_run([f"--training.dtype={dtype}", *words])
        made, valid = batches(0)
        losses, counts, norm, _ = run(made, valid, 0.0)
        results.append((losses["loss"].item(), norm.item()))
    (loss, norm), (compiled_loss, compiled_norm) = results
    tolerance = 2e-3 if dtype == "bfloat16" else 1e-5
    assert compiled_loss == pytest.approx(loss, rel=tolerance) and compiled_norm == pytest.approx(
        norm, rel=10 * tolerance
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, preset", [(name, preset) for name, cls in MIXERS.items() for preset in cls.presets]
)
def test_the_a03b_2b_shape_trains(cuda_group, name, preset):
    """10 steps of ragged documents, compiled as eager, without recompiling once both kinds of step
    are known.

    The first step is the same to bf16's accuracy. Later ones are held to twice what was seen, 6 %
    of what was learnt (Lightning, whose loss falls fast; 1 % in a later run). A norm may differ by
    3 %, RetNet faithful's by 10 %: in bf16 its eager norm was 3.2 % and its compiled one 9.0 % from
    float32's, in which the two agree to 2e-6. Takes 42 GB: one at a time (-n 0).
    """
    toml = {
        "model": {
            "flavor": "a0.3b_2b",
            "mixer": name,
            "preset": preset,
            "pattern": "L",
            "vocab_size": 151936,
        },
        "data": {"seq_len": 2048},
        "training": {"batch_size": 2, "global_batch_size": 2, "dtype": "bfloat16"},
        "activation_checkpoint": {"mode": "full"},
        "optimizer": {"lr": 1e-4},
    }
    runs = []
    for words in ([], ["--compile.enable=true"]):
        torch._dynamo.reset()
        run, batches = make_run(words, toml, vocabulary=1000, noise=0.0)  # as it ships
        losses, norms = [], []
        for step in range(10):
            made, valid = batches(step % 9)  # the last step sees the first one's batch again
            with torch._dynamo.config.patch(error_on_recompile=step >= 2):
                step_losses, _, norm, _ = run(made, valid, 1e-4)
            losses.append(step_losses["loss"].item())
            norms.append(norm.item())
        runs.append((losses, norms))
        del run, batches, made
        gc.collect()
        torch.cuda.empty_cache()
    (eager, norms), (compiled, compiled_norms) = runs
    apart = [abs(a - b) for a, b in zip(eager, compiled, strict=True)]
    print(
        f"{name} {preset}: {eager[0]:.3f} -> {eager[-1]:.3f}, compiled {compiled[-1]:.3f}, apart by"
        f" up to {max(apart):.4f}"
    )
    assert all(math.isfinite(x) for x in norms + compiled_norms) and eager[-1] < eager[0] - 0.005
    within = 0.1 if (name, preset) == ("retnet", "faithful") else 0.03
    assert apart[0] < 1e-3 and compiled_norms[0] == pytest.approx(norms[0], rel=within)
    assert all(d < 0.01 + 0.12 * abs(a - eager[0]) for d, a in zip(apart, eager)), apart
