"""One dataclass for each TOML section that stands above the model, and Config of them all."""

import dataclasses
from dataclasses import dataclass, field

from lmoe.model.config import ModelConfig, MoEConfig, opt


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
        least=0,
    )
    gc_every: int = opt(
        50,
        "steps between garbage collections, run on all ranks at the same step; 0: leave it to"
        " Python",
        least=0,
    )


@dataclass
class DataConfig:
    source: str = opt(
        "stdlib",
        "what to train on; stdlib: this Python's own library source",
        choices=("stdlib", "text", "tokens", "mqar"),
    )
    tokenizer: str = opt(
        "byte", "byte, the path of a .tiktoken rank file, or a tiktoken encoding name"
    )
    seq_len: int = opt(512, "tokens per sample", least=2)
    paths: list[str] = opt([], "files, folders or globs of the sources text and tokens")
    field: str = opt("text", "field of a .jsonl line that holds the document")
    mixture: list[str] = opt(
        [], 'weighted sources instead of one, such as "0.7 stdlib", "0.3 text:/corpus/*.md"'
    )
    cache: str = opt("", "folder for tokenised text; empty: data/ in the run's folder")
    accept_changes: bool = opt(
        False,
        "go on from a checkpoint though the data are no longer what its run read: other text, or"
        " another source",
    )
    validation_fraction: float = opt(
        0.01, "share of the text held out for validation", above=0, below=1
    )
    workers: int = opt(2, "loader processes per rank; 0: load in the training process", least=0)
    prefetch: int = opt(2, "microbatches that each loader process prepares ahead", least=1)
    mqar_pairs: int = opt(8, "key-value pairs per sample of the source mqar", least=1)
    mqar_queries: int = opt(8, "queries per sample of the source mqar", least=1)


@dataclass
class TrainingConfig:
    steps: int = opt(1000, "optimizer steps in all", least=1)
    batch_size: int = opt(
        8, "rows of seq_len tokens per data-parallel rank and microbatch", least=1
    )
    global_batch_size: int = opt(
        0,
        "rows per optimizer step over all ranks, by accumulation; 0: batch_size x data-parallel"
        " ranks",
        least=0,
    )
    max_norm: float = opt(1.0, "clip the global gradient norm to this; 0: no clipping", least=0)
    max_skipped_steps: int = opt(
        20,
        "steps in a row skipped, their gradients' norm not finite, after which the run is lost and"
        " ends; 0: never",
        least=0,
    )
    dtype: str = opt(
        "bfloat16",
        "compute dtype; bfloat16 keeps fp32 master weights, float64 is for tests",
        choices=("bfloat16", "float32", "float64"),
    )


@dataclass
class OptimizerConfig:
    name: str = opt("adamw", "optimizer, fused", choices=("adamw",))
    lr: float = opt(3e-4, "peak learning rate", least=0)
    betas: list[float] = opt([0.9, 0.95], "decay rates of the moments", least=0, below=1)
    weight_decay: float = opt(
        0.1, "decoupled weight decay; norms, biases and gate parameters take none", least=0
    )
    eps: float = opt(1e-8, "added to the root of the second moment", least=0)


@dataclass
class ScheduleConfig:
    kind: str = opt(
        "cosine",
        "learning rate after the warm-up; wsd: warm-up, stable, decay",
        choices=("constant", "linear", "cosine", "wsd"),
    )
    steps: int = opt(
        0,
        "steps that warm-up and decay stretch over; after them the rate stays; 0: training.steps",
        least=0,
    )
    warmup_steps: int = opt(100, "steps of linear warm-up from 0", least=0)
    min_lr_ratio: float = opt(0.1, "final learning rate over the peak", least=0)
    decay_steps: int = opt(0, "steps of wsd's final decay; 0: a tenth of schedule.steps", least=0)


@dataclass
class CompileConfig:
    enable: bool = opt(False, "compile every block with torch.compile")
    backend: str = opt("inductor", "compiler backend", choices=("inductor", "aot_eager"))


@dataclass
class ActivationCheckpointConfig:
    mode: str = opt(
        "none",
        "recompute activations in the backward pass; selective keeps scans, attention and GEMMs",
        choices=("none", "full", "selective"),
    )


@dataclass
class CheckpointConfig:
    every: int = opt(
        500,
        "steps between checkpoints; the last step and a run asked to stop are saved too; 0: no"
        " checkpoints at all",
        least=0,
    )
    keep: int = opt(3, "checkpoints to keep, the newest ones; 0: all", least=0)
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
        0,
        "steps between validations (step 0 and the last step are always measured); 0: never",
        least=0,
    )
    steps: int = opt(
        10, "batches of training.batch_size rows per validation, over all ranks", least=1
    )
    shuffle_context: bool = opt(
        False,
        "also measure with the order of the context shuffled: a model that uses its context gets"
        " worse",
    )


