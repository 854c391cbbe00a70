"""Ends the whole job, and says which rank is to blame, when a rank dies, fails or hangs.

A daemon thread on every rank publishes about once a second how far the rank has come and looks at
three things: whether somebody has published a verdict, whether the next rank still sends (each rank
watches one other, so the cost per rank does not grow with the job), and whether this rank still
makes progress. The first one to see something wrong publishes the verdict; every rank then prints
it with its own Python stacks and leaves through os._exit: a rank that waits in a collective would
never get to the end of a destroy_process_group. The culprit leaves first, where it can: torchrun
takes the first to leave for the root cause. Its own code is then not zero.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback

import torch.distributed as dist

from lmoe.messages import (
    Beat,
    Stand,
    Verdict,
    clean,
    read_beat,
    read_stand,
    read_text,
    read_verdict,
)
from lmoe.signals import STOPS
from lmoe.stacks import in_one_line, is_communication, origin, place, stacks

_GATHER_SECONDS = 2.0  # for every rank to see a verdict and to say where it stands
# Intervals from a rank's last words to its end; _STAYS where a culprit is to leave first.
_LEAVES = 1.5
_STAYS = 4


def connect_store():
    """A connection of its own to the job's store, or None in a process without torchrun. After
    init_process_group.

    Of its own, because a connection serves one call at a time and the default one may be blocked
    waiting for a dead rank. Under torchrun the store lives in the agent of node 0 and outlives
    every rank.
    """
    if not dist.is_initialized() or "MASTER_ADDR" not in os.environ:
        return None
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, wait_for_workers=False)
    return dist.PrefixStore(
        f"lmoe/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
    )


class Watchdog:
    """Use as a context manager around the training loop: an exception in it ends the job with that
    rank named.

    store: connect_store(). timeout: seconds without a beat after which a rank counts as hung, once
    two steps are done; ten times that before, and inside `phase`. 0: nothing is watched. A rank is
    not hung while another one says `advance`.
    dead_after: seconds without a sign of life (the thread's, which needs the GIL only) after which
    a rank counts as dead; ten times that in the same places.
    """

    def __init__(self, store, rank, world, timeout, interval=1.0, dead_after=20.0):
        self.store = store
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self.interval = interval
        self.dead_after = dead_after
        self._step = None
        self._phase = "start"
        self._steps_begun = 0
        self._beats = 0
        self._advances = 0
        self._slow = 1  # inside how many of: the first two steps, phase()
        self._progress = time.monotonic()
        self._ending = threading.Lock()
        self._failure = None  # of the main thread, once it has raised: its stand, see _stand
        self._stopped = threading.Event()
        self._thread = None
        if timeout:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, step, phase="train"):
        """Progress: this rank is now in `phase` of `step`. Every rank makes the same calls in the
        same order, so that the one with the fewest is the one that the others wait for. Costs
        nothing."""
        if step != self._step:
            self._steps_begun += 1
            if self._steps_begun == 3:  # two are done: kernels are compiled and caches are warm
                self._slow -= 1
        self._step = step
        self._phase = phase
        self._beats += 1
        self._progress = time.monotonic()

    def advance(self):
        """Progress in work of unknown length, such as tokenising: this rank, and those that wait
        for it, are not hung. Costs nothing."""
        self._advances += 1
        self._progress = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name):
        """Work that may take ten times as long without a beat: validation, checkpoint,
        preparation."""
        before = self._phase
        self._slow += 1
        self.beat(self._step, name)
        try:
            yield
        finally:
            self.beat(self._step, before)
            self._slow -= 1

    def report(self, exception):
        """Say that this rank failed, to the user and to the other ranks, or which rank's end it is
        a consequence of."""
        exception = origin(exception)
        # Most likely of another rank's end, which shows in a moment.
        echo = is_communication(exception)
        error = clean(in_one_line(exception))
        self._failure = Stand(self._beats, echo, f"{self._where()}, failed with {error}")
        line = f"rank {self.rank} failed {self._where()}: {error}"
        said = None
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # the store is gone as well
                verdict = Verdict(line, first=(self.rank,))
                if echo:
                    verdict = self._other_verdict() or verdict
                said, first = self._explain(self._agree(verdict))
        self.last_words(said or line)
        _print(line if said in (line, None) else f"{line} -- after this: {said}")
        if said is not None:
            self._linger(first)

    def last_words(self, line):
        """Leave for the launcher what has ended the job."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set("said", json.dumps(line))

    def refuse(self, message):
        """A user's mistake, or a broken file: one line from rank 0 where all ranks found it, else
        one from each that did.

        Ranks that did not find it (a file that one node lacks) are told within seconds, so that
        none waits for this one.
        """
        self._stopped.set()
        _ignore_signals()  # another rank that refused has left, and torchrun ends this one
        short = clean(message)
        first = None
        if self.rank == 0:
            first = short
            _print_error(message)
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"refused/{self.rank}", json.dumps(short))
                everyone = [f"refused/{rank}" for rank in range(self.world)]
                for _ in range(10):
                    if self.store.check(everyone):
                        break
                    time.sleep(self.interval / 2)
                else:
                    began = self._steps_begun
                    end = f"failed {self._where()}" if began else "refused to start"
                    self._agree(Verdict(f"rank {self.rank} {end}: {short}"))
                first = self._read("refused/0", read_text)
        if first != short:
            _print_error(f"rank {self.rank}: {message}")

    def stop(self):
        """The end of a run that went well."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5 * self.interval)
            faulthandler.cancel_dump_traceback_later()

    def __enter__(self):
        return self

    def __exit__(self, kind, exception, trace):
        if kind is None or issubclass(kind, SystemExit):
            code = getattr(exception, "code", None)
            if isinstance(code, int) and code > 128:  # a signal before there was anything to save
                self._stop_all(code)
            self.stop()
            return
        _ignore_signals()
        traceback.print_exception(kind, exception, trace)
        sys.stderr.flush()
        with self._ending:  # the thread must not end the process while this says why
            self.report(exception)
            _leave()

    def _stop_all(self, code):
        """Leave with the exit code of a signal, and have the other ranks, which may have missed
        it, leave too."""
        with self._ending:
            if self.store is not None:
                with contextlib.suppress(RuntimeError):
                    self._agree(Verdict("", "stop", code=code))
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            _leave(code)

    # ----------------------------------------------------------------------------------------------
    # the thread

    def _watch(self):
        neighbour = (self.rank + 1) % self.world
        sign = None
        tick = 0
        published = 0  # of this rank's advances
        advanced = None  # what all ranks had published, half of the patience ago
        seen = last = time.monotonic()
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            # This process was stopped (or the thread starved): nobody's fault.
            if now - last > self.interval + 5:
                seen += now - last
                self._progress += now - last
            last = now
            tick = tick + 1
            # This thread cannot run while C code keeps the GIL; faulthandler's can.
            patience = self.timeout * (10 if self._slow else 1)
            faulthandler.dump_traceback_later(patience + 10, exit=True)
            if self._failure is not None:
                self._progress = now  # the main thread is about to end the process
            try:
                if self.store is not None:
                    beat = Beat(tick, self._beats, self._where(), bool(self._slow))
                    self.store.set(f"beat/{self.rank}", json.dumps(beat))
                    if self._advances != published:
                        published = self._advances
                        self.store.set("advanced", f"{self.rank} {published}")
                    if self._failure is None and self.store.check(["verdict"]):
                        self._end(read_verdict(self.store.get("verdict"), self.world))
                    latest = self._read(f"beat/{neighbour}", read_beat)
                    if self.store.check([f"done/{neighbour}"]):
                        seen = now
                    elif latest not in (sign, None):  # what cannot be read is no sign of life
                        sign = latest
                        seen = now
                    slow = sign is None or sign.slow
                    if now - seen > self.dead_after * (10 if slow else 1):
                        self._end(self._agree(self._silent([neighbour])))
                    # This rank may wait for one that advances.
                    if now - self._progress <= patience / 2:
                        advanced = None
                    elif (latest := self._read("advanced", bytes) or b"") != advanced:
                        if advanced is not None:
                            self._progress = now
                        advanced = latest
                if now - self._progress > patience:
                    line = f"no progress for {now - self._progress:.0f} s"
                    self._end(self._agree(Verdict(line, "hang")))
            except RuntimeError as error:  # dist.DistStoreError and friends
                # Not the normal end of the job, where rank 0 may leave first.
                if not self._stopped.wait(5):
                    line = (
                        "the job's store is gone, and with it rank 0's node or process"
                        f" ({str(error).splitlines()[0]})"
                    )
                    self._end(Verdict(line))
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"done/{self.rank}", "")

    def _end(self, verdict):
        """Print the verdict and this rank's stacks, and leave."""
        with self._ending:
            if verdict.kind == "stop":
                _leave(verdict.code)
            line, first = self._explain(verdict)
            _print(
                f"{line} (rank {self.rank} ends {self._where()}; its Python stacks"
                f" follow)\n{stacks()}"
            )
            self.last_words(line)
            self._linger(first)
            _leave()

    def _linger(self, first):
        """torchrun ends the others once one is gone: let them say so too, and let the ranks `first`
        leave before this one."""
        time.sleep((_STAYS if first and self.rank not in first else _LEAVES) * self.interval)

    def _where(self):
        step = "" if self._step is None else f"at step {self._step} "
        return f"{step}in {self._phase}"

    # ----------------------------------------------------------------------------------------------
    # between the ranks

    def _agree(self, verdict):
        """The job's verdict: this one, or the one that another rank published before."""
        if self.store is None:
            return verdict
        verdict = self.store.compare_set("verdict", "", json.dumps(verdict))
        return read_verdict(verdict, self.world)

    def _read(self, key, read):
        """Read a key's bytes with `read`; None where nothing is there."""
        return read(self.store.get(key)) if self.store.check([key]) else None

    def _silent(self, ranks):
        """The verdict on ranks that have stopped sending."""
        lines = [
            f"rank {rank} is dead or frozen, last seen {self._last_seen(rank)}" for rank in ranks
        ]
        return Verdict("; ".join(lines))

    def _last_seen(self, rank):
        beat = self._read(f"beat/{rank}", read_beat)
        return beat.where if beat else "before its first step"

    def _explain(self, verdict):
        """(line, ranks that leave first) of a verdict; of a hang that is what the ranks find out
        together now."""
        if verdict.kind != "hang":
            return verdict.line, verdict.first
        blame, first = self._blame()
        return f"{verdict.line}; {blame}", first

    def _other_verdict(self):
        """The verdict that another rank has published, or of the ranks that have stopped sending,
        looking for a few seconds."""
        beats = [f"beat/{rank}" for rank in range(self.world)]
        before = [self._read(key, read_beat) for key in beats]
        for _ in range(4):
            time.sleep(self.interval)
            verdict = self._read("verdict", lambda data: read_verdict(data, self.world))
            if verdict is not None:
                return verdict
        silent = [
            rank
            for rank, beat in enumerate(before)
            if rank != self.rank and self._read(beats[rank], read_beat) == beat
        ]
        return self._silent(silent) if silent and self._thread is not None else None

    def _stand(self):
        waits, where = place()
        return self._failure or Stand(self._beats, waits, f"{self._where()} {where}")

    def _blame(self):
        """(which ranks the others are waiting for, those of them that answer), from what all ranks
        say in the next two seconds."""
        if self.store is None:
            return f"the process is {self._stand().where}", [self.rank]
        self.store.set(f"stand/{self.rank}", json.dumps(self._stand()))
        time.sleep(_GATHER_SECONDS + self.interval)
        stands = {rank: self._read(f"stand/{rank}", read_stand) for rank in range(self.world)}
        said = {rank: stand for rank, stand in stands.items() if stand}
        where = [
            f"rank {rank} (does not answer; last {self._last_seen(rank)})"
            for rank in stands
            if rank not in said
        ]
        blamed = []
        if not where:
            blamed = _behind(said)
            where = [f"rank {rank} ({said[rank].where})" for rank in blamed]
        others = sorted({stand.where for rank, stand in said.items() if rank not in blamed})
        if where:
            rest = f"; the other ranks are {'; '.join(others[:3])}" if others else ""
            return f"waiting for {', '.join(where)}{rest}", blamed
        if len(others) == 1:
            return f"every rank waits at the same place: {others[0]}", []
        return f"nothing tells which rank the others wait for; they are {'; '.join(others[:4])}", []


