"""What a model is made of: the TOML sections [model] and [moe], and the flavours that fill them.

Values come in this order, later ones winning: the defaults below, the flavour, the TOML file, the
command line.
"""

from dataclasses import dataclass, field


def opt(default, help, **_):
    """A dataclass field with its one line of documentation (shown by --help)."""
    factory = (
        {"default_factory": lambda: list(default)}
        if isinstance(default, list)
        else {"default": default}
    )
    return field(metadata={"help": help}, **factory)


@dataclass
class ModelConfig:
    flavor: str = opt(
        "debug",
        "named shape whose values the fields below take unless given: debug, a0.3b_2b, a1b_7b",
    )
    mixer: str = opt("gla", "token mixer of the L layers, a name of the registry")
    pattern: str | list[str] = opt(
        "LLLN",
        "layers, repeated over the depth: L the mixer, N softmax attention; or a list of mixer"
        " names",
    )
    preset: str = opt(
        "uniform",
        "mixer options to start from: uniform (comparable shapes) or faithful (as in the mixer's"
        " paper)",
    )
    vocab_size: int = opt(0, "rows of the embedding; 0: the tokenizer's, up to a multiple of 64")
    dim: int = opt(128, "model width D")
    layers: int = opt(4, "number of blocks")
    heads: int = opt(4, "heads of the uniform preset and of softmax attention")
    ffn_hidden: int = opt(256, "hidden width of dense feed-forward layers")
    dense_layers: int = opt(
        0, "number of first layers with a dense feed-forward instead of experts"
    )
    tie_embeddings: bool = opt(False, "share the embedding with the head")
    norm_eps: float = opt(1e-6, "epsilon of the block and final norms")
    init_std: float = opt(
        0.02,
        "standard deviation of the initial weights; output projections divide it by sqrt(2 layers)",
    )
    z_loss: float = opt(0.0, "coefficient of the head's z-loss, mean of logsumexp(logits)^2")
    loss_chunk: int = opt(1024, "tokens whose logits exist at one time in the loss")


@dataclass
class MoEConfig:
    experts: int = opt(8, "routed experts E per layer; 0: every layer is dense")
    top_k: int = opt(2, "experts per token")
    hidden: int = opt(128, "hidden width I of an expert")
    score: str = opt("softmax", "router score: softmax or sigmoid")
    renormalize: bool = opt(True, "divide the chosen scores by their sum")
    route_scale: float = opt(1.0, "factor on the routing weights")
    groups: int = opt(1, "expert groups of group-limited routing; 1: off")
    top_groups: int = opt(1, "groups that a token may choose from")
    bias_rate: float = opt(
        1e-3,
        "step of the selection bias that balances the load, once per optimizer step; 0: no bias",
    )
    balance: str = opt(
        "sequence",
        "balance loss: none, sequence, or, varying with the layout, switch, megatron, global_batch,"
        " hf_pooled",
    )
    balance_coeff: float = opt(1e-2, "coefficient of the balance loss")
    z_coeff: float = opt(
        0.0, "coefficient of the router's z-loss, mean of logsumexp(router logits)^2"
    )
    shared: int = opt(0, "hidden width of the shared expert; 0: none")
    shared_gate: bool = opt(False, "scale the shared expert by a sigmoid gate of the token")
    impl: str = opt(
        "grouped",
        "expert products: grouped (one grouped GEMM) or loop (one expert at a time, the reference)",
    )


_LINEAR_MOE = {  # arXiv 2503.05447, table 2
    "model": {"pattern": "LLLN", "init_std": 0.008, "norm_eps": 1e-6, "ffn_hidden": 0},
    "attention": {"qkv_bias": True, "rope_theta": 10000.0},
    "moe": {"experts": 64, "top_k": 8, "renormalize": True},
}

FLAVORS = {
    "debug": {"model": {}, "attention": {}, "moe": {}},
    "a0.3b_2b": {
        "model": _LINEAR_MOE["model"] | {"dim": 1024, "layers": 12, "heads": 8},
        "attention": _LINEAR_MOE["attention"],
        "moe": _LINEAR_MOE["moe"] | {"hidden": 896},
    },
    "a1b_7b": {
        "model": _LINEAR_MOE["model"] | {"dim": 2048, "layers": 16, "heads": 16},
        "attention": _LINEAR_MOE["attention"],
        "moe": _LINEAR_MOE["moe"] | {"hidden": 1024},
    },
}
