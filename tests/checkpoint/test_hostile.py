"""Checkpoints made by strangers: nothing in them runs, hangs, or is read from elsewhere, and one
line names the file."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from lmoe import checkpoint_files
from lmoe.checkpoint import Checkpointer, load_model, main, verify
from tests.checkpoint.toy import Toy, adamw

ROOT = Path(__file__).parent.parent.parent


def reseal(path, manifest=None):
    """Write the manifest again, over what is there or as given."""
    names = [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]
    names.remove("manifest.json")
    files = checkpoint_files.seal(path, names) if manifest is None else manifest
    text = json.dumps({"files": files, "sha256": checkpoint_files._digest(files)})
    (path / "manifest.json").write_text(text)


def refused(path, name):
    """Every reader refuses the checkpoint in one line that names the file."""
    model = Toy()
    for load in (
        lambda: load_model(model, path),
        lambda: Checkpointer(path.parent).load(model, adamw(model), path),
    ):
        with pytest.raises(ValueError) as caught:
            load()
        assert name in str(caught.value) and "\n" not in str(caught.value), caught.value


def unsealed(path, name):
    """As refused; verify sees it too."""
    refused(path, name)
    (problem,) = verify(path)
    assert problem.startswith(f"{name}: ") and "\n" not in problem
    assert main(["verify", str(path)]) == 1


# --------------------------------------------------------------------------------------------------
# pickles


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


PICKLES = {
    "protocol 4": lambda made: pickle.dumps(Runs(made)),
    "protocol 0": lambda made: pickle.dumps(Runs(made), protocol=0),
    "INST": lambda made: f"(V{made}\nios\nmkdir\n.".encode(),
    "dotted name": lambda made: (
        b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93\x8c\x02ls\x85R."
    ),
    "bytes": lambda made: pickle.dumps(BytesStorageMetadata()),
    "state of a class": lambda made: b"\x80\x04\x8c\x05torch\x8c\x04Size\x93}\x8c\x01a\x8c\x01bsb.",
    "extension": lambda made: b"\x80\x04\x82\x01.",
    "deep keys": lambda made: b"\x80\x04})" + b"\x85" * 200_000 + b"K\x01s.",
    "deep name": lambda made: b"\x80\x04)" + b"\x85" * 200_000 + b".",
    "huge memo": lambda made: b"\x80\x02Nr\xff\xff\xff\xff.",
    "huge string": lambda made: b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "empty": lambda made: b"",
    "cut": lambda made: b"\x80\x04(((",
    "number": lambda made: b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_strangers_metadata_runs_no_code(run, tmp_path, kind):
    folder, _ = run
    path = folder / "step-3"
    (path / ".metadata").write_bytes(PICKLES[kind](tmp_path / "made"))
    reseal(path)
    unsealed(path, ".metadata")
    model = Toy()
    assert Checkpointer(folder).load(model, adamw(model)) == {"step": 2}
    assert not (tmp_path / "made").exists()


def test_a_bytes_entry_is_not_unpickled(run, tmp_path):
    """torch's own planner unpickles those with everything allowed."""
    folder, _ = run
    path = folder / "step-3"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.load"] = BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path)
    unsealed(path, ".metadata")


def change(key, value):
    def edit(metadata):
        for index, info in metadata.storage_data.items():
            if index.fqn == "model.first.weight":
                setattr(info, key, value)

    return edit


def resize(metadata):
    metadata.state_dict_metadata["model.first.weight"].size = torch.Size([33, 8])


def move(metadata):
    metadata.state_dict_metadata["model.first.weight"].chunks[0].offsets = torch.Size([1, 0])


def rename(metadata):
    entries = metadata.state_dict_metadata
    entries["model\nline"] = entries.pop("model.first.weight")


def negative(metadata):
    chunk = metadata.state_dict_metadata["model.first.weight"].chunks[0]
    chunk.sizes = (-33, -7)


def forget(metadata):
    metadata.storage_data.clear()


