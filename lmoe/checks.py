"""Cross-checks of a whole configuration, before any work: one line that says which key, why, and
what would work."""

from lmoe.kernels.ops import BACKENDS
from lmoe.model.mixers import MIXERS
from lmoe.model.model import mixer_options, needs_dense_mask
from lmoe.model.moe.moe import check as check_moe
from lmoe.optimizer import wsd_decay_steps
from lmoe.parallel.context import METHODS, check_context_parallel
from lmoe.parallel.dims import resolve_sizes
from lmoe.parallel.expert import check_expert_parallel
from lmoe.parallel.parallelize import DTYPES
from lmoe.parallel.pipeline import SCHEDULES, check_pipeline
from lmoe.parallel.tensor import check_tensor_parallel

_CHOICES = {
    "training.dtype": list(DTYPES),
    "optimizer.name": ["adamw"],
    "schedule.kind": ["constant", "linear", "cosine", "wsd"],
    "activation_checkpoint.mode": ["none", "full", "selective"],
    "compile.backend": ["inductor", "aot_eager"],
    "data.source": ["stdlib", "text", "tokens", "mqar"],
    "attention.impl": ["auto", "sdpa", "varlen"],
    "moe.impl": ["grouped", "loop"],
    "moe.score": ["softmax", "sigmoid"],
    "parallel.cp_method": list(METHODS),
    "parallel.schedule": list(SCHEDULES),
}

# Least value of numbers that may not be smaller.
_AT_LEAST = {
    "job.hang_timeout": 0,
    "job.gc_every": 0,
    "model.dim": 1,
    "model.layers": 1,
    "model.heads": 1,
    "model.vocab_size": 0,
    "model.dense_layers": 0,
    "model.loss_chunk": 1,
    "model.init_std": 0,
    "model.z_loss": 0,
    "model.norm_eps": 0,
    "model.ffn_hidden": 0,
    "attention.rope_theta": 1,
    "attention.heads": 0,
    "attention.kv_heads": 0,
    "attention.head_dim": 0,
    "attention.window": 0,
    "moe.experts": 0,
    "moe.hidden": 1,
    "moe.route_scale": 0,
    "moe.shared": 0,
    "moe.bias_rate": 0,
    "moe.balance_coeff": 0,
    "moe.z_coeff": 0,
    "data.seq_len": 2,
    "data.workers": 0,
    "data.prefetch": 1,
    "data.mqar_pairs": 1,
    "data.mqar_queries": 1,
    "training.steps": 1,
    "training.batch_size": 1,
    "training.global_batch_size": 0,
    "training.max_norm": 0,
    "optimizer.lr": 0,
    "optimizer.weight_decay": 0,
    "optimizer.eps": 0,
    "schedule.warmup_steps": 0,
    "schedule.min_lr_ratio": 0,
    "schedule.decay_steps": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "validation.every": 0,
    "validation.steps": 1,
    "metrics.log_every": 1,
    "profiling.trace_step": 0,
    "parallel.stages_per_rank": 0,
    "parallel.ranks": 0,
}


def _value(config, key):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def check_config(config, world, device):
    """Refuse with a ValueError what cannot run on `world` ranks of `device`. Fills in
    training.global_batch_size."""
    for key, choices in _CHOICES.items():
        if _value(config, key) not in choices:
            raise ValueError(
                f"{key} = {_value(config, key)!r} is not known; one of: {', '.join(choices)}"
            )
    for key, least in _AT_LEAST.items():
        if not least <= _value(config, key) < float("inf"):  # not a number either
            raise ValueError(
                f"{key} = {_value(config, key)} must be a finite number, {least} at least"
            )
    if len(config.optimizer.betas) != 2 or not all(
        0 <= beta < 1 for beta in config.optimizer.betas
    ):
        raise ValueError(
            f"optimizer.betas = {config.optimizer.betas} must be two numbers from 0 to below 1"
        )
    if not 0 < config.data.validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction = {config.data.validation_fraction} must lie between 0 and 1"
        )
    decay = wsd_decay_steps(config.schedule, config.training.steps)
    if (
        config.schedule.kind == "wsd"
        and config.schedule.warmup_steps + decay > config.training.steps
    ):
        raise ValueError(
            f"schedule.warmup_steps = {config.schedule.warmup_steps} and {decay} steps of decay"
            f" (schedule.decay_steps) exceed training.steps = {config.training.steps}; lower one of"
            " them"
        )
    if config.schedule.kind != "wsd" and config.schedule.decay_steps:
        raise ValueError(
            f"schedule.decay_steps is for schedule.kind = wsd, not {config.schedule.kind}"
        )
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

    options = mixer_options(config)
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
    dense = config.model.layers if not config.moe.experts else config.model.dense_layers
    if dense > config.model.layers:
        raise ValueError(
            f"model.dense_layers = {dense} is more than model.layers = {config.model.layers}"
        )
    if dense and not config.model.ffn_hidden:
        raise ValueError("model.ffn_hidden = 0: the dense layers need a hidden width")
    if config.moe.experts:
        check_moe(config.moe)
        if config.moe.impl == "loop" and config.compile.enable:
            raise ValueError(
                "moe.impl = loop reads token counts on the host and does not compile; set moe.impl"
                " = grouped"
            )

    sizes = resolve_sizes(config.parallel, world)
    ranks = sizes["dp_replicate"] * sizes["dp_shard"]
    rows = config.training.batch_size * ranks
    total = config.training.global_batch_size or rows
    if total % rows:
        raise ValueError(
            f"training.global_batch_size = {total} is not a multiple of training.batch_size x"
            f" data-parallel ranks = {config.training.batch_size} x {ranks}"
        )
    config.training.global_batch_size = total
    check_parallel(config, sizes, options, device)


