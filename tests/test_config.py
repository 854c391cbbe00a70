"""TOML, command line, refusals: every key is read, known, checked and round-trips."""

import ast
import dataclasses
import functools
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmoe.checks import check_config, check_same_model
from lmoe.command import asks_for_help
from lmoe.config import (
    RENAMED,
    help_text,
    load_config,
    load_saved_config,
    to_toml,
)
from lmoe.config.sections import SECTIONS, Config, sections
from lmoe.data.sources import SOURCES
from lmoe.model.build import build_model, mixer_options
from lmoe.model.config import layer_ffns
from lmoe.model.mixers import MIXERS
from lmoe.model.model import count_parameters
from lmoe.model.moe.experts import IMPLEMENTATIONS
from lmoe.parallel.context import METHODS
from lmoe.parallel.dims import local_device
from lmoe.parallel.parallelize import DTYPES
from lmoe.parallel.pipeline import SCHEDULES
from lmoe.resolve import resolve_batch_size

ROOT = Path(__file__).resolve().parent.parent
TOMLS = sorted((ROOT / "train_configs").glob("*.toml"))
CPU = torch.device("cpu")
HELP = help_text(["--help=all"])


FIELDS = [
    (mixer, section, field.name)
    for mixer in MIXERS
    for section, values in sections(load_config([f"--model.mixer={mixer}"])).items()
    if mixer == "gla"
    or (section == "mixer" and mixer != "attention")  # there [mixer] is [attention]
    for field in dataclasses.fields(values)
]


@pytest.mark.parametrize("path", TOMLS, ids=lambda p: p.name)
@pytest.mark.parametrize("mixer", [None, *MIXERS])
def test_every_toml_builds(path, mixer):
    """Every file, with its own and with every other mixer, builds on the meta device and passes the
    checks."""
    config = load_config([f"--config={path}"] + ([f"--model.mixer={mixer}"] if mixer else []))
    check_config(config, config.parallel.ranks or 1, CPU)
    config.model.vocab_size = 320
    with torch.device("meta"):
        model = build_model(config)
    assert count_parameters(model)["total"] > 0


def test_comments_count_the_parameters():
    found = 0
    for path in TOMLS:
        counts = re.search(r"([\d.]+) (M|B) parameters, ([\d.]+) \2 of them", path.read_text())
        if counts is None:
            continue
        found += 1
        config = load_config([f"--config={path}"])
        config.model.vocab_size = config.model.vocab_size or 320
        with torch.device("meta"):
            size = count_parameters(build_model(config))
        unit = {"M": 1e6, "B": 1e9}[counts[2]]
        for said, name in ((counts[1], "total"), (counts[3], "active")):
            digits = len(said.partition(".")[2])
            assert f"{size[name] / unit:.{digits}f}" == said, path.name
    assert found == 2


@pytest.mark.parametrize("path", TOMLS, ids=lambda p: p.name)
def test_the_resolved_config_reads_back(path):
    config = load_config([f"--config={path}"])
    text = to_toml(config)
    (saved := Path(path).with_suffix(".resolved")).write_text(text)
    try:
        assert to_toml(load_config([f"--config={saved}"])) == text
    finally:
        saved.unlink()


def other_value(section, field, value):
    """A legal value that differs, as a command-line word."""
    name = field.name
    named = {
        ("model", "flavor"): "a0.3b_2b",
        ("model", "mixer"): "gated_deltanet",
        ("model", "pattern"): "LN",
        ("model", "attention"): None,
        ("model", "layers"): "8",
        ("model", "ffn_pattern"): "DE",
        ("optimizer", "name"): None,
        ("data", "mixture"): "1 stdlib",
        ("data", "paths"): "a,b",
        ("optimizer", "betas"): "0.8,0.99",
    }
    if (section, name) in named:
        return named[section, name]
    if isinstance(value, bool):
        return str(not value).lower()
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice != value)
    if isinstance(value, str):
        return value + "x"
    return str(value + 1 if isinstance(value, int) else value * 0.5 + 0.1)


