"""Odd TOML, words and paths: a configuration, or a ValueError of one line that names the key."""

import os
import pwd
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmoe import checkpoint, generate
from lmoe.command import as_word, reason
from lmoe.config import load_config, load_saved_config, to_toml
from lmoe.config.paths import FOLDERS, PATHS
from lmoe.data import prepare
from lmoe.kernels import check
from lmoe.model.build import build_model, on_meta

ROOT = Path(__file__).resolve().parent.parent


def refused(words, key, toml=None):
    """The message of a refusal, one line that names `key`."""
    with pytest.raises(ValueError) as caught:
        load_config(words, toml)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 700 and message.isprintable(), message
    assert key in message, message
    return message


ODD_FILES = {
    "Latin-1": b'[job]\nfolder = "\xe4"',
    "UTF-16": "[job]\nseed = 1".encode("utf-16"),
    "NUL": b'[job]\nfolder = "a\0b"',
    "deep list": b"[job]\nseed = " + b"[" * 100_000,
    "deep tables": b"[job]\nseed = " + b"{a=" * 50_000,
    "huge int": b"[job]\nseed = 1" + b"0" * 6000,
    "twice": b"[job]\nseed = 1\nseed = 2",
    "two tables": b"[job]\nseed = 1\n[job]\nfolder = 'x'",
    "carriage return": b"[job]\rseed = 3",
    "half": b'[job]\nfolder = "',
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_files_that_are_no_toml(name, tmp_path):
    (tmp_path / "x.toml").write_bytes(ODD_FILES[name])
    assert "is not valid TOML" in refused([f"--config={tmp_path}/x.toml"], f"--config={tmp_path}")


ODD_VALUES = {
    "training.steps = 2020-01-01": "training.steps",
    "training.steps = 12:00:00": "training.steps",
    "training.steps = inf": "training.steps",
    "training.steps = 1" + "0" * 30: "training.steps is beyond 32 bits",
    "model.dim = 2147483648": "model.dim is beyond 32 bits",
    "job.seed = -9223372036854775809": "job.seed is beyond 64 bits",
    f"job.folder = 0x1{'0' * 5000}": "job.folder",
    f"x = [{{{'a.' * 3000}a = 1}}]": ".. stands outside a section",
    f"data.paths = [{{{'a.' * 3000}a = 1}}]": "data.paths",
    f"training.steps.{'a.' * 3000}a = 1": "training.steps",
    "training.steps = true": "training.steps",
    "training.steps = {a = 1}": "training.steps",
    "training.steps = [1]": "training.steps",
    "optimizer.lr = nan": "optimizer.lr",
    "optimizer.lr = -inf": "optimizer.lr",
    "optimizer.lr = 1" + "0" * 400: "optimizer.lr is beyond 64 bits",
    "optimizer.lr = 1e308": "optimizer.lr = 1e+308 is beyond the range of float32",
    "optimizer.betas = [[0.9]]": "optimizer.betas",
    'data.paths = ["a", 1]': "data.paths",
    'job.folder = "a\\u0000b"': "job.folder",
    'job."se\\ned" = 1': "job.se\\ned",
    '"job\\n".seed = 1': "job\\n",
    '"".seed = 1': "unknown section",
    "[[job]]\nseed = 1": "job",
    "seed = 1": "seed = 1 stands outside a section",
    "[job.x]\nseed = 1": "job.x",
    '["mixer.gsa"]\nslots = 3\n[mixer.gsa]\nslots = 4': "mixer.gsa] is there twice",
    "[mixer.gsa.b.c]\nx = 1": "mixer.gsa",
    "[" + ".".join(["a"] * 3000) + "]\nx = 1": "unknown section a",
    "model.layers = 1000000000000": "model.layers",
}


@pytest.mark.parametrize("text", ODD_VALUES, ids=lambda text: text[:24])
def test_values_that_no_key_takes(text, tmp_path):
    (tmp_path / "x.toml").write_text(text)
    refused([f"--config={tmp_path}/x.toml"], ODD_VALUES[text])


def test_files_that_are_toml(tmp_path):
    path = tmp_path / "a ü.toml"
    for data, seed in (
        (b"", 1),
        (b"\xef\xbb\xbf[job]\r\nseed = 2\r\n", 2),
        (b"job.seed = 1_000", 1000),
        (b'"job"."seed" = 0x10', 16),
        (b"job = {seed = 5}", 5),
    ):
        path.write_bytes(data)
        for words in ([f"--config={path}"], ["--config", str(path)]):
            assert load_config(words).job.seed == seed


ODD_WORDS = {
    "--training.steps=1e400": "training.steps",
    "--training.steps=1" + "0" * 30: "training.steps",
    "--training.steps=" + "1" * 9000: "training.steps",
    "--training.steps=": "training.steps",
    "--training.steps=1.0": "training.steps",
    "--optimizer.lr=1e400": "optimizer.lr",
    "--optimizer.lr=1" + "0" * 400: "optimizer.lr",
    "--data.seq_len=1" + "0" * 400: "data.seq_len",
    "--optimizer.betas=" + "[" * 9000: "optimizer.betas",
    "--data.paths=" + "[" * 9000 + "]" * 9000: "data.paths",
    '--data.paths=["a\n"]': "data.paths",
    "--data.paths=[]\ny = 3": "data.paths",
    "--data.paths=,a,": None,
    '--data.paths=[""]': "data.paths",
    f"--data.paths=[{{{'a.' * 3000}a=1}}]": "data.paths",
    "--job.folder=": "job.folder",
    "--job.folder=\udcff": "job.folder",
    "--job.fol\nder=3": "job.fol\\nder",
    "--\x1b[31m.x=3": "\\x1b",
    "--model.mixer=\n": "model.mixer",
    '--model.pattern=["a\\nb"]': "model.pattern",
    "--model.pattern=": "model.pattern",
    "--model.layers=1000000000000": "model.layers",
    "--training.steps": "'--training.steps': write --section.key=value",
    "training.steps=3": "'training.steps=3': write",
    "--.=": "unknown section",
    "": "''",
    "-x": "'-x'",
    "--config": "--config: the path of a TOML file must follow",
    "--config=": "--config=",
    "--config=\0": "--config=",
    "--config=\udcff": "--config=",
    "--config=" + "a" * 5000: "--config=",
    "--config=/dev/zero": "--config=/dev/zero: not a regular file",
    "--config=/": "--config=/: not a regular file",
    "--config=README.md/x": "--config=README.md/x: Not a directory",
}


@pytest.mark.parametrize("word", ODD_WORDS, ids=lambda word: repr(word)[:24])
def test_words(word, monkeypatch):
    monkeypatch.chdir(ROOT)
    if ODD_WORDS[word] is None:
        load_config([word])
    else:
        refused([word], ODD_WORDS[word])


def test_the_last_of_repeated_words_wins(tmp_path):
    (tmp_path / "a.toml").write_text("job.seed = 3")
    (tmp_path / "b.toml").write_text("job.seed = 4\ntraining.steps = 7")
    words = ["--training.steps=8", f"--config={tmp_path}/a.toml", "--training.steps=9"]
    config = load_config([*words, "--config", f"{tmp_path}/b.toml"])
    assert (config.job.seed, config.training.steps) == (4, 9)
    refused(["--config", "--job.seed=1"], "--config: the path")


def words_at_random(rng):
    keys = ["training.steps", "optimizer.lr", "optimizer.betas", "data.paths", "job.folder"]
    keys += [
        "model.pattern",
        "compile.enable",
        "checkpoint.load",
        "mixer.gsa.slots",
        "data.mixture",
    ]
    parts = ["[", "]", "{", "}", '"', "'", "\\", "\n", "\0", "=", ",", "#", "1", "9" * 40, "e", "-"]
    parts += [".", "nan", "inf", "true", "~", "/", "..", "ü", "\ud800", "\x7f", "☃", " ", "0x", "_"]
    value = "".join(rng.choice(parts) for _ in range(rng.randrange(9)))
    return rng.choice(keys), value


def test_hundreds_of_odd_values(tmp_path, monkeypatch):
    """On the command line and in a file; what is taken is written so that it reads back."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(3)
    taken = 0
    for _ in range(400):
        key, value = words_at_random(rng)
        try:
            config = load_config([f"--{key}={value}"])
        except ValueError as error:
            message = str(error)
            assert message.isprintable() and re.search(r"\w+\.\w+|section", message), message
        else:
            taken += 1
            Path("config.toml").write_text(to_toml(config), encoding="utf-8")
            assert load_saved_config(tmp_path) == config == load_config(["--config=config.toml"])
        Path("x.toml").write_bytes(f"{key} = {value}".encode("utf-8", "surrogatepass"))
        try:
            load_config(["--config=x.toml"])
        except ValueError as error:
            message = str(error)
            assert message.isprintable() and re.search(r"\w+\.\w+|section", message), message
    assert taken > 60


EARLIER = ['"x"', "1.5", "[1]", "-1", "5", "9000000000000000000"]


@pytest.mark.parametrize("value", EARLIER)
def test_an_earlier_versions_key_may_hold_anything(value, tmp_path):
    (tmp_path / "config.toml").write_text(f"[model]\nlayers = 4\ndense_layers = {value}")
    with pytest.raises(ValueError, match=r"^model\.dense_layers [^\n]*$"):
        load_saved_config(tmp_path)


def test_sizes_beyond_all_tensors_name_a_key():
    config = load_config(["--model.dim=2000000000", "--model.vocab_size=64"])
    with pytest.raises(ValueError, match=r"^model\.dim = 2000000000 is too large[^\n]*$"):
        with on_meta(config):
            build_model(config)


# Paths


COMMANDS = {
    "checkpoint": lambda path: checkpoint.main(["verify", path]),
    "generate": lambda path: generate.main([path, "--device=cpu"]),
    "prepare": lambda path: prepare.main([path, "--paths", __file__, "--workers=0"]),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("path", ["", "~nobody-of-this-name/x", "~/no\nsuch\x1b[31m"])
def test_commands_treat_paths_alike(name, path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    try:
        COMMANDS[name](path)
        said = capsys.readouterr()
        said = said.err + said.out
    except (SystemExit, ValueError) as error:  # generate's is said where it is a command
        said = reason(error)
    assert len(said.strip().splitlines()) == 1 and said.strip().isprintable(), said
    assert not os.listdir(tmp_path) or os.listdir(tmp_path) == ["home"]
    if path:
        assert "no home folder" in said or f"{tmp_path}/home/no\\nsuch\\x1b" in said, said
    else:
        assert "is empty" in said, said


def test_a_path_is_no_option():
    assert as_word(Path("-x/ckpt")) == "./-x/ckpt" and as_word(Path("a b")) == "'a b'"


@pytest.mark.parametrize("words", [["lmoe.checkpoint", "verify", "."], ["lmoe.plan", "--help"]])
def test_a_reader_that_leaves_is_no_error(words, tmp_path):
    for step in range(3):
        (tmp_path / f"step-{step}").mkdir()
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *words]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert run.returncode == -signal.SIGPIPE and not run.stderr, run


@pytest.fixture(scope="module")
def odd_paths(tmp_path_factory):
    """{kind: a path that is none}"""
    folder = tmp_path_factory.mktemp("odd")
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "file").write_text("x")
    return {
        "fifo": folder / "fifo",
        "device": "/dev/zero",
        "loop": folder / "loop",
        "long name": folder / ("x" * 300),
        "long": "/x" * 5000,
        "file for a folder": folder / "file" / "x",
        "NUL": "a\0b",
        "no home": "~nobody-of-this-name/x",
        "not UTF-8": "a\udcff",
    }


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    "kind",
    [
        "fifo",
        "device",
        "loop",
        "long name",
        "long",
        "file for a folder",
        "NUL",
        "no home",
        "not UTF-8",
    ],
)
def test_every_key_refuses_what_is_no_path(key, kind, odd_paths):
    path = str(odd_paths[kind])
    refused([f"--{key}={path}"], key)
    section, name = key.split(".")
    refused([], key, {section: {name: [path] if name == "paths" else path}})


@pytest.mark.parametrize("key", FOLDERS)
def test_a_file_is_no_folder(key, odd_paths):
    assert "is no folder" in refused([f"--{key}={odd_paths['file for a folder'].parent}"], key)


@pytest.mark.parametrize("key", PATHS)
def test_home_is_the_users(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    section, name = key.split(".")
    (tmp_path / "x").mkdir()
    found = getattr(getattr(load_config([f"--{key}=~/x"]), section), name)
    assert found in (f"{tmp_path}/x", [f"{tmp_path}/x"])
    (tmp_path / "c.toml").write_text("job.seed = 7")
    assert load_config(["--config=~/c.toml"]).job.seed == 7


def test_a_user_without_a_home(monkeypatch):
    """A user id without an entry, as in containers, and no HOME."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert load_config(["--job.folder=x"]).job.folder == "x"
    for word in ("--job.folder=~/x", "--config=~/x"):
        assert "no home folder is known for '~/x'" in refused([word], word[2:12])
    assert check.cache_file() is None and check._remembered() == {}
    check._remember("key", "")
