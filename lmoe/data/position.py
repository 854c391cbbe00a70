"""Where a run stands in its data: the state in a checkpoint, and what becomes of it over the
sources of the run that goes on.

A source is known again by its fingerprint, wherever it lies and whatever it is called. One of the
same name with another fingerprint has changed.
"""

import contextlib
import logging
from pathlib import Path

from lmoe.data.corpus import changes, read_contents
from lmoe.data.order import SampleOrder

logger = logging.getLogger("lmoe")


def state_of(order: SampleOrder, sources: list, left_out: dict) -> dict:
    """Describe where an order stands: a small JSON-able dict.

    position: samples of the global order; sources: {fingerprint: {name, consumed: samples given
    over all epochs, about}}, those of earlier mixtures (left_out) among them; in samples of seq_len
    tokens, in the order of `seed`.
    """
    given = {
        source.fingerprint: {"name": source.name, "consumed": count, "about": source.about()}
        for source, count in zip(sources, order.consumed.tolist())
    }
    left_out = {fingerprint: entry | {"left_out": True} for fingerprint, entry in left_out.items()}
    return {
        "position": order.position,
        "sources": left_out | given,
        "seq_len": sources[0].seq_len,
        "seed": order.seed,
    }


def check_state(state: object) -> None:
    """Refuse what state_of() of this or an earlier version did not give; ValueError says which part
    of it."""

    def natural(number):
        return type(number) is int and 0 <= number < 1 << 60

    if not isinstance(state, dict):
        raise ValueError("data is no table")
    position, seq_len = state.get("position"), state.get("seq_len")
    if not natural(position):
        raise ValueError("data.position is no count of samples")
    if not natural(seq_len) or not seq_len:
        raise ValueError("data.seq_len is no count of tokens")
    if "sources" not in state:
        state = _of_earlier_version(state)
    if type(state.get("seed")) is not int and state.get("seed") is not None:
        raise ValueError("data.seed is no number")
    sources = state["sources"]
    if not isinstance(sources, dict):
        raise ValueError("data.sources is no table")
    for entry in sources.values():
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError("data.sources holds one without a name")
        if not natural(entry.get("consumed")) or not natural(entry["consumed"] * seq_len):
            raise ValueError("data.sources holds one whose `consumed` is no count of samples")
        if not isinstance(entry.get("about"), dict):
            raise ValueError("data.sources holds one whose `about` is no table")
    if position and not any(entry["consumed"] for entry in sources.values()):
        raise ValueError(f"data.sources lacks the {position} samples of data.position")


def _of_earlier_version(state: dict) -> dict:
    """Read a state that knew its sources by their names: none of them is known again."""
    consumed = state.get("consumed")
    if not isinstance(consumed, dict):
        raise ValueError("data.consumed is no table")
    sources = {
        f"{name} of an earlier version": {"name": name, "consumed": count, "about": {}}
        for name, count in consumed.items()
    }
    return state | {"sources": sources, "seed": None}


def seed_of(state: dict | None, seed: int) -> int:
    """Choose the seed of the order: that of the state, if it has one."""
    kept = None if state is None else state.get("seed")
    return seed if kept is None else kept


def check_sources(sources: list, state: dict, accept_changes: bool) -> None:
    """Say what has changed between a state and the sources, text among them that is not tokenised
    yet; ValueError where restore() would refuse it."""
    check_state(state)
    matched, changed = _match(sources, state)
    _refuse(changed, accept_changes)
    for what in changed:
        logger.warning(f"data: {what}; from here on its samples come in another order")
    new = [source.name for source in sources if source.fingerprint not in matched]
    gone = [entry["name"] for entry in _read_last(state, matched).values()]
    if new and gone:
        logger.warning(
            f"data: {', '.join(new)} is new since the checkpoint, and {', '.join(gone)} is not read"
            " any more"
        )
    elif new:
        logger.info(f"data: {', '.join(new)} is new since the checkpoint")