@functools.cache
def attributes_read():
    """Names of the attributes that some code other than lmoe/config and the checks reads."""
    return {
        node.attr
        for path in [ROOT / "train.py", *(ROOT / "lmoe").rglob("*.py")]
        if ROOT / "lmoe" / "config" not in path.parents and path.name != "checks.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }


@pytest.mark.parametrize("mixer, section, name", FIELDS, ids=lambda v: str(v))
def test_every_key_is_documented_settable_and_used(mixer, section, name):
    """It has a help text, changes the resolved config, and some code other than lmoe/config and
    the checks reads it."""
    config = load_config([f"--model.mixer={mixer}"])
    field = next(f for f in dataclasses.fields(getattr(config, section)) if f.name == name)
    assert len(field.metadata["help"]) > 10 and f"--{section}.{name}=" in HELP
    word = other_value(section, field, getattr(getattr(config, section), name))
    word = "2" if name == "ep" else word  # 1 is what 0 chooses here
    if word is not None:
        changed = load_config([f"--model.mixer={mixer}", f"--{section}.{name}={word}"])
        assert to_toml(changed) != to_toml(config)
    attributes = attributes_read()
    elsewhere = {
        "flavor",
        "mixer",
        "preset",
    }  # choose other defaults: load_config is where they act
    if (section, name) == ("optimizer", "name") or (section, name) in [
        ("parallel", axis) for axis in ("tp", "cp", "pp", "ep")
    ]:
        with pytest.raises(
            ValueError, match=f"{section}.{name}"
        ):  # there is one value; others are refused
            check_config(load_config([f"--{section}.{name}={word or 'sgd'}"]), 1, CPU)
    else:
        assert name in attributes | elsewhere, f"nothing reads {section}.{name}"


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--data.seqlen=3"],
            "unknown key data.seqlen; did you mean data.seq_len\\?|did you mean seq_len",
        ),
        (["--dat.seq_len=3"], "unknown section dat; did you mean data"),
        (["--mixer.glaa.heads=2"], "unknown section mixer.glaa; did you mean mixer.gla"),
        (["--heads=2"], "cannot read the argument"),
        (["--data.seq_len=abc"], "data.seq_len = 'abc' has the wrong type: int"),
        (["--compile.enable=maybe"], "compile.enable = 'maybe' has the wrong type"),
        (["--optimizer.betas=[0.9"], "optimizer.betas"),
        (["seq_len=3"], "cannot read the argument"),
        (["--model.mixer=glaa"], "model.mixer = 'glaa' is not known; did you mean gla"),
        (["--model.flavor=debugg"], "did you mean debug"),
        (["--model.preset=x"], "model.preset = 'x' is not known; one of: uniform, faithful"),
        (["--model.attention=gla"], "model.attention = 'gla' is not known; one of: attention"),
        (['--model.pattern=["glaa"]'], "model.pattern: mixer = 'glaa' is not known; did you mean"),
        (["--model.pattern=LLLLL"], "5 layers, which does not divide model.layers = 4"),
        (
            ["--mixer.gla.heads=2"],
            r"\[mixer.gla\]: gla is model.mixer, whose options are \[mixer\]",
        ),
        (["--mixer.attention.heads=2"], r"model.attention, whose options are \[attention\]"),
        (["--mixer.gsa.heads=2"], r"\[mixer.gsa\]: model.pattern names no layer gsa"),
        (["--config=nowhere.toml"], "no such file"),
    ],
)
def test_mistakes_get_one_line(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_config(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, world, message",
    [
        (["--parallel.dp_replicate=3"], 4, "does not divide the world size 4"),
        (["--parallel.dp_shard=3"], 4, "is not the world size 4"),
        (["--parallel.tp=3"], 4, "parallel.tp = 3"),
        (["--parallel.tp=8"], 8, "parallel.tp = 8 does not divide the 4 heads"),
        (["--parallel.ep=3"], 4, "parallel.ep = 3 does not divide"),
        (
            ["--parallel.ep=2", "--moe.experts=7", "--moe.top_k=1"],
            2,
            "parallel.ep = 2 does not divide moe.experts",
        ),
        (
            ["--parallel.cp=8", "--training.batch_size=1", "--data.seq_len=12"],
            8,
            "does not divide the 12 tokens",
        ),
        (
            [
                "--parallel.cp=8",
                "--training.batch_size=1",
                "--data.seq_len=16",
                "--model.mixer=gated_deltanet",
            ],
            8,
            "looks back",
        ),
        (["--parallel.cp=2", "--mixer.backend=reference"], 2, "knows no segments"),
        (["--parallel.cp=8", "--parallel.cp_method=all_to_all"], 8, "does not divide the 4 heads"),
        (["--parallel.cp_method=all_to_all"], 1, "parallel.cp above 1"),
        (["--parallel.async_tp=true"], 1, "parallel.async_tp"),
        (
            ["--parallel.tp=2", "--parallel.ep=1", "--moe.hidden=15", "--moe.impl=loop"],
            2,
            "does not divide moe.hidden",
        ),
        (["--training.global_batch_size=12"], 1, "not a multiple of training.batch_size"),
        (["--training.dtype=float16"], 1, "training.dtype"),
        (["--schedule.kind=step"], 1, "schedule.kind"),
        (["--schedule.decay_steps=5"], 1, "schedule.decay_steps is for"),
        (["--moe.top_k=9"], 1, "moe.top_k = 9"),
        (["--model.loss_chunk=-1"], 1, "model.loss_chunk = -1 must be finite, at least 0"),
        (["--model.logits_dtype=float16"], 1, "model.logits_dtype = 'float16' is not known"),
        *(
            (
                ["--model.logits_dtype=bfloat16", f"--training.dtype={dtype}"],
                1,
                f"training.dtype = {dtype} .* set model.logits_dtype = float32",
            )
            for dtype in ("float32", "float64")
        ),
        (["--moe.score=linear"], 1, "moe.score"),
        (["--moe.impl=loop", "--compile.enable=true"], 1, "does not compile"),
        (["--moe.experts=0", "--model.ffn_hidden=0"], 1, "model.ffn_hidden = 0"),
        (["--model.ffn_pattern=EX"], 1, "model.ffn_pattern = 'EX': only E .* and D"),
        (["--model.ffn_pattern=EED"], 1, "model.ffn_pattern has 3 layers, which does not divide"),
        (["--model.ffn_pattern=ED", "--model.ffn_hidden=0"], 1, "model.ffn_hidden = 0"),
        (["--model.heads=3"], 1, "does not divide"),
        (["--attention.kv_heads=3"], 1, "attention.kv_heads = 3"),
        (["--attention.impl=varlen"], 1, "needs CUDA"),
        (["--mixer.expand_k=0.3"], 1, "mixer.expand_k"),
        (["--model.pattern=LLX"], 1, "only L"),
        (["--checkpoint.load_only_model=true"], 1, "needs checkpoint.load"),
        (["--profiling.memory_snapshot=true"], 1, "no GPU"),
        (["--compile.backend=aot_eager"], 1, "compile.enable is false"),
        (["--optimizer.betas=0.9"], 1, "must be two numbers"),
        (["--data.validation_fraction=0"], 1, "validation_fraction"),
        (["--training.steps=0"], 1, "training.steps = 0 must be finite, at least 1"),
        (["--optimizer.lr=nan"], 1, "optimizer.lr = nan must be finite"),
        (["--training.max_norm=inf"], 1, "training.max_norm = inf must be finite"),
        (["--attention.rope_theta=0"], 1, "attention.rope_theta = 0.0 must"),
        (["--moe.hidden=0"], 1, "moe.hidden = 0 must"),
        (
            ["--mixer.backend=tritan"],
            1,
            "mixer.backend = 'tritan' is not known; did you mean triton",
        ),
        (
            ["--mixer.backend=reference", "--compile.enable=true"],
            1,
            "mixer.backend = reference .* does not compile",
        ),
        (["--mixer.backend=triton"], 1, "mixer.backend = triton needs a GPU"),
        (
            ["--mixer.backend=triton", "--model.mixer=gated_deltanet"],
            1,
            "no kernels for gated_deltanet",
        ),
        (["--mixer.chunk_size=48"], 1, "mixer.chunk_size = 48 is not a power of two"),
        (["--mixer.feature_map=tanh"], 1, "mixer.feature_map = 'tanh' is not known"),
        (["--mixer.gate_low_rank_dim=0"], 1, "mixer.gate_low_rank_dim = 0"),
        (["--mixer.gate_logit_normalizer=0"], 1, "mixer.gate_logit_normalizer = 0.0"),
        (["--model.mixer=gated_deltanet", "--mixer.conv_size=0"], 1, "mixer.conv_size = 0"),
        (
            ["--model.mixer=gated_deltanet", "--mixer.value_heads=2"],
            1,
            "mixer.value_heads = 2 is not a multiple of the 4 heads",
        ),
        (
            ["--profiling.trace_step=1001"],
            1,
            "profiling.trace_step = 1001 is beyond training.steps = 1000",
        ),
        (
            ["--schedule.kind=wsd", "--schedule.warmup_steps=950"],
            1,
            "100 steps of decay .* exceed training.steps = 1000",
        ),
        *(
            (
                [f"--schedule.kind={kind}", "--schedule.warmup_steps=21", *words],
                1,
                f"schedule.warmup_steps = 21 exceeds {words[0][2:-3]} = 20",
            )
            for kind in ("constant", "linear", "cosine", "wsd")
            for words in (["--training.steps=20"], ["--schedule.steps=20"])
        ),
    ],
)
def test_impossible_configurations_are_refused(words, world, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_config(load_config(words), world, CPU)
    assert "\n" not in str(caught.value)


def excluded(field, value):
    """Values that the constraints of a field exclude."""
    bounds, is_list = field.metadata["bounds"], isinstance(value, list)
    numbers = []
    if "at least" in bounds:
        numbers.append(bounds["at least"] - 1)
    numbers += [bounds[name] for name in ("above", "below") if name in bounds]
    if value and isinstance(value[0] if is_list else value, float):
        numbers += [float("nan"), float("inf")]
    wrong = [f"{value}x"] if field.metadata["choices"] else []
    return wrong + [[number] if is_list else number for number in numbers]


@pytest.mark.parametrize("mixer, section, name", FIELDS, ids=lambda v: str(v))
def test_what_a_field_excludes_is_refused(mixer, section, name):
    options = sections(load_config([f"--model.mixer={mixer}"]))[section]
    field = next(f for f in dataclasses.fields(options) if f.name == name)
    for value in excluded(field, getattr(options, name)):
        with pytest.raises(ValueError, match=rf"^{section}\.{name} = [^\n]*$"):
            load_config([f"--model.mixer={mixer}"], toml={section: {name: value}})


def test_help_shows_the_constraints():
    assert '--moe.impl="grouped"  (grouped, loop)\n' in HELP
    assert "--data.validation_fraction=0.01  (above 0, below 1)\n" in HELP
    assert "[attention]  (model.attention = 'attention')" in HELP


def test_help_is_a_line_a_section():
    text = help_text(["--config=x", "--help"])
    assert "[mixer.NAME]" in text and len(text.splitlines()) < 30
    assert max(map(len, text.splitlines())) <= 100
    for section in SECTIONS:
        assert re.search(rf"^  {section} +\w+", text, re.M), section


@pytest.mark.parametrize("words", [["--help=data"], ["--help", "data"], ["-h", "data", "--x.y=1"]])
def test_help_of_a_section(words):
    text = help_text(words)
    assert asks_for_help(words) and text in HELP
    assert set(re.findall(r"^\[(.*?)\]", text, re.M)) == {"data"} and "--data.paths=[]" in text


def test_help_of_mixers():
    names = re.findall(r"model\.mixer = '(\w+)'", help_text(["--help=mixer"]))
    assert names == [name for name, mixer in MIXERS.items() if not mixer.softmax]
    for name in names:
        text = help_text([f"--help=mixer.{name}"])
        assert text in HELP and text.startswith(f"[mixer]  (model.mixer = {name!r})")
    assert "--attention.window=" in help_text(["--help=attention"])
    with pytest.raises(ValueError, match="^--help=mixer.glaa: .*did you mean mixer.gla"):
        help_text(["--help=mixer.glaa"])
    assert not asks_for_help(["--config=--help", "--job.folder=-h", "--helpful=1"])


@pytest.mark.parametrize(
    "key, registry",
    [
        ("training.dtype", DTYPES),
        ("parallel.schedule", SCHEDULES),
        ("parallel.cp_method", METHODS),
        ("data.source", SOURCES),
        ("moe.impl", IMPLEMENTATIONS),
        *(("model.preset", mixer.presets) for mixer in MIXERS.values()),
    ],
)
def test_choices_are_those_of_the_registry(key, registry):
    section, name = key.split(".")
    fields = dataclasses.fields(getattr(Config(), section))
    (choices,) = (f.metadata["choices"] for f in fields if f.name == name)
    assert sorted(choices) == sorted(registry)


def test_checks_write_nothing():
    config = load_config([])
    check_config(config, 1, CPU)
    assert config.training.global_batch_size == 0
    resolve_batch_size(config, 1)
    assert config.training.global_batch_size == config.training.batch_size
    config = load_config(["--parallel.tp=2", "--training.batch_size=3"])
    resolve_batch_size(config, 8)
    assert config.training.global_batch_size == 12


PATTERN = ["gla", "gated_deltanet", "N", "gsa"]


def test_every_mixer_of_the_pattern_has_a_section(tmp_path):
    toml = {
        "model": {"pattern": PATTERN, "preset": "faithful", "dim": 1024},
        "mixer": {"heads": 2, "gsa": {"slots": 7}, "gated_deltanet": {"chunk_size": 16}},
    }
    config = load_config(["--mixer.gated_deltanet.chunk_size=32", "--mixer.gsa.heads=1"], toml)
    assert config.mixer.heads == 2 and config.mixers.keys() == {"gated_deltanet", "gsa"}
    deltanet, gsa = config.mixers["gated_deltanet"], config.mixers["gsa"]
    assert deltanet.chunk_size == 32 and deltanet.heads != 2
    assert (gsa.slots, gsa.heads) == (7, 1)
    for name, value in MIXERS["gated_deltanet"].presets["faithful"].items():
        assert getattr(deltanet, name) == value
    for name, options in {"gla": config.mixer, "attention": config.attention}.items():
        assert mixer_options(config, name) is options
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert "[mixer.gsa]" in to_toml(config) and load_saved_config(tmp_path) == config


@pytest.mark.parametrize("word, key", [("slot=3", "slot"), ("slots=x", "slots")])
def test_a_mixer_section_is_checked_under_its_name(word, key):
    with pytest.raises(ValueError, match=rf"mixer\.gsa\.{key}"):
        load_config([f"--mixer.gsa.{word}"], toml={"model": {"pattern": PATTERN}})


def test_a_mixer_section_reaches_its_layers():
    words = ["--mixer.gsa.slots=7", "--model.vocab_size=64"]
    config = load_config(words, toml={"model": {"pattern": PATTERN}})
    with torch.device("meta"):
        blocks = build_model(config).blocks
    assert [block.mixer.options for block in blocks] == [
        config.mixer,
        config.mixers["gated_deltanet"],
        config.attention,
        config.mixers["gsa"],
    ]
    saved = load_config(words[1:], toml={"model": {"pattern": PATTERN}})
    with pytest.raises(ValueError, match="mixer.gsa.slots = 7 but there holds"):
        check_same_model(config, saved, "there")


def test_the_layers_of_a_feed_forward_pattern():
    config = load_config(["--model.ffn_pattern=DE", "--model.vocab_size=64"])
    assert layer_ffns(config.model, config.moe) == ["D", "E", "D", "E"]
    with torch.device("meta"):
        model = build_model(config)
    assert [block.has_experts for block in model.blocks] == [False, True] * 2
    assert list(model.routers) == ["1.ffn", "3.ffn"]
    config = load_config(["--model.ffn_pattern=DE", "--moe.experts=0"])
    assert layer_ffns(config.model, config.moe) == ["D"] * 4


@pytest.mark.parametrize(
    "mixer, words, heads",
    [
        ("gated_deltanet", ["--model.dim=2048"], (6, 256)),  # of the preset
        ("gated_deltanet", ["--model.dim=2048", "--mixer.heads=4"], (4, 384)),
        ("gated_deltanet", ["--model.dim=2048", "--mixer.head_dim=96"], (16, 96)),
        (
            "gated_deltanet",
            ["--model.dim=2048", "--mixer.heads=16", "--mixer.head_dim=96"],
            (16, 96),
        ),
        ("retnet", ["--model.dim=512"], (2, 256)),
        ("gla", ["--mixer.head_dim=32"], (2, 32)),  # the preset's heads = 4 give way
        ("gla", ["--mixer.heads=0", "--model.heads=8"], (8, 8)),
        ("gsa", ["--mixer.gsa.head_dim=16", '--model.pattern=["gla", "gsa"]'], (8, 16)),
        ("rwkv6", [], (2, 64)),
        ("rwkv6", ["--mixer.heads=8"], (8, 16)),
        ("mamba2", ["--mixer.heads=8"], (8, 32)),
        ("mamba3", ["--mixer.head_dim=16"], (16, 16)),
    ],
    ids=str,
)
def test_heads_and_their_size(tmp_path, caplog, mixer, words, heads):
    """The user's value of one wins over the preset's of the other; all of it is read back."""
    words = [f"--model.mixer={'gla' if mixer == 'gsa' else mixer}", *words]
    with caplog.at_level("INFO", "lmoe"):
        config = load_config([*words, "--model.preset=faithful"])
    assert not caplog.messages
    options = mixer_options(config, mixer)
    shape = options.shape(config.model)
    state_space = mixer.startswith("mamba")
    assert heads == ((shape.v_heads, shape.V) if state_space else (shape.qk_heads, shape.K))
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_saved_config(tmp_path) == config
    assert load_config([f"--config={tmp_path}/config.toml"]) == config


@pytest.mark.parametrize("dim, width", [(128, 96), (800, 600)])
def test_a_preset_s_heads_that_do_not_fit(tmp_path, caplog, monkeypatch, dim, width):
    """Fewer than two of them, or a rest: said once, whatever the number of layers."""
    monkeypatch.setattr(logging.getLogger("lmoe"), "propagate", True)
    words = ["--model.mixer=gated_deltanet", "--model.preset=faithful", f"--model.dim={dim}"]
    words += ["--model.heads=4", "--model.vocab_size=64"]
    with caplog.at_level("INFO", "lmoe"), torch.device("meta"):
        config = load_config(words)
        build_model(config)
    (said,) = caplog.messages
    assert "mixer.head_dim = 256" in said and f"{width} channels" in said and "model.heads" in said
    assert config.mixer.shape(config.model).qk_heads == config.model.heads
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_saved_config(tmp_path) == config


@pytest.mark.parametrize("mixer", [name for name, of in MIXERS.items() if not of.softmax])
def test_heads_that_do_not_fit_are_refused(mixer):
    for words, message in (
        (["--mixer.head_dim=48"], r"^mixer\.head_dim = 48 does not divide the \d+ .*; 32 does$"),
        (
            ["--mixer.heads=3", "--mixer.head_dim=32"],
            r"^mixer\.heads = 3 and mixer\.head_dim = 32 ",
        ),
    ):
        config = load_config([f"--model.mixer={mixer}", *words])
        with pytest.raises(ValueError, match=message):
            check_config(config, 1, CPU)


@pytest.mark.parametrize("key", RENAMED)
def test_old_keys_are_refused_by_their_new_name(key):
    section, old = key.split(".")
    message = rf"^{section}\.{old} is now {section}\.{RENAMED[key]}$"
    for argv, toml in (([f"--{key}=1"], {}), ([], {section: {old: 1}})):
        with pytest.raises(ValueError, match=message):
            load_config(argv, toml)


@pytest.mark.parametrize("dense, pattern", [(0, "E"), (1, "DEEE"), (4, "DDDD")])
def test_a_checkpoint_with_old_keys_loads(tmp_path, dense, pattern):
    now = load_config([f"--model.ffn_pattern={pattern}"])
    text = to_toml(now).replace(f'ffn_pattern = "{pattern}"', f"dense_layers = {dense}")
    (tmp_path / "config.toml").write_text(text)
    saved = load_saved_config(tmp_path)
    assert saved == now
    check_same_model(now, saved, "there")


@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "attention"])
def test_a_checkpoint_with_old_mixer_options_loads(tmp_path, mixer):
    other = "gla" if mixer != "gla" else "gsa"
    now = load_config([f"--model.mixer={mixer}", f'--model.pattern=["L", "{other}"]'])
    text = to_toml(now)
    for key, new in RENAMED.items():
        if key.startswith("mixer."):
            text = re.sub(rf"^{new} = ", f"{key.split('.')[1]} = ", text, flags=re.M)
    (tmp_path / "config.toml").write_text(text)
    assert load_saved_config(tmp_path) == now


