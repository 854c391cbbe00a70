"""Find what a run starts from."""

import torch

from lmoe.checkpoint import Checkpointer, read_extra
from lmoe.checks import check_same_model
from lmoe.config import Config, load_saved_config
from lmoe.data.tokenizer import Tokenizer
from lmoe.metrics import logger
from lmoe.model.model import Model


def resume_or_start(
    config: Config,
    checkpointer: Checkpointer,
    model: Model,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
) -> tuple[int, dict | None]:
    """Load the run's own newest checkpoint, else checkpoint.load, else nothing -> (step, the
    loader's state or None).

    ValueError where it holds another model or was trained with another tokenizer.
    """
    path = checkpointer.find()
    only_model = False
    if path is None and config.checkpoint.load:
        only_model = config.checkpoint.load_only_model
        path = checkpointer.find(config.checkpoint.load)
    if path is None:
        return 0, None
    check_same_model(config, load_saved_config(path), path)
    if read_extra(path)["tokenizer"] != tokenizer.digest:
        raise ValueError(
            f"data.tokenizer = {config.data.tokenizer!r} is not the tokenizer that {path} was"
            " trained with"
        )
    if only_model:
        checkpointer.load_model(model, path)
        logger.info(f"took the weights of {path}: a new branch")
        return 0, None
    extra = checkpointer.load(model, [optimizer], path)
    return extra["step"], extra["data"]
