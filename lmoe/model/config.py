"""Configure a model: the TOML sections [model] and [moe], the flavours that fill them, and
the fields that all sections are made of.

Values come in this order, later ones winning: the defaults below, the flavour, the TOML file, the
command line.
"""

import dataclasses
import difflib
import math
import operator
from dataclasses import dataclass, field

BOUNDS = {
    "at least": operator.ge,
    "at most": operator.le,
    "above": operator.gt,
    "below": operator.lt,
}


def opt(default, help, *, choices=None, least=None, most=None, above=None, below=None):
    """Make a dataclass field with its line of documentation and its constraints.

    choices: the legal strings. least, most, above, below: bounds of a number, or of every number in
    a list; all numbers are finite. check_fields checks these, and --help shows them.
    """
    bounds = {"at least": least, "at most": most, "above": above, "below": below}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    metadata = {"help": help, "choices": choices, "bounds": bounds}
    if isinstance(default, list):
        return field(metadata=metadata, default_factory=lambda: list(default))
    return field(metadata=metadata, default=default)


def nearest(word, words):
    """Say which of `words` was meant, as the end of an error message."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; one of: {', '.join(words)}"


def check_choice(key, value, choices):
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{key} = {value!r} is not known{nearest(value, choices)}")


def check_fields(section, options):
    """Refuse what the constraints of a dataclass's fields exclude. section: its name in errors."""
    for f in dataclasses.fields(options):
        key = f"{section}.{f.name}"
        value = getattr(options, f.name)
        if f.metadata["choices"]:
            check_choice(key, value, f.metadata["choices"])
        bounds = f.metadata["bounds"]
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                continue
            within = all(BOUNDS[name](item, bound) for name, bound in bounds.items())
            if not within or not math.isfinite(item):
                limits = [f"{name} {bound}" for name, bound in bounds.items()]
                raise ValueError(f"{key} = {value} must be {', '.join(['finite', *limits])}")


def linear_moe(dim, layers, heads, hidden):
    """Fill the sections with a shape of arXiv 2503.05447, table 2."""
    shape = {"dim": dim, "layers": layers, "heads": heads}
    model = {"pattern": "LLLN", "init_std": 0.008, "norm_eps": 1e-6, "ffn_hidden": 0}
    moe = {"experts": 64, "top_k": 8, "renormalize": True, "hidden": hidden}
    attention = {"qkv_bias": True, "rope_theta": 10000.0}
    return {"model": model | shape, "attention": attention, "moe": moe}


FLAVORS = {
    "debug": {"model": {}, "attention": {}, "moe": {}},
    "a0.3b_2b": linear_moe(dim=1024, layers=12, heads=8, hidden=896),
    "a1b_7b": linear_moe(dim=2048, layers=16, heads=16, hidden=1024),
}


