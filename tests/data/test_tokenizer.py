import base64
import json
import os
import pickle
import random
import re
import time

import pytest
import tiktoken
import tiktoken_ext.openai_public

from lmoe.data.tokenizer import CLASSES, EOS, QWEN_PATTERN, load_tokenizer

WORDS = [
    "the",
    " the",
    "he",
    "in",
    "ing",
    " a",
    "\n\n",
    "  ",
    "é",
    "日本",
    "🙂",
    "\r\n",
    "<|endoftext|>",
    "12",
    "it's",
]


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory):
    """A small BPE: 256 bytes and some merges, each of two tokens that exist already."""
    tokens = [bytes([i]) for i in range(256)]
    for a, b in [
        ("t", "h"),
        ("th", "e"),
        (" ", "the"),
        ("i", "n"),
        ("in", "g"),
        (" ", " "),
        ("\n", "\n"),
        ("\r", "\n"),
    ]:
        tokens.append((a + b).encode())
    tokens.append("é".encode())
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


def random_text(rng, n):
    """Any Unicode but surrogates, of all planes, mixed with words, white space, NUL and line
    ends."""
    out = []
    for _ in range(n):
        kind = rng.randrange(5)
        if kind == 0:
            out.append(rng.choice(WORDS))
        elif kind == 1:
            out.append(rng.choice("\0\r\n\t \u00a0\u200b\ufeff\ufffd\u0301") * rng.randrange(1, 4))
        else:
            top = (0x80, 0x800, 0xD800, 0x110000)[rng.randrange(4)]
            code = rng.randrange(top)
            out.append(chr(code) if not 0xD800 <= code < 0xE000 else "x")
    return "".join(out)


@pytest.mark.parametrize("kind", ["byte", "ranks"])
def test_round_trip(kind, rank_file):
    tokenizer = load_tokenizer("byte" if kind == "byte" else str(rank_file))
    rng = random.Random(1)
    texts = ["", "\0", "a" * 1000, "".join(map(chr, range(0xD800)))] + [
        random_text(rng, rng.randrange(200)) for _ in range(200)
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert all(0 <= i < tokenizer.ordinary_size for i in ids)
        if kind == "byte":
            assert ids == list(text.encode())


def test_byte_layout():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.name, tokenizer.eos, tokenizer.vocab_size, tokenizer.ordinary_size) == (
        "byte",
        256,
        259,
        256,
    )
    assert tokenizer.decode([104, 256]) == "h" + EOS
    assert tokenizer.decode("é".encode()[:1]) == "\ufffd"
    assert tokenizer.bos is None and tokenizer.start == tokenizer.eos
    digest = "8d3debbeadfea85d83fecf6df5ad52188473c5f9986011323a91e4bdaae569fe"
    assert tokenizer.digest == digest  # folders and checkpoints have it


def test_special_text_is_plain(rank_file):
    for name in ("byte", str(rank_file)):
        tokenizer = load_tokenizer(name)
        ids = tokenizer.encode("a<|endoftext|>b<|im_start|>")
        assert max(ids) < tokenizer.ordinary_size <= tokenizer.eos


def test_lone_surrogates_become_replacement_characters():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_merges_are_used(rank_file):
    tokenizer = load_tokenizer(rank_file)
    assert tokenizer.encode("the the") == [257, 258] and tokenizer.eos == 265
    assert tokenizer.vocab_size == 268


def test_long_runs_do_not_break_the_regex(rank_file):
    tokenizer = load_tokenizer(rank_file)
    text = "x" + " " * 1_500_000 + "y"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["byte", "ranks"])
def test_save_load_pickle(kind, rank_file, tmp_path):
    tokenizer = load_tokenizer("byte" if kind == "byte" else str(rank_file))
    tokenizer.save(tmp_path)
    text = random_text(random.Random(2), 100)
    for again in (load_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(tokenizer))):
        assert again.encode(text) == tokenizer.encode(text)
        for field in ("name", "eos", "vocab_size", "ordinary_size", "digest", "dtype"):
            assert getattr(again, field) == getattr(tokenizer, field)


