"""lmoe.plan: every configuration file builds at its world size and fits; what ranks hold adds up;
activations are those of a real run.

A plan takes a process group that is not there, so plans are made in a process of their own.
"""

import contextlib
import copy
import functools
import gc
import io
import itertools
import math
import re
import subprocess
import sys
import weakref
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from lmoe import plan
from lmoe.checks import check_config
from lmoe.config import load_config
from lmoe.data.packing import HostBatch
from lmoe.kernels.choice import forced
from lmoe.kernels.cross_entropy import linear_cross_entropy
from lmoe.kernels.grid import Grid
from lmoe.model.batch import LossWeights, SeqInfo
from lmoe.model.build import build_model
from lmoe.model.init import init_weights, local, materialise
from lmoe.model.mixers.attention import Attention
from lmoe.model.model import count_parameters
from lmoe.parallel.context import make_builder
from lmoe.parallel.dims import build_dims
from lmoe.parallel.expert import AllToAllDispatch
from lmoe.parallel.parallelize import build, units
from lmoe.parallel.recompute import apply_recompute
from lmoe.parallel.tensor import Vocabulary
from tests.harness import compare

ROOT = Path(__file__).resolve().parent.parent
TOMLS = sorted((ROOT / "train_configs").glob("*.toml"))
USABLE = 70  # GiB of an H100's 80 GB that a plan may take: it leaves out some
CPU = torch.device("cpu")
one_process = pytest.mark.xdist_group("plan")  # for all plans of the module

TINY = {
    "model": {
        "dim": 64,
        "layers": 4,
        "heads": 4,
        "pattern": ["gla", "gated_deltanet", "attention", "gla"],
        "vocab_size": 320,
        "ffn_pattern": "DEEE",
        "ffn_hidden": 96,
        "loss_chunk": 256,
    },
    "mixer": {"chunk_size": 16, "backend": "chunk"},
    "moe": {"experts": 8, "top_k": 2, "hidden": 32, "shared": 32},
    "data": {"seq_len": 256},
    "training": {"dtype": "float32", "batch_size": 4},
}


