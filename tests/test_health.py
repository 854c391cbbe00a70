"""A run that is lost names the layer."""

import pytest
import torch

from lmoe.health import locate_non_finite
from lmoe.model.init import local
from lmoe.model.mixers import MIXERS
from tests.harness.compare import build_run, microbatches_of


def poison(model, layer, kind):
    """Spoil the output of a layer, or the gradient of what enters it."""
    for number, block in model.blocks.named_children():
        if number == str(layer) and kind == "output":
            for p in block.parameters():
                local(p.data).fill_(float("nan"))
        elif number == str(layer):
            block.register_forward_pre_hook(spoil_gradient)


def spoil_gradient(block, given):
    given[0].register_hook(lambda gradient: gradient * float("nan"))


def located(words, layer, kind):
    config, dims, model, parallel, _, build = build_run(words)
    batches, valid = microbatches_of(config, dims, build, 0)
    poison(model, layer, kind)
    return locate_non_finite(model, parallel, batches, valid, config, dims)


LAYOUTS = {
    "tp 2 cp 2": ["--parallel.tp=2", "--parallel.cp=2"],
    "pp 2": ["--parallel.pp=2", "--activation_checkpoint.mode=full"],
    "pp interleaved": ["--parallel.pp=2", "--parallel.schedule=interleaved"],
}


@pytest.mark.xdist_group("world4")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_lowest_layer_is_found_over_all_ranks(pools, layout, layer):
    words = ["--model.layers=4", "--model.pattern=LN", *LAYOUTS[layout]]
    name = ["gla", "attention"][layer]
    (said,) = set(pools(4).run(located, words, layer, "output"))
    assert said == f"the lowest layer whose output is not finite is layer {layer} ({name})"
    (said,) = set(pools(4).run(located, words, layer + 1, "gradient"))
    assert "all outputs are finite" in said
    assert f"first on the way back layer {layer} ({name})" in said and "embedding" in said
    assert "every layer's output" in pools(4).run(located, words, 99, "output")[0]


def test_compiled_blocks_are_looked_into(one_rank):
    words = ["--compile.enable=true", "--compile.backend=aot_eager", "--moe.impl=grouped"]
    words += ["--training.dtype=float32", "--model.layers=2", "--model.pattern=LN"]
    assert "layer 1 (attention)" in located(words, 1, "output")


@pytest.mark.parametrize("name", [name for name, mixer in MIXERS.items() if not mixer.softmax])
def test_no_exponential_of_a_parameter_leaves_the_range_for_good(one_rank, name):
    """Parameters that are exponentiated may have drifted anywhere: where the loss is finite the
    gradients are."""
    words = [f"--model.mixer={name}", "--model.pattern=L", "--model.layers=1"]
    words += ["--training.dtype=float32"]
    config, dims, model, parallel, _, build = build_run(words)
    for value in (90.0, 1e4, -1e4):
        with torch.no_grad():
            for key, p in model.named_parameters():
                if any(word in key for word in ("A_log", "decay", "dt_bias", "w0")):
                    p.fill_(value if "A_log" in key or "decay" in key else p.mean())
        batches, valid = microbatches_of(config, dims, build, 0)
        (output, *_) = parallel.forward_backward(batches[:1], valid)
        assert output.loss.isfinite()
        for key, p in model.named_parameters():
            assert p.grad is None or p.grad.isfinite().all(), (key, value)
            p.grad = None
