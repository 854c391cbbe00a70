"""Find what a run starts from."""

from pathlib import Path

import torch

from lmoe.checkpoint import Checkpointer, read_extra
from lmoe.checkpoint_metadata import META, read_meta
from lmoe.checks import check_same_model, model_changes
from lmoe.config import Config, load_saved_config
from lmoe.data.position import check_state
from lmoe.data.tokenizer import Tokenizer
from lmoe.metrics import Totals, logger
from lmoe.model.model import Model


def resume_or_start(
    config: Config,
    checkpointer: Checkpointer,
    model: Model,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
) -> tuple[int, dict | None, Totals]:
    """Load the run's own newest checkpoint, else checkpoint.load, else nothing -> (step, the
    loader's state or None, what the run has done so far).

    ValueError where it holds another model or was trained with another tokenizer.
    """
    path = checkpointer.find()
    only_model = False
    if path is None and config.checkpoint.load:
        only_model = config.checkpoint.load_only_model
        path = checkpointer.find(config.checkpoint.load)
    if path is None:
        return 0, None, Totals()
    saved = load_saved_config(path)
    if not only_model:
        check_same_model(config, saved, path)
    extra, totals = _read_extra(path, only_model)
    if extra["tokenizer"] != tokenizer.digest:
        raise ValueError(
            f"data.tokenizer = {config.data.tokenizer!r} is not the tokenizer that {path} was"
            " trained with"
        )
    if only_model:
        changes = [
            f"{key} = {here!r}, was {there!r}" for key, here, there in model_changes(config, saved)
        ]
        changed = f"; changed: {'; '.join(changes)}" if changes else ""
        try:
            checkpointer.load_model(model, path)
        except ValueError as error:
            raise ValueError(f"{error}{changed}") from None
        logger.info(f"took the weights of {path}: a new branch{changed}")
        return 0, None, Totals()
    checkpointer.load(model, [optimizer], path)
    if totals.skipped_in_a_row:
        logger.warning(
            f"{path} was saved after {totals.skipped_in_a_row:.0f} skipped steps in a row: if its"
            " run was lost, remove it to go on from one before"
        )
    return extra["step"], extra["data"], totals


def _read_extra(path: Path, only_model: bool) -> tuple[dict, Totals]:
    """Read what train.py gave to save as `extra`, and the run's totals in it; ValueError where it
    is anything else. only_model: all that matters is the tokenizer."""
    extra = read_extra(path)
    step = read_meta(path)["step"]
    try:
        if not isinstance(extra, dict) or not isinstance(extra.get("tokenizer"), str):
            raise ValueError("tokenizer is missing: train.py did not write it")
        if only_model:
            return extra, Totals()
        if type(extra.get("step")) is not int or extra["step"] != step:
            raise ValueError(f"step is not {step}, as it is beside extra")
        check_state(extra.get("data"))
        if not 0 <= step <= extra["data"]["position"]:
            raise ValueError(f"data.position is less than a sample for each of {step} steps")
        totals = Totals.of_checkpoint(extra)
        if not totals.skipped_in_a_row <= totals.skipped_steps <= step:
            raise ValueError(f"totals.skipped_steps is more than step {step} can have")
        return extra, totals
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {META}: extra: {error}") from None
