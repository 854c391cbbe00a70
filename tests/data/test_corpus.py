"""Identity of corpora: which files a folder and a glob give, and what makes two the same."""

import contextlib
import gzip
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from hash_chain import make_config

from lmoe.data import corpus as corpus_module
from lmoe.data import documents
from lmoe.data.corpus import changes, contents, files_digest
from lmoe.data.documents import text_files, told
from lmoe.data.loader import build_loader
from lmoe.data.prepare import main, prepare
from lmoe.data.tokenizer import load_tokenizer

BYTE = load_tokenizer("byte")
FILES = {f"d{i}.txt": f"document {i}: " + "fox " * 30 for i in range(12)}
FILES |= {"sub/a.md": "in a folder " * 20, "sub.txt": "beside it " * 20, "sub-a/x.txt": "x " * 99}


def write(folder, files=FILES):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def names(*paths):
    return [file.name for file in text_files([str(path) for path in paths])]


def digest(*paths):
    return files_digest(text_files([str(path) for path in paths]), "text")


def test_order_is_that_of_the_names_below_the_root(tmp_path):
    """By the parts of a name, so that no separator or length of the root shows."""
    write(tmp_path / "a")
    want = sorted(FILES, key=lambda name: name.split("/"))
    assert names(tmp_path / "a") == want != sorted(FILES)
    write(tmp_path / "b" / "deeper" / "still", dict(reversed(FILES.items())))
    assert names(tmp_path / "b" / "deeper" / "still") == want
    assert names(f"{tmp_path}/a/*.txt") == [n for n in want if "/" not in n]
    assert names(f"{tmp_path}/*/sub/*.md") == ["a/sub/a.md"]
    assert names(tmp_path / "a" / "sub" / "a.md") == ["a.md"]


def spelt(text, other):
    """The same corpus, spelt in other ways, at other times and in another place."""
    for name in FILES:
        os.utime(text / name, (1e9, 1e9))
    shutil.copytree(text, other)
    linked = other.with_name("linked")
    linked.symlink_to(other)
    return {
        "again": [text],
        "moved": [other],
        "slash": [f"{text}/"],
        "dots": [f"{text}/../{text.name}/."],
        "link": [linked],
        "relative": [os.path.relpath(text)],
        "glob": [f"{text}/**"],
        "suffixes": [f"{text}/**/*.*"],
        "home": ["~/text"],
        "named twice": [text, f"{text}/d1.txt"],
    }


def test_a_corpus_is_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = write(tmp_path / "text")
    here = digest(text)
    for way, paths in spelt(text, tmp_path / "elsewhere").items():
        assert digest(*paths) == here, way


CHANGES = {
    "renamed": (lambda t: (t / "d3.txt").rename(t / "e.txt"), "1 renamed ('d3.txt' is 'e.txt')"),
    "in place": (lambda t: (t / "d3.txt").rename(t / "d30.txt"), "'d3.txt' is 'd30.txt'"),
    "changed": (lambda t: (t / "d3.txt").write_text("as long " * 17), "1 changed ('d3.txt')"),
    "new": (lambda t: (t / "new.txt").write_text("x"), "1 new ('new.txt')"),
    "gone": (lambda t: (t / "d3.txt").unlink(), "1 gone ('d3.txt')"),
    "empty": (lambda t: (t / "new.txt").write_text(""), "1 new ('new.txt')"),
}


def changed_keeping_its_time(text, change):
    """Change a corpus so that no size or time of a file tells."""
    times = {path: path.stat() for path in text.rglob("*") if path.is_file()}
    change(text)
    for path, stat in times.items():
        if path.exists():
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("kind", CHANGES)
def test_what_makes_another_corpus(tmp_path, kind):
    change, said = CHANGES[kind]
    text = write(tmp_path)
    before, list_before = digest(text), contents(text_files([str(text)]))
    changed_keeping_its_time(text, change)
    assert digest(text) != before
    assert said in changes(list_before, contents(text_files([str(text)])))


