"""Fill in what a configuration leaves open until the ranks and the tokenizer are known."""

from lmoe.parallel.dims import resolve_sizes


def resolve_batch_size(config, world):
    """Set training.global_batch_size = 0 to one microbatch [rows] of every data-parallel rank."""
    sizes = resolve_sizes(config, world)
    rows = config.training.batch_size * sizes["dp_replicate"] * sizes["dp_shard"]
    config.training.global_batch_size = config.training.global_batch_size or rows


def resolve_vocab_size(config, tokenizer):
    """Set model.vocab_size = 0 to the tokenizer's, up to a multiple of 64; ValueError for a smaller
    one."""
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
