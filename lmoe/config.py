"""The configuration: one dataclass per TOML section, and the way from a TOML file and command-line
words to a checked run.

Order, later ones winning: the dataclasses' defaults, the flavour and the preset, the TOML file,
`--section.key=value`. Every error is one line that names the key, says why, and what would work.
"""

import dataclasses
import difflib
import json
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

from lmoe.model.config import FLAVORS, ModelConfig, MoEConfig, opt
from lmoe.model.mixers import MIXERS
from lmoe.model.mixers.attention import Attention

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass
class JobConfig:
    folder: str = opt(
        "outputs",
        "where the run writes: config.toml, metrics.jsonl, tb/, ckpt/; a folder that holds"
        " checkpoints is resumed",
    )
    seed: int = opt(1, "seed of the initial weights and of the order of the data")
    deterministic: bool = opt(
        False, "deterministic algorithms only: the same run gives the same bits on the same devices"
    )
    hang_timeout: int = opt(
        60,
        "seconds without progress after which a hung rank ends the job (ten times that before step"
        " 2 is done, in validation, checkpoints and preparation); 0: never",
    )
    gc_every: int = opt(
        50,
        "steps between garbage collections, run on all ranks at the same step; 0: leave it to"
        " Python",
    )


@dataclass
class DataConfig:
    source: str = opt("stdlib", "stdlib (this Python's own library source), text, tokens or mqar")
    tokenizer: str = opt(
        "byte", "byte, the path of a .tiktoken rank file, or a tiktoken encoding name"
    )
    seq_len: int = opt(512, "tokens per sample")
    paths: list[str] = opt([], "files, folders or globs of the sources text and tokens")
    field: str = opt("text", "field of a .jsonl line that holds the document")
    mixture: list[str] = opt(
        [], 'weighted sources instead of one, such as "0.7 stdlib", "0.3 text:/corpus/*.md"'
    )
    cache: str = opt("", "folder for tokenised text; empty: data/ in the run's folder")
    validation_fraction: float = opt(0.01, "share of the documents held out for validation")
    workers: int = opt(2, "loader processes per rank; 0: load in the training process")
    prefetch: int = opt(2, "microbatches that each loader process prepares ahead")
    mqar_pairs: int = opt(8, "key-value pairs per sample of the source mqar")
    mqar_queries: int = opt(8, "queries per sample of the source mqar")


@dataclass
class TrainingConfig:
    steps: int = opt(1000, "optimizer steps in all")
    batch_size: int = opt(8, "rows of seq_len tokens per data-parallel rank and microbatch")
    global_batch_size: int = opt(
        0,
        "rows per optimizer step over all ranks, by accumulation; 0: batch_size x data-parallel"
        " ranks",
    )
    max_norm: float = opt(1.0, "clip the global gradient norm to this; 0: no clipping")
    dtype: str = opt(
        "bfloat16", "compute dtype: bfloat16 (fp32 master weights), float32, or float64 (for tests)"
    )


@dataclass
class OptimizerConfig:
    name: str = opt("adamw", "adamw (fused)")
    lr: float = opt(3e-4, "peak learning rate")
    betas: list[float] = opt([0.9, 0.95], "decay rates of the moments")
    weight_decay: float = opt(
        0.1, "decoupled weight decay; norms, biases and gate parameters take none"
    )
    eps: float = opt(1e-8, "added to the root of the second moment")


@dataclass
class ScheduleConfig:
    kind: str = opt(
        "cosine", "constant, linear, cosine or wsd (warm-up, stable, decay), each after the warm-up"
    )
    warmup_steps: int = opt(100, "steps of linear warm-up from 0")
    min_lr_ratio: float = opt(0.1, "final learning rate over the peak")
    decay_steps: int = opt(0, "steps of wsd's final decay; 0: a tenth of training.steps")


@dataclass
class CompileConfig:
    enable: bool = opt(False, "compile every block with torch.compile")
    backend: str = opt("inductor", "compiler backend: inductor or aot_eager")


@dataclass
class ActivationCheckpointConfig:
    mode: str = opt(
        "none",
        "recompute activations in the backward pass: none, full, or selective (keep scans,"
        " attention and GEMMs)",
    )


