"""Cross-checks of a whole configuration, before any work: one line that says which key, why, and
what would work."""

from lmoe.config.sections import sections
from lmoe.model.build import every_mixer, needs_dense_mask
from lmoe.model.config import layer_ffns
from lmoe.model.mixers import MIXERS
from lmoe.model.moe.moe import check as check_moe
from lmoe.optimizer import wsd_decay_steps
from lmoe.parallel.context import METHODS, check_context_parallel, shares_heads
from lmoe.parallel.dims import resolve_sizes
from lmoe.parallel.expert import check_expert_parallel
from lmoe.parallel.parallelize import DTYPES
from lmoe.parallel.pipeline import check_pipeline
from lmoe.parallel.tensor import check_tensor_parallel


def check_config(config, world, device):
    """Refuse with a ValueError what cannot run on `world` ranks of `device`."""
    if len(config.optimizer.betas) != 2:
        raise ValueError(f"optimizer.betas = {config.optimizer.betas} must be two numbers")
    check_schedule(config)
    if config.checkpoint.load_only_model and not config.checkpoint.load:
        raise ValueError(
            "checkpoint.load_only_model needs checkpoint.load, the checkpoint to take the weights"
            " from"
        )
    if config.profiling.memory_snapshot and device.type != "cuda":
        raise ValueError(
            "profiling.memory_snapshot records CUDA allocations and there is no GPU;"
            " profiling.trace_step works on a CPU"
        )
    if config.profiling.trace_step > config.training.steps:
        raise ValueError(
            f"profiling.trace_step = {config.profiling.trace_step} is beyond training.steps ="
            f" {config.training.steps}: name one that runs"
        )
    if config.compile.backend != "inductor" and not config.compile.enable:
        raise ValueError(
            "compile.backend is set but compile.enable is false; set --compile.enable=true"
        )

    if config.model.logits_dtype == "bfloat16" != config.training.dtype:
        raise ValueError(
            "model.logits_dtype = bfloat16 rounds what training.dtype ="
            f" {config.training.dtype} computes; set model.logits_dtype = float32"
        )

    options = every_mixer(config)
    for name, chosen in options.items():  # shapes that do not divide are refused here
        chosen.shape(config.model)
        if getattr(chosen, "backend", "auto") == "triton":
            check_triton(name, chosen, config, device)
    if config.compile.enable and getattr(config.mixer, "backend", "auto") == "reference":
        raise ValueError(
            "mixer.backend = reference goes token by token on the host and does not compile; set"
            " mixer.backend = auto"
        )
    needs_dense_mask(config, device, DTYPES[config.training.dtype])
    if "D" in layer_ffns(config.model, config.moe) and not config.model.ffn_hidden:
        raise ValueError("model.ffn_hidden = 0: the dense layers need a hidden width")
    if config.moe.experts:
        check_moe(config.moe)
        if config.moe.impl == "loop" and config.compile.enable:
            raise ValueError(
                "moe.impl = loop reads token counts on the host and does not compile; set moe.impl"
                " = grouped"
            )

    sizes = resolve_sizes(config, world)
    ranks = sizes["dp_replicate"] * sizes["dp_shard"]
    rows = config.training.batch_size * ranks
    total = config.training.global_batch_size or rows
    if total % rows:
        raise ValueError(
            f"training.global_batch_size = {total} is not a multiple of training.batch_size x"
            f" data-parallel ranks = {config.training.batch_size} x {ranks}"
        )
    check_parallel(config, sizes, options, device)


def check_schedule(config):
    """Refuse phases of the learning rate that do not fit its steps."""
    schedule = config.schedule
    key = "schedule.steps" if schedule.steps else "training.steps"
    steps = schedule.steps or config.training.steps
    if schedule.kind != "wsd" and schedule.decay_steps:
        raise ValueError(f"schedule.decay_steps is for schedule.kind = wsd, not {schedule.kind}")
    if schedule.warmup_steps > steps:
        raise ValueError(
            f"schedule.warmup_steps = {schedule.warmup_steps} exceeds {key} = {steps}: the peak"
            " would never be reached; lower it, or set schedule.steps"
        )
    decay = wsd_decay_steps(schedule, steps)
    if schedule.kind == "wsd" and schedule.warmup_steps + decay > steps:
        raise ValueError(
            f"schedule.warmup_steps = {schedule.warmup_steps} and {decay} steps of decay"
            f" (schedule.decay_steps) exceed {key} = {steps}; lower one of them"
        )


