"""Plan a run before there is a GPU: parameters, FLOPs, tokens, and the memory of a rank of every
pipeline stage.

    python -m lmoe.plan train_configs/a1b_7b.toml [--section.key=value ...]

Without words it plans what ./run_train.sh runs without words.

One process on any machine. It takes the place of one rank of each pipeline stage in turn, in a
process group of `parallel.ranks` ranks that is not there, and builds on the meta device what
training builds (parallelize.build): what training refuses is refused here too. Weights are counted
on that model. What a block keeps for the backward pass and what it has at work is measured: one
block of each kind runs forwards and backwards on the meta device, with the tokens and the widths of
the rank, and every tensor that is made is put down (Ledger).

Taken for granted: every expert gets as many tokens as any other; documents are DOCUMENT tokens
long, or as long as rows where those are shorter (a scan needs a chunk's memory more for each);
masked attention is one fused operation. Neglected: what the compiler saves or adds, statistics, the
small gradients that FSDP2 leaves out while they are summed, and whatever is not a tensor: CUDA,
NCCL, the allocator's gaps.
"""

import functools
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from lmoe.checks import check_config
from lmoe.command import asks_for_help, end_with_reader, reason
from lmoe.config import load_config
from lmoe.data.tokenizer import load_tokenizer
from lmoe.kernels.cross_entropy import automatic_chunk, lies_over
from lmoe.ledger import Ledger
from lmoe.model.batch import LossWeights
from lmoe.model.build import build_model, needs_dense_mask, on_meta
from lmoe.model.init import fp32_parameters, local, narrow
from lmoe.model.model import count_parameters
from lmoe.model.moe.experts import IMPLEMENTATIONS
from lmoe.parallel.context import make_builder
from lmoe.parallel.dims import AXES, build_dims
from lmoe.parallel.expert import AllToAllDispatch
from lmoe.parallel.fsdp import left_out
from lmoe.parallel.parallelize import DTYPES, build, split_layers, units
from lmoe.parallel.pipeline import Pipeline
from lmoe.parallel.recompute import apply_recompute
from lmoe.resolve import resolve_batch_size, resolve_vocab_size

DEFAULT = Path(__file__).parents[1] / "train_configs" / "debug.toml"
GIB = 2**30
DOCUMENT = 1024  # tokens
GPU = torch.device("cuda")  # what is planned for; the planning happens on the CPU


# --------------------------------------------------------------------------------------------------
# Activations


class Kind(NamedTuple):
    """Bytes of one block and microbatch: what it keeps for its backward pass, and what is there
    beyond that, at most, while it runs (recomputed activations, gradients, the kernels' own)."""

    kept: int
    work: int


def kind_of(block):
    return type(block.mixer), block.has_experts