def start():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def alone():
    """alone(f, *arguments): the result of f in a process of its own, forked from one that has
    imported all this. torch remembers meshes, so that no second one of the same shape should be
    made where the first one's groups are gone."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.test_plan"])
    with context.Pool(1, start, maxtasksperchild=1) as pool:
        yield lambda function, *arguments: pool.apply_async(function, arguments).get(timeout=300)


def plan_of(words, toml=None):
    """(the Plan, its text)."""
    config = load_config(words, toml=toml)
    asked = config.parallel.ranks
    with (
        forced("portable") if toml else contextlib.nullcontext()
    ):  # what the CPU is measured to take
        made = plan.make_plan(config)
    return made, plan.describe(made, asked)


# --------------------------------------------------------------------------------------------------
# Files and mistakes


@one_process
@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.name)
def test_every_file_fits(alone, path):
    """It builds at its world size, on every pipeline stage, and leaves room on an H100 of 80 GB."""
    made, text = alone(plan_of, [f"--config={path}"])
    assert made.world >= 1 and "planned for one" not in text
    assert len(made.ranks) == made.sizes["pp"] and sum(rank.layers for rank in made.ranks) >= 2
    for rank in made.ranks:
        assert 0 < rank.total < USABLE * plan.GIB
        always = sum(rank.memory[name] for name in ("weights", "moments", "gathered weights"))
        assert always < rank.total <= sum(rank.memory.values())


def printed(words):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        plan.main(words)
    return out.getvalue()


@one_process
def test_the_default_and_help(alone):
    """No words are the default run; a file is named in three ways; help stands anywhere."""
    file = str(ROOT / "train_configs" / "debug.toml")
    words = ["--job.seed=1"]
    want = alone(printed, [])
    assert "parameters  1,984,480" in want and "4,096 a step" in want
    for named in ([file], ["--config", file], [f"--config={file}"]):
        assert alone(printed, [*words, *named]) == alone(printed, [*named, *words]) == want
    assert alone(printed, [file, "--help"]).startswith("Plan a run")


def message_of(words):
    try:
        plan.main(words)
    except ValueError as error:
        return str(error)


@one_process
@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere.toml"], "nowhere.toml: no such file"),
        (["--config", "nowhere.toml"], "nowhere.toml: no such file"),
        (["--config"], "--config: the path of a TOML file must follow"),
        (["--data.tokenizer=nowhere.tiktoken"], "nowhere.tiktoken.*set --model.vocab_size"),
        (["--model.vocab_size=100"], "model.vocab_size = 100 is less than"),
        (["--parallel.ranks=6", "--parallel.dp_replicate=4"], "does not divide the world size 6"),
        (["--parallel.ranks=8", "--parallel.tp=8"], "parallel.tp = 8 does not divide the 4 heads"),
        (["--mixer.backend=reference"], "mixer.backend = reference"),
    ],
)
def test_mistakes_get_one_line(alone, words, message):
    said = alone(message_of, words)
    assert re.search(message, said) and "\n" not in said


def test_the_command():
    """A bare path and --config=, words that win over the file, a tokenizer that is not there; a
    mistake ends with one line."""
    command = [sys.executable, "-m", "lmoe.plan"]
    words = [
        "train_configs/debug.toml",
        "--data.tokenizer=nowhere.tiktoken",
        "--model.vocab_size=640",
        "--parallel.ranks=0",
    ]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "planned for one" in done.stdout
        and "4,096 a step" in done.stdout
        and re.search(r"at the peak +0\.\d\d", done.stdout)
    )
    with torch.device("meta"):
        config = load_config(["--config=train_configs/debug.toml", "--model.vocab_size=640"])
        total = count_parameters(build_model(config))["total"]
    assert f"parameters  {total:,}" in done.stdout
    failed = subprocess.run(
        [*command, "--config=train_configs/debug.toml", "--model.dim=abc"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        failed.returncode == 1
        and failed.stderr.count("\n") == 1
        and failed.stderr.startswith("error: model.dim")
    )


# --------------------------------------------------------------------------------------------------
# What ranks hold


def parts_in(p):
    """Into how many parts a parameter is cut."""
    if not isinstance(p, DTensor):
        return 1
    return math.prod(
        p.device_mesh.size(axis)
        for axis, place in enumerate(p.placements)
        if not place.is_replicate()
    )


def parts_of(words):
    """(the Plan, {name: elements} of the whole model, and of every rank of one copy its place in
    the pipeline, the bytes that it holds, the elements that its FSDP2 units gather, and {name:
    (elements here, elements in all, parts that the parameter is cut into)})."""
    config = load_config(words, toml=TINY)
    made = plan.make_plan(copy.deepcopy(config))
    check_config(config, made.world, CPU)
    whole, parts = None, []
    for rank in range(made.world):
        dist.init_process_group("fake", rank=rank, world_size=made.world)
        dims = build_dims(config, CPU)
        with torch.device("meta"):
            model = build_model(config)
        whole = whole or {name: p.numel() for name, p in model.named_parameters()}
        build(model, config, dims)
        if dims.index("dp_replicate") == 0:
            held = {
                name: (local(p).numel(), p.numel(), parts_in(p))
                for name, p in model.named_parameters()
            }
            parts.append(
                (
                    dims.index("pp"),
                    plan.held_bytes(model),
                    sum(plan.fsdp_units(model).values()),
                    held,
                )
            )
        dist.destroy_process_group()
    return made, whole, parts


@one_process
@pytest.mark.parametrize(
    "words",
    [
        ["--parallel.ranks=8"],
        # three do not divide what they share
        ["--parallel.ranks=6", "--parallel.dp_replicate=2", "--training.batch_size=1"],
        ["--parallel.ranks=8", "--parallel.dp_replicate=2", "--parallel.tp=2"],
        ["--parallel.ranks=8", "--parallel.cp=2", "--parallel.tp=2", "--parallel.ep=4"],
        [
            "--parallel.ranks=8",
            "--parallel.pp=2",
            "--parallel.ep=4",
            "--training.global_batch_size=32",
        ],
        [
            "--parallel.ranks=16",
            "--parallel.pp=2",
            "--parallel.schedule=interleaved",
            "--parallel.dp_replicate=2",
            "--parallel.cp=2",
            "--parallel.tp=2",
            "--parallel.ep=2",
            "--training.global_batch_size=32",
        ],
    ],
    ids=lambda words: " ".join(word.split(".")[1] for word in words),
)
def test_what_ranks_hold_adds_up(alone, words):
    made, whole, parts = alone(parts_of, words)
    assert made.parameters["total"] == sum(whole.values())
    group = len(parts) // len(made.ranks)  # ranks of a stage and copy
    sums = dict.fromkeys(whole, 0)
    for _, _, _, held in parts:
        for name, (here, total, cuts) in held.items():
            assert total == whole[name] and group % cuts == 0
            sums[name] += here * cuts  # each part is held by group / cuts ranks
    assert sums == {name: count * group for name, count in whole.items()}
    for place, rank in enumerate(made.ranks):
        assert rank.memory["weights"] == max(size for stage, size, *_ in parts if stage == place)
    if made.sizes["tp"] == made.sizes["ep"] == 1:
        kept = sum(
            count for name, count in whole.items() if re.search(r"norm|router|decay\.", name)
        )
        gathered = {place: elements for place, _, elements, _ in parts}
        assert sum(gathered.values()) == sum(whole.values()) - kept


# --------------------------------------------------------------------------------------------------
# Activations


def allocated(run):
    """([running sum of bytes at every allocation and release in run()], its result)."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        result = run()
    events = sorted(
        (e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    )
    return torch.tensor([event.nbytes() for event in events]).cumsum(0), result


class Kept:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved(run, known):
    """Bytes that the graph of run()'s result keeps, without those of the tensors `known`."""
    kept = weakref.WeakSet()

    def pack(tensor):
        item = Kept(tensor)
        kept.add(item)
        return item

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
        graph = run()
    storages = [item.tensor.untyped_storage() for item in kept]
    known = {tensor.untyped_storage().data_ptr() for tensor in known}
    assert graph is not None
    return sum(
        {
            storage.data_ptr(): storage.nbytes()
            for storage in storages
            if storage.data_ptr() not in known
        }.values()
    )


def tensors_of(seq):
    """All tensors of a SeqInfo or an AttentionMask."""
    for value in vars(seq).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, SeqInfo):
            yield from tensors_of(value)
        elif isinstance(value, dict):
            for mask in itertools.chain.from_iterable(value.values()):
                yield from tensors_of(mask)


