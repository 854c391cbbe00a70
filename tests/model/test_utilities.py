"""Models on Triton utilities (norms, convolution, elementwise work) against the same on portable
ones; on the CPU in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe.kernels import choice, short_conv
from lmoe.kernels.choice import forced, on_gpu
from lmoe.model.batch import StepInfo, prompt_info
from lmoe.model.moe.experts import IMPLEMENTATIONS
from lmoe.model.norm import WideRMSNorm
from tests.kernels.ops import error
from tests.model.variants import MIXER_VARIANTS, make_model, make_seq, window_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")
# Of the fast suite: together they use every utility.
FAST = {
    "gated_deltanet-uniform": {"l2norm", "short_conv", "short_conv_step"},
    "mamba2-groups": {"short_conv", "short_conv_step"},
    "rwkv6-uniform": {"token_shift"},
    "attention-uniform": {"rope"},
}


class Called(TorchDispatchMode):
    """The names of the Triton utilities that run, without those of backward passes."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name.startswith("lmoe::gpu_") and not name.endswith("_bwd"):
            self.names.add(name.removeprefix("lmoe::gpu_"))
        return function(*args, **(kwargs or {}))


def run(variant, dtype=torch.float32):
    """({name: tensor} of the logits, every gradient and decoded logits of a model; the Triton
    utilities that it used)."""
    model = make_model(variant, dtype, ffn_pattern="DE")
    model.blocks[1].ffn.experts.run = IMPLEMENTATIONS["grouped"]
    generator = torch.Generator().manual_seed(0)
    prompts, tokens, dy = (
        [5, 2],
        torch.randint(64, (31,), generator=generator),
        torch.randn(31, 64, generator=generator),
    )
    model, tokens, dy = (x.to(DEVICE) for x in (model, tokens, dy))
    with Called() as called:
        results = {"logits": model(tokens, make_seq([7, 1, 20, 3], variant, device=DEVICE))}
        results["logits"].backward(dy)
        results |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            states = model.initial_states(2, 16, DEVICE, dtype)
            seq = prompt_info(prompts, DEVICE, dense_mask=True, windows={window_of(variant)})
            results["prefill"] = model(tokens[:7], seq, states=states)
            for i in range(2):
                step = StepInfo(torch.tensor(prompts, device=DEVICE) + i)
                results[f"step {i}"] = model(tokens[[8 + i, 10 + i]], step, states=states)
    return results, called.names


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=() if v in FAST else pytest.mark.slow) for v in MIXER_VARIANTS],
)
def test_both_forms_agree(variant):
    with forced("portable"):
        want, none = run(variant)
    with forced("triton"):
        got, used = run(variant)
    assert not none and {"rms_norm", "swiglu"} | FAST.get(variant, set()) <= used
    assert got.keys() == want.keys()
    truth = None
    for name, x in want.items():
        # Where a derivative is zero, as of a key's bias under softmax, both are rounding.
        if error(got[name], x) < 3e-5 or max(x.abs().max(), got[name].abs().max()) < 1e-5:
            continue
        # Elsewhere rounding alone may part them further: float64 tells.
        if truth is None:
            with forced("portable"):
                truth, _ = run(variant, torch.float64)
        portable, triton = (error(t, truth[name].to(t.dtype)) for t in (x, got[name]))
        # In fp32 a router (of the memories among the toys) may choose otherwise at a tie: 1 %.
        assert triton < 3 * portable < 3e-2, (name, portable, triton)


def test_the_choice(monkeypatch):
    """Without being forced: what a GPU takes, by dtype, width and compilation; shown with the
    device that tensors claim to be on."""

    class OnGPU(torch.Tensor):
        device = torch.device("cuda", 0)

    x, halves, wide = (
        torch.zeros(2, 4, dtype=d).as_subclass(OnGPU)
        for d in (torch.bfloat16, torch.float16, torch.float64)
    )
    monkeypatch.setattr(choice, "INSTALLED", True)
    assert on_gpu(x) and on_gpu(x, None, x) and on_gpu(x, width=16384)
    assert not any(
        (
            on_gpu(halves),
            on_gpu(wide),
            on_gpu(x, wide),
            on_gpu(x, width=16385),
            on_gpu(torch.zeros(2)),
        )
    )
    with forced("portable"):
        assert not on_gpu(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not on_gpu(x) and on_gpu(x, pointwise=False)
    monkeypatch.setattr(choice, "INSTALLED", False)
    assert not on_gpu(x, pointwise=False)


def test_not_of_dtensors(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    weight = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Replicate()])
    with forced("triton"):
        assert on_gpu(torch.zeros(2, 4)) and not on_gpu(torch.zeros(2, 4), weight)


def test_a_norm_that_spans_ranks_is_portable():
    """Its squares are summed over them: here two that hold the same channels."""
    norm, o = WideRMSNorm(8, 1e-5), torch.randn(3, 2, 2, device=DEVICE)
    norm.weight, norm.sum_over_heads = (
        torch.nn.Parameter(torch.ones(4, device=DEVICE)),
        lambda squares: 2 * squares,
    )
    with forced("triton"), Called() as called:
        y = norm(o)
    assert not called.names
    torch.testing.assert_close(y, o * (o.square().mean((1, 2), keepdim=True) + 1e-5).rsqrt())


def test_a_backend_of_the_scan_is_the_convolution_s():
    x, weight, positions = (
        torch.randn(5, 4, device=DEVICE),
        torch.randn(4, 3, device=DEVICE),
        torch.arange(5, device=DEVICE),
    )
    with forced("triton"):
        for backend, taken in (
            ("auto", True),
            ("triton", True),
            ("chunk", False),
            ("reference", False),
        ):
            with Called() as called:
                short_conv(x, weight, None, positions, backend=backend)
            assert called.names == ({"short_conv"} if taken else set())


def test_compiled_code_keeps_the_convolution_kernel():
    """One op in the graph, even where tracing is what imports the kernels."""
    code = """
import torch
from lmoe.kernels import choice, short_conv

def convolved(x, weight, positions):
    return short_conv(x, weight, None, positions, None, "silu")

args = torch.randn(5, 4), torch.randn(4, 3), torch.arange(5)
with choice.forced("triton"):
    y = torch.compile(convolved, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(y, convolved(*args))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_imports_no_triton():
    code = """
import sys
import lmoe.kernels

assert "triton" not in sys.modules
import lmoe.model.model  # torch's variable-length attention imports Triton by itself

assert "lmoe.kernels.gpu" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