class EqualLoad(AllToAllDispatch):
    """Sends as many rows to every rank as to any other."""

    def begin(self, ids):
        plan = super().begin(ids)
        size = self.ranks.size
        return plan._replace(sizes=torch.full((2, size), ids.numel() // size), ready=None)


def one_block_of_each_kind(config, dims):
    """{kind: a block as this rank computes it}: after tensor and expert parallelism, with the
    weights that FSDP2 gathers for it."""
    with on_meta(config):
        model = build_model(config)
    narrow(model, DTYPES[config.training.dtype])
    split_layers(model, config, dims)
    for layer in model.moe_layers():
        # The loop reads sizes on the host; it keeps nearly the same.
        layer.experts.run = IMPLEMENTATIONS["grouped"]
        if layer.experts.dispatch.reads_sizes:
            layer.experts.dispatch = EqualLoad(layer.cfg.experts, layer.experts.dispatch.ranks)
    return {kind_of(block): block for block in model.blocks}


class FusedAttention(TorchFunctionMode):
    """SDPA as one fused operation; on the meta device it would take the unfused one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args
        groups = q.shape[-3] // k.shape[-3]
        k, v = (t.repeat_interleave(groups, -3) if groups > 1 else t for t in (k, v))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(q, k, v, attn_mask=kwargs["attn_mask"].to(q.dtype))[0]


def make_seq(config, dims):
    """(a SeqInfo on the meta device, bytes of a microbatch's tokens, labels and SeqInfo)."""
    rows = config.training.batch_size
    row_len = config.data.seq_len
    dense = needs_dense_mask(config, GPU, DTYPES[config.training.dtype])
    builder = make_builder(config, dims, dense_mask=dense, weights=[LossWeights(1.0, 1.0, 1.0)] * 2)
    builder.device = torch.device("meta")
    starts = [row * row_len + at for row in range(rows) for at in range(0, row_len, DOCUMENT)]
    borders = torch.tensor([*starts, rows * row_len], dtype=torch.int32)
    with Ledger() as ledger:
        seq = builder.seq_info(borders, rows, row_len)
        return seq, ledger.live + 2 * 8 * rows * row_len // dims.cp


def run_block(block, seq, tokens, dtype, tp):
    """(bytes kept between forward and backward pass, most bytes during both)."""
    empty = functools.partial(torch.empty, dtype=dtype, device="meta", requires_grad=True)
    residuals = {
        name: empty(tokens * tp, heads // tp, *rest)
        for name, (heads, *rest) in block.mixer.residual_shapes.items()
    }
    x = empty(tokens, *block.norm_mixer.weight.shape)
    with Ledger() as ledger, FusedAttention():
        x = x * 1
        x = block(x, seq, None, residuals)[0]
        gradient = torch.empty_like(x)
        edge = torch.autograd.graph.get_gradient_edge(x)
        del x  # the next block's
        kept = ledger.live - gradient.nbytes
        torch.autograd.backward(edge, gradient)
    for p in block.parameters():
        p.grad = None
    return kept, ledger.peak


def measure_kinds(config, dims, seq, tokens):
    """{kind: Kind} of all blocks. tokens: of this rank's x."""
    dtype = DTYPES[config.training.dtype]
    mode = config.activation_checkpoint.mode
    kinds = {}
    for kind, block in one_block_of_each_kind(config, dims).items():
        for owner, method, _ in units(block) if mode != "none" else []:
            apply_recompute(owner, method, mode)
        kept, peak = run_block(block, seq, tokens, dtype, dims.tp)
        kinds[kind] = Kind(kept, peak - kept)
    return kinds


def in_flight(order, kept, last):
    """(most bytes kept at a time, most microbatches of the stage `last` at a time). order: a rank's
    actions in torch's schedule; kept: {stage: bytes of one microbatch}."""
    count = dict.fromkeys(kept, 0)
    most = 0
    most_last = 0
    for action in filter(None, order):
        name = action.computation_type.name
        count[action.stage_index] += name == "FORWARD"
        count[action.stage_index] -= name in ("FULL_BACKWARD", "BACKWARD_WEIGHT")
        most = max(most, sum(kept[stage] * number for stage, number in count.items()))
        most_last = max(most_last, count.get(last, 0))
    return most, most_last


# --------------------------------------------------------------------------------------------------
# A rank


def fsdp_units(model):
    """{name: elements that it gathers} of a rank's FSDP2 units."""
    found = {}
    seen = set()
    for stage in model.stages:
        # Inner ones first: their parameters are not the outer's.
        for name, module in reversed(list(stage.named_modules())):
            if isinstance(module, FSDPModule):
                own = {*module.parameters()} - left_out(module) - seen
                seen |= own
                found[name] = found.get(name, 0) + sum(map(gathered_elements, own))
    return found


def gathered_elements(p):
    """Count the elements of a parameter that tensor and expert parallelism leave to a rank."""
    mesh = p.device_mesh
    for axis, size, place in zip(mesh.mesh_dim_names, mesh.shape, p.placements):
        if axis in ("tp", "ep") and not place.is_replicate():
            return p.numel() // size
    return p.numel()


def loss_bytes(config, dims, tokens):
    """(kept between forward and backward pass, at work beyond that) by norm, head and
    cross-entropy, on a rank that has them. See kernels/cross_entropy.py for both passes."""
    dtype = DTYPES[config.training.dtype]
    narrow = dtype.itemsize
    wide = max(4, narrow)
    D = config.model.dim
    V = config.model.vocab_size // dims.tp
    of_logits = torch.promote_types(dtype, DTYPES[config.model.logits_dtype])
    chunk = config.model.loss_chunk or automatic_chunk(V, of_logits)
    chunk = min(chunk, tokens * dims.tp)
    gathered = narrow * tokens * dims.tp * D  # dx, and x under tensor parallelism
    kept = wide * V * D + wide * tokens * D + gathered  # dW, the norm's x
    if dims.tp > 1:
        kept += gathered
    of_gradient = 0 if lies_over(V, of_logits, dtype) else narrow
    forward = (of_logits.itemsize + of_gradient) * V * chunk
    work = max(forward, narrow * V * D + narrow * tokens * dims.tp * D)  # dW and dx scaled
    return kept, work


class Rank(NamedTuple):
    """layers: how many. memory: {what: bytes}, each at its most; total: bytes at the peak, for not
    all is there at once; peak: when."""

    layers: int
    memory: dict
    total: int
    peak: str


def plan_rank(config, dims, model, kinds, batch, microbatches, tokens):
    """The Rank of a built model. batch: bytes of a microbatch's input; tokens: of this rank's x."""
    narrow = DTYPES[config.training.dtype].itemsize
    master = max(4, narrow)
    weights = held_bytes(model)
    gathered, reduced, whole_gradients = communicated(config, dims, model)
    if dims.pp == 1:
        there = 0 if microbatches == 1 else weights  # gradients from the microbatches before
        # Whether this one's stay beside them until its backward pass ends.
        stays = microbatches == 1 or replicated(model)
        gradients = there + stays * weights
    else:
        there = gradients = whole_gradients * master + held_bytes(model, left_out=True)
        stays = False
    activations, losses, messages = kept_bytes(config, dims, model, kinds, microbatches, tokens)
    loss_kept, loss_work = loss_bytes(config, dims, tokens) if model.head is not None else (0, 0)
    work = {
        number: kinds[kind_of(block)].work + master * reduced
        for number, block in model.blocks.named_children()
    }
    memory = {
        "weights": weights,
        "gradients": gradients,
        "moments": 2 * weights,
        "gathered weights": narrow * gathered,
        "activations": activations,
        "batches, messages": microbatches * batch + messages,
        "a block at work": max(work.values()),
        "the loss at work": losses * loss_kept + loss_work,
    }

    # As the backward pass goes on, gradients come (in a pipeline they are taken to be there) and
    # activations go.
    moments = {"the optimizer's step": weights}
    if model.head is not None:
        moments["the loss"] = there + activations + memory["the loss at work"]
        there += stays * (held_bytes(model.norm) + held_bytes(model.head))
    for stage in model.stages:
        left = activations
        for number, block in reversed(list(stage.blocks.named_children())):
            moments[f"the backward pass of layer {number}"] = there + left + work[number]
            there += stays * held_bytes(block)
            left -= kinds[kind_of(block)].kept
    peak = max(moments, key=moments.get)
    always = ("weights", "moments", "gathered weights", "batches, messages")
    total = moments[peak] + sum(memory[name] for name in always)
    return Rank(len(model.blocks), memory, total, peak)


def held_bytes(module, left_out=False):
    """Count the bytes of the parts of parameters that a rank holds; left_out: only of those that
    FSDP2 leaves out."""
    held = fp32_parameters(module) if left_out else module.parameters()
    return sum(local(p).nbytes for p in held)


def replicated(model):
    """Tell whether FSDP2 also sums over replicas, be it one: then a unit's newly reduced gradient
    is held until the backward pass ends."""
    return any(
        "dp_replicate" in p.device_mesh.mesh_dim_names
        for p in model.parameters()
        if isinstance(p, DTensor)
    )


def communicated(config, dims, model):
    """Elements on this rank (gathered weights at their most, gradients being reduced, gradients of
    a whole step if none are reduced)."""
    found = fsdp_units(model)
    named = dict(model.named_modules())
    gathered = everything = sum(found.values())
    # A pipeline keeps them, as it does gradients, to the last microbatch.
    if dims.pp == 1 and config.parallel.reshard_after_forward:
        blocks = Counter()
        for name, size in found.items():
            if name.startswith("blocks.") and not named[name].reduces_alone:
                blocks[name.split(".")[1]] += size
        # Of blocks the one at work and the next on its way stay.
        gathered -= sum(sorted(blocks.values())[:-2])
    # Experts that FSDP2 leaves alone are cast by every block, which recomputation does anew.
    cast = [
        sum(map(gathered_elements, layer.experts.parameters()))
        for layer in model.moe_layers()
        if layer.experts.fsdp == "not at all"
    ]
    if config.training.dtype == "bfloat16":
        gathered += (sum if config.activation_checkpoint.mode == "none" else max)(cast or [0])
    return gathered, max(found.values()), everything


def kept_bytes(config, dims, model, kinds, microbatches, tokens):
    """(bytes of activations kept at a time, microbatches whose loss is kept at a time, bytes of the
    pipeline's messages)."""
    stages = {dims.index("pp") + i * dims.pp: stage for i, stage in enumerate(model.stages)}
    kept = {
        number: sum(kinds[kind_of(block)].kept for block in stage.blocks)
        for number, stage in stages.items()
    }
    if dims.pp == 1:
        return sum(kept.values()), 1, 0
    last = next((number for number, stage in stages.items() if stage.head is not None), None)
    pipeline = Pipeline(model, config, dims)
    buffers = 0

    def message(residuals):
        return sum(t.nbytes for t in pipeline.border(tokens, residuals, "meta"))

    for number, stage in stages.items():
        if stage.embed is None:
            buffers += message(stage.incoming)
        if stage.head is None:
            buffers += message(stage.outgoing)
            kept[number] += message(stage.outgoing)  # it stays until its gradient comes back
    order = pipeline.build_schedule(microbatches, 1).pipeline_order[dims.index("pp")]
    return *in_flight(order, kept, last), microbatches * buffers


# --------------------------------------------------------------------------------------------------
# The plan


class Plan(NamedTuple):
    """sizes: {axis: ranks}; parameters: as count_parameters says; flops: per token, of a training
    step; microbatches: of a step; tokens: of a step; ranks: a Rank for each place in the pipeline.
    """

    world: int
    sizes: dict
    parameters: dict
    flops: float
    microbatches: int
    tokens: int
    ranks: list


def find_vocab_size(config):
    """Fill in model.vocab_size, if need be without the tokenizer."""
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
    except ValueError as error:
        if not config.model.vocab_size:
            raise ValueError(f"{error}; to plan without it set --model.vocab_size") from None
        return
    resolve_vocab_size(config, tokenizer)


def make_plan(config):
    """The Plan of a Config; fills in what training fills in. ValueError where training would
    refuse. There must be no process group yet."""
    world = config.parallel.ranks or 1
    if getattr(config.mixer, "backend", "auto") == "reference":
        raise ValueError(
            "mixer.backend = reference goes token by token on the host: nothing to plan; set"
            " mixer.backend = auto"
        )
    find_vocab_size(config)
    check_config(config, world, GPU)
    resolve_batch_size(config, world)
    ranks = []
    kinds = None
    rows = config.training.global_batch_size
    pp = config.parallel.pp
    for place in range(pp):
        # A stage's first rank: no other has larger shards. The other ranks are not there.
        dist.init_process_group("fake", rank=place * world // pp, world_size=world)
        try:
            dims = build_dims(config, torch.device("cpu"))
            with on_meta(config):
                model = build_model(config)
            if kinds is None:
                size = count_parameters(model), 3 * model.flops_per_token(config.data.seq_len)
                microbatches = rows // (config.training.batch_size * dims.data_world)
                tokens = config.training.batch_size * config.data.seq_len // (dims.cp * dims.tp)
                seq, batch = make_seq(config, dims)
                kinds = measure_kinds(config, dims, seq, tokens)
            build(model, config, dims)
            ranks.append(plan_rank(config, dims, model, kinds, batch, microbatches, tokens))
        finally:
            dist.destroy_process_group()
    sizes = {axis: getattr(dims, axis) for axis in (*AXES, "ep")}
    tokens = rows * config.data.seq_len
    return Plan(world, sizes, *size, microbatches, tokens, ranks)


def describe(plan, asked):
    """The Plan as text. asked: parallel.ranks."""
    count = plan.parameters
    pp = len(plan.ranks)
    sizes = {axis: size for axis, size in plan.sizes.items() if size > 1}
    ep = f" (ep {sizes.pop('ep')} of dp_shard x cp x tp)" if "ep" in sizes else ""
    layout = " = " * bool(sizes) + " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    lines = [
        f"ranks       {plan.world}{layout}{ep}"
        + " (parallel.ranks = 0: planned for one)" * (not asked),
        (
            f"parameters  {count['total']:,}, active {count['active']:,}; body {count['body']:,},"
            f" active {count['active_body']:,}"
        ),
        f"FLOPs       {plan.flops / 1e9:.4f} GFLOP a token, forward x 3",
        (
            f"tokens      {plan.tokens:,} a step in {plan.microbatches} microbatches,"
            f" {plan.tokens * pp // plan.world:,} of them on a rank"
        ),
        "",
    ]
    heads = [f"pp {place}" for place in range(pp)] if pp > 1 else [""]
    table = [["GiB on a rank", *heads], ["layers", *(rank.layers for rank in plan.ranks)]]
    memory = [rank.memory | {"at the peak": rank.total} for rank in plan.ranks]
    for name in memory[0]:
        table.append([name, *(f"{bytes_of[name] / GIB:.2f}" for bytes_of in memory)])
    lines += [f"{row[0]:18}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in table]
    place, most = max(enumerate(plan.ranks), key=lambda item: item[1].total)
    lines += [
        "",
        (
            f"{most.total / GIB:.1f} GiB{f' on pp {place}' * (pp > 1)} in {most.peak}. Each line"
            " above is its most; not all is there at once."
        ),
        (
            "Not counted: CUDA's and NCCL's own, gaps between tensors, experts with more than their"
            " share of tokens; what compilation saves."
        ),
    ]
    return "\n".join(lines)


def main(words):
    if asks_for_help(words):
        print(__doc__)
        return
    if not words and DEFAULT.is_file():  # it is not installed with the package
        words = [str(DEFAULT)]
    config = load_config(
        [
            word if word.startswith("--") or before == "--config" else f"--config={word}"
            for before, word in zip(["", *words], words)
        ]
    )
    asked = config.parallel.ranks
    print(describe(make_plan(config), asked))


if __name__ == "__main__":
    end_with_reader()
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError, OverflowError) as error:  # also of sizes beyond all tensors
        sys.exit(f"error: {reason(error)}")
