"""Tokenise text into shards, once, in parallel and resumably.

    python -m lmoe.data.prepare OUT --paths FILE FOLDER 'GLOB/**/*.jsonl' --tokenizer byte [--field
    text] [--workers 8] python -m lmoe.data.prepare OUT --verify

The bytes written depend on the files, the tokenizer and --shard-tokens, not on the number of
workers or on interruptions: workers tokenise pieces of the input, one writer takes them in order.
After a kill the same command continues where the last shard that is finished and intact ends, or
where the shard in work was last kept (lmoe/data/partial.py).
"""

import argparse
import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from lmoe.command import given_path, printable, reason
from lmoe.data.corpus import (
    FILES,
    changes,
    contents,
    files_digest,
    hex_digest,
    read_contents,
)
from lmoe.data.documents import read_piece, split_pieces, text_files, told
from lmoe.data.partial import PartialWriter
from lmoe.data.shards import INDEX, Shards, read_json, to_json
from lmoe.data.tokenizer import load_tokenizer
from lmoe.files import write_atomic
from lmoe.signals import end_with_parent

logger = logging.getLogger("lmoe")

SHARD_TOKENS = 1 << 27
# Characters of a text that may take minutes. tiktoken takes it whole: where a cut would not show in
# the tokens only its pattern knows. It can be slow but has nothing to wait for, so it gets on.
LONG = 1 << 20
TICK = 1.0
PLAN = "plan.json"
# What a finished folder no longer needs; whatever else has such an ending is the user's.
_LEFT = re.compile(
    r"plan\.json|shard-\d{5,}\.json"
    r"|((plan|files|index)\.json|shard|(partial|ends)(\.tmp)?|shard-\d{5,}\.(json|documents))\.tmp"
)
# All that a preparation writes but its index and lock.
_OURS = re.compile(rf"{_LEFT.pattern}|files\.json|shard-\d{{5,}}\.(tokens|documents)")
# of a worker process, set as it starts: pickling it with every piece would cost more than the work
_tokenizer = None
_done = None  # documents, of all workers together: any change says that they get on


def _start_worker(tokenizer, done):
    global _tokenizer, _done
    _tokenizer = tokenizer
    _done = done
    for number in (signal.SIGINT, signal.SIGUSR1):  # they are for the writer
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _count():
    _done.value += 1  # now and then one is lost: there is no lock


@contextlib.contextmanager
def _ticking(advance: Callable[[], None]) -> Iterator[None]:
    """Call advance() about every second meanwhile."""
    done = threading.Event()

    def tick():
        while not done.wait(TICK):
            advance()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def tokenise(piece, field, tokenizer=None, advance=_count):
    """A piece's documents -> tokens [n], each document ended by eos, and where each ends
    [documents]. tokenizer: by default the worker's; advance(): called after every document, and
    within a long one."""
    tokenizer = tokenizer or _tokenizer
    eos = np.array([tokenizer.eos], tokenizer.dtype)
    parts = [eos[:0]]
    for text in read_piece(piece, field):
        with _ticking(advance) if len(text) > LONG else contextlib.nullcontext():
            parts += [tokenizer.encode_array(text), eos]
        advance()
    return np.concatenate(parts), np.cumsum([len(part) for part in parts])[2::2]