def restore(order: SampleOrder, sources: list, state: dict, accept_changes: bool) -> dict:
    """Move the order of `sources` to where a state stands, with its seed, and return what the
    sources that are no longer there had given, for state_of().

    With another sample length a source goes on after as many tokens, rounded up to a sample.
    ValueError where a source has changed since and accept_changes is False.
    """
    check_state(state)
    kept = seed_of(state, order.seed)
    if kept != order.seed:
        logger.info(
            f"data: the order of samples keeps the checkpoint's seed {kept}; job.seed ="
            f" {order.seed} would be for a new run"
        )
    order.seed = kept
    order.position = state["position"]
    old = state["seq_len"]
    length = sources[0].seq_len
    left = {
        fingerprint: entry | {"consumed": -(-entry["consumed"] * old // length)}
        for fingerprint, entry in _sources_of(state).items()
    }
    matched, changed = _match(sources, state)
    _refuse(changed, accept_changes)
    for place, source in enumerate(sources):
        if source.fingerprint in matched:
            order.consumed[place] = left.pop(matched[source.fingerprint])["consumed"]
    return left


def _sources_of(state: dict) -> dict:
    return (state if "sources" in state else _of_earlier_version(state))["sources"]


def _match(sources: list, state: dict) -> tuple[dict, list[str]]:
    """Find which sources of a state those of today are: {fingerprint: fingerprint then}, and what
    has changed, a line for each: a source, or all of them."""
    left = _sources_of(state)
    matched = {s.fingerprint: s.fingerprint for s in sources if s.fingerprint in left}
    changed = []
    for source in sources:
        if source.fingerprint in matched:
            continue
        rest = [f for f in left if f not in matched.values()]
        alike = [f for f in rest if left[f]["name"] == source.name]
        if alike:
            matched[source.fingerprint] = before = alike[-1]  # not one of an earlier mixture
            why = _change(source, left[before]["about"])
            changed.append(f"{source.name} has changed since the checkpoint: {why}")
    new = [source for source in sources if source.fingerprint not in matched]
    gone = _read_last(state, matched)
    if not matched:
        then = ", ".join(entry["name"] for entry in gone.values())
        now = ", ".join(source.name for source in sources)
        what = f"the checkpoint is of a run over {then}, this one is over {now}"
        if len(new) == len(gone) == 1 and _kind(then) == _kind(now):
            # One text and one text: it may have changed and moved.
            ((before, entry),) = gone.items()
            matched[new[0].fingerprint] = before
            what += f": {_change(new[0], entry['about'])}"
        changed.append(what)
    return matched, changed


def _read_last(state: dict, matched: dict) -> dict:
    """Find the sources that the run read when it was saved and that are none of today's."""
    found = _sources_of(state).items()
    return {f: e for f, e in found if f not in matched.values() and not e.get("left_out")}


def _kind(name: str) -> str:
    return name.partition(":")[0]


def _refuse(changed: list[str], accept_changes: bool) -> None:
    if changed and not accept_changes:
        raise ValueError(
            f"data.accept_changes = false: {changed[0]}; true goes on over what is there now; or"
            " put it back, or choose another job.folder"
        )


def _change(source: object, before: dict) -> str:
    """Say what is another in a source. before: what about() said then, or a stranger."""
    now = source.about()
    if not before:
        return "an earlier version knew it by its path and times"
    named = {"fraction": "validation_fraction", "pairs": "mqar_pairs", "queries": "mqar_queries"}
    for key, name in named.items():
        if key in now and now[key] != before.get(key):
            return f"data.{name} = {now[key]}, was {before.get(key)!r:.40}"
    if "folders" not in now:
        return "another tokenizer"
    files = source.contents()
    old = _files_then(before.get("folders"), Path(now["folders"][0]).parent)
    if files and old and old != files:
        return changes(old, files)
    counts = [f"{before.get(key)!r:.20} {key}" for key in ("documents", "tokens")]
    return f"other files, data.field or tokenizer than gave {counts[0]}, {counts[1]}"


def _files_then(folders: object, beside: Path) -> list:
    """Read what files the folders of tokens were made of, where they are still there, or in the
    folder `beside`."""
    with contextlib.suppress(TypeError, ValueError):
        there = [Path(folder) for folder in folders]
        found = [read_contents(path) or read_contents(beside / path.name) for path in there]
        return sum(found, []) if all(found) else []
    return []