@dataclass
class ModelConfig:
    flavor: str = opt(
        "debug",
        "named shape whose values the fields below take unless given",
        choices=tuple(FLAVORS),
    )
    mixer: str = opt("gla", "token mixer of the L layers, a name of the registry")
    attention: str = opt("attention", "softmax mixer of the N layers, a name of the registry")
    pattern: str | list[str] = opt(
        "LLLN",
        "mixers, repeated over the depth: L model.mixer, N model.attention; or a list of names",
    )
    ffn_pattern: str = opt(
        "E",
        "feed-forward layers, repeated over the depth: E experts, D dense; without experts all are"
        " dense",
    )
    preset: str = opt(
        "uniform",
        "mixer options to start from: comparable shapes, or those of the mixer's paper",
        choices=("uniform", "faithful"),
    )
    vocab_size: int = opt(
        0, "rows of the embedding; 0: the tokenizer's, up to a multiple of 64", least=0
    )
    dim: int = opt(128, "model width D", least=1)
    layers: int = opt(4, "number of blocks", least=1, most=10_000)
    heads: int = opt(4, "heads of the uniform preset and of softmax attention", least=1)
    ffn_hidden: int = opt(256, "hidden width of dense feed-forward layers", least=0)
    tie_embeddings: bool = opt(False, "share the embedding with the head")
    norm: str = opt(
        "rms",
        "norms of the blocks and the last one; zero_centered_rms: their weights are 1 + w",
        choices=("rms", "zero_centered_rms"),
    )
    residual: str = opt(
        "pre_norm",
        "how layers join the stream: x + f(norm(x)) or x + norm(f(x))",
        choices=("pre_norm", "post_norm"),
    )
    embedding_multiplier: float = opt(1.0, "factor on embedded tokens", above=0)
    residual_multiplier: float = opt(1.0, "factor on what a layer adds to the stream", above=0)
    logits_multiplier: float = opt(1.0, "factor on the logits", above=0)
    attention_multiplier: float = opt(
        0.0, "factor on softmax attention's q k; 0: 1 / sqrt(head size)", least=0
    )
    norm_eps: float = opt(1e-6, "epsilon of the block and final norms", least=0)
    init_std: float = opt(
        0.0,
        "standard deviation of the initial weights, which output projections divide by sqrt(2"
        " layers); 0: 1 / sqrt(dim), a number in config.toml",
        least=0,
    )
    z_loss: float = opt(
        0.0, "coefficient of the head's z-loss, mean of logsumexp(logits)^2", least=0
    )
    loss_chunk: int = opt(
        0,
        "tokens whose logits exist at one time in the loss; 0: 128 to 4096, as 2.5 GiB hold",
        least=0,
    )
    logits_dtype: str = opt(
        "float32",
        "logits of the loss: bfloat16 takes half the memory and rounds them, with training.dtype ="
        " bfloat16",
        choices=("float32", "bfloat16"),
    )

    def __post_init__(self):
        """Fill in init_std = 0: so that what a projection of a normed stream gives starts with the
        stream's own size, at any width."""
        self.init_std = self.init_std or self.dim**-0.5


@dataclass
class MoEConfig:
    experts: int = opt(8, "routed experts E per layer; 0: every layer is dense", least=0)
    top_k: int = opt(2, "experts per token", least=1)
    hidden: int = opt(128, "hidden width I of an expert", least=1)
    score: str = opt("softmax", "router score", choices=("softmax", "sigmoid"))
    renormalize: bool = opt(True, "divide the chosen scores by their sum")
    route_scale: float = opt(1.0, "factor on the routing weights", least=0)
    groups: int = opt(1, "expert groups of group-limited routing; 1: off", least=1)
    top_groups: int = opt(1, "groups that a token may choose from", least=1)
    bias_rate: float = opt(
        1e-3,
        "step of the selection bias that balances the load, once per optimizer step; 0: no bias",
        least=0,
    )
    balance: str = opt(
        "sequence",
        "balance loss; megatron and global_batch vary with the layout",
        choices=("none", "sequence", "megatron", "global_batch"),
    )
    balance_coeff: float = opt(1e-2, "coefficient of the balance loss", least=0)
    z_coeff: float = opt(
        0.0, "coefficient of the router's z-loss, mean of logsumexp(router logits)^2", least=0
    )
    shared: int = opt(0, "hidden width of the shared expert; 0: none", least=0)
    shared_gate: bool = opt(False, "scale the shared expert by a sigmoid gate of the token")
    impl: str = opt(
        "grouped",
        "expert products: one grouped GEMM, or one expert at a time (the reference)",
        choices=("grouped", "loop"),
    )


def repeat(key, pattern, layers):
    """Repeat a pattern over the depth, one item a layer; ValueError names `key`."""
    if not pattern or layers % len(pattern):
        raise ValueError(
            f"{key} has {len(pattern)} layers, which does not divide model.layers = {layers}"
        )
    return list(pattern) * (layers // len(pattern))


def layer_ffns(model, moe):
    """List the feed-forward of every layer: "E" experts, "D" dense. model: ModelConfig; moe:
    MoEConfig."""
    if set(model.ffn_pattern) - {"D", "E"}:
        raise ValueError(
            f"model.ffn_pattern = {model.ffn_pattern!r}: only E (experts) and D (dense) make a"
            " pattern"
        )
    return repeat("model.ffn_pattern", model.ffn_pattern if moe.experts else "D", model.layers)