def prepare(
    folder,
    files,
    tokenizer,
    *,
    field="text",
    workers=0,
    shard_tokens=SHARD_TOKENS,
    advance=lambda: None,
):
    """Tokenise `files` (of documents.text_files or stdlib_files) into `folder`; returns the folder
    opened as Shards.

    workers: processes that tokenise; 0 works in this one. A folder that holds the same preparation,
    finished or not, is continued; one of something else is refused. advance(): called whenever the
    work, or that of another process which has the folder, has got on.
    """
    folder = Path(folder)
    if shard_tokens < 1:
        raise ValueError(f"--shard-tokens {shard_tokens}: a shard needs at least 1 token")
    corpus = files_digest(files, field, advance)
    plan = hex_digest(f"{corpus} {tokenizer.digest} {shard_tokens}")
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(folder)
    # Not through a link, and not waiting for the reader of a pipe.
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(folder / ".lock", flags, 0o644), "rb") as lock:
        # Of two runs that share a cache one prepares, the other waits and finds it done.
        _take(lock, folder, advance)
        if not _is_done(folder, plan):
            writer = PartialWriter(folder, tokenizer.dtype, shard_tokens, advance)
            write_atomic(folder / FILES, json.dumps(contents(files)).encode())
            _write(writer, (plan, corpus), files, tokenizer, field, workers, advance)
        for name in filter(_LEFT.fullmatch, os.listdir(folder)):
            (folder / name).unlink()
    return Shards(folder)


def _take(lock, folder: Path, advance: Callable[[], None]) -> None:
    """Lock the folder, as soon as nobody else has it; signals are heard meanwhile."""
    seen = None
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        if seen is None:
            logger.info(f"{folder}: waiting for another process that tokenises into it")
        found = _sizes(folder)
        if found != seen:
            advance()
        seen = found
        time.sleep(0.2)


def _sizes(folder):
    with contextlib.suppress(FileNotFoundError):
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    return {}


def _refuse_changed(folder, corpus, files, field, advance):
    """Refuse text that changed while it was tokenised, and remove what was made of it."""
    same = files_digest(files, field, advance) == corpus
    if same and all(os.stat(file.path).st_size == file.size for file in files):
        return
    before, after = read_contents(folder), contents(files)
    for name in filter(_OURS.fullmatch, os.listdir(folder)):
        (folder / name).unlink()
    what = changes(before, after) if before != after else "files have grown"
    raise ValueError(f"data.paths: the text changed while it was tokenised, {what}: start again")


def _write(writer, made_from, files, tokenizer, field, workers, advance):
    pieces = split_pieces(files)
    first, done = writer.resume  # documents of the first piece that finished shards hold already
    total = sum(piece.size for piece in pieces)
    read = before = sum(piece.size for piece in pieces[:first])
    start = shown = time.monotonic()
    tokens_done = sum(s["tokens"] for s in writer.shards) + writer.tokens

    def show():
        rate = (read - before) / max(time.monotonic() - start, 1e-9)
        logger.info(
            f"tokenising {read / max(total, 1):6.1%} of {total / 1e6:,.0f} MB,"
            f" {tokens_done:,} tokens, {rate / 1e6:.1f} MB/s,"
            f" {(total - read) / max(rate, 1):.0f} s left"
        )

    tokenised = _tokenised(pieces[first:], field, tokenizer, workers, advance)
    with contextlib.closing(tokenised):
        for k, (tokens, ends) in enumerate(tokenised, first):
            while done < len(ends):
                at = ends[done - 1] if done else 0
                # Documents go into the shard up to and with the one that fills it.
                stop = min(int(np.searchsorted(ends, at + writer.room)) + 1, len(ends))
                writer.add(tokens[at : ends[stop - 1]], ends[done:stop] - at)
                tokens_done += int(ends[stop - 1] - at)
                done = stop
                if writer.room <= 0:
                    writer.finish_shard((k, done) if done < len(ends) else (k + 1, 0))
            done = 0
            writer.keep((k + 1, 0))
            advance()
            read += pieces[k].size
            # A line every ten seconds, and one at the end.
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                show()
    show()
    _refuse_changed(writer.folder, made_from[1], files, field, advance)
    writer.close(*made_from, tokenizer, (len(pieces), 0))


def _refuse_strangers(folder: Path) -> None:
    """Refuse a folder that holds something but no preparation, before anything is written there."""
    found = set(os.listdir(folder)) - {".lock", f"{PLAN}.tmp"}
    # In this order: another process may finish meanwhile, and removes its plan after that.
    if found and _plan_of(folder / PLAN) is None and _plan_of(folder / INDEX) is None:
        raise ValueError(
            f"OUT = {str(folder)!r} holds other files ({min(found)!r:.80}): name an empty or a new"
            " folder"
        )