def test_digest_tells_tokenizers_apart(rank_file, tmp_path):
    lines = rank_file.read_bytes().splitlines()
    other = tmp_path / "small.tiktoken"
    other.write_bytes(b"\n".join(lines[:-1]) + b"\n" + base64.b64encode(b"zz") + b" 264\n")
    digests = {load_tokenizer(name).digest for name in ("byte", str(rank_file), str(other))}
    assert len(digests) == 3


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no such file"),
        (b"not base64 at all\n", "not a .tiktoken file"),
        (base64.b64encode(b"a") + b" 0\n", "255 of the 256 single bytes"),
        (b"bGlzdA== 1\nbGlzdA== 2\n", "a token occurs twice"),
        (b" 7\n", "not a .tiktoken file"),
    ],
)
def test_damaged_rank_file(content, reason, tmp_path):
    path = tmp_path / "bad.tiktoken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^data.tokenizer = .*{reason}[^\n]*$"):
        load_tokenizer(path)


def test_unknown_name_and_folder(tmp_path):
    with pytest.raises(ValueError, match="^data.tokenizer = 'bytes'[^\n]*cl100k_base[^\n]*$"):
        load_tokenizer("bytes")
    with pytest.raises(ValueError, match="^data.tokenizer = .*lmoe_tokenizer.json[^\n]*$"):
        load_tokenizer(str(tmp_path))


def test_encoding_without_network(monkeypatch):
    def refuse(name):
        raise ConnectionError("no route")

    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    with pytest.raises(
        ValueError, match="^data.tokenizer = 'o200k_base'[^\n]*TIKTOKEN_CACHE_DIR[^\n]*$"
    ):
        load_tokenizer("o200k_base")


def test_named_encoding(monkeypatch, tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "cl100k_base", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={EOS: 300}
    )
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: encoding)
    tokenizer = load_tokenizer("cl100k_base")
    tokenizer.save(tmp_path)
    monkeypatch.undo()
    again = load_tokenizer(tmp_path)
    assert again.digest == tokenizer.digest and (
        again.eos,
        again.vocab_size,
        again.ordinary_size,
    ) == (300, 301, 256)


@pytest.mark.skipif(
    "LMOE_QWEN_TIKTOKEN" not in os.environ, reason="LMOE_QWEN_TIKTOKEN names no rank file"
)
def test_qwen(tmp_path):
    tokenizer = load_tokenizer(os.environ["LMOE_QWEN_TIKTOKEN"])
    assert (tokenizer.vocab_size, tokenizer.eos, tokenizer.specials["<|im_start|>"]) == (
        151851,
        151643,
        151644,
    )
    assert (tokenizer.specials["<|im_end|>"], tokenizer.specials["<|extra_204|>"]) == (
        151645,
        151850,
    )
    assert tokenizer.encode("Hello world") == [9707, 1879] and tokenizer.encode("2026") == [
        17,
        15,
        17,
        21,
    ]
    rng = random.Random(3)
    for _ in range(100):
        text = random_text(rng, 100)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).digest == tokenizer.digest


RANK_LINES = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
DESCRIBED = {
    "name": "x",
    "pattern": r"(?s:.)",
    "specials": {EOS: 300},
    "eos": EOS,
    "ranks": "ranks.tiktoken",
}
ODD = [None, True, 3, 1e400, [], {}, "", "\ud800", "(", {EOS: -1}, {EOS: 1 << 31}, {EOS: 0.5}]
ODD += [
    {"": 300, EOS: 301},
    {EOS: "300"},
    {EOS: 300, "x": 300},
    {EOS: 255},
    {"\ud800": 300, EOS: 301},
    "../x",
    "/x",
]


@pytest.mark.parametrize("value", ODD, ids=ascii)
def test_any_field_of_a_folder_may_be_anything(value, tmp_path):
    """A file is a tokenizer, or is refused in one line."""
    (tmp_path / "ranks.tiktoken").write_bytes(RANK_LINES)
    (tmp_path.parent / "x").write_bytes(RANK_LINES)
    for key in DESCRIBED:
        (tmp_path / "lmoe_tokenizer.json").write_text(json.dumps(DESCRIBED | {key: value}))
        if key == "name" and value in ("(", "../x", "/x"):
            assert load_tokenizer(tmp_path).encode("ab") == [97, 98]
        else:
            with pytest.raises(ValueError, match=r"^data\.tokenizer = [^\n]{1,500}$"):
                load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "data", [b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"[1" + b"0" * 5000 + b"]", b"null"]
)
def test_a_folder_without_a_description(data, tmp_path):
    (tmp_path / "lmoe_tokenizer.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"^data\.tokenizer = [^\n]* is damaged: [^\n]*$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["lmoe_tokenizer.json", "ranks.tiktoken", "."])
