"""Where a run stands in its data, on the day after the data moved, changed or were exchanged."""

import json
import logging
import os
import shutil

import pytest
from hash_chain import make_config
from test_corpus import CHANGES, changed_keeping_its_time, spelt, write

from lmoe.data.loader import build_loader
from lmoe.data.tokenizer import load_tokenizer

BYTE = load_tokenizer("byte")


def open_loader(folder, state=None, **data):
    seed = data.pop("seed", 1)
    data = {"source": "text", "cache": str(folder / "cache"), **data}
    return build_loader(make_config(str(folder), seed=seed, **data), BYTE, state=state)


def following(loader, steps=30):
    """The next rows, over the end of an epoch."""
    iterator = iter(loader)
    rows = [next(iterator)[0].labels.tolist() for _ in range(steps)]
    iterator.close()
    return rows


@pytest.fixture
def trained(tmp_path):
    """(folder, text, state after 7 steps, the rows that would have come)."""
    text = write(tmp_path / "text")
    loader = open_loader(tmp_path, paths=[str(text)])
    rows = following(loader, 37)
    return tmp_path, text, json.loads(json.dumps(loader.state(7))), rows[7:]


def test_a_run_goes_on_wherever_its_text_lies(trained, monkeypatch, caplog):
    folder, text, state, rows = trained
    monkeypatch.setenv("HOME", str(folder))
    caplog.set_level("WARNING")
    for way, paths in spelt(text, folder / "elsewhere").items():
        assert following(open_loader(folder, state, paths=list(map(str, paths)))) == rows, way
    shutil.rmtree(text)
    shutil.rmtree(folder / "cache")
    assert following(open_loader(folder, state, paths=[str(folder / "elsewhere")])) == rows
    assert not caplog.records


def test_a_run_keeps_the_seed_of_its_order(trained, caplog):
    folder, text, state, rows = trained
    caplog.set_level("INFO")
    loader = open_loader(folder, state, paths=[str(text)], seed=2)
    assert following(loader) == rows and loader.state(0)["seed"] == 1
    assert "keeps the checkpoint's seed 1" in caplog.text
    assert following(open_loader(folder, paths=[str(text)], seed=2))[7:] != rows


def test_synthetic_data_keep_their_seed_too(tmp_path):
    loader = open_loader(tmp_path, source="mqar")
    rows = following(loader)
    assert following(open_loader(tmp_path, loader.state(7), source="mqar", seed=2), 23) == rows[7:]


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_corpus_is_refused_or_accepted(trained, kind, caplog):
    folder, text, state, _ = trained
    change, said = CHANGES[kind]
    changed_keeping_its_time(text, change)
    with pytest.raises(ValueError) as error:
        open_loader(folder, state, paths=[str(text)])
    message = str(error.value)
    assert message.startswith("data.accept_changes = false: ") and "\n" not in message
    assert said in message
    loader = open_loader(folder, state, paths=[str(text)], accept_changes=True)
    assert said in caplog.text
    (entry,) = loader.state(0)["sources"].values()  # from where it stands, once
    assert entry["consumed"] == loader.state(0)["position"] == state["position"]
    following(open_loader(folder, loader.state(0), paths=[str(text)]))