def test_the_field_counts_where_there_are_lines(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    files = text_files([str(tmp_path)])
    assert files_digest(files, "text") == files_digest(files, "body")
    (tmp_path / "b.jsonl").write_text('{"text": "x", "body": "y"}')
    files = text_files([str(tmp_path)])
    assert files_digest(files, "text") != files_digest(files, "body")


def test_one_rule_for_folders_and_globs(tmp_path, monkeypatch):
    """Links are followed, what is hidden is not, and what is left out is counted."""
    write(tmp_path / "text", {"a.txt": "a", "b/c.txt": "c", "b/.d.txt": "d", ".git/e.txt": "e"})
    text = tmp_path / "text"
    write(tmp_path / "away", {"f.txt": "f", "deep/g.md": "g"})
    write(text, {"b/picture.png": "", "closed/h.txt": "h"})
    (text / "linked").symlink_to(tmp_path / "away")
    (text / "one.txt").symlink_to(tmp_path / "away" / "f.txt")
    (text / "lost.txt").symlink_to(tmp_path / "nowhere.txt")
    (text / "round").symlink_to(text)
    os.mkfifo(text / "pipe.txt")
    scandir = os.scandir

    def refusing(path):  # the superuser may read every folder
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(documents.os, "scandir", refusing)
    want = ["a.txt", "b/c.txt", "linked/deep/g.md", "linked/f.txt"]
    for entry in (text, f"{text}/", f"{text}/**", f"{text}/**/*"):
        left_out = Counter()
        assert [file.name for file in text_files([str(entry)], left_out)] == want
        assert told(left_out) == (
            "left out: 2 hidden, 1 with other endings, 1 there already under another name, 2 pipes,"
            " devices or links that lead nowhere, 1 folders that may not be read"
        )
    left_out = Counter()
    text_files([f"{text}/*"], left_out)
    assert left_out[documents.FOLDERS] == 4 and left_out[documents.HIDDEN] == 1
    assert names(f"{text}/b/.d*") == [".d.txt"] and names(f"{text}/.git/*") == ["e.txt"]
    with pytest.raises(ValueError, match="^data.paths: .*closed.* gives no file.*may not be read"):
        text_files([f"{text}/closed"])


def test_a_folder_that_may_only_be_listed(tmp_path, monkeypatch):
    """It counts once, as one that may not be read."""
    text = write(tmp_path / "text", {"a.txt": "a", "sealed/b.txt": "b", "sealed/c.txt": "c"})
    scandir = os.scandir

    class Entry:
        def __init__(self, name):
            self.name = name

        def stat(self):
            raise PermissionError(13, "Permission denied", self.name)

    @contextlib.contextmanager
    def refusing(path):
        with scandir(path) as entries:
            sealed = Path(path).name == "sealed"
            yield [Entry(entry.name) if sealed else entry for entry in entries]

    monkeypatch.setattr(documents.os, "scandir", refusing)
    for entry in (text, f"{text}/**", f"{text}/**/*.txt", f"{text}/**/."):
        left_out = Counter()
        assert [file.name for file in text_files([str(entry)], left_out)] == ["a.txt"]
        assert told(left_out) == "left out: 1 folders that may not be read"


def test_what_is_left_out_is_said_once(tmp_path, caplog, capsys):
    text = write(tmp_path / "text", {"a.txt": "fox " * 99, "b.rst": "", "c/d.txt": "dog " * 99})
    options = {"source": "text", "paths": [str(text)], "cache": str(tmp_path / "cache")}
    caplog.set_level("INFO")
    for split in ("train", "validation"):
        build_loader(make_config("", validation_fraction=0.5, **options), BYTE, split=split)
    assert caplog.text.count("2 files; left out: 1 with other endings") == 1
    caplog.clear()
    main([str(tmp_path / "out"), "--paths", str(text), "--workers", "1"])
    assert caplog.text.count("2 files; left out: 1 with other endings") == 1


def test_a_file_is_read_once_in_a_process(tmp_path, monkeypatch):
    text = write(tmp_path)
    before = digest(text)
    opened = corpus_module.open_regular
    read = []
    monkeypatch.setattr(corpus_module, "open_regular", lambda p: read.append(p) or opened(p))
    assert digest(text) == before and not read
    os.utime(text / "d1.txt")
    assert digest(text) == before and read == [str(text / "d1.txt")]


def test_prepare_goes_on_after_a_touch_and_refuses_what_changed(tmp_path):
    text = write(tmp_path / "text")
    out = tmp_path / "out"
    prepare(out, text_files([str(text)]), BYTE)
    written = (out / "index.json").stat().st_mtime_ns
    for paths in spelt(text, tmp_path / "elsewhere").values():
        if "~" not in str(paths[0]):
            prepare(out, text_files([str(path) for path in paths]), BYTE)
    assert (out / "index.json").stat().st_mtime_ns == written
    changed_keeping_its_time(text, CHANGES["changed"][0])
    with pytest.raises(ValueError, match="holds a preparation of other files"):
        prepare(out, text_files([str(text)]), BYTE)


def test_folders_nested_too_deep_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):  # its whole path is longer than any call takes
        os.mkdir("a")
        os.chdir("a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^data.paths: '.' (is nested too deep|gives no file)"):
        text_files(["."])
    subprocess.run(["rm", "-r", tmp_path / "a"], check=True)  # deeper than Python removes


