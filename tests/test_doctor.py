"""What the doctor says, and its exit code."""

import pytest
import torch

from lmoe import doctor
from lmoe.kernels import check


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is there without a GPU")
def test_machine_without_gpu(capsys):
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch   {torch.__version__}" in lines
    assert "kernel  chunk delta: right" in lines
    assert "kernel  triton ssd: not checked, there is no GPU; mixer.backend = chunk serves" in lines
    assert (
        "kernel  triton utilities: not checked, there is no GPU; portable PyTorch serves" in lines
    )


def test_wrong_kernel_is_an_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(
        check,
        "verdict",
        lambda family, device, backend: "gla is wrong" if family == "gla" else "",
    )
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "chunk gla: gla is wrong" in out and "chunk ssd: right" in out