@dataclass
class CheckpointConfig:
    every: int = opt(
        500,
        "steps between checkpoints; the last step and a run asked to stop are saved too; 0: no"
        " checkpoints at all",
    )
    keep: int = opt(3, "checkpoints to keep, the newest ones; 0: all")
    async_save: bool = opt(True, "write in the background while training goes on")
    load: str = opt(
        "",
        "checkpoint to start from when job.folder has none: a step-N folder, or a folder of them"
        " (the newest whole one)",
    )
    load_only_model: bool = opt(
        False,
        "take only the weights from checkpoint.load: a branch with a new schedule, data and"
        " optimizer",
    )


@dataclass
class ValidationConfig:
    every: int = opt(
        0, "steps between validations (step 0 and the last step are always measured); 0: never"
    )
    steps: int = opt(10, "batches of training.batch_size rows per validation, over all ranks")
    shuffle_context: bool = opt(
        False,
        "also measure with the order of the context shuffled: a model that uses its context gets"
        " worse",
    )


@dataclass
class MetricsConfig:
    log_every: int = opt(
        10,
        "steps between console lines and metrics.jsonl entries; the first and the last step are"
        " always logged",
    )
    tensorboard: bool = opt(True, "write TensorBoard files to tb/")


@dataclass
class ProfilingConfig:
    trace_step: int = opt(
        0,
        "step whose trace (and the two after it) goes to profile/ for Perfetto or TensorBoard; 0:"
        " none",
    )
    memory_snapshot: bool = opt(
        False,
        "record CUDA allocations and write profile/memory-rankN.pickle at the end or on an error",
    )


@dataclass
class ParallelConfig:
    dp_replicate: int = opt(1, "replicas of the sharded model (HSDP)")
    dp_shard: int = opt(
        -1,
        "ranks that share one copy of weights, gradients and moments (FSDP2); -1: all that remain",
    )
    tp: int = opt(1, "tensor parallel ranks: heads, hidden widths and the vocabulary")
    cp: int = opt(1, "context parallel ranks: each holds a slice of every microbatch's tokens")
    pp: int = opt(1, "pipeline parallel ranks: each holds some of the layers")
    ep: int = opt(
        1, "expert parallel ranks, taken out of dp_shard x cp x tp: each holds some of the experts"
    )
    cp_method: str = opt(
        "lasp2",
        "what cp ranks exchange: lasp2 (states, keys and values) or all_to_all (tokens for heads)",
    )
    schedule: str = opt(
        "1f1b", "order of a pipeline's microbatches: 1f1b, gpipe, interleaved or zero_bubble"
    )
    stages_per_rank: int = opt(
        0, "stages of a pipeline on each rank; 0: 2 for interleaved and zero_bubble, else 1"
    )
    async_tp: bool = opt(
        False, "overlap tensor parallel exchanges with matrix products (CUDA, with compile.enable)"
    )
    ranks: int = opt(
        0, "world size that this configuration is meant for: what lmoe.plan plans for; 0: any"
    )
    reshard_after_forward: bool = opt(
        True, "free a block's gathered weights between its forward and backward"
    )