def test_an_unreadable_file_is_one_line(tmp_path, monkeypatch):
    text = write(tmp_path)

    def refusing(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(corpus_module, "open_regular", refusing)
    with pytest.raises(ValueError, match="^data.paths: cannot read '[^\n]*': Permission denied$"):
        digest(text)


def test_lines_are_the_same_however_they_are_packed(tmp_path):
    """A .gz tells when and how hard it was pressed: that is no text."""
    path = tmp_path / "a.jsonl.gz"
    text = b'{"text": "fox"}\n' * 99
    packed = [gzip.compress(text, level, mtime=time) for level, time in ((9, 1), (9, 2), (1, 1))]
    packed.append(gzip.compress(text[:160]) + gzip.compress(text[160:]))
    digests = set()
    for data in packed:
        path.write_bytes(data)
        digests.add(digest(path))
    assert len(digests) == 1
    path.write_bytes(packed[0][:-9])
    with pytest.raises(ValueError, match="^data.paths: cannot read '[^\n]*'"):
        digest(path)


SAME_NAMES = {
    "1 changed ('x')": ([("x", "1"), ("x", "2")], [("x", "3"), ("x", "2")]),
    "3 new ('a')": ([("x", "1")], [("x", "1"), ("a", "0"), ("b", "0"), ("c", "0")]),
    "2 renamed ('a' is 'c')": ([("a", "0"), ("b", "0")], [("c", "0"), ("d", "0")]),
    "1 renamed ('it is a' is 'b')": ([("it is a", "1")], [("b", "1")]),
    "2 changed ('a')": ([("a", "1"), ("b", "2")], [("a", "2"), ("b", "1")]),
}


@pytest.mark.parametrize("said", SAME_NAMES)
def test_what_changed_is_counted_right(said):
    """Also of files of one name in several roots, and of equal files."""
    before, after = SAME_NAMES[said]
    assert changes(before, after) == f"of {len(after)} files {said}"


@pytest.mark.parametrize("kind", ["changed", "grown", "between"])
def test_text_that_changes_while_it_is_tokenised(tmp_path, monkeypatch, kind):
    """It is refused, and nothing made of it is taken for the text that it was."""
    from lmoe.data import prepare as module

    text = write(tmp_path / "text", {"a.txt": "fox " * 99, "b.jsonl": '{"text": "fox"}\n'})
    files = text_files([str(text)])
    out = tmp_path / "out"
    tokenise = module.tokenise

    def change(*arguments):
        (text / "a.txt").write_text("dog " * 99)
        return tokenise(*arguments)

    if kind == "grown":  # after its size was taken
        with open(text / "b.jsonl", "a") as file:
            file.write('{"text": "dog"}\n')
    else:
        monkeypatch.setattr(module, "tokenise", change)
    with pytest.raises(ValueError, match="^data.paths: the text changed while it was tok[^\n]*$"):
        prepare(out, files, BYTE, shard_tokens=100)
    assert os.listdir(out) == [".lock"]
    monkeypatch.setattr(module, "tokenise", tokenise)
    if kind == "between":
        write(text, {"a.txt": "fox " * 99})
    shards = prepare(out, text_files([str(text)]), BYTE)
    assert shards.documents == 2 + (kind == "grown")