EDITS = {
    "up": change("relative_path", "../step-2/__0_0.distcp"),
    "absolute": change("relative_path", "/etc/passwd"),
    "unlisted": change("relative_path", "manifest.json"),
    "no path": change("relative_path", None),
    "beyond": change("offset", 10**9),
    "before": change("offset", -5),
    "endless": change("length", 10**12),
    "short": change("length", 3),
    "transformed": change("transform_descriptors", ["zstd"]),
    "larger": resize,
    "moved": move,
    "renamed": rename,
    "negative": negative,
    "forgotten": forget,
}


@pytest.mark.parametrize("kind", EDITS)
def test_metadata_stays_inside_its_tensors_and_files(run, kind):
    folder, _ = run
    path = folder / "step-3"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    EDITS[kind](metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path)
    unsealed(path, ".metadata")


def place(path, key):
    metadata = pickle.loads((path / ".metadata").read_bytes())
    return next(info for index, info in metadata.storage_data.items() if index.fqn == key)


def put(path, key, data):
    """Overwrite where a tensor lies, without changing any length."""
    info = place(path, key)
    assert len(data) <= info.length
    with open(path / info.relative_path, "r+b") as file:
        file.seek(info.offset)
        file.write(data.ljust(info.length, b"\0"))


def archive(**files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as made:
        for name, content in files.items():
            made.writestr(f"a/{name.replace('_', '/')}", content)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["pickle", "zip of a pickle", "short", "nothing", "order"])
def test_a_strangers_tensors_run_no_code(run, tmp_path, kind):
    folder, _ = run
    path = folder / "step-3"
    code = pickle.dumps(Runs(tmp_path / "made"))
    data = {
        "pickle": code,
        "zip of a pickle": archive(**{"data.pkl": code}),
        "short": archive(data_0=b"12345678"),
        "nothing": b"",
        "order": archive(data_0=bytes(33 * 7 * 4), byteorder=b"big"),
    }[kind]
    info = place(path, "model.first.weight")
    # its end is where an archive is looked for
    put(path, "model.first.weight", data.rjust(info.length, b"\0") if kind != "nothing" else data)
    reseal(path)
    refused(path, f"{info.relative_path}: model.first.weight: ")
    assert not (tmp_path / "made").exists()


def with_numpy(position=3, count=624):
    def edit(state):
        name, keys, _, *rest = state["numpy"]
        state["numpy"] = (name, keys[:1].repeat(count), position, *rest)

    return edit


RNG = {
    "NumPy beyond its state": with_numpy(position=10**6),
    "NumPy's position no number": with_numpy(position="a"),
    "NumPy too short": with_numpy(count=5),
    "Python too short": lambda state: state.update(python=(3, torch.arange(4), None)),
    "Python's normal": lambda state: state.update(
        python=(state["python"][0], state["python"][1], "a")
    ),
    "torch too short": lambda state: state.update(torch=torch.zeros(4, dtype=torch.uint8)),
    "torch of another dtype": lambda state: state.update(torch=torch.zeros(5056)),
    "nothing": lambda state: state.clear(),
}


@pytest.mark.parametrize("kind", [*RNG, "pickle", "pickle in an archive", "no archive", "pipe"])
def test_a_strangers_generators_are_checked(run, tmp_path, kind):
    folder, _ = run
    path = folder / "step-3"
    file = path / "rng-0.pt"
    code = pickle.dumps(Runs(tmp_path / "made"))
    if kind in RNG:
        state = torch.load(file, weights_only=True)
        RNG[kind](state)
        torch.save(state, file)
    else:
        archived = archive(**{"data.pkl": code})
        file.write_bytes({"pickle": code, "pickle in an archive": archived}.get(kind, b"ab"))
    reseal(path)
    if kind == "pipe":
        file.unlink()
        os.mkfifo(file)
    before = np.random.get_state()[1].copy()
    model = Toy()
    with pytest.raises(ValueError, match="rng-0.pt: ") as caught:
        Checkpointer(folder).load(model, adamw(model), path)
    assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()
    assert (np.random.get_state()[1] == before).all()


