"""The pages: files, keys and commands that they name exist, and the mixer of docs/adding_a_mixer.md
is one like any other."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lmoe.config import help_text, load_config
from lmoe.model.mixers import MIXERS
from tests.harness import layouts
from tests.harness.compare import TINY, differences, run_layout
from tests.model import test_mixers
from tests.model.variants import MIXER_VARIANTS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path for path in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"] if path.exists()
]
FOLDERS = ["benchmarks", "docs", "kernels", "lmoe", "tests", "train_configs"]
WRITTEN = {"config.toml"}  # by a run, into its own folder

GUIDE = ROOT / "docs" / "adding_a_mixer.md"
NEW_FILE = "lmoe/model/mixers/fixed_decay.py"
NEW_FILES = {NEW_FILE, "kernels/chunk/average.py", "kernels/families/average.py"}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, kind):
    """The fenced blocks of a kind on a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def fixed_decay(tmp_path_factory):
    """The page's mixer, registered while this module's tests run: the names of its variants."""
    assert "fixed_decay" not in MIXERS and not (ROOT / NEW_FILE).exists()
    (code,) = blocks(GUIDE, "python")
    path = tmp_path_factory.mktemp("guide") / "fixed_decay.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("fixed_decay", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fixed_decay", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        patch.setitem(MIXERS, "fixed_decay", module.FixedDecay)
        for preset, options in module.FixedDecay.presets.items():
            patch.setitem(MIXER_VARIANTS, f"fixed_decay-{preset}", ("fixed_decay", options))
        yield


PROPERTIES = {
    "memory": test_mixers.test_a_slow_mixer_remembers,
    "leak": test_mixers.test_documents_do_not_leak,
    "causality": test_mixers.test_the_future_does_not_leak,
    "packing": test_mixers.test_packed_is_separate,
    "rows": test_mixers.test_rows_are_a_way_to_lay_out_a_stream,
    "decoding": lambda variant: test_mixers.test_decoding_is_the_forward_pass(
        variant, [1, 15, 16, 17]
    ),
    "decoding from nothing": test_mixers.test_decoding_from_nothing,
    "flops": test_mixers.test_flops_of_projections_are_counted,
}


@pytest.mark.parametrize("variant", ["fixed_decay-uniform", "fixed_decay-faithful"])
@pytest.mark.parametrize("name", PROPERTIES)
def test_the_mixer_of_the_page(fixed_decay, name, variant):
    PROPERTIES[name](variant)


def train_on_ranks(code, words):
    """Two steps with the page's mixer, registered in this process."""
    module = types.ModuleType("fixed_decay")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fixed_decay", module)
        exec(code, module.__dict__)
        patch.setitem(MIXERS, "fixed_decay", module.FixedDecay)
        return run_layout(
            words, toml=TINY | {"model": TINY["model"] | {"mixer": "fixed_decay", "pattern": "LLN"}}
        )


@pytest.mark.xdist_group("world4")
def test_the_mixer_of_the_page_on_four_ranks(pools, one_rank):
    (code,) = blocks(GUIDE, "python")
    alone = train_on_ranks(code, [])
    for result in pools(4).run(train_on_ranks, code, ["--parallel.tp=2", "--parallel.cp=2"]):
        assert max(differences(alone, result).values()) < 1e-9


def test_the_mixer_of_the_page_refuses_an_odd_head_size(fixed_decay):
    config = load_config(["--model.mixer=fixed_decay", "--mixer.rope=true", "--model.dim=12"])
    with pytest.raises(ValueError, match="mixer.rope needs an even head size, not 3"):
        config.mixer.shape(config.model)


def tree():
    """All files of the repository, relative to it, and the folders that hold them."""
    files = [
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if "__pycache__" not in path.parts
    ]
    files += [path.relative_to(ROOT) for path in ROOT.iterdir() if path.is_file()]
    names = {path.as_posix() for path in files}
    return names | {f"lmoe/{name}" for name in names if name.startswith("kernels/")}  # the symlink


@every_page
def test_files_exist(page):
    """Links; words anywhere that begin with a folder of the repository; and names of source files
    in backticks, whole or as an end of a path (the pages shorten within their subject)."""
    text, there = page.read_text(), tree() | NEW_FILES
    links = [
        link.split("#")[0]
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if not re.match(r"\w+:|#", link)
    ]
    missing = [link for link in links if not (page.parent / link).exists()]
    words = re.findall(rf"(?<![\w./-])(?:\./)?((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", text)
    missing += [word for word in words if word not in there]
    names = re.findall(
        r"`([\w./-]+\.(?:py|md|sh|toml))`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )
    ends = {name: "/" + name.replace("../", "").removeprefix("./") for name in names}
    missing += [
        name
        for name, end in ends.items()
        if name not in WRITTEN and not any(f"/{path}".endswith(end) for path in there)
    ]
    assert not missing


@every_page
def test_keys_exist(page, fixed_decay):
    known = set(re.findall(r"--(\w+\.\w+)=", help_text(["--help=all"]))) | {"section.key"}
    named = set(re.findall(r"--([a-z_]\w*\.\w+)", page.read_text()))
    assert named <= known


def training_commands():
    """(page, words) of every call of run_train.sh or train.py in the pages' shell blocks."""
    for page in PAGES:
        for line in (
            "\n".join(blocks(page, "(?:bash|sh|console)?")).replace("\\\n", " ").splitlines()
        ):
            before, script, after = re.sub(r"\s#.*", "", line).partition(
                "run_train.sh" if "run_train.sh" in line else "python train.py"
            )
            if script:
                given = [
                    word
                    for word in shlex.split(re.split(r"&&|;|\|", after)[0])
                    if word.startswith("--")
                ]
                config = re.search(r"CONFIG=(\S+)", before)
                yield (
                    page.name,
                    [
                        f"--config={ROOT / config[1]}"
                        if config
                        else f"--config={ROOT}/train_configs/debug.toml",
                        *given,
                    ],
                )


@pytest.mark.parametrize(
    "page, words", [pytest.param(*c, id=f"{c[0]}-{i}") for i, c in enumerate(training_commands())]
)
def test_commands_have_a_configuration(page, words, fixed_decay, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "--help" not in words:
        load_config(words)


def apply(diff, text):
    """A diff of lines to add, in hunks that begin with @@."""
    for hunk in re.split(r"^@@\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] == " ")
        assert text.count(before) == 1, before
        text = text.replace(before, "".join(line[1:] for line in lines))
    return text


@pytest.mark.slow
def test_following_the_page(tmp_path):
    """In a copy of the repository: the file, the line, and then every command as it stands."""
    for name in [*FOLDERS, "train.py", "run_train.sh", "pyproject.toml"]:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                tmp_path / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    (code,), (diff,), (commands,) = (
        blocks(GUIDE, "python"),
        blocks(GUIDE, "diff"),
        blocks(GUIDE, "bash"),
    )
    (tmp_path / NEW_FILE).write_text(code)
    registry = tmp_path / "lmoe" / "model" / "mixers" / "__init__.py"
    registry.write_text(apply(diff, registry.read_text()))
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {
        **inherited,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tmp_path),
        "PATH": path,
        "PYTHON": sys.executable,
    }
    for command in commands.splitlines():
        run = subprocess.run(
            ["bash", "-euc", command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert run.returncode == 0, f"{command}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        if command.startswith("pytest"):
            assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 20, run.stdout


def test_the_table_of_layouts_is_that_of_the_tests():
    assert layouts.table() in (ROOT / "docs/parallelism.md").read_text()
