"""The configuration: from a TOML file and the command line to a checked Config.

Order, later ones winning: the dataclasses' defaults, the flavour and the preset, the TOML file,
`--section.key=value`. Every error is one line that names the key, says why, and what would work.
A `~` at the start of a path is the home folder.
"""

import contextlib
import dataclasses
import json
import logging
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

from lmoe.command import at_home, reason
from lmoe.config.paths import check_paths
from lmoe.config.sections import SECTIONS, Config, sections
from lmoe.files import read_regular
from lmoe.model.build import layer_mixers
from lmoe.model.config import FLAVORS, ModelConfig, check_choice, check_fields, nearest
from lmoe.model.mixers import MIXERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _ffn_pattern(dense_layers, model):
    """model.ffn_pattern of what an earlier version called dense_layers. model: its section."""
    dense = _convert("model.dense_layers", dense_layers, int)
    layers = _convert("model.layers", model.get("layers", ModelConfig.layers), int)
    if not 0 <= dense <= layers <= 10_000:
        raise ValueError(f"model.dense_layers = {dense} are not among model.layers = {layers}")
    return "D" * dense + "E" * (layers - dense) if dense else "E"


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


logger = logging.getLogger("lmoe")

LARGEST = 3.4e38


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Print what is not printable in an error as its escape, and cut what is very long."""
    try:
        yield
    except ValueError as error:
        raise ValueError(reason(error)) from None


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
    elif type(value) is int and kind in (int, float):
        bits = 32 if kind is int and not key.endswith("seed") else 64
        if not -(1 << bits - 1) <= value < 1 << bits - 1:
            raise ValueError(f"{key} is beyond {bits} bits")
        return kind(value)
    elif type(value) is kind:
        if kind is str and not _is_text(value):
            raise ValueError(f"{key} = {value!r} holds a NUL or what is not UTF-8")
        if kind is float and LARGEST < abs(value) < float("inf"):
            raise ValueError(f"{key} = {value} is beyond the range of float32")
        return value
    name = str(kind) if options else "true or false" if kind is bool else kind.__name__
    raise ValueError(f"{key} = {_shown(value)} has the wrong type: {name} is expected")


def _shown(value):
    try:
        text = repr(value)
        return text if len(text) < 100 else f"{text[:97]}.."
    except (RecursionError, ValueError):  # ValueError: of an integer of thousands of digits
        return ".."


def _is_text(value: str) -> bool:
    with contextlib.suppress(UnicodeEncodeError):
        return "\0" not in value and bool(value.encode() or True)
    return False


def _parse(key, text, kind):
    """The value of a command-line word: booleans, numbers, strings, and lists as `a,b` or `["a",
    "b"]`."""
    value = text
    if typing.get_args(kind) and text.startswith("["):
        try:
            (value,) = tomllib.loads(f"x = {text}").values()
        except (ValueError, RecursionError) as error:
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
    words = iter(argv)
    for argument in words:
        if argument == "--config":
            path = next(words, "")
            if not path or path.startswith("--"):
                raise ValueError("--config: the path of a TOML file must follow")
            continue
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
    key = f"--config={path}"
    try:
        return tomllib.loads(read_regular(at_home(key, str(path))).decode("utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{key}: no such file") from None
    except OSError as error:
        raise ValueError(f"{key}: {error.strerror}; a TOML file is needed") from None
    except RecursionError:
        raise ValueError(f"{key} is not valid TOML: nested too deep") from None
    except ValueError as error:  # also of a NUL in the path, bytes that are not UTF-8, huge numbers
        if str(error).startswith(key):
            raise
        raise ValueError(f"{key} is not valid TOML: {error}") from None


def _split_tables(toml):
    """Make {section: {key: value}} of parsed TOML; a table in a section is "section.table"."""
    sections = {}
    for section, values in toml.items():
        if not isinstance(values, dict):
            raise ValueError(
                f"{section} = {_shown(values)} stands outside a section: write [section] and then"
                " key = value"
            )
        sections[section] = {}
        for key, value in values.items():
            if isinstance(value, dict):
                if f"{section}.{key}" in toml:
                    raise ValueError(f"section [{section}.{key}] is there twice")
                sections[f"{section}.{key}"] = value
            else:
                sections[section][key] = value
    return sections


def load_config(argv=(), toml=None):
    """Build the Config from the command line (`--config=FILE`, `--section.key=value`) and/or a
    parsed TOML dict.

    Raises ValueError (one line) for an unknown key, a wrong type or a value that no run could use.
    """
    with _one_line():
        path, given = _read_argv(argv)
        if path is not None:
            toml = _read_toml(path)
        config = _build(_split_tables(toml or {}), given)
        check_paths(config)
        return config


def load_saved_config(path):
    """Build the Config of a checkpoint, of this or an earlier version. path: its folder."""
    with _one_line():
        saved = _split_tables(_read_toml(Path(path) / "config.toml"))
        for section, values in saved.items():
            for key in list(values):
                if new := _renamed(section, key):
                    value = values.pop(key)
                    values[new] = _ffn_pattern(value, values) if new == "ffn_pattern" else value
            _drop_idle_head_dim(values, saved.get("model", {}))
        return _build(saved, {}, presets=False)


def _drop_idle_head_dim(values, model):
    """Drop the head_dim that an earlier version kept in a section though heads overruled it."""
    heads = values.get("heads")
    if "d_state" in values and heads:
        width = model.get("dim", ModelConfig.dim) * values.get("expand", 2.0)
        if heads * values.get("head_dim", 0) != width:
            values["head_dim"] = 0


def _build(toml, given, presets=True):
    """Build the Config of {section: {key: value}} and, stronger, {section: {key: text}}. presets:
    whether these do not hold all that the model is, so that presets fill it up."""
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
        preset = mixer.presets[model.preset] if presets else {}
        options = fill(section, mixer.Options(), *defaults, preset)
        if not mixer.softmax:
            named = [HEADS & set(values.get(section, ())) for values in (given, toml)]
            _settle_heads(section, options, named, preset, model)
        return options

    config = Config()
    model = config.model
    flavor = FLAVORS[fill("model", ModelConfig()).flavor]
    model.init_std = 0.0  # that of the default width
    fill("model", model, flavor["model"]).__post_init__()
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


HEADS = {"heads", "head_dim"}


def _settle_heads(section, options, named, preset, model):
    """Let heads or head_dim win over a weaker value of the other one, and model.heads over a
    preset's head_dim of which two or more do not make up the width. named: which of HEADS the
    command line gives and which the file."""
    strongest = next(filter(None, named), set())
    if options.heads and options.head_dim and len(strongest) == 1:
        (other,) = HEADS - strongest
        setattr(options, other, 0)
    size = options.head_dim
    width = options.width(model)
    if (
        size
        and "head_dim" in preset.keys() - set.union(*named)
        and (width < 2 * size or width % size)
    ):
        options.head_dim = 0
        logger.info(
            f"{section}.head_dim = {size} of the preset {model.preset}: two heads or more of it do"
            f" not make up {width:g} channels; model.heads = {model.heads} heads do"
        )


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
    # Of these types JSON and TOML write the same, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_toml(config):
    """Write the resolved configuration as TOML, which load_config reads back to the same values."""
    lines = []
    for section, options in sections(config).items():
        lines.append(f"[{section}]")
        for f in dataclasses.fields(options):
            lines.append(f"{f.name} = {_toml_value(getattr(options, f.name))}")
        lines.append("")
    return "\n".join(lines)


USAGE = """train.py [--config=FILE.toml] [--section.key=value ...]
train.py --help=SECTION      the keys of a section with their meanings, of all sections: --help=all