@dataclass
class Config:
    job: JobConfig = field(default_factory=JobConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mixer: object = None  # the options dataclass of the mixer that model.mixer names
    attention: object = field(default_factory=Attention.Options)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(
        default_factory=ActivationCheckpointConfig
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


SECTIONS = [f.name for f in dataclasses.fields(Config)]


def _nearest(word, words):
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; one of: {', '.join(sorted(words))}"


def _convert(key, value, kind):
    """`value` as the type `kind`, or a ValueError that names the key."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        if isinstance(value, list):
            return [_convert(key, item, options[0]) for item in value]
    elif options:  # a union such as str | list[str]
        for option in options:
            try:
                return _convert(key, value, option)
            except ValueError:
                pass
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif type(value) is kind:
        return value
    name = str(kind) if options else kind.__name__
    raise ValueError(f"{key} = {value!r} has the wrong type: {name} is expected")


def _parse(key, text, kind):
    """The value of a command-line word: booleans, numbers, strings, and lists as `a,b` or `["a",
    "b"]`."""
    if typing.get_origin(kind) is list or (typing.get_args(kind) and text.startswith("[")):
        inner = typing.get_args(kind)[0] if typing.get_origin(kind) is list else str
        if text.startswith("["):
            try:
                return _convert(key, tomllib.loads(f"x = {text}")["x"], list[inner])
            except tomllib.TOMLDecodeError as error:
                raise ValueError(
                    f'{key} = {text} is not a list: write a,b or ["a", "b"]'
                ) from error
        return [_parse(key, item, inner) for item in text.split(",") if item]
    if kind is bool:
        if text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
        raise ValueError(f"{key} = {text!r} has the wrong type: true or false is expected")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(
                f"{key} = {text!r} has the wrong type: {kind.__name__} is expected"
            ) from None
    return text


def _assign(section, name, values, parse=_convert):
    hints = typing.get_type_hints(type(section))
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"unknown key {name}.{key}{_nearest(key, hints)}")
        setattr(section, key, parse(f"{name}.{key}", value, hints[key]))


def _read_words(words):
    """(path of the TOML file or None, {section: {key: text}}) from command-line words."""
    path, given = None, {}
    for word in words:
        if word.startswith("--config="):
            path = word.split("=", 1)[1]
            continue
        left, equals, text = word.partition("=")
        section, dot, key = left.removeprefix("--").partition(".")
        if not word.startswith("--") or not dot or not equals:
            raise ValueError(
                f"cannot read the argument {word!r}: write --section.key=value (or --config=FILE,"
                " --help)"
            )
        if section not in SECTIONS:
            raise ValueError(f"unknown section {section} in {word!r}{_nearest(section, SECTIONS)}")
        given.setdefault(section, {})[key] = text
    return path, given


def load_config(words=(), toml=None):
    """Build the Config from command-line words (`--config=FILE`, `--section.key=value`) and/or a
    parsed TOML dict.

    Raises ValueError (one line) for an unknown key, a wrong type or a value that no run could use.
    """
    path, given = _read_words(words)
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"--config={path}: no such file")
        try:
            toml = tomllib.loads(Path(path).read_text())
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"--config={path} is not valid TOML: {error}") from error
    toml = toml or {}
    for section, values in toml.items():
        if section not in SECTIONS:
            raise ValueError(f"unknown section [{section}]{_nearest(section, SECTIONS)}")
        if not isinstance(values, dict):
            raise ValueError(
                f"{section} = {values!r} stands outside a section: write [section] and then key ="
                " value"
            )

    def choice(key, table):
        default = getattr(ModelConfig, key)
        value = given.get("model", {}).get(key, toml.get("model", {}).get(key, default))
        if value not in table:
            raise ValueError(f"model.{key} = {value!r} is not known{_nearest(str(value), table)}")
        return value

    config = Config()
    flavor = FLAVORS[choice("flavor", FLAVORS)]
    mixer = MIXERS[choice("mixer", MIXERS)]
    # Where softmax attention is the chosen mixer, [mixer] and [attention] are one section.
    config.mixer = config.attention if mixer is Attention else mixer.Options()
    for section, values in flavor.items():
        _assign(getattr(config, section), section, values)
    preset = choice("preset", mixer.presets)
    _assign(config.mixer, "mixer", mixer.presets[preset])
    for section, values in toml.items():
        _assign(getattr(config, section), section, values)
    for section, values in given.items():
        _assign(getattr(config, section), section, values, _parse)
    return config


def _toml_value(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def to_toml(config):
    """The resolved configuration as TOML text, which load_config reads back to the same values."""
    lines = []
    for section in SECTIONS:
        lines.append(f"[{section}]")
        for f in dataclasses.fields(getattr(config, section)):
            lines.append(f"{f.name} = {_toml_value(getattr(getattr(config, section), f.name))}")
        lines.append("")
    return "\n".join(lines)


def help_text():
    """Every field with its default and meaning; the options of every mixer under its name."""
    lines = ["train.py [--config=FILE.toml] [--section.key=value ...]", ""]
    config = Config()
    sections = [(name, getattr(config, name), "") for name in SECTIONS if name != "mixer"]
    sections += [
        ("mixer", cls.Options(), f"  (model.mixer = {name!r})")
        for name, cls in MIXERS.items()
        if name != "attention"
    ]
    for name, section, remark in sections:
        lines.append(f"[{name}]{remark}")
        for f in dataclasses.fields(section):
            lines.append(f"  --{name}.{f.name}={_toml_value(getattr(section, f.name))}")
            lines.append(f"      {f.metadata['help']}")
        lines.append("")
    return "\n".join(lines)
