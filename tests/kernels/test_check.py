"""The check of the kernels before a run: what it refuses, what it remembers, and when it asks
again. In Triton's interpreter on a CPU."""

import errno
import importlib
import os
import re

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

from lmoe.kernels import FAMILIES, check
from lmoe.kernels.families.ssd import SSD

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = [(family.name, backend) for family in FAMILIES.values() for backend in family.forms]
PAIRS.append(("utilities", "triton"))
# Of kernels/gpu: what is broken, and what is refused.
UTILITIES = [
    ("norm", "_rms_op", "o of rms_norm"),
    ("norm", "_rms_bwd", "dx of rms_norm"),
    ("norm", "gated_rms_norm", "o of gated_rms_norm"),
    ("norm", "head_group_norm", "o of head_group_norm"),
    ("norm", "_l2_bwd", "dx of l2norm"),
    ("conv", "_conv_bwd", "dx of short_conv"),
    ("conv", "short_conv_step", "o of short_conv_step"),
    ("pointwise", "_swiglu_bwd", "dx of swiglu"),
    ("pointwise", "rope", "o of rope"),
    ("pointwise", "_shift_bwd", "dx of token_shift"),
    ("cross_entropy", "parts", "o of cross_entropy"),
    ("cross_entropy", "terms", "o of cross_entropy"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Asked(list):
    """Stands in for the check itself: notes the families and finds `wrong`."""

    wrong = ""

    def __call__(self, family, device, backend, cases):
        self.append(family)
        return self.wrong


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The checks that were not answered from memory; the sources are one file."""
    stand_in = Asked()
    monkeypatch.setattr(check, "first_error", stand_in)
    (tmp_path / "kernel.py").write_text("1")
    monkeypatch.setattr(check, "sources", lambda: [tmp_path / "kernel.py"])
    return stand_in


def break_(monkeypatch, name, change):
    """Let an op of ssd return something else."""
    module = SSD.form("triton")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: change(*right(*args)))


@pytest.mark.parametrize("family, backend", PAIRS)
def test_kernels_are_right(family, backend):
    assert check.verdict(family, DEVICE, backend) == ""


def test_wrong_output_is_refused_by_name(monkeypatch):
    break_(monkeypatch, "fwd", lambda o, *rest: (o * 1.001, *rest))
    with pytest.raises(
        ValueError,
        match=(
            r"^mixer.backend = triton: o of ssd .* is off by 1.0e-03, .*; take mixer.backend ="
            r" chunk, or"
        ),
    ) as error:
        check.check_kernels({"ssd": None}, DEVICE)
    assert "\n" not in str(error.value) and f"Triton {check.versions(DEVICE)[0]} on " in str(
        error.value
    )


@pytest.mark.parametrize("place, name", [(0, "dq"), (2, "dv"), (3, "dg"), (4, "ddiag")])
def test_wrong_gradient_is_refused_by_name(place, name, monkeypatch):
    def change(*grads):
        return [
            x * (1.1 if i == place and x is not None else 1) if x is not None else None
            for i, x in enumerate(grads)
        ]

    break_(monkeypatch, "bwd", change)
    message = check.verdict("ssd", DEVICE)
    assert f"{name} of ssd" in message and "is off by 1.0e-01" in message


@pytest.mark.parametrize("grouped", [False, True])
def test_heads_are_as_in_the_run(grouped, monkeypatch):
    """Value heads of their own and grouped ones are different kernels: one that is wrong shows
    where it is used."""
    right = SSD.form("triton").bwd

    def bwd(q, k, v, *others):
        dq, *grads = right(q, k, v, *others)
        return dq * (1.1 if (k.shape[2] != v.shape[2]) == grouped else 1), *grads

    monkeypatch.setattr(SSD.form("triton"), "bwd", bwd)
    for shared in (False, True):
        case = check.Case(SSD, "g", 16, 16, torch.float32, torch.float32, shared)
        assert (check.verdict("ssd", DEVICE, cases=[case]) == "") == (shared != grouped)


def test_nan_is_refused(monkeypatch):
    break_(monkeypatch, "fwd", lambda o, *rest: (o * float("nan"), *rest))
    assert check.verdict("ssd", DEVICE)


def wrong_utility(monkeypatch, module, name, change):
    """The message where a function of kernels/gpu/{module}.py has its results changed."""
    module = importlib.import_module(f"lmoe.kernels.gpu.{module}")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: change(right(*args)))
    with pytest.raises(ValueError) as error:
        check.check_kernels({"utilities": None}, DEVICE)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("module, name, refused", UTILITIES)
def test_wrong_utility_is_refused_by_name(module, name, refused, monkeypatch):
    message = wrong_utility(
        monkeypatch, module, name, lambda y: y * 1.1 if torch.is_tensor(y) else (y[0] * 1.1, *y[1:])
    )
    assert re.match(
        rf"Triton utilities: {refused} \(\w+\) is off by .*; take another version of Triton$",
        message,
    ), message


def test_failing_utility_is_refused_by_name(monkeypatch):
    def fail(y):
        raise RuntimeError("in the compiler\n\nno registers left\n")

    message = wrong_utility(monkeypatch, "pointwise", "rope", fail)
    assert (
        message.startswith("Triton utilities: rope (")
        and "fails with RuntimeError: no registers left" in message
    )


def test_other_scans_ask_again(asked):
    one, other = ([check.Case(SSD, "", K, 64, torch.bfloat16, torch.bfloat16)] for K in (64, 128))
    for cases, times in ((one, 1), (one, 1), (other, 2), (None, 3)):
        assert not check.verdict("ssd", DEVICE, cases=cases) and len(asked) == times


def test_verdict_is_remembered(asked):
    assert check.verdict("ssd", DEVICE) == check.verdict("ssd", DEVICE) == ""
    asked.wrong = "o of gla is off"
    assert not check.verdict("ssd", DEVICE) and asked == ["ssd"]
    wrong = check.verdict("gla", DEVICE)
    asked.wrong = ""
    assert wrong and check.verdict("gla", DEVICE) == wrong and asked == ["ssd", "gla"]


def test_other_sources_and_versions_ask_again(asked, tmp_path, monkeypatch):
    for text, times in (("1", 1), ("1", 1), ("2", 2), ("1", 2)):
        (tmp_path / "kernel.py").write_text(text)
        assert not check.verdict("ssd", DEVICE) and len(asked) == times
    monkeypatch.setattr(check, "versions", lambda device: ("0.0", "another GPU", "sm_00"))
    assert not check.verdict("ssd", DEVICE) and len(asked) == 3


def test_sources_are_those_that_run():
    names = {path.name for path in check.sources()}
    assert {
        "ssd.py",
        "state.py",
        "common.py",
        "ops.py",
        "norm.py",
        "conv.py",
        "pointwise.py",
    } <= names


def test_failure_is_one_line_and_not_remembered(asked, monkeypatch):
    def fail(*args):
        raise RuntimeError("in the compiler\n\nno registers left\n")

    with monkeypatch.context() as patch:
        patch.setattr(check, "first_error", fail)
        message = check.verdict("ssd", DEVICE)
    assert "\n" not in message and "ssd fails with RuntimeError: no registers left" in message
    assert not check.verdict("ssd", DEVICE)


def test_unusable_memory_costs_a_check(asked, tmp_path, monkeypatch):
    check.cache_file().parent.mkdir()
    check.cache_file().write_text("{half a")
    assert check.verdict("ssd", DEVICE) == check.verdict("ssd", DEVICE) == "" and len(asked) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kernel.py"))  # no folder
    assert check.verdict("ssd", DEVICE) == check.verdict("ssd", DEVICE) == "" and len(asked) == 3


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b"\xff", b"[]", b'{"key": [1]}', "fifo", "folder", "loop"], ids=str
)
def test_odd_memory_costs_a_check(data, asked):
    path = check.cache_file()
    path.parent.mkdir()
    if data == "fifo":
        os.mkfifo(path)
    elif data == "folder":
        path.mkdir()
    elif data == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(data)
    assert check.verdict("ssd", DEVICE) == check.verdict("ssd", DEVICE) == "" and asked
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half written stays


def test_a_full_disk_costs_a_check(asked, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(check.os, "replace", full)
    assert check.verdict("ssd", DEVICE) == check.verdict("ssd", DEVICE) == "" and len(asked) == 2
    assert not list(check.cache_file().parent.iterdir())