def test_a_checkpoint_keeps_what_its_presets_were(tmp_path):
    """A key that a configuration of before says nothing of has the value of then, not what the
    preset says today."""
    now = load_config(["--model.mixer=lightning", "--model.preset=faithful"])
    text = to_toml(now).replace("norm_eps = 1e-06\nbackend", "backend")
    (tmp_path / "config.toml").write_text(text)
    assert now.mixer.norm_eps == 1e-6 and load_saved_config(tmp_path).mixer.norm_eps == 1e-5


def test_a_checkpoint_whose_heads_overruled_their_size_loads(tmp_path):
    now = load_config(["--model.mixer=mamba2", "--mixer.heads=8"])
    (tmp_path / "config.toml").write_text(
        to_toml(now).replace("head_dim = 0\nnorm", "head_dim = 64\nnorm")
    )
    assert "head_dim = 64" in (tmp_path / "config.toml").read_text()
    assert load_saved_config(tmp_path) == now


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="there are 2; start at most as many"):
        local_device()


def test_precedence():
    """default < flavour < TOML < command line, and preset < TOML < command line for the mixer."""
    assert load_config([]).model.dim == 128
    assert load_config(["--model.flavor=a0.3b_2b"]).model.dim == 1024
    assert load_config(["--model.flavor=a0.3b_2b"], toml={"model": {"dim": 512}}).model.dim == 512
    assert load_config(["--model.dim=256"], toml={"model": {"dim": 512}}).model.dim == 256
    assert load_config(["--model.preset=faithful"]).mixer.heads == 4
    assert load_config(["--model.preset=faithful"], toml={"mixer": {"heads": 2}}).mixer.heads == 2
    assert load_config(["--mixer.heads=8"], toml={"mixer": {"heads": 2}}).mixer.heads == 8
    # Heads or their size: the command line's over the file's, which may name both.
    for given in ({"heads": 0, "head_dim": 64}, {"head_dim": 32}, {"heads": 4, "head_dim": 64}):
        mixer = load_config(["--model.mixer=mamba2", "--mixer.heads=8"], {"mixer": given}).mixer
        assert (mixer.heads, mixer.head_dim) == (8, 0)


