"""The configuration: from a TOML file and the command line to a checked Config.

Order, later ones winning: the dataclasses' defaults, the flavour and the preset, the TOML file,
`--section.key=value`. Every error is one line that names the key, says why, and what would work.
"""

import contextlib
import dataclasses
import json
import sys
import typing
from pathlib import Path

from lmoe.config.sections import SECTIONS, Config, sections
from lmoe.model.build import layer_mixers
from lmoe.model.config import FLAVORS, ModelConfig, check_choice, check_fields, nearest
from lmoe.model.mixers import MIXERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _ffn_pattern(dense_layers, model):
    return "D" * dense_layers + "E" * (model["layers"] - dense_layers) if dense_layers else "E"


# Keys of earlier versions: section.old -> new. What holds for [mixer] holds for [mixer.NAME].
RENAMED = {
    "model.dense_layers": "ffn_pattern",
    "mixer.conv_width": "conv_size",
    "mixer.gate_scale": "gate_logit_normalizer",
    "mixer.gate_rank": "gate_low_rank_dim",
    "mixer.mix_rank": "mix_low_rank_dim",
    "mixer.decay_rank": "decay_low_rank_dim",
    "mixer.wide_norm": "full_width_norm",
    "mixer.state": "d_state",
    "mixer.groups": "n_groups",
}


def _renamed(section, key):
    """Look up what an earlier version's key is called now, or None."""
    return RENAMED.get(f"{section.split('.')[0]}.{key}")


