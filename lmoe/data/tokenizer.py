"""Tokenizers on tiktoken: bytes (embedded), a .tiktoken rank file, or one of tiktoken's own
encodings.

Text is always plain text: the characters `<|endoftext|>` in a document become ordinary tokens,
never the separator. So the separator's id occurs in a stream at the ends of documents and nowhere
else.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import os
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
KEYS = ("name", "pattern", "eos", "ranks", "specials")  # of DESCRIPTION: four texts, {text: id}


class Tokenizer:
    """A byte-level BPE and its special tokens. Pickles (to loader processes) and saves to a folder
    (into checkpoints).

    vocab_size counts the special tokens, ordinary_size only the ids that text can give; eos ends
    every document and start, bos where there is one, is the input before its first token.
    """

    bos = None

    def __init__(self, name, pattern, ranks, specials, eos=EOS):
        """ranks: {bytes: id}, specials: {text: id}, eos: the text of the special token that ends a
        document."""
        self.name = name
        self.pattern = pattern
        self.ranks = ranks
        self.specials = specials
        self.eos_text = eos
        self.eos = specials[eos]
        self.ordinary_size = max(ranks.values()) + 1
        self.vocab_size = max(self.ordinary_size, max(specials.values()) + 1)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
            )
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"data.tokenizer = {name!r}: tiktoken refuses its pattern or ranks:"
                f" {in_one_line(error)}"
            ) from None

    def __reduce__(self):
        return Tokenizer, (self.name, self.pattern, self.ranks, self.specials, self.eos_text)

    def encode_array(self, text):
        """Text -> token ids [n] in self.dtype. Lone surrogates, which no encoding can hold, become
        U+FFFD."""
        return self._encode(text).astype(self.dtype, copy=False)

    def _encode(self, text):
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # tiktoken's Rust; no Exception
                raise ValueError(
                    f"data.tokenizer = {self.name!r}: its pattern matches where there is no text"
                ) from None
            if not isinstance(error, ValueError):
                raise
            # A run of several hundred thousand equal characters exhausts the regex engine's stack:
            # such a text is cut first.
            if len(text) <= FALLBACK_CHARACTERS:
                raise
            cuts = range(0, len(text), FALLBACK_CHARACTERS)
            return np.concatenate([self._encode(text[a : a + FALLBACK_CHARACTERS]) for a in cuts])

    @property
    def start(self):
        return self.eos if self.bos is None else self.bos

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
        text = json.dumps(description, indent=1, ensure_ascii=False)
        (folder / DESCRIPTION).write_text(f"{text}\n", encoding="utf-8")


def by_id(ids):
    """The items of {token: id} in the order of ids."""
    return sorted(ids.items(), key=lambda item: item[1])


def load_tokenizer(name):
    """`byte`, the path of a .tiktoken rank file, a folder with lmoe_tokenizer.json, or the name of
    a tiktoken encoding.

    A bare rank file is read with Qwen's pattern; with Qwen's 151,643 ranks it gets Qwen's 208
    special tokens (ids from 151643), otherwise <|endoftext|>, <|im_start|> and <|im_end|> after the
    ranks. For another pattern give the folder form. ValueError names data.tokenizer.
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
        return Tokenizer(path.stem, QWEN_PATTERN, ranks, numbered(specials, first))
    return _from_tiktoken(name)


def numbered(specials, first):
    """{text: id} of special tokens whose ids go on from `first`."""
    return {text: first + i for i, text in enumerate(specials)}


def _read_ranks(path):
    """{bytes: id} of a .tiktoken file: lines of a base64 token and its rank. All 256 bytes must be
    there, or some text has no tokens."""
    try:
        pairs = (line.split() for line in read_regular(path).splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except FileNotFoundError:
        raise ValueError(f"data.tokenizer = {str(path)!r}: no such file") from None
    except OSError as error:
        raise ValueError(f"data.tokenizer = {str(path)!r}: {error.strerror}") from None
    except (binascii.Error, ValueError):
        raise ValueError(
            f"data.tokenizer = {str(path)!r}: not a .tiktoken file (lines of a base64 token and its"
            " rank)"
        ) from None
    fault = ""
    if missing := sum(bytes([i]) not in ranks for i in range(256)):
        fault = f"{missing} of the 256 single bytes have no rank"
    elif len(set(ranks.values())) != len(ranks):
        fault = "a rank occurs twice"
    elif not 0 <= min(ranks.values()) <= max(ranks.values()) < MAX_IDS:
        fault = f"a rank is not from 0 to {MAX_IDS - 1}"
    if fault:
        raise ValueError(f"data.tokenizer = {str(path)!r}: {fault}: the rank file is damaged")
    return ranks


def _from_folder(folder):
    """Read a folder's description, which may be a stranger's, and the rank file beside it."""
    try:
        description = json.loads(read_regular(folder / DESCRIPTION))
        fault = _fault(description)
    except FileNotFoundError:
        raise ValueError(
            f"data.tokenizer = {str(folder)!r}: a folder needs {DESCRIPTION} (as a checkpoint"
            " holds it)"
        ) from None
    except OSError as error:
        fault = error.strerror
    except RecursionError:
        fault = "nested too deep"
    except ValueError as error:
        fault = in_one_line(error)
    if fault:
        raise ValueError(f"data.tokenizer = {str(folder)!r}: {DESCRIPTION} is damaged: {fault}")
    name, pattern, eos, ranks, specials = map(description.get, KEYS)
    ranks = _read_ranks(folder / ranks)
    if both := set(ranks.values()).intersection(specials.values()):
        raise ValueError(
            f"data.tokenizer = {str(folder)!r}: {DESCRIPTION} is damaged: id {min(both)} is a"
            " special token and a rank"
        )
    return Tokenizer(name, pattern, ranks, specials, eos)


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
        if type(number) is not int or not 0 <= number < MAX_IDS:
            return f"specials: {text!r} has no id from 0 to {MAX_IDS - 1}"
    if len(set(specials.values())) != len(specials):
        return "specials: an id occurs twice"
    if description["eos"] not in specials:
        return f"eos {description['eos']!r} is not among the specials"
    if not is_plain(description["ranks"]):
        return f"ranks {description['ranks']!r} is no file of this folder"


def _from_tiktoken(name):
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise ValueError(
            f"data.tokenizer = {name!r}: neither byte, nor a path that exists, nor an encoding of"
            f" tiktoken ({', '.join(known)})"
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        why = in_one_line(error)[:200]
        raise ValueError(
            f"data.tokenizer = {name!r}: tiktoken could not load it ({why}); set"
            " TIKTOKEN_CACHE_DIR to a filled cache, or use byte or a rank file"
        ) from None
    # tiktoken's README documents these attributes as the way to build one encoding from another.
    return Tokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)
