"""Checkpoints made by strangers: nothing in them runs, hangs, or is read from elsewhere, and one
line names the file."""

import copy
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
from lmoe.config import load_config, to_toml
from lmoe.data.tokenizer import load_tokenizer
from lmoe.files import MOST_BYTES, read_regular
from lmoe.metrics import Totals
from lmoe.resume import resume_or_start
from tests.checkpoint.toy import Toy, adamw, train

BYTE = load_tokenizer("byte")
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


def repeat(metadata):
    entry = metadata.state_dict_metadata["model.load"]
    entry.size = entry.chunks[0].sizes = torch.Size([0])
    entry.chunks *= 2


EDITS = {
    "repeated": repeat,
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


def test_an_archive_is_hardly_longer_than_its_tensor(run):
    folder, _ = run
    path = folder / "step-3"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    os.truncate(path / place(path, "model.first.weight").relative_path, 1 << 22)  # sparse
    change("length", 1 << 21)(metadata)
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


SHORT, LONG = torch.zeros(0), torch.zeros(100_000)
MATRIX = torch.zeros(33, 7)
STATES = {
    "empty": ({"exp_avg": SHORT, "exp_avg_sq": SHORT}, r"exp_avg has shape \(0,\) instead of"),
    "long": ({"exp_avg_sq": LONG}, r"exp_avg_sq has shape \(100000,\) instead of"),
    "int8": ({"exp_avg": MATRIX.to(torch.int8)}, "exp_avg is torch.int8 instead of torch.float32"),
    "half": ({"exp_avg": MATRIX.half()}, "exp_avg is torch.float16 instead of"),
    "double": ({"exp_avg_sq": MATRIX.double()}, "exp_avg_sq is torch.float64 instead of"),
    "complex": ({"exp_avg": MATRIX.to(torch.complex64)}, "exp_avg is torch.complex64 instead of"),
    "no moment": ({"exp_avg_sq": None}, "exp_avg_sq is missing"),
    "no step": ({"step": None}, "step is missing"),
    "another": ({"max": MATRIX}, "max is unexpected"),
    "step of none": ({"step": SHORT}, r"step has shape \(0,\) instead of \(\)"),
    "steps": ({"step": torch.ones(5)}, r"step has shape \(5,\) instead of \(\)"),
    "whole step": ({"step": torch.tensor(3)}, "step is torch.int64 instead of torch.float32"),
    "negative step": ({"step": torch.tensor(-1.0)}, "step is -1.0, no count"),
    "half a step": ({"step": torch.tensor(0.5)}, "step is 0.5, no count"),
    "endless step": ({"step": torch.tensor(float("inf"))}, "step is inf, no count"),
}


@pytest.mark.parametrize("kind", STATES)
def test_optimizer_state_is_what_the_optimizer_makes(tmp_path, kind):
    """Its sizes are not the file's to choose: a fused step would read and write beyond them."""
    model = Toy()
    optimizers = adamw(model, fused=True)
    train(model, optimizers, 1)
    changes, message = STATES[kind]
    state = optimizers[0].state[model.first.weight]
    for key, value in changes.items():
        state.pop(key, None) if value is None else state.update({key: value})
    Checkpointer(tmp_path).save(1, model, optimizers, {}, sync=True)
    with pytest.raises(ValueError, match=f"optim.first.weight.{message}") as caught:
        Checkpointer(tmp_path).load(model, adamw(model, fused=True))
    assert "\n" not in str(caught.value)


def test_weights_alone_resume_no_run_that_has_trained(tmp_path):
    model = Toy()
    Checkpointer(tmp_path).save(1, model, adamw(model), {}, sync=True)
    with pytest.raises(ValueError, match=r"optim.first.bias.exp_avg is missing; .*"):
        Checkpointer(tmp_path).load(model, adamw(model))


def test_a_parameter_that_never_had_a_gradient_has_no_state(tmp_path):
    model = Toy()
    optimizers = adamw(model)
    model.first.weight.requires_grad_(False)
    train(model, optimizers, 1)
    Checkpointer(tmp_path).save(1, model, optimizers, {}, sync=True)
    again = adamw(model)
    Checkpointer(tmp_path).load(model, again)
    assert set(again[0].state) == {model.second.weight}


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


def nested(depth):
    """A pickle of a table of generators whose one entry holds, by name, twice the one within."""
    tuples = b"".join(b"q%ch%c\x86" % (level, level) for level in range(depth))
    return b"\x80\x02}\x8c\x06python)" + tuples + b"s."


def named(depth):
    """As nested, in the place of a tensor's name."""
    inner = nested(depth).removeprefix(b"\x80\x02}\x8c\x06python").removesuffix(b"s.")
    storage = b"(\x8c\x07storageN" + inner + b"\x8c\x03cpuK\x01tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x01\x85K\x01\x85tR"
    return b"\x80\x02}\x8c\x06python" + tensor + b"s."


@pytest.mark.parametrize(
    "kind", [*RNG, "nested", "named", "pickle", "pickle in an archive", "no archive", "pipe"]
)
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
        pickles = {"pickle in an archive": code, "nested": nested(60), "named": named(60)}
        archives = {name: archive(**{"data.pkl": data}) for name, data in pickles.items()}
        file.write_bytes((archives | {"pickle": code}).get(kind, b"ab"))
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


def test_a_file_is_read_whole_up_to_a_limit(run):
    folder, _ = run
    file = folder / "step-3" / "manifest.json"
    size = file.stat().st_size
    assert len(read_regular(file, size)) == len(read_regular(file, None)) == size
    with pytest.raises(OSError, match=f"more than {size - 1} bytes"):
        read_regular(file, size - 1)
    os.truncate(file, MOST_BYTES + 1)  # sparse
    assert verify(file.parent) == [f"manifest.json: unreadable (more than {MOST_BYTES:,} bytes)"]


TOTALS = {"samples": 6, "tokens": 96, "flops": 1e9, "skipped_steps": 2.0, "skipped_in_a_row": 1.0}
SOURCE = {"name": "a", "consumed": 6, "about": {}}
DATA = {"position": 6, "sources": {"b": SOURCE}, "seq_len": 16, "seed": 1}
EXTRA = {"step": 3, "tokenizer": BYTE.digest, "data": DATA, "totals": TOTALS}
EXTRAS = {
    "tokenizer": [None, [1], "word", {}, EXTRA | {"tokenizer": None}],
    "step": [EXTRA | {"step": step} for step in ("3", -3, 3.0, None, True, 4)],
    "data": [EXTRA | {"data": data} for data in (None, [])],
    "data.position": [None, "6", -6, 6.0, True, 0, 2, 10**30],
    "data.sources": [
        *(None, [], {}, {"b": 6}, {"b": {}}),
        *({"b": SOURCE | {"consumed": n}} for n in (None, -6, 6.0, "6", 0, 1 << 59)),
        *({"b": SOURCE | {"about": about}} for about in (None, [])),
        *({"b": SOURCE | {"name": name}} for name in (1, "a\x1b[31m", "a\nb")),
    ],
    "data.seed": ["1", 1.0, [], True],
    "data.seq_len": [None, "16", -16, 16.0, 0],
    "totals": [EXTRA | {"totals": totals} for totals in (None, [], TOTALS | {"more": 1})],
    "totals.samples": [None, -1, 6.0, True],
    "totals.flops": [None, "1", -1.0, float("nan"), float("inf"), 10**400],
    "totals.skipped_steps": [None, -1.0, float("nan"), 4.0, 0.5],
}


def extras():
    for key, values in EXTRAS.items():
        for value in values:
            section, _, name = key.partition(".")
            extra = EXTRA | {section: EXTRA[section] | {name: value}} if name else value
            yield pytest.param(key, extra, id=f"{key} {value!r:.20}" if name else key)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = load_config([f"--job.folder={folder}"])
    files = {"config.toml": to_toml(config)}
    model = Toy()
    optimizers = [torch.optim.AdamW(model.parameters())]
    train(model, optimizers, 3)
    Checkpointer(folder / "ckpt").save(3, model, optimizers, EXTRA, files, sync=True)
    return folder / "ckpt" / "step-3", config


def resume(trained, extra, branch=False):
    """Start from a checkpoint, the run's own or that of a branch, that holds `extra`."""
    path, config = trained
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"extra": extra}))
    reseal(path)
    config = copy.deepcopy(config)
    config.checkpoint.load_only_model = branch
    config.checkpoint.load = str(path) if branch else ""
    model = Toy()
    checkpointer = Checkpointer(path.parent / "branch" if branch else path.parent)
    return resume_or_start(config, checkpointer, model, torch.optim.AdamW(model.parameters()), BYTE)


def test_a_run_goes_on_from_a_checkpoint_of_an_earlier_version(trained):
    assert resume(trained, EXTRA) == (3, DATA, Totals(**TOTALS))
    earlier = {key: value for key, value in EXTRA.items() if key != "totals"}
    assert resume(trained, earlier) == (3, DATA, Totals(6, 96))


@pytest.mark.parametrize("key, extra", extras())
def test_a_run_goes_on_from_what_train_wrote(trained, key, extra):
    """A branch takes no more than the weights: all that matters is the tokenizer."""
    message = f"^checkpoint {trained[0]}: meta.json: extra: {key} [^\n]*$"
    with pytest.raises(ValueError, match=message):
        resume(trained, extra)
    if key == "tokenizer":
        with pytest.raises(ValueError, match=message):
            resume(trained, extra, branch=True)
    else:
        assert resume(trained, extra, branch=True) == (0, None, Totals())


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
