"""Tokenizers on tiktoken: bytes (embedded), a .tiktoken rank file, or one of tiktoken's own
encodings.

Text is always plain text: the characters `<|endoftext|>` in a document become ordinary tokens,
never the separator. So the separator's id occurs in a stream at the ends of documents and nowhere
else.

No text is lost: what is loaded must give a probe of all characters back, and every text's tokens
must have as many bytes as the text.
"""

import base64
import binascii
import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from lmoe.files import in_one_line, is_plain, read_regular

# Qwen's split: letters with one leading sign, single digits, punctuation with trailing line breaks,
# white space.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# No two bytes merge, so any cut gives the same tokens; cuts of 64 run ten times as fast as cuts of
# 1.
BYTE_PATTERN = r"(?s:.{1,64})"
EOS = "<|endoftext|>"
SPECIALS = (EOS, "<|im_start|>", "<|im_end|>")
QWEN_RANKS = 151643
QWEN_EXTRAS = 205
DESCRIPTION = "lmoe_tokenizer.json"
RANKS = "ranks.tiktoken"
FALLBACK_CHARACTERS = 100_000
MAX_IDS = 1 << 31
# Of DESCRIPTION: four texts, {text: id}, and a text or none.
KEYS = ("name", "pattern", "eos", "ranks", "specials", "bos")
# Letters (small, capital, of no case), digits, a mark, punctuation, symbols, white space, line
# ends, control, joiner, private use: of each class that patterns tell apart.
CLASSES = "aZ\u65e51\u00b2\u0301'.+\U0001f642 \t\n\r\u00a0\u2028\0\u200d\ue000"
PROBE_BLOCK = 1024  # characters; a pattern that is slow has no more of them to be slow on
PROBE_SECONDS = 5  # of this thread; usual is a twentieth of one


class Tokenizer:
    """A byte-level BPE and its special tokens. Pickles (to loader processes) and saves to a folder
    (into checkpoints).

    vocab_size counts the special tokens, ordinary_size only the ids that text can give; eos ends
    every document; bos is the id that begins one, where there is such a token, else None; start is
    what a document's first token follows: bos, or else eos.
    """

    def __init__(self, name, pattern, ranks, specials, eos=EOS, bos=None):
        """ranks: {bytes: id}, specials: {text: id}, eos, bos: the texts of the special tokens that
        end and begin a document. ValueError: what tiktoken says against the pattern."""
        self.name = name
        self.pattern = pattern
        self.ranks = ranks
        self.specials = specials
        self.eos_text = eos
        self.bos_text = bos
        self.eos = specials[eos]
        self.bos = None if bos is None else specials[bos]
        self.start = self.eos if bos is None else self.bos
        self.ordinary_size = max(ranks.values()) + 1
        self.vocab_size = max(self.ordinary_size, max(specials.values()) + 1)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        # tiktoken panics where a pattern matches no text, unless that is a token: this one is
        # longer than any text, so that no count of bytes is right with it.
        empty = {b"": self.vocab_size}
        self._lengths = np.zeros(self.ordinary_size + 1, np.int32)
        self._lengths[[*ranks.values(), -1]] = [*map(len, ranks), np.iinfo(np.int32).max]
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks | empty, special_tokens=specials
            )
        except (ValueError, OverflowError) as error:
            why = f"tiktoken refuses its pattern or ranks: {in_one_line(error)}"
            raise ValueError(why) from None

    def __reduce__(self):
        described = self.name, self.pattern, self.ranks, self.specials, self.eos_text
        return Tokenizer, (*described, self.bos_text)

    def encode_array(self, text):
        """Text -> token ids [n] in self.dtype. Lone surrogates, which no encoding can hold, become
        U+FFFD. ValueError: the pattern leaves out a part of it, or cannot be matched to it."""
        try:
            return self._encode(text).astype(self.dtype, copy=False)
        except ValueError as error:
            raise _refused(self.name, error) from None

    def _encode(self, text):
        """Text -> token ids; ValueError says why not, without the key."""
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except BaseException as error:
            # tiktoken's Rust has an exception of its own, which is no Exception.
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            # A run of several hundred thousand equal characters exhausts the regex engine's stack:
            # such a text is cut first.
            if len(text) <= FALLBACK_CHARACTERS:
                why = f"its pattern fails on {text[:20]!a}: {in_one_line(error)}"
                raise ValueError(why) from None
            cuts = range(0, len(text), FALLBACK_CHARACTERS)
            return np.concatenate([self._encode(text[a : a + FALLBACK_CHARACTERS]) for a in cuts])
        if self.pattern == BYTE_PATTERN:  # matches everything; a count is a tenth of its cost
            return ids
        if self._lengths.take(ids, mode="clip").sum(dtype=np.int64) != len(text.encode()):
            raise ValueError(self._loss(text, ids))
        return ids

    def _loss(self, text, ids):
        """Say which part of a text its ids leave out first."""
        there = os.path.commonprefix([text.encode(), self.decode_bytes(ids)])
        begin = len(there.decode(errors="ignore"))
        if begin == len(text):
            return f"its pattern matches where there is no text, in {text[-20:]!a}"
        around = text[max(0, begin - 5) : begin + 5]
        return f"its pattern leaves out text, {text[begin]!a} in {around!a}"

    def probe(self):
        """Encode and decode every character and sequences of all classes of them; ValueError says
        which text is lost, without the key."""
        start = time.thread_time()
        for text in probes():
            ids = self._encode(text)
            if self.decode_bytes(ids) != text.encode():
                raise ValueError(self._loss(text, ids))
            if time.thread_time() - start > PROBE_SECONDS:
                raise ValueError(f"its pattern is too slow, for one on {text[:20]!a}")

    def encode(self, text):
        """Text -> list of token ids."""
        return self.encode_array(text).tolist()

    def decode_bytes(self, ids):
        """Token ids -> the exact bytes, special tokens as their text, ids without a token as
        none."""
        ids = [int(i) for i in ids]
        with contextlib.suppress(KeyError):
            return self._encoding.decode_bytes(ids)
        known = {*self.ranks.values(), *self.specials.values()}
        return self._encoding.decode_bytes([i for i in ids if i in known])

    def decode(self, ids):
        """Token ids -> text; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def digest(self):
        """Hex digest of everything that decides the ids of a text: equal digests, equal tokens."""
        described = [self.pattern, self.eos_text, by_id(self.specials)]
        described += [] if self.bos is None else [self.bos_text]
        digest = hashlib.sha256(json.dumps(described).encode())
        for token, rank in by_id(self.ranks):
            digest.update(b"%d %d " % (rank, len(token)) + token)
        return digest.hexdigest()

    def save(self, folder):
        """Write lmoe_tokenizer.json and the rank file; load_tokenizer(folder) gives this tokenizer
        back, on any machine."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in by_id(self.ranks))
        (folder / RANKS).write_bytes(b"".join(lines))
        description = {
            "name": self.name,
            "pattern": self.pattern,
            "specials": self.specials,
            "eos": self.eos_text,
            "ranks": RANKS,
        }
        description |= {} if self.bos is None else {"bos": self.bos_text}
        text = json.dumps(description, indent=1, ensure_ascii=False)
        (folder / DESCRIPTION).write_text(f"{text}\n", encoding="utf-8")