def test_lists_and_booleans_from_the_command_line():
    config = load_config(
        [
            "--optimizer.betas=[0.8, 0.9]",
            "--data.paths=a,b c",
            "--compile.enable=1",
            '--data.mixture=["0.7 stdlib"]',
        ]
    )
    assert config.optimizer.betas == [0.8, 0.9] and config.data.paths == ["a", "b c"]
    assert config.compile.enable is True and config.data.mixture == ["0.7 stdlib"]


def test_another_model_is_not_resumed():
    saved = load_config([])
    free = [
        "--optimizer.lr=1.0",
        "--data.seq_len=64",
        "--moe.impl=loop",
        "--model.z_loss=0.1",
        "--data.tokenizer=/elsewhere/same.tiktoken",
    ]
    check_same_model(load_config(free), saved, "there")
    for word, key in (
        ("--model.dim=64", "model.dim"),
        ("--mixer.gate_rank=8", "mixer.gate_rank"),
        ("--moe.top_k=1", "moe.top_k"),
    ):
        with pytest.raises(ValueError, match=key):
            check_same_model(load_config([word]), saved, "there")
    with pytest.raises(ValueError, match="model.mixer"):
        check_same_model(load_config(["--model.mixer=gated_deltanet"]), saved, "there")


def layer_of(module):
    """How high a module of ours stands, or None for others."""
    if module == "train":
        return 5
    if module in ("lmoe.files", "lmoe.command"):
        return -1  # the standard library only
    path = module.replace(".", "/")
    if not path.startswith("lmoe"):
        return None
    for index, prefix in enumerate(
        ["lmoe/kernels", "lmoe/model", "lmoe/config", "lmoe/parallel", "lmoe"]
    ):
        if path == prefix or path.startswith(prefix + "/"):
            return index
    return None