# --------------------------------------------------------------------------------------------------
# meta.json, manifests, pipes

METAS = [
    "",
    "[]",
    "[" * 100_000,
    '{"step": 3}',
    '{"step": true, "world_size": 1, "optimizers": [], "extra": {}}',
    '{"step": 3, "world_size": 1, "optimizers": [1], "extra": {}}',
    '{"step": 3, "world_size": "1", "optimizers": [], "extra": {}}',
    '{"step": 3, "world_size": 1, "optimizers": [], "extra": {}, "healthy": "no"}',
]


@pytest.mark.parametrize("text", METAS, ids=range(len(METAS)))
def test_meta_json_is_checked(run, text):
    folder, _ = run
    (folder / "step-3" / "meta.json").write_text(text)
    reseal(folder / "step-3")
    unsealed(folder / "step-3", "meta.json")


SHA = "0" * 64
ENTRIES = {
    "../step-2/meta.json": {"bytes": 1, "sha256": SHA},
    "/etc/passwd": {"bytes": 1, "sha256": SHA},
    "a/../b": {"bytes": 1, "sha256": SHA},
    "two\nlines": {"bytes": 1, "sha256": SHA},
    "\ud800": {"bytes": 1, "sha256": SHA},
    "": {"bytes": 1, "sha256": SHA},
    "negative": {"bytes": -1, "sha256": SHA},
    "word": {"bytes": "1", "sha256": SHA},
    "bool": {"bytes": True, "sha256": SHA},
    "digest": {"bytes": 1, "sha256": "x"},
    "list": [],
    "nothing": None,
}


@pytest.mark.parametrize("name", ENTRIES, ids=ascii)
def test_a_manifest_lists_files_of_its_folder(run, name):
    folder, _ = run
    path = folder / "step-3"
    files = checkpoint_files.read_manifest(path)[0]
    reseal(path, files | {name: ENTRIES[name]})
    unsealed(path, "manifest.json")


@pytest.mark.parametrize("name", [".metadata", "meta.json", "rng-0.pt"])
def test_only_what_the_manifest_lists_is_read(run, name):
    folder, _ = run
    path = folder / "step-3"
    files = checkpoint_files.read_manifest(path)[0]
    files.pop(name)
    reseal(path, files)
    model = Toy()
    with pytest.raises(ValueError, match=f"{name}: not listed"):
        Checkpointer(folder).load(model, adamw(model), path)


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "meta.json", "config.toml"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_reported_at_once(run, name, kind):
    folder, _ = run
    path = folder / "step-3"
    (path / name).unlink()
    os.mkfifo(path / name) if kind == "pipe" else (path / name).symlink_to("/dev/zero")
    for module, words in (("checkpoint", ["verify"]), ("generate", ["--device=cpu"])):
        if (module, name) != ("generate", "config.toml"):
            continue
        command = [sys.executable, "-m", f"lmoe.{module}", *words, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"{name}: unreadable (not a regular file)" in done.stderr
    unsealed(path, name)
    model = Toy()
    checkpointer = Checkpointer(folder, keep=1)
    assert checkpointer.load(model, adamw(model)) == {"step": 2}
    checkpointer.save(4, model, [], {}, sync=True)


def test_links_to_files_are_fine(run, tmp_path):
    folder, _ = run
    file = folder / "step-3" / "__0_0.distcp"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    model = Toy()
    assert Checkpointer(folder).load(model, adamw(model)) == {"step": 3}


# --------------------------------------------------------------------------------------------------
# the command line


def test_verify_takes_the_folder_of_a_job_and_says_where_there_is_nothing(run, tmp_path, capsys):
    folder, _ = run
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("whole") == 3
    model = Toy()
    assert load_model(model, tmp_path) == {"step": 3}
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere", "file"):
        assert main(["verify", str(tmp_path / name)]) == 1
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1 and name in err
    (folder / "step-3" / "manifest.json").unlink()
    assert main(["verify", str(folder / "step-3")]) == 1
    assert "step-3: damaged\n    manifest.json: missing" in capsys.readouterr().out