@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "folder"])
def test_only_regular_files_are_read(name, kind, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "ranks.tiktoken").write_bytes(RANK_LINES)
    (folder / "lmoe_tokenizer.json").write_text(json.dumps(DESCRIBED))
    path = folder / name if name != "." else tmp_path / "x.tiktoken"
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path}[kind])
    with pytest.raises(ValueError, match=r"^data\.tokenizer = [^\n]*$"):
        load_tokenizer(folder if name != "." else path)


@pytest.mark.parametrize("value", [None, *ODD, "x", EOS], ids=ascii)
def test_bos(value, tmp_path):
    """It is one of the specials, or there is none; without it digests are what they were."""
    described = DESCRIBED | {"specials": {EOS: 300, "<s>": 301}}
    none, other = write_folder(tmp_path / "none", **described), tmp_path / "other"
    if value is not None and value != EOS:
        write_folder(other, **described, bos=value)
        with pytest.raises(ValueError, match=r"^data\.tokenizer = [^\n]*bos[^\n]{,200}$"):
            load_tokenizer(other)
        return
    without = load_tokenizer(none)
    assert (without.bos, without.start) == (None, 300)
    write_folder(other, **described, bos=value and "<s>")
    tokenizer = load_tokenizer(other)
    tokenizer.save(tmp_path / "again")
    for again in (
        tokenizer,
        load_tokenizer(tmp_path / "again"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert (again.bos, again.start, again.eos) == (
            (301, 301, 300) if value else (None, 300, 300)
        )
        assert again.digest == tokenizer.digest
        assert (again.digest == without.digest) == (value is None)


def write_folder(folder, lines=RANK_LINES, **described):
    folder.mkdir(exist_ok=True)
    (folder / "ranks.tiktoken").write_bytes(lines)
    (folder / "lmoe_tokenizer.json").write_text(json.dumps(DESCRIBED | described))
    return folder


def refuse(folder, why):
    """One line that names the folder, within seconds."""
    start = time.monotonic()
    line = rf"^data\.tokenizer = {re.escape(repr(str(folder)))}: {why}[^\n]{{,200}}$"
    with pytest.raises(ValueError, match=line):
        load_tokenizer(folder)
    assert time.monotonic() - start < 10


LOSSES = {r"\p{L}+": "'1'", r"\s*\S+": "' '", r"[^\n]+": r"'\\n'", r"^(?s:.{1,999})": ".*"}
LOSSES |= {r"[^\x{1F600}-\x{1F602}]+": r"'\\U0001f600'"}
LOSSES |= {r"[\s\S--\p{Cn}]": ".*", r"(?:\r\n|[^\r])+": r"'\\r'", r"[\x00-\x{ffff}]": r"'\\U"}
# Of Qwen's six alternatives these have no substitute.
for left_out, lost in {r"\p{N}": "'1'", r" ?[^\s\p{L}\p{N}]+[\r\n]*": "", r"\s+": ""}.items():
    LOSSES[QWEN_PATTERN.removesuffix(f"|{left_out}").replace(f"|{left_out}|", "|")] = lost


@pytest.mark.parametrize("pattern", LOSSES)
def test_patterns_that_leave_out_text(pattern, tmp_path):
    refuse(
        write_folder(tmp_path, pattern=pattern), f"its pattern leaves out text, {LOSSES[pattern]}"
    )


@pytest.mark.parametrize("place", ["^{}", "{}$", "{0}{0}{0}", "(?<=1){}(?=a)", "(?<=\\n){}(?= )"])
@pytest.mark.parametrize("character", CLASSES, ids=ascii)
def test_patterns_that_leave_out_a_class_in_one_place(character, place, tmp_path):
    code = f"\\x{{{ord(character):x}}}"
    pattern = f"(?!{place.format(code)})(?s:.)"
    lost = re.escape(ascii(character))
    refuse(write_folder(tmp_path, pattern=pattern), f"its pattern leaves out text, {lost}")


@pytest.mark.parametrize("pattern", ["^|a", "a*", r"\b", "(?=a)", "|", "$|(?s:.)", r"\K"])
def test_patterns_that_match_no_text(pattern, tmp_path, capfd):
    refuse(
        write_folder(tmp_path, pattern=pattern),
        "its pattern (leaves out|matches where there is no) text",
    )
    assert not capfd.readouterr().err  # Rust would say what it panics at


@pytest.mark.parametrize("pattern", [r"(a|a)*(?!z)b|(?s:.)", r"(\s+\s+)+(?!\S)y|(?s:.)"])
def test_patterns_that_never_end(pattern, tmp_path):
    refuse(write_folder(tmp_path, pattern=pattern), "its pattern fails on .* limit")


def test_slow_patterns(tmp_path, monkeypatch):
    monkeypatch.setattr("lmoe.data.tokenizer.PROBE_SECONDS", 0)
    refuse(write_folder(tmp_path), "its pattern is too slow")


def test_patterns_that_ship_with_tiktoken(tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *a, **k: {})
    monkeypatch.setattr(
        tiktoken_ext.openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *a, **k: {}
    )
    makers = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS.values()
    patterns = {make()["pat_str"] for make in makers} | {QWEN_PATTERN}
    for pattern in patterns:
        tokenizer = load_tokenizer(write_folder(tmp_path, pattern=pattern))
        start = time.thread_time()
        tokenizer.probe()
        assert time.thread_time() - start < 1  # a twentieth of it, usually
    assert len(patterns) > 3


@pytest.mark.parametrize("pattern, text", [("(?!qzx)(?s:.)", "a qzxb"), ("^|(?<!qz)x|[^x]", "qzx")])
def test_text_that_only_encoding_finds_lost(pattern, text, tmp_path):
    """A text that the probe lacks is an error as well."""
    if pattern.startswith("^"):
        pattern = "(?<=qz)(?=x)|(?s:.)"  # matches no text, and drops x
    tokenizer = load_tokenizer(write_folder(tmp_path, pattern=pattern))
    assert tokenizer.decode(tokenizer.encode("zxq")) == "zxq"
    for long in text, "é" + text, text * 100, "\ud800" + text:
        with pytest.raises(
            ValueError, match="^data.tokenizer = 'x': its pattern leaves out [^\n]*$"
        ):
            tokenizer.encode(long)


def test_ids_with_gaps(tmp_path):
    """Special tokens may stand in the gaps of ranks; all of it decodes to what it was."""
    lines = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % (3 * i) for i in range(256))
    specials = {EOS: 1, "<a>": 2, "<b>": (1 << 31) - 1}
    lines += base64.b64encode(b"ab") + b" 766\n"
    tokenizer = load_tokenizer(write_folder(tmp_path, lines, specials=specials, pattern="(?s:.+)"))
    assert tokenizer.encode("ab\0") == [766, 0] and tokenizer.ordinary_size == 767
    assert tokenizer.decode([766, 1, 4, 2, 0, (1 << 31) - 1, 1 << 31]) == f"ab{EOS}<a>\0<b>"


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda ranks, specials: specials.clear(), "it has no <|endoftext|>"),
        (lambda ranks, specials: ranks.pop(b"a"), "1 of the 256"),
        (lambda ranks, specials: ranks.update({b"": 400}), "a token is empty"),
        (lambda ranks, specials: specials.update({EOS: 10}), "id 10 is a special token and a rank"),
    ],
)
def test_encodings_of_plugins(change, why, monkeypatch):
    """Found by tiktoken, and any."""
    ranks, specials = {bytes([i]): i for i in range(256)}, {EOS: 300}
    change(ranks, specials)
    encoding = tiktoken.Encoding("x", pat_str=".", mergeable_ranks=ranks, special_tokens=specials)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: encoding)
    with pytest.raises(ValueError, match=rf"^data\.tokenizer = 'cl100k_base': {re.escape(why)}"):
        load_tokenizer("cl100k_base")


def test_ids_without_a_token_are_no_text(tmp_path):
    (tmp_path / "ranks.tiktoken").write_bytes(RANK_LINES)
    (tmp_path / "lmoe_tokenizer.json").write_text(json.dumps(DESCRIBED))
    assert load_tokenizer(tmp_path).decode([97, 280, 98, 300, 10**9]) == f"ab{EOS}"


def test_odd_names(tmp_path, monkeypatch):
    for name in ("", "x" * 5000, str(tmp_path / ("x" * 300 + ".tiktoken")), "~nobody/x.tiktoken"):
        with pytest.raises(ValueError, match=r"^data\.tokenizer [^\n]*$"):
            load_tokenizer(name)
    (tmp_path / "x.tiktoken").write_bytes(RANK_LINES)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_tokenizer("~/x.tiktoken").ordinary_size == 256