def test_imports_point_one_way():
    """kernels <- model <- config <- parallel <- the rest <- train.py."""
    files = {path: 0 for path in (ROOT / "kernels").rglob("*.py")}
    for path in (ROOT / "lmoe").rglob("*.py"):
        if "kernels" not in path.relative_to(ROOT).parts:
            files[path] = layer_of(
                str(path.relative_to(ROOT).with_suffix(""))
                .replace("/", ".")
                .removesuffix(".__init__")
            )
    for path, layer in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module]
            for name in names:
                other = layer_of(name)
                assert other is None or other <= layer, (
                    f"{path} imports {name}, which stands above it"
                )


def test_private_torch_is_used_in_compat_only():
    pattern = re.compile(r"torch(\.\w+)*\._(?!_)\w+")
    # The last only as a name that checkpoints hold.
    allowed = {"torch._foreach_norm", "torch._dynamo", "torch._utils"}
    for path in [
        ROOT / "train.py",
        *(ROOT / "lmoe").rglob("*.py"),
        *(ROOT / "kernels").rglob("*.py"),
    ]:
        if path.name == "compat.py":
            continue
        found = {match.group(0) for match in pattern.finditer(path.read_text())} - allowed
        found = {name for name in found if not name.startswith("torch.ops.")}
        assert not found, f"{path}: {found}"


def test_importing_is_light():
    code = (
        "import sys, time, lmoe, lmoe.config, torch; assert not torch.cuda.is_initialized(); assert"
        " not {'torchdata', 'tensorboard', 'matplotlib', 'tiktoken'} & set(sys.modules), 'too much'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_sections_are_those_of_the_dataclass():
    assert {f.name for f in dataclasses.fields(Config)} == {*SECTIONS, "mixers"}