def _convert(key, value, kind):
    """`value` as the type `kind`, or a ValueError that names the key."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        if isinstance(value, list):
            return [_convert(key, item, options[0]) for item in value]
    elif options:  # a union such as str | list[str]
        for option in options:
            with contextlib.suppress(ValueError):
                return _convert(key, value, option)
    elif type(value) is kind:
        return value
    elif kind is float and type(value) is int:
        return float(value)
    name = str(kind) if options else "true or false" if kind is bool else kind.__name__
    raise ValueError(f"{key} = {value!r} has the wrong type: {name} is expected")


def _parse(key, text, kind):
    """The value of a command-line word: booleans, numbers, strings, and lists as `a,b` or `["a",
    "b"]`."""
    value = text
    if typing.get_args(kind) and text.startswith("["):
        try:
            value = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f'{key} = {text} is not a list: write a,b or ["a", "b"]') from error
    elif typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        return [_parse(key, item, inner) for item in text.split(",") if item]
    elif kind is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    elif kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(text)
    return _convert(key, value, kind)


def _assign(options, section, values, parse=_convert):
    hints = typing.get_type_hints(type(options))
    for key, value in values.items():
        if key not in hints:
            if renamed := _renamed(section, key):
                raise ValueError(f"{section}.{key} is now {section}.{renamed}")
            raise ValueError(f"unknown key {section}.{key}{nearest(key, sorted(hints))}")
        setattr(options, key, parse(f"{section}.{key}", value, hints[key]))


def _read_argv(argv):
    """Split command-line arguments into (path of the TOML file or None, {section: {key: text}})."""
    path = None
    given = {}
    for argument in argv:
        if argument.startswith("--config="):
            path = argument.split("=", 1)[1]
            continue
        left, equals, text = argument.partition("=")
        section, dot, key = left.removeprefix("--").rpartition(".")
        if not argument.startswith("--") or not dot or not equals:
            raise ValueError(
                f"cannot read the argument {argument!r}: write --section.key=value (or"
                " --config=FILE, --help)"
            )
        given.setdefault(section, {})[key] = text
    return path, given


def _read_toml(path):
    if not Path(path).is_file():
        raise ValueError(f"--config={path}: no such file")
    try:
        return tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config={path} is not valid TOML: {error}") from error


def _split_tables(toml):
    """Make {section: {key: value}} of parsed TOML; a table in a section is "section.table"."""
    sections = {}
    for section, values in toml.items():
        if not isinstance(values, dict):
            raise ValueError(
                f"{section} = {values!r} stands outside a section: write [section] and then key ="
                " value"
            )
        sections[section] = {}
        for key, value in values.items():
            if isinstance(value, dict):
                sections[f"{section}.{key}"] = value
            else:
                sections[section][key] = value
    return sections


def load_config(argv=(), toml=None):
    """Build the Config from the command line (`--config=FILE`, `--section.key=value`) and/or a
    parsed TOML dict.

    Raises ValueError (one line) for an unknown key, a wrong type or a value that no run could use.
    """
    path, given = _read_argv(argv)
    if path is not None:
        toml = _read_toml(path)
    return _build(_split_tables(toml or {}), given)


def load_saved_config(path):
    """Build the Config of a checkpoint, of this or an earlier version. path: its folder."""
    saved = _split_tables(_read_toml(Path(path) / "config.toml"))
    for section, values in saved.items():
        for key in list(values):
            if new := _renamed(section, key):
                value = values.pop(key)
                values[new] = _ffn_pattern(value, values) if new == "ffn_pattern" else value
    return _build(saved, {})


def _build(toml, given):
    """Build the Config of {section: {key: value}} and, stronger, {section: {key: text}}."""
    known = [*SECTIONS, *(f"mixer.{name}" for name in MIXERS)]
    for section in (*toml, *given):
        if section not in known:
            raise ValueError(f"unknown section {section}{nearest(section, known)}")

    def fill(section, options, *defaults):
        for values in (*defaults, toml.get(section, {})):
            _assign(options, section, values)
        _assign(options, section, given.get(section, {}), _parse)
        check_fields(section, options)
        return options

    def mixer_section(section, name, *defaults):
        mixer = MIXERS[name]
        return fill(section, mixer.Options(), *defaults, mixer.presets[model.preset])

    config = Config()
    model = config.model
    flavor = FLAVORS[fill("model", ModelConfig()).flavor]
    fill("model", model, flavor["model"])
    check_choice("model.mixer", model.mixer, MIXERS)
    softmax = [name for name, mixer in MIXERS.items() if mixer.softmax]
    check_choice("model.attention", model.attention, softmax)
    config.attention = mixer_section("attention", model.attention, flavor["attention"])
    if model.mixer == model.attention:
        config.mixer = fill("mixer", config.attention)
    else:
        config.mixer = mixer_section("mixer", model.mixer)
    for name in dict.fromkeys(layer_mixers(model)):
        if name not in (model.mixer, model.attention):
            config.mixers[name] = mixer_section(f"mixer.{name}", name)
    for section in (*toml, *given):
        _check_mixer_section(section, config)
    for section in SECTIONS:
        if section not in ("model", "mixer", "attention"):
            fill(section, getattr(config, section), flavor.get(section, {}))
    return config


def _check_mixer_section(section, config):
    """Refuse a [mixer.NAME] that no layer reads."""
    name = section.partition(".")[2]
    for key in ("mixer", "attention"):
        if name == getattr(config.model, key):
            raise ValueError(f"[{section}]: {name} is model.{key}, whose options are [{key}]")
    if name and name not in config.mixers:
        raise ValueError(
            f"[{section}]: model.pattern names no layer {name}; add one, or leave it out"
        )


def _toml_value(value):
    return json.dumps(value, ensure_ascii=False)  # of these types JSON and TOML write the same


def to_toml(config):
    """Write the resolved configuration as TOML, which load_config reads back to the same values."""
    lines = []
    for section, options in sections(config).items():
        lines.append(f"[{section}]")
        for f in dataclasses.fields(options):
            lines.append(f"{f.name} = {_toml_value(getattr(options, f.name))}")
        lines.append("")
    return "\n".join(lines)


def help_text():
    """Describe every field: default, constraints, meaning; every mixer's options under its name."""
    lines = [
        "train.py [--config=FILE.toml] [--section.key=value ...]",
        "",
        "[mixer] and [attention] hold the options of model.mixer and model.attention, [mixer.NAME]",
        "(--mixer.NAME.key=value) those of any other mixer NAME that model.pattern lists.",
        "",
    ]
    entries = [(section, "", options) for section, options in sections(Config()).items() if options]
    for name, mixer in MIXERS.items():
        section = "attention" if mixer.softmax else "mixer"
        entries.append((section, f"  (model.{section} = {name!r})", mixer.Options()))
    for section, remark, options in entries:
        lines.append(f"[{section}]{remark}")
        for f in dataclasses.fields(options):
            value = _toml_value(getattr(options, f.name))
            lines.append(f"  --{section}.{f.name}={value}{_constraints(f)}")
            lines.append(f"      {f.metadata['help']}")
        lines.append("")
    return "\n".join(lines)


def _constraints(f):
    limits = [f"{name} {bound}" for name, bound in f.metadata["bounds"].items()]
    limits = [*(f.metadata["choices"] or ()), *limits]
    return f"  ({', '.join(limits)})" if limits else ""