@forced("portable")
def activations(words):
    """{kind: bytes that a block keeps for its backward pass}: as planned; as the graph of the same
    block says on the CPU, which knows nothing of what recomputation saves; and, on one rank, as
    they were allocated."""
    config = load_config(words, toml=TINY)
    check_config(config, dist.get_world_size(), CPU)
    dims, mode = compare.dims_of(config), config.activation_checkpoint.mode
    rows, row_len = config.training.batch_size, config.data.seq_len
    tokens = rows * row_len // (dims.cp * dims.tp)
    planned = plan.measure_kinds(config, dims, plan.make_seq(config, dims)[0], tokens)
    builder = make_builder(config, dims, dense_mask=True, weights=[LossWeights(1.0, 1.0, 1.0)] * 2)
    seq = builder.seq_info(torch.arange(rows + 1, dtype=torch.int32) * row_len, rows, row_len)
    results = {}
    for kind, block in plan.one_block_of_each_kind(config, dims).items():
        if block.has_experts and isinstance(block.ffn.experts.dispatch, plan.EqualLoad):
            block.ffn.experts.dispatch = AllToAllDispatch(
                config.moe.experts, block.ffn.experts.dispatch.ranks
            )
        materialise(block, CPU)
        init_weights(block, 1)
        for owner, method, _ in units(block) if mode != "none" else []:
            apply_recompute(owner, method, mode)
        leaf = torch.randn(
            tokens,
            config.model.dim,
            generator=torch.Generator().manual_seed(dims.rank),
            requires_grad=True,
        )

        def forward(block=block, leaf=leaf):
            return block(leaf * 1, seq)[0].grad_fn

        said = saved(forward, [*map(local, block.parameters()), *block.buffers(), *tensors_of(seq)])
        real = int(allocated(forward)[0][-1]) if dims.world == 1 else None
        results[kind] = planned[kind].kept, said, real
    return results