def _plan_of(path: Path) -> str | None:
    """Read which preparation a file is of, None where there is no file."""
    try:
        plan = read_json(path).get("plan")
    except FileNotFoundError:
        return None
    except ValueError:
        plan = None
    if not isinstance(plan, str) or not re.fullmatch("[0-9a-f]{64}", plan):
        raise ValueError(
            f"OUT = {str(path.parent)!r}: its {path.name} is damaged, or of something else: name"
            " another folder"
        )
    return plan


def _is_done(folder, plan):
    """Tell whether the folder holds the finished preparation `plan`; one of something else is
    refused, an empty one claimed."""
    for name in (INDEX, PLAN):
        found = _plan_of(folder / name)
        if found not in (plan, None):
            raise ValueError(
                f"OUT = {str(folder)!r} holds a preparation of other files or options (tokenizer,"
                " --field, --shard-tokens): name another folder"
            )
        if found:
            return name == INDEX
    write_atomic(folder / PLAN, to_json({"plan": plan}))
    return False


def _tokenised(pieces, field, tokenizer, workers, advance):
    """(tokens, ends) of each piece, in order; at most two pieces per worker wait."""
    if workers == 0:
        yield from (tokenise(piece, field, tokenizer, advance) for piece in pieces)
        return
    # Not forked: the caller may hold threads and a GPU.
    context = multiprocessing.get_context("spawn")
    counter = context.RawValue("Q", 0)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer, counter)
    )
    processes = pool._processes
    try:
        pending = deque()
        for piece in pieces:
            pending.append(pool.submit(tokenise, piece, field))
            if len(pending) > 2 * workers:
                yield _result(pending.popleft(), counter, advance)
        while pending:
            yield _result(pending.popleft(), counter, advance)
    except BrokenProcessPool:
        raise ValueError(
            "--workers: a worker died (out of memory?); the same command continues, with fewer"
            " workers if need be"
        ) from None
    finally:
        if pending:  # else shutdown() would wait for what they have in hand
            for process in list(processes.values()):
                process.kill()
        pool.shutdown(cancel_futures=True)


def _result(future: Future, counter, advance: Callable[[], None]):
    seen = counter.value
    while not wait([future], timeout=1).done:
        if counter.value != seen:
            advance()
        seen = counter.value
    return future.result()


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m lmoe.data.prepare", description=__doc__.split("\n")[0]
    )
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    parser.add_argument(
        "--paths", nargs="+", help="files, folders or globs of .txt .md .py .jsonl .jsonl.gz"
    )
    parser.add_argument(
        "--tokenizer",
        default="byte",
        help="byte, the path of a .tiktoken rank file, or a tiktoken encoding name",
    )
    parser.add_argument(
        "--field", default="text", help="field of a .jsonl line that holds the document"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=cores(),
        help="processes that tokenise (default: this machine's cores)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        help="a shard closes after this many (default: %(default)s)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare OUT with its checksums instead of writing"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        out = given_path("OUT", args.out)
        if args.verify:
            shards = Shards(out)
            shards.verify()
        elif not args.paths:
            parser.error("--paths is needed")
        else:
            left_out = Counter()
            files = text_files(args.paths, left_out)
            if left_out.total():
                logger.info(f"{len(files):,} files; {told(left_out)}")
            shards = prepare(
                out,
                files,
                load_tokenizer(args.tokenizer),
                field=args.field,
                workers=args.workers,
                shard_tokens=args.shard_tokens,
            )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {reason(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command continues") from None
    print(
        f"{printable(str(out))}: {shards.documents:,} documents, {shards.tokens:,} tokens in"
        f" {len(shards.shards)} shards, tokenizer"
        f" {shards.tokenizer['name']}{', checksums right' if args.verify else ''}"
    )


if __name__ == "__main__":
    main()
