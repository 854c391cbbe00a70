import pytest

from lmoe.checkpoint import Checkpointer
from tests.checkpoint.toy import Toy, adamw, seed, tensors, train


@pytest.fixture
def run(tmp_path):
    """A folder with steps 1, 2, 3 of a run, and what was in step 3."""
    seed(1)
    model = Toy()
    optimizers = adamw(model)
    checkpointer = Checkpointer(tmp_path / "ckpt", keep=3)
    for step in (1, 2, 3):
        train(model, optimizers, 1)
        checkpointer.save(
            step, model, optimizers, {"step": step}, {"config.toml": f"step = {step}\n"}
        )
    checkpointer.wait()
    return checkpointer.folder, tensors(model, optimizers)