@dataclass
class MetricsConfig:
    log_every: int = opt(
        10,
        "steps between console lines and metrics.jsonl entries, each written while the next step"
        " runs; the first and the last step are always logged",
        least=1,
    )
    tensorboard: bool = opt(True, "write TensorBoard files to tb/")


@dataclass
class ProfilingConfig:
    trace_step: int = opt(
        0,
        "step whose trace (and the two after it) goes to profile/ for Perfetto or TensorBoard; 0:"
        " none",
        least=0,
    )
    memory_snapshot: bool = opt(
        False,
        "record CUDA allocations and write profile/memory-rankN.pickle at the end or on an error",
    )


@dataclass
class ParallelConfig:
    dp_replicate: int = opt(1, "replicas of the sharded model (HSDP)", least=1)
    dp_shard: int = opt(
        -1,
        "ranks that share one copy of weights, gradients and moments (FSDP2); -1: all that remain",
        least=-1,
    )
    tp: int = opt(1, "tensor parallel ranks: heads, hidden widths and the vocabulary", least=1)
    cp: int = opt(
        1, "context parallel ranks: each holds a slice of every microbatch's tokens", least=1
    )
    pp: int = opt(1, "pipeline parallel ranks: each holds some of the layers", least=1)
    ep: int = opt(
        0,
        "expert parallel ranks, taken out of dp_shard x cp x tp: each holds some of the experts; 0:"
        " tp where that divides the experts, else 1; 1 under tp: a slice of every expert",
        least=0,
    )
    ep_method: str = opt(
        "auto",
        "how ep ranks share tokens; gather: every rank sees all of them; all_to_all: rows go to the"
        " experts that were chosen, which the host waits for; auto: gather up to ep = moe.top_k",
        choices=("auto", "gather", "all_to_all"),
    )
    cp_method: str = opt(
        "auto",
        "what cp ranks exchange; lasp2: states, keys and values; all_to_all: tokens for heads;"
        " auto: lasp2, but all_to_all where states do not compose",
        choices=("auto", "lasp2", "all_to_all"),
    )
    schedule: str = opt(
        "1f1b",
        "order of a pipeline's microbatches",
        choices=("1f1b", "gpipe", "interleaved", "zero_bubble"),
    )
    stages_per_rank: int = opt(
        0,
        "stages of a pipeline on each rank; 0: 2 for interleaved and zero_bubble, else 1",
        least=0,
    )
    async_tp: bool = opt(
        False, "overlap tensor parallel exchanges with matrix products (CUDA, with compile.enable)"
    )
    ranks: int = opt(
        0,
        "world size that this configuration is meant for: what lmoe.plan plans for; 0: any",
        least=0,
    )
    reshard_after_forward: bool = opt(
        True,
        "free a block's gathered weights between its forward and backward; one rank has none to"
        " gather, and keeps its copies",
    )


def fresh(kind):
    """Make a dataclass field of which every Config has one of its own."""
    return field(default_factory=kind)


@dataclass
class Config:
    job: JobConfig = fresh(JobConfig)
    model: ModelConfig = fresh(ModelConfig)
    mixer: object = None  # options of model.mixer
    attention: object = None  # options of model.attention; the same object where both name one
    mixers: dict = fresh(dict)  # [mixer.NAME]: options of the pattern's others
    moe: MoEConfig = fresh(MoEConfig)
    data: DataConfig = fresh(DataConfig)
    training: TrainingConfig = fresh(TrainingConfig)
    optimizer: OptimizerConfig = fresh(OptimizerConfig)
    schedule: ScheduleConfig = fresh(ScheduleConfig)
    compile: CompileConfig = fresh(CompileConfig)
    activation_checkpoint: ActivationCheckpointConfig = fresh(ActivationCheckpointConfig)
    checkpoint: CheckpointConfig = fresh(CheckpointConfig)
    validation: ValidationConfig = fresh(ValidationConfig)
    metrics: MetricsConfig = fresh(MetricsConfig)
    profiling: ProfilingConfig = fresh(ProfilingConfig)
    parallel: ParallelConfig = fresh(ParallelConfig)


SECTIONS = [f.name for f in dataclasses.fields(Config) if f.name != "mixers"]


def sections(config):
    """Map the name of every section, [mixer.NAME] included, to its options."""
    named = {name: getattr(config, name) for name in SECTIONS}
    return named | {f"mixer.{name}": options for name, options in config.mixers.items()}