def activations_alone(words):
    dist.init_process_group("fake", rank=0, world_size=1)
    return activations(words)


@one_process
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_activations_are_those_of_a_real_block(alone, mode):
    kinds = alone(activations_alone, [f"--activation_checkpoint.mode={mode}"])
    assert len(kinds) == 4  # a dense layer first
    for (mixer, _), (planned, said, real) in kinds.items():
        assert planned == pytest.approx(real, rel=0.001)
        assert mode != "none" or planned == pytest.approx(said, rel=0.001)
        # Little more than x, and what SDPA gives.
        assert mode != "full" or planned < 1.2 * 4 * 1024 * 64 * (1 + (mixer is Attention))


@pytest.mark.xdist_group("world2")
@pytest.mark.parametrize(
    "words",
    [
        ["tp=2"],
        ["cp=2"],
        ["cp=2", "cp_method=all_to_all"],
        ["tp=2", "ep=1"],
        ["ep=2"],
        ["ep=2", "ep_method=all_to_all"],
        ["ep=2", "cp=2"],
        ["ep=2", "tp=2"],
    ],
    ids=" ".join,
)
def test_activations_of_a_part(pools, words):
    """With tokens, heads or experts on two ranks. What is allocated is no measure here, as gloo's
    threads keep what they sent last. How many tokens choose a rank's experts is chance, so it is
    the sum over the ranks that must agree."""
    results = pools(2).run(activations, [f"--parallel.{word}" for word in words])
    for kind in results[0]:
        planned, said = (sum(result[kind][i] for result in results) for i in (0, 1))
        assert planned == pytest.approx(said, rel=0.002), kind


@one_process
def test_microbatches_in_flight(alone):
    """Stage s of p keeps min(p - s, M) microbatches under 1f1b, all of them under gpipe."""
    words = [
        "--model.pattern=L",
        "--model.ffn_pattern=E",
        "--parallel.ranks=4",
        "--parallel.pp=4",
        "--training.global_batch_size=24",
    ]
    x = 4 * 4 * 256 * 64  # bytes of a stage's result, kept until its gradient comes back
    for schedule, flying in (("1f1b", [4, 3, 2, 1]), ("gpipe", [6, 6, 6, 6])):
        made, _ = alone(plan_of, [*words, f"--parallel.schedule={schedule}"], TINY)
        kept = made.ranks[3].memory["activations"] // flying[3]
        assert [rank.memory["activations"] for rank in made.ranks] == [
            count * (kept + x * (place < 3)) for place, count in enumerate(flying)
        ]


