"""The scans that a run does, as the check of the kernels before it finds them."""

import pytest
import torch

from lmoe import scans
from lmoe.config import load_config
from lmoe.kernels import check
from lmoe.kernels.families.gla import GLA
from lmoe.kernels.families.ssd import SSD
from lmoe.model.build import every_mixer
from lmoe.model.mixers import MIXERS

PRESETS = [(name, preset) for name, cls in MIXERS.items() if cls.family for preset in cls.presets]
BF16 = torch.bfloat16


def test_every_run_on_a_gpu_checks_the_utilities(monkeypatch):
    config = load_config(["--model.pattern=N"])
    assert scans.triton_cases(config, torch.device("cpu")) == {}
    monkeypatch.setattr(scans, "INSTALLED", True)
    assert scans.triton_cases(config, torch.device("cuda")) == {"utilities": [BF16]}
    monkeypatch.setattr(scans, "INSTALLED", False)
    assert scans.triton_cases(config, torch.device("cuda")) == {}


@pytest.mark.parametrize("name, preset", PRESETS)
def test_what_a_run_scans_is_checked(name, preset):
    """Every mixer: its scans have the dtype of the run, and the check can make inputs for them."""
    words = ["--model.pattern=L", "--model.flavor=a0.3b_2b"]
    config = load_config([f"--model.mixer={name}", f"--model.preset={preset}", *words])
    ((_, options),) = every_mixer(config).items()
    found = scans.scans_of(config, name, options)
    found = [scan for scan in found if scan.backend == "auto"]  # Mamba3 sums angles elsewhere
    cases = list(dict.fromkeys(map(scans.case_of, found)))
    for case in cases:
        _, made, _ = check.make_inputs(case, 8)
        given = made.inputs.keys() | made.constants.keys()
        assert case.dtype == BF16 and given == {"k", "v", *check.named(case.gates)}
    triton = [case for case in cases if "triton" in case.family.forms]
    wanted = [case for case in triton if max(case.K, case.V) <= case.family.max_head_dim]
    checked = scans.triton_cases(config, torch.device("cuda"))
    assert [x for name, of in checked.items() if name != "utilities" for x in of] == wanted


def test_the_kinds_of_scans():
    """A normaliser of one fp32 channel, logits, several recurrences of a layer."""
    for mixer, preset, want in (
        (
            "bla",
            "faithful",
            {
                check.Case(SSD, "", 32, 32, BF16, BF16),
                check.Case(SSD, "", 32, 1, BF16, torch.float32),
            },
        ),
        ("gla", "uniform", {check.Case(GLA, "gk tau", 32, 32, BF16, BF16)}),
        (
            "gsa",
            "uniform",
            {
                check.Case(GLA, "gv", 32, 64, BF16, BF16),
                check.Case(GLA, "gk", 64, 32, BF16, BF16),
            },
        ),
        ("rwkv6", "uniform", {check.Case(GLA, "gk u", 32, 32, BF16, BF16)}),
        ("mamba3", "uniform", {check.Case(SSD, "g diag", 128, 64, BF16, BF16)}),
        ("mamba2", "uniform", {check.Case(SSD, "g", 128, 64, BF16, BF16, True)}),
    ):
        words = [f"--model.mixer={mixer}", f"--model.preset={preset}", "--model.pattern=L"]
        config = load_config([*words, "--model.dim=128", "--model.heads=4"])
        cases = scans.triton_cases(config, torch.device("cuda"))
        found = {x for family, of in cases.items() for x in of if family != "utilities"}
        assert found == want, cases