def by_id(ids):
    """The items of {token: id} in the order of ids."""
    return sorted(ids.items(), key=lambda item: item[1])


def probes() -> Iterator[str]:
    """Short texts that a pattern must not lose anything of: all pairs and triples of classes, runs,
    and every character of the Basic Multilingual Plane and some beyond."""
    yield ""
    for a, b in itertools.product(CLASSES, repeat=2):
        yield a + 3 * b + a
    for a in CLASSES:
        yield 100 * a
    planes = range(0xD800), range(0xE000, 0x10000), range(0x1F000, 0x20000)  # those of symbols
    planes = *planes, range(0x10000, 0x110000, 257)
    text = "".join(map(chr, itertools.chain(*planes)))
    text += "".join(map("".join, itertools.product(CLASSES, repeat=3)))
    for begin in range(0, len(text), PROBE_BLOCK):
        yield text[begin : begin + PROBE_BLOCK]


def _refused(name: object, why: object) -> ValueError:
    return ValueError(f"data.tokenizer = {str(name)!r}: {why}")


def load_tokenizer(name):
    """`byte`, the path of a .tiktoken rank file, a folder with lmoe_tokenizer.json, or the name of
    a tiktoken encoding.

    A bare rank file is read with Qwen's pattern; with Qwen's 151,643 ranks it gets Qwen's 208
    special tokens (ids from 151643), otherwise <|endoftext|>, <|im_start|> and <|im_end|> after the
    ranks. For another pattern give the folder form. All but `byte` are probed. ValueError names
    data.tokenizer.
    """
    if name == "byte":
        ranks = {bytes([i]): i for i in range(256)}
        return Tokenizer("byte", BYTE_PATTERN, ranks, numbered(SPECIALS, 256))
    if not name:
        raise ValueError("data.tokenizer is empty: byte is the one that needs no file")
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return _from_folder(path)
    if path.suffix == ".tiktoken" or os.path.exists(path):
        ranks = _read_ranks(path)
        first = max(ranks.values()) + 1
        specials = list(SPECIALS)
        if len(ranks) == first == QWEN_RANKS:
            specials += [f"<|extra_{i}|>" for i in range(QWEN_EXTRAS)]
        return _probed(path, path.stem, QWEN_PATTERN, ranks, numbered(specials, first))
    return _from_tiktoken(name)