def check_triton(name, options, config, device):
    """Refuse what the Triton kernels can't take."""
    family, (_, _, K, V) = MIXERS[name].family, options.shape(config.model)
    if family not in BACKENDS["triton"]:
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
    if max(K, V) > 256:
        raise ValueError(
            f"mixer.backend = triton takes heads of up to 256 channels, not {K} and {V}; choose"
            " more heads, or backend = auto"
        )
    if config.training.dtype not in ("bfloat16", "float32"):
        raise ValueError(
            "mixer.backend = triton takes training.dtype = bfloat16 or float32, not"
            f" {config.training.dtype}"
        )


def check_parallel(config, sizes, options, device):
    """Refuse what cannot be split over ranks. sizes: of resolve_sizes."""
    tp, cp = sizes["tp"], sizes["cp"]
    tokens = config.training.batch_size * config.data.seq_len
    if tokens % (cp * tp):
        raise ValueError(
            f"parallel.cp x tp = {cp} x {tp} does not divide the {tokens} tokens of a microbatch,"
            " training.batch_size x data.seq_len"
        )
    if tp > 1:
        check_tensor_parallel(config, tp)
    elif config.parallel.async_tp:
        raise ValueError(
            "parallel.async_tp overlaps tensor parallel exchanges: set parallel.tp above 1"
        )
    if config.parallel.async_tp and not (config.compile.enable and device.type == "cuda"):
        raise ValueError(
            "parallel.async_tp is done by the compiler on CUDA: set compile.enable = true, or leave"
            " it off without a GPU"
        )
    if sizes["ep"] > 1:
        check_expert_parallel(config, sizes["ep"])
    if cp > 1:
        check_context_parallel(config, cp, options)
    elif config.parallel.cp_method != METHODS[0]:
        raise ValueError(
            f"parallel.cp_method = {config.parallel.cp_method} is for parallel.cp above 1"
        )
    split = tp if cp == 1 or config.parallel.cp_method == METHODS[0] else tp * cp
    for name, chosen in options.items():
        if split > 1:
            check_heads(name, chosen, config.model, tp, split)
    check_pipeline(config, sizes)


def check_heads(name, options, model, tp, split):
    """Refuse heads that tp ranks, and with the all-to-all tp x cp ranks, cannot share."""
    if tp > 1 and MIXERS[name].shards is None:
        raise ValueError(
            f"parallel.tp = {tp}: the mixer {name} cannot be split over its heads; set"
            " parallel.tp = 1"
        )
    keys = "parallel.tp" if split == tp else "parallel.tp x cp (parallel.cp_method = all_to_all)"
    kinds = ("", "key-value ") if name == "attention" else ("key ", "value ")
    counts = options.shape(model)[:2]
    kinds = ("", "") if counts[0] == counts[1] else kinds
    for index, (heads, kind) in enumerate(zip(counts, kinds)):
        # Each rank takes the head that it needs, or (q and k of a scan) all ranks get copies.
        shared = (
            index == MIXERS[name].shared_heads
            and split % heads == 0
            and (split == tp or name != "attention")
        )
        if heads % split and not shared:
            raise ValueError(f"{keys} = {split} does not divide the {heads} {kind}heads of {name}")


def set_vocab_size(config, tokenizer):
    """model.vocab_size = 0 becomes the tokenizer's size, up to a multiple of 64; a smaller one is
    refused."""
    if not config.model.vocab_size:
        config.model.vocab_size = -(-tokenizer.vocab_size // 64) * 64
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {tokenizer.vocab_size}"
            f" tokens of data.tokenizer = {config.data.tokenizer!r}; 0 takes the tokenizer's"
        )
    if config.model.vocab_size % config.parallel.tp:
        raise ValueError(
            f"parallel.tp = {config.parallel.tp} does not divide model.vocab_size ="
            f" {config.model.vocab_size}; set it to a multiple"
        )


# Keys of these sections that may change between a checkpoint and the run that goes on from it: they
# shape no tensor and no output.
_FREE = {
    "model": {"loss_chunk", "z_loss", "init_std"},
    "mixer": {"backend", "chunk_size"},
    "attention": {"impl"},
    "moe": {"impl", "bias_rate", "balance", "balance_coeff", "z_coeff"},
}


def check_same_model(config, saved, path):
    """Refuse to go on from a checkpoint of another model. saved: the checkpoint's Config."""
    for section, free in _FREE.items():
        here, there = vars(getattr(config, section)), vars(getattr(saved, section))
        for key in sorted(here.keys() | there.keys()):
            if key not in free and here.get(key) != there.get(key):
                raise ValueError(
                    f"{section}.{key} = {here.get(key)!r} but {path} holds a model with"
                    f" {there.get(key)!r}; keep that value, or train into another job.folder"
                )
