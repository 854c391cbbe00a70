"""Messages between the watchdogs of a job, which go through its store as JSON.

Whoever reaches the store can write there, so that what is read is data: fields of known types and
ranks in range, or unreadable. Texts are cut, and hold nothing that a terminal would obey.
"""

import json
from typing import NamedTuple

LONGEST = 600  # characters of a text


class Beat(NamedTuple):
    """A sign of life: the thread's ticks, the beats, where the rank is, and whether it may take
    long there."""

    tick: int
    beats: int
    where: str
    slow: bool


class Stand(NamedTuple):
    """Where a rank is when a hang is looked into, and whether it waits for others there."""

    beats: int
    waits: bool
    where: str


class Verdict(NamedTuple):
    """How a job ends. kind: failure; hang, of which the ranks find out together whose it is; stop,
    by a signal, about which nothing is said. first: ranks that leave before the others."""

    line: str
    kind: str = "failure"
    first: tuple[int, ...] = ()
    code: int = 1


UNREADABLE = Verdict(
    "what the job's store holds as the verdict cannot be read: something else than this job writes"
    " to it"
)


def clean(text: str, longest: int = LONGEST) -> str:
    """Make a text printable in one line: control characters and lone surrogates become `?`."""
    text = "".join(c if c.isprintable() else "?" for c in text[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def parse(data: bytes) -> object:
    """Read JSON; None where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _are(values: object, *kinds: type) -> bool:
    fits = isinstance(values, list) and len(values) == len(kinds)
    return fits and all(type(value) is kind for value, kind in zip(values, kinds))


def read_beat(data: bytes) -> Beat | None:
    """Read a Beat; None where it is none."""
    values = parse(data)
    if not _are(values, int, int, str, bool):
        return None
    tick, beats, where, slow = values
    return Beat(tick, beats, clean(where), slow)


def read_stand(data: bytes) -> Stand | None:
    """Read a Stand; None where it is none."""
    values = parse(data)
    if not _are(values, int, bool, str):
        return None
    beats, waits, where = values
    return Stand(beats, waits, clean(where))


def read_text(data: bytes) -> str | None:
    """Read a text; None where it is none."""
    value = parse(data)
    return clean(value) if isinstance(value, str) else None


def read_verdict(data: bytes, world: int) -> Verdict:
    """Read the Verdict of a job of `world` ranks; UNREADABLE where it is none."""
    values = parse(data)
    if not _are(values, str, str, list, int):
        return UNREADABLE
    line, kind, first, code = values
    ranks = all(type(rank) is int and 0 <= rank < world for rank in first)
    if kind not in ("failure", "hang", "stop") or not ranks or not 0 < code < 256:
        return UNREADABLE
    return Verdict(clean(line), kind, tuple(first), code)