def check_triton(name, options, config, device):
    """Refuse what the Triton kernels can't take."""
    families = MIXERS[name].families()
    shape = options.shape(config.model)
    if any("triton" not in family.forms for family in families):
        raise ValueError(
            f"mixer.backend = triton has no kernels for {name}; set mixer.backend = auto"
        )
    if device.type != "cuda":
        raise ValueError("mixer.backend = triton needs a GPU; set mixer.backend = auto")
    if not 16 <= options.chunk_size <= 128:
        raise ValueError(
            f"mixer.chunk_size = {options.chunk_size}: mixer.backend = triton takes 16, 32, 64"
            " and 128"
        )
    widest = min(family.max_head_dim for family in families)
    if max(shape.K, shape.V) > widest:
        raise ValueError(
            f"mixer.backend = triton takes heads of up to {widest} channels, not {shape.K} and"
            f" {shape.V}; choose more heads, or backend = auto"
        )
    if config.training.dtype not in ("bfloat16", "float32"):
        raise ValueError(
            "mixer.backend = triton takes training.dtype = bfloat16 or float32, not"
            f" {config.training.dtype}"
        )


def check_parallel(config, sizes, options, device):
    """Refuse what cannot be split over ranks. sizes: of resolve_sizes."""
    tp = sizes["tp"]
    cp = sizes["cp"]
    tokens = config.training.batch_size * config.data.seq_len
    if tokens % (cp * tp):
        raise ValueError(
            f"parallel.cp x tp = {cp} x {tp} does not divide the {tokens} tokens of a microbatch,"
            " training.batch_size x data.seq_len"
        )
    if tp > 1:
        check_tensor_parallel(config, tp, sizes["ep"])
    elif config.parallel.async_tp:
        raise ValueError(
            "parallel.async_tp overlaps tensor parallel exchanges: set parallel.tp above 1"
        )
    if config.parallel.async_tp and not (config.compile.enable and device.type == "cuda"):
        raise ValueError(
            "parallel.async_tp is done by the compiler on CUDA: set compile.enable = true, or leave"
            " it off without a GPU"
        )
    check_expert_parallel(config, sizes["ep"])
    if cp > 1:
        check_context_parallel(config, cp, options)
    elif config.parallel.cp_method != METHODS[0]:
        raise ValueError(
            f"parallel.cp_method = {config.parallel.cp_method} is for parallel.cp above 1"
        )
    for name, chosen in options.items():
        check_heads(name, chosen, config, tp, cp)
    check_pipeline(config, sizes)


def check_heads(name, options, config, tp, cp):
    """Refuse heads that tp ranks, and with the all-to-all tp x cp ranks, cannot share."""
    mixer = MIXERS[name]
    method = config.parallel.cp_method
    exchanged = cp > 1 and shares_heads(mixer, method)
    keys = "parallel.tp"
    split = tp
    if exchanged:
        keys = f"parallel.tp x cp (parallel.cp_method = {method})"
        split = tp * cp
    if tp > 1 and mixer.tp_plan is None:
        raise ValueError(
            f"parallel.tp = {tp}: the mixer {name} cannot be split over its heads; set parallel.tp"
            " = 1"
        )
    counts = mixer.head_counts(options, config.model)
    alike = len(set(counts.values())) == 1
    for kind, heads in counts.items():
        # Each rank takes the head that it needs, or (q and k of a scan) all ranks get copies.
        shared = kind == mixer.replicated_heads and split % heads == 0
        shared = shared and not (exchanged and mixer.softmax)
        if heads % split and not shared:
            kind = "" if alike or not kind else f"{kind} "
            raise ValueError(f"{keys} = {split} does not divide the {heads} {kind}heads of {name}")


# Keys of these sections that may change between a checkpoint and the run that goes on from it: they
# shape no tensor and no output.
_FREE = {
    "model": {"loss_chunk", "logits_dtype", "z_loss", "init_std"},
    "mixer": {"backend", "chunk_size", "A_init_min"},
    "attention": {"impl"},
    "moe": {"impl", "bias_rate", "balance", "balance_coeff", "z_coeff"},
}


def model_changes(config, saved):
    """List [(key, value here, value there)] of what makes another model of that of a checkpoint.
    saved: the checkpoint's Config."""
    changes = []
    here = sections(config)
    there = sections(saved)
    for section in here | there:
        kind = section.split(".")[0]
        if kind not in _FREE:
            continue
        mine, theirs = (vars(all[section]) if section in all else {} for all in (here, there))
        for key in sorted(mine.keys() | theirs.keys()):
            if key not in _FREE[kind] and mine.get(key) != theirs.get(key):
                changes.append((f"{section}.{key}", mine.get(key), theirs.get(key)))
    return changes


def check_same_model(config, saved, path):
    """Refuse to go on from a checkpoint of another model. saved: the checkpoint's Config."""
    for key, here, there in model_changes(config, saved):
        raise ValueError(
            f"{key} = {here!r} but {path} holds a model with {there!r}; keep that value, or start a"
            " branch from its weights: checkpoint.load, checkpoint.load_only_model and another"
            " job.folder"
        )