[mixer] and [attention] hold the options of model.mixer and model.attention, [mixer.NAME]
(--mixer.NAME.key=value) those of any other mixer NAME that model.pattern lists.
"""


def _topic(words):
    """The section that words ask about: `--help=SECTION`, `--help SECTION`, or ""."""
    words = list(words)
    for at, word in enumerate(words):
        if word.startswith("--help="):
            return word.partition("=")[2]
        if word in ("-h", "--help") and at + 1 < len(words) and not words[at + 1].startswith("-"):
            return words[at + 1]
    return ""


def help_text(words: Iterable[str] = ()) -> str:
    """Describe the sections in a line each or, for the words `--help=SECTION` or `--help SECTION`,
    every field of one: default, constraints, meaning; every mixer's options under its name."""
    entries = [(section, "", options) for section, options in sections(Config()).items() if options]
    for name, mixer in MIXERS.items():
        section = "attention" if mixer.softmax else "mixer"
        entries.append((section, f"  (model.{section} = {name!r})", mixer.Options()))
    topic = _topic(words)
    if not topic:
        return _overview(entries)
    section, _, name = topic.strip("[]").partition(".")
    known = [*SECTIONS, *(f"mixer.{name}" for name in MIXERS), "all"]
    with _one_line():
        if topic.strip("[]") not in known:
            raise ValueError(f"--help={topic}: unknown section{nearest(topic, known)}")
    lines = []
    for of, remark, options in entries:
        if section not in (of, "all") and not (name and f"{name!r}" in remark):
            continue
        if name and f"{name!r}" not in remark:
            continue
        lines.append(f"[{of}]{remark}")
        for f in dataclasses.fields(options):
            given = f.default_factory() if f.default is dataclasses.MISSING else f.default
            lines.append(f"  --{of}.{f.name}={_toml_value(given)}{_constraints(f)}")
            lines.append(f"      {f.metadata['help']}")
        lines.append("")
    return "\n".join(lines)


def _overview(entries):
    """The usage, and the keys of each section in one line."""
    keys = {}
    for section, _, options in entries:
        names = dict.fromkeys(f.name for f in dataclasses.fields(options))
        keys[section] = keys.get(section, {}) | names
    lines = [
        f"  {section:22}{textwrap.shorten(', '.join(names), 76, placeholder=' ..')}"
        for section, names in keys.items()
    ]
    return "\n".join([USAGE, *lines, ""])


def _constraints(f):
    limits = [f"{name} {bound}" for name, bound in f.metadata["bounds"].items()]
    limits = [*(f.metadata["choices"] or ()), *limits]
    return f"  ({', '.join(limits)})" if limits else ""