def _behind(stands):
    """Find in {rank: [beats, inside a collective, where]} those that the others wait for: those
    with the fewest beats, else those outside a collective while others are inside one, else the
    smaller group; empty if nothing tells the ranks apart."""
    for key in (lambda stand: stand[0], lambda stand: stand[1]):
        values = {key(stand) for stand in stands.values()}
        if len(values) > 1:
            return [rank for rank, stand in stands.items() if key(stand) == min(values)]
    groups = {}
    for rank, stand in stands.items():
        groups.setdefault(stand[2], []).append(rank)
    smallest = min(groups.values(), key=len)
    return smallest if 2 * len(smallest) < len(stands) else []


def _ignore_signals():
    """Let nothing interrupt the main thread that says what has happened: torchrun's SIGTERM once
    another rank is gone, and SIGCHLD, in which torch's loader raises."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)


def _leave(code=1):
    """End this process, whatever else goes on in it, and those that it started: one that hangs
    while it loads would stay."""
    try:
        for child in multiprocessing.active_children():
            child.kill()
    finally:
        os._exit(code)


def _print_error(message):
    print(f"error: {clean(message, longest=10_000)}", file=sys.stderr, flush=True)


def _print(line):
    """One write, so that ranks do not mix; not through sys.stderr, whose lock the hung thread may
    hold."""
    os.write(2, f"[watchdog] {line}\n".encode(errors="replace"))
