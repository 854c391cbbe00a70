"""The repository's root on sys.path, where the folder kernels/ has the name of a package that
transformers imports."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,"
    " num_key_value_heads=2"
)


def run(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_folder_under_another_name_is_empty():
    run(
        "import sys, kernels; assert kernels.__file__ and not any(name.partition('.')[0] in"
        " ('lmoe', 'torch') for name in sys.modules)"
    )


@pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="transformers is not installed"
)
@pytest.mark.slow
def test_transformers_builds_a_model():
    """Before and after lmoe is imported, which registers its ops once."""
    build = (
        "from transformers import AutoModelForCausalLM, Qwen2Config;"
        f" AutoModelForCausalLM.from_config(Qwen2Config({TINY}))"
    )
    run(f"{build}; import lmoe.model.model, sys; assert 'kernels.ops' not in sys.modules")
    run(f"import lmoe.model.model, sys; {build}; assert 'kernels.ops' not in sys.modules")