class ReallyEqualLoad(plan.EqualLoad):
    """Where nothing is received, what is received must be made up."""

    def begin(self, ids):
        made = super().begin(ids)
        return made._replace(
            received=torch.full_like(made.received, ids.numel() // made.received.numel())
        )


class LonelyVocabulary(Vocabulary):
    """Where nothing is received, the other ranks have no label."""

    def gather_parts(self, x):
        gathered = super().gather_parts(x).zero_()
        gathered[self.ranks.index] = x
        return gathered


SHORT = {
    **TINY,
    "model": TINY["model"] | {"dim": 128, "vocab_size": 2048},
    "training": TINY["training"] | {"batch_size": 16},
}


def step_peak(words, microbatches, tokens):
    """Bytes at the peak of a training step on the CPU, where chunks lie as they do on a GPU, which
    is what a plan is for."""
    import train

    config, dims, model, parallel, optimizer, builder = compare.build_run(words, SHORT)
    for layer in model.moe_layers() if dist.get_backend() == "fake" and dims.ep > 1 else []:
        layer.experts.dispatch = ReallyEqualLoad(config.moe.experts, layer.experts.dispatch.ranks)
    if dist.get_backend() == "fake" and dims.tp > 1:
        model.head.vocab.__class__ = LonelyVocabulary
    rows, row_len = config.training.batch_size, config.data.seq_len
    ids, borders = (
        torch.randint(0, 320, (rows * row_len,)),
        torch.arange(rows + 1, dtype=torch.int32) * row_len,
    )

    def run():
        batches = [builder(HostBatch(ids, ids, borders, row_len)) for _ in range(microbatches)]
        return train.train_step(
            model, parallel, optimizer, config, dims, batches, float(tokens), 1e-3
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Grid, "__init__", functools.partialmethod(Grid.__init__, stream_order=True))
        run()  # makes the moments
        return 3 * plan.held_bytes(model) + int(
            allocated(run)[0].max()
        )  # beside weights and moments


def step_peak_alone(words, made):
    """step_peak of a rank whose messages go nowhere: all but their contents is as it would be."""
    dist.init_process_group("fake", rank=made.world // 2, world_size=made.world)
    return step_peak(words, made.microbatches, made.tokens)


@one_process
@pytest.mark.parametrize(
    "ranks, words",
    [
        pytest.param(
            1,
            ["activation_checkpoint.mode=full", "training.global_batch_size=32"],
            marks=pytest.mark.slow,
        ),
        pytest.param(4, ["training.global_batch_size=128"], marks=pytest.mark.slow),
        (4, ["parallel.tp=2", "parallel.dp_replicate=2"]),
        pytest.param(
            4, ["parallel.ep=4", "activation_checkpoint.mode=selective"], marks=pytest.mark.slow
        ),
        (4, ["parallel.cp=4", "activation_checkpoint.mode=full"]),
        (4, ["parallel.cp=4", "parallel.cp_method=all_to_all"]),
    ],
    ids=str,
)
def test_the_peak_is_that_of_a_real_step(alone, ranks, words):
    words = [f"--{word}" for word in (*words, f"parallel.ranks={ranks}")]
    made, _ = alone(plan_of, words, SHORT)
    assert made.ranks[0].total == pytest.approx(alone(step_peak_alone, words, made), rel=0.03)


@pytest.mark.parametrize("chunk", [0, 64])
def test_the_loss_at_work(chunk):
    """Most in the forward pass of large chunks, in the backward pass of small ones."""
    words = [f"--model.loss_chunk={chunk}", "--model.vocab_size=2000"]
    config = load_config(words, toml=TINY)
    T, D, V = 1000, config.model.dim, config.model.vocab_size
    x, weight = (torch.randn(n, D, requires_grad=True) for n in (T, V))
    labels = torch.randint(V, (T,))

    def run():
        loss, _ = linear_cross_entropy(x, weight, labels, 9.0, chunk=chunk)
        return torch.autograd.grad(loss, [x, weight])

    kept, work = plan.loss_bytes(config, SimpleNamespace(tp=1), T)
    planned = kept + work - 4 * T * D  # what the norm keeps
    assert planned == pytest.approx(int(allocated(run)[0].max()), rel=0.06)


@pytest.mark.xdist_group("world2")
@pytest.mark.slow
@pytest.mark.parametrize("schedule, mode", [("1f1b", "none"), ("interleaved", "full")])
def test_the_peak_of_a_pipeline(alone, pools, schedule, mode):
    """Its gradients and activations are not all there at one time, so the plan is above."""
    words = [
        f"--parallel.schedule={schedule}",
        f"--activation_checkpoint.mode={mode}",
        "--parallel.pp=2",
        "--training.global_batch_size=64",
    ]
    made, _ = alone(plan_of, [*words, "--parallel.ranks=2"], SHORT)
    for rank, real in zip(
        made.ranks, pools(2).run(step_peak, words, made.microbatches, made.tokens), strict=True
    ):
        assert 0.98 * real <= rank.total <= 1.2 * real