def _probed(path, *described):
    """Make a Tokenizer and probe it; errors name the path that it came from."""
    try:
        tokenizer = Tokenizer(*described)
        tokenizer.probe()
    except ValueError as error:
        raise _refused(path, error) from None
    return tokenizer


def numbered(specials, first):
    """{text: id} of special tokens whose ids go on from `first`."""
    return {text: first + i for i, text in enumerate(specials)}


def _read_ranks(path):
    """{bytes: id} of a .tiktoken file: lines of a base64 token and its rank."""
    try:
        pairs = [line.split() for line in read_regular(path).splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except FileNotFoundError:
        raise _refused(path, "no such file") from None
    except OSError as error:
        raise _refused(path, error.strerror) from None
    except (binascii.Error, ValueError):
        raise _refused(
            path, "not a .tiktoken file (lines of a base64 token and its rank)"
        ) from None
    fault = "a token occurs twice" if len(ranks) < len(pairs) else _ranks_fault(ranks)
    if fault:
        raise _refused(path, f"{fault}: the rank file is damaged")
    return ranks


def _ranks_fault(ranks):
    """Say what is wrong with {bytes: id}, or None. All 256 bytes must be there, or some text has no
    tokens."""
    if missing := sum(bytes([i]) not in ranks for i in range(256)):
        return f"{missing} of the 256 single bytes have no rank"
    if b"" in ranks:
        return "a token is empty"
    if len(set(ranks.values())) != len(ranks):
        return "a rank occurs twice"
    if not 0 <= min(ranks.values()) <= max(ranks.values()) < MAX_IDS:
        return f"a rank is not from 0 to {MAX_IDS - 1}"


def _from_folder(folder):
    """Read a folder's description, which may be a stranger's, and the rank file beside it."""
    try:
        description = json.loads(read_regular(folder / DESCRIPTION))
        fault = _fault(description)
    except FileNotFoundError:
        raise _refused(folder, f"a folder needs {DESCRIPTION} (as a checkpoint holds it)") from None
    except OSError as error:
        fault = error.strerror
    except RecursionError:
        fault = "nested too deep"
    except ValueError as error:
        fault = in_one_line(error)
    if fault:
        raise _refused(folder, f"{DESCRIPTION} is damaged: {fault}")
    name, pattern, eos, ranks, specials, bos = map(description.get, KEYS)
    ranks = _read_ranks(folder / ranks)
    if fault := _shared(ranks, specials):
        raise _refused(folder, f"{DESCRIPTION} is damaged: {fault}")
    return _probed(folder, name, pattern, ranks, specials, eos, bos)


def _shared(ranks, specials):
    """Say which id is a special token's and an ordinary one's, or None."""
    if both := set(ranks.values()).intersection(specials.values()):
        return f"id {min(both)} is a special token and a rank"


def _fault(description):
    """Say what is wrong with a description, or None."""
    if not isinstance(description, dict):
        return "not a JSON object"
    for key in KEYS[:4]:
        text = description.get(key)
        if not isinstance(text, str) or not text or not text.isprintable() and key == "name":
            return f"{key} is no text"
        text.encode()  # lone surrogates
    specials = description.get("specials")
    if not isinstance(specials, dict):
        return "specials are no object"
    for text, number in specials.items():
        text.encode()
        if not text:
            return "specials: a text is empty"
        if type(number) is not int or not 0 <= number < MAX_IDS:
            return f"specials: {text!r:.80} has no id from 0 to {MAX_IDS - 1}"
    if len(set(specials.values())) != len(specials):
        return "specials: an id occurs twice"
    if description["eos"] not in specials:
        return f"eos {description['eos']!r:.80} is not among the specials"
    bos = description.get("bos")
    if bos is not None and (not isinstance(bos, str) or bos not in specials):
        return f"bos {bos!r:.80} is not among the specials"
    if not is_plain(description["ranks"]):
        return f"ranks {description['ranks']!r:.80} is no file of this folder"


def _from_tiktoken(name):
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise _refused(
            name,
            "neither byte, nor a path that exists, nor an encoding of tiktoken"
            f" ({', '.join(known)})",
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        why = in_one_line(error)[:200]
        raise _refused(
            name,
            f"tiktoken could not load it ({why}); set TIKTOKEN_CACHE_DIR to a filled cache, or use"
            " byte or a rank file",
        ) from None
    # tiktoken's README documents these attributes as the way to build one encoding from another.
    ranks, specials = encoding._mergeable_ranks, encoding._special_tokens
    fault = _ranks_fault(ranks) or _shared(ranks, specials)
    if fault or EOS not in specials:  # a plugin's encoding may be anything
        raise _refused(name, fault or f"it has no {EOS}")
    return _probed(name, name, encoding._pat_str, ranks, specials)