OTHERS = {
    "text": ({"paths": ["text/d1.txt"]}, "over text:.*, this one is over text:"),
    "mqar": ({"source": "mqar"}, "over text:.*, this one is over mqar"),
    "fraction": ({"paths": ["text"], "validation_fraction": 0.3}, "validation_fraction = 0.3, was"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_data_of_another_run_are_refused(trained, kind, monkeypatch):
    folder, _, _, _ = trained
    monkeypatch.chdir(folder)
    state = open_loader(folder, paths=["text"]).state(7)
    data, said = OTHERS[kind]
    with pytest.raises(ValueError, match=f"^data.accept_changes = false: [^\n]*{said}[^\n]*$"):
        open_loader(folder, state, **data)
    open_loader(folder, state, **data, accept_changes=True)


def test_what_a_source_was_called_does_not_count(tmp_path, caplog):
    """Folders that change places keep their own counts, and one that comes back is known."""
    caplog.set_level("INFO")
    a, b = (write(tmp_path / name, {"x.txt": f"{name} fox " * 400}) for name in "ab")
    mixture = [f"0.7 text:{a}", f"0.3 text:{b}"]
    options = {"paths": [], "validation_fraction": 0.2}
    loader = open_loader(tmp_path, mixture=mixture, **options)
    state = loader.state(9)
    counts = {entry["name"]: entry["consumed"] for entry in state["sources"].values()}
    os.rename(a, tmp_path / "c")
    os.rename(b, a)
    os.rename(tmp_path / "c", b)
    swapped = open_loader(tmp_path, state, mixture=mixture, **options).state(0)
    now = {entry["name"]: entry["consumed"] for entry in swapped["sources"].values()}
    assert now == {f"text:{a}": counts[f"text:{b}"], f"text:{b}": counts[f"text:{a}"]}
    alone = open_loader(tmp_path, state, source="text", paths=[str(a)], validation_fraction=0.2)
    assert alone.state(0)["sources"] == {
        fingerprint: entry if entry["name"] == f"text:{a}" else was | {"left_out": True}
        for (fingerprint, was), entry in zip(
            state["sources"].items(), swapped["sources"].values(), strict=True
        )
    }
    with pytest.raises(
        ValueError, match="^data.mixture: .* hold the same text; give it one weight$"
    ):
        open_loader(tmp_path, mixture=[f"1 text:{a}", f"1 text:{a}/*"], **options)
    assert "new since" not in caplog.text
    write(tmp_path / "d", {"x.txt": "another fox " * 400})
    open_loader(tmp_path, state, mixture=[*mixture, f"1 text:{tmp_path}/d"], **options)
    assert f"text:{tmp_path}/d is new since the checkpoint" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    open_loader(tmp_path, state, mixture=[mixture[0], f"1 text:{tmp_path}/d"], **options)
    said = f"text:{tmp_path}/d is new since the checkpoint, and text:{a} is not read any more"
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert said in warning.getMessage()


def test_a_mixture_is_the_same_in_any_order_and_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write(tmp_path / name, {"x.txt": f"{name} fox " * 400})
    mixture = ["0.5 text:a", "0.3 text:b", "0.2 mqar"]
    state = open_loader(tmp_path, mixture=mixture).state(7)
    rows = following(open_loader(tmp_path, state, mixture=mixture))
    again = ["2 mqar", "3 text:./b/", f"5 text:{tmp_path}/a/*.txt"]
    assert following(open_loader(tmp_path, state, mixture=again)) == rows
    (tmp_path / "a/x.txt").write_text("another fox " * 400)
    with pytest.raises(ValueError, match="text:a has changed .* 1 changed"):
        open_loader(tmp_path, state, mixture=["2 mqar", "3 text:b", "5 text:./a/"])


def test_what_left_a_mixture_before_is_not_missed(tmp_path, caplog):
    for name in "abc":
        write(tmp_path / name, {"x.txt": f"{name} fox " * 400})
    mixture = [f"1 text:{tmp_path}/{name}" for name in "abc"]
    state = open_loader(tmp_path, mixture=mixture[:2]).state(9)
    state = open_loader(tmp_path, state, mixture=mixture[:1]).state(9)
    caplog.clear()
    open_loader(tmp_path, state, mixture=[mixture[0], mixture[2]])
    assert not caplog.records
    back = open_loader(tmp_path, state, mixture=mixture[:2]).state(0)["sources"].values()
    assert all(entry["consumed"] and "left_out" not in entry for entry in back)


def test_no_text_is_in_two_sources(tmp_path):
    """One would train on what the other holds out."""
    text = write(tmp_path / "text")
    (tmp_path / "link").symlink_to(text / "sub")
    for other in (f"{text}/sub", f"{text}/*.txt", tmp_path / "link"):
        with pytest.raises(ValueError, match="^data.mixture: .* is in .* and in .*: name it once$"):
            open_loader(tmp_path, mixture=[f"1 text:{text}", f"1 text:{other}"])
    open_loader(tmp_path, mixture=[f"1 text:{text}/sub/*", "1 mqar", f"1 text:{text}/*.txt"])


def test_prepared_text_is_the_same_however_it_is_cut(trained):
    from lmoe.data.documents import text_files
    from lmoe.data.prepare import prepare

    folder, text, _, _ = trained
    files = text_files([str(text)])
    rows = []
    state = None
    for name, shard_tokens in (("one", 1 << 27), ("many", 100)):
        prepare(folder / name, files, BYTE, shard_tokens=shard_tokens)
        loader = open_loader(folder, state, source="tokens", paths=[str(folder / name)])
        rows.append(following(loader)[0 if state else 7 :][:23])
        state = loader.state(7)
    assert rows[0] == rows[1]


def test_a_folder_of_tokens_counts_once(trained):
    from lmoe.data.documents import text_files
    from lmoe.data.prepare import prepare

    folder, text, _, _ = trained
    prepare(folder / "p", text_files([str(text)]), BYTE)
    once, twice = (
        open_loader(folder, source="tokens", paths=[str(folder / path) for path in paths])
        for paths in (["p"], ["p", "p/../p"])
    )
    assert following(twice) == following(once)


def test_the_state_of_an_earlier_version(trained, caplog):
    """It knew its sources by name: which text that was nobody can tell."""
    folder, text, _, _ = trained
    name = f"text:{text}"
    state = {"position": 14, "consumed": {name: 14}, "seq_len": 64, "fingerprints": {name: "0"}}
    with pytest.raises(ValueError, match="^data.accept_changes = false: .*an earlier version"):
        open_loader(folder, state, paths=[str(text)])
    loader = open_loader(folder, state, paths=[str(text)], accept_changes=True)
    (entry,) = loader.state(0)["sources"].values()
    assert entry["consumed"] == 14 and loader.state(0)["seed"] == 1
    assert logging.getLevelName(caplog.records[0].levelno) == "WARNING"


@pytest.mark.parametrize("cached", [True, False])
def test_other_data_are_refused_before_anything_is_written(trained, cached):
    """Wherever they lie, and with what changed, as far as the first cache is there to tell."""
    folder, text, state, _ = trained
    shutil.copytree(text, folder / "elsewhere")
    (folder / "elsewhere/d3.txt").write_text("another fox")
    if not cached:
        shutil.rmtree(folder / "cache")
    said = (
        r"of 15 files 1 changed \('d3.txt'\)"
        if cached
        else "other files, data.field or .* 14 documents"
    )
    match = f"^data.accept_changes = false: .*over text:.*, this one is over text:.*: [^\n]*{said}"
    options = {"paths": [str(folder / "elsewhere")], "cache": str(folder / "new")}
    with pytest.raises(ValueError, match=match if cached else said):
        open_loader(folder, state, **options)
    assert not (folder / "new").exists()
    state = open_loader(folder, state, **options, accept_changes=True).state(0)
    (entry,) = state["sources"].values()  # as if it had changed where it was
    assert entry["consumed"] == state["position"]
    open_loader(folder, state, **options)


def test_a_source_s_name_is_short_and_printable(tmp_path):
    text = write(tmp_path / "a\nb", {f"{i:040}.txt": "fox " * 99 for i in range(20)})
    loader = open_loader(tmp_path, paths=sorted(map(str, text.iterdir())))
    (name,) = (source.name for source in loader.sources)
    assert name.isprintable() and len(name) < 210


def test_one_rank_says_what_changed(trained, caplog):
    folder, text, state, _ = trained
    changed_keeping_its_time(text, CHANGES["changed"][0])
    options = {"source": "text", "paths": [str(text)], "cache": str(folder / "cache")}
    config = make_config(str(folder), **options, accept_changes=True)
    build_loader(config, BYTE, state=state)
    assert caplog.text.count("has changed since") == 1
    made = max((folder / "cache").iterdir(), key=os.path.getmtime).name
    build_loader(config, BYTE, state=state, share=lambda make: made)
    assert caplog.text.count("has changed since") == 1


def test_of_two_sources_of_one_name_the_last_has_changed(tmp_path):
    """The other was in an earlier mixture, when another text lay there."""
    a, b = (write(tmp_path / name, {"x.txt": f"{name} fox " * 400}) for name in "ab")
    state = open_loader(tmp_path, mixture=[f"1 text:{a}", f"1 text:{b}"]).state(5)
    shutil.rmtree(a)
    os.rename(b, a)
    state = open_loader(tmp_path, state, paths=[str(a)]).state(3)
    earlier, last = state["sources"].values()
    assert earlier["name"] == last["name"] and earlier["consumed"] != last["consumed"]
    (a / "x.txt").write_text("another fox " * 400)
    loader = open_loader(tmp_path, state, paths=[str(a)], accept_changes=True)
    assert list(loader.state(0)["sources"].values())[-1]["consumed"] == last["consumed"]
