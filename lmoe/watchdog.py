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
import re
import signal
import sys
import threading
import time
import traceback

import torch.distributed as dist

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
    two steps are done; ten times that before, and inside `phase`. 0: nothing is watched.
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
        exception = _origin(exception)
        # Most likely of another rank's end, which shows in a moment.
        echo = _is_communication(exception)
        error = _in_one_line(exception)
        self._failure = [self._beats, echo, f"{self._where()}, failed with {error}"]
        line = f"rank {self.rank} failed {self._where()}: {error}"
        said = None
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # the store is gone as well
                verdict = {"line": line, "first": [self.rank]}
                if echo:
                    verdict = self._other_verdict() or verdict
                said, first = self._explain(self._agree(verdict))
        _print(line if said in (line, None) else f"{line} -- after this: {said}")
        if said is not None:
            self._linger(first)

    def refuse(self, message):
        """A user's mistake found before training: one line from rank 0 where all ranks made it,
        else one from each that did.

        Ranks that did not make it (a file that one node lacks) are told within seconds, so that
        none waits for this one.
        """
        self._stopped.set()
        first = None
        if self.rank == 0:
            first = message
            _print_error(message)
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"refused/{self.rank}", json.dumps(message))
                refused = self.store.add("refusals", 1)
                for _ in range(10):
                    if refused == self.world:
                        break
                    time.sleep(self.interval / 2)
                    refused = self.store.add("refusals", 0)
                if refused < self.world:
                    self._agree({"line": f"rank {self.rank} refused to start: {message}"})
                first = self._read("refused/0")
        if first != message:
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
            self.stop()
            return
        if threading.current_thread() is threading.main_thread():
            # torch's loader raises in it, wherever the main thread is, even here.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        traceback.print_exception(kind, exception, trace)
        sys.stderr.flush()
        with self._ending:  # the thread must not end the process while this says why
            self.report(exception)
            _leave()

    # ----------------------------------------------------------------------------------------------
    # the thread

    def _watch(self):
        neighbour = (self.rank + 1) % self.world
        sign = None
        tick = 0
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
                    beat = [tick, self._beats, self._where(), bool(self._slow)]
                    self.store.set(f"beat/{self.rank}", json.dumps(beat))
                    if self._failure is None and self.store.check(["verdict"]):
                        self._end(json.loads(self.store.get("verdict")))
                    if self.store.check([f"done/{neighbour}"]):
                        seen = now
                    elif (latest := self._read(f"beat/{neighbour}")) != sign:
                        sign = latest
                        seen = now
                    slow = sign is None or sign[3]
                    if now - seen > self.dead_after * (10 if slow else 1):
                        self._end(self._agree(self._silent([neighbour])))
                if now - self._progress > patience:
                    line = f"no progress for {now - self._progress:.0f} s"
                    self._end(self._agree({"line": line, "kind": "hang"}))
            except RuntimeError as error:  # dist.DistStoreError and friends
                # Not the normal end of the job, where rank 0 may leave first.
                if not self._stopped.wait(5):
                    line = (
                        "the job's store is gone, and with it rank 0's node or process"
                        f" ({str(error).splitlines()[0]})"
                    )
                    self._end({"line": line})
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"done/{self.rank}", "")

    def _end(self, verdict):
        """Print the verdict and this rank's stacks, and leave."""
        with self._ending:
            line, first = self._explain(verdict)
            _print(
                f"{line} (rank {self.rank} ends {self._where()}; its Python stacks"
                f" follow)\n{_stacks()}"
            )
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
        return json.loads(self.store.compare_set("verdict", "", json.dumps(verdict)))

    def _read(self, key):
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def _silent(self, ranks):
        """The verdict on ranks that have stopped sending."""
        lines = [
            f"rank {rank} is dead or frozen, last seen {self._last_seen(rank)}" for rank in ranks
        ]
        return {"line": "; ".join(lines)}

    def _last_seen(self, rank):
        beat = self._read(f"beat/{rank}")
        return beat[2] if beat else "before its first step"

    def _explain(self, verdict):
        """(line, ranks that leave first) of a verdict; of a hang that is what the ranks find out
        together now."""
        if verdict.get("kind") != "hang":
            return verdict["line"], verdict.get("first", [])
        blame, first = self._blame()
        return f"{verdict['line']}; {blame}", first

    def _other_verdict(self):
        """The verdict that another rank has published, or of the ranks that have stopped sending,
        looking for a few seconds."""
        before = [self._read(f"beat/{rank}") for rank in range(self.world)]
        for _ in range(4):
            time.sleep(self.interval)
            if verdict := self._read("verdict"):
                return verdict
        silent = [
            rank
            for rank, beat in enumerate(before)
            if rank != self.rank and self._read(f"beat/{rank}") == beat
        ]
        return self._silent(silent) if silent and self._thread is not None else None

    def _stand(self):
        """[beats, whether this rank waits for others, where it is]"""
        collective, place = _place()
        return self._failure or [self._beats, collective, f"{self._where()} {place}"]

    def _blame(self):
        """(which ranks the others are waiting for, those of them that answer), from what all ranks
        say in the next two seconds."""
        if self.store is None:
            return f"the process is {self._stand()[2]}", [self.rank]
        self.store.set(f"stand/{self.rank}", json.dumps(self._stand()))
        time.sleep(_GATHER_SECONDS + self.interval)
        stands = {rank: self._read(f"stand/{rank}") for rank in range(self.world)}
        said = {rank: stand for rank, stand in stands.items() if stand}
        where = [
            f"rank {rank} (does not answer; last {self._last_seen(rank)})"
            for rank in stands
            if rank not in said
        ]
        blamed = []
        if not where:
            blamed = _behind(said)
            where = [f"rank {rank} ({said[rank][2]})" for rank in blamed]
        others = sorted({stand[2] for rank, stand in said.items() if rank not in blamed})
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


def _place():
    """(whether the main thread is inside torch.distributed, where it is: its innermost line outside
    of torch)."""
    innermost = sys._current_frames()[threading.main_thread().ident]
    collective = False
    for frame, _ in traceback.walk_stack(innermost):
        file = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in file:
            break
        collective |= f"{os.sep}torch{os.sep}distributed{os.sep}" in file
        # lmoe's own are ops, of which Python sees the call alone: lmoe/parallel/compat.py, and code
        # that torch.compile wrote.
        if file.endswith(f"{os.sep}_ops.py"):
            collective |= "c10d_functional" in str(frame.f_locals.get("self"))
    place = f"at {os.path.basename(file)}:{frame.f_lineno}"
    return collective, f"{place} ({innermost.f_code.co_name})"


def _stacks():
    """Every thread's stack, innermost line first. Reads no source files: a file system that hangs
    may be why we are here."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, innermost in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        lines.append(f"  thread {names.get(ident, ident)}:")
        for frame, line in traceback.walk_stack(innermost):
            lines.append(
                f'    File "{frame.f_code.co_filename}", line {line} in {frame.f_code.co_name}'
            )
    return "\n".join(lines)


def _leave():
    """End this process, whatever else goes on in it, and those that it started: one that hangs
    while it loads would stay."""
    try:
        for child in multiprocessing.active_children():
            child.kill()
    finally:
        os._exit(1)


def _origin(exception):
    """The exception itself: torch's pipelining wraps what a stage raises in a RuntimeError that
    tells the shapes of its tensors."""
    pipelining = f"{os.sep}pipelining{os.sep}"
    while exception.__cause__ is not None and pipelining in _raised_at(exception).filename:
        exception = exception.__cause__
    return exception


def _in_one_line(exception):
    """Type and message, or what stands in for one: the line that raised it."""
    lines = [line.strip() for line in str(exception).splitlines() if line.strip()]
    if not lines:
        at = _raised_at(exception)
        lines = [f"no message, at {os.path.basename(at.filename)}:{at.lineno} ({at.name})"]
    return f"{type(exception).__name__}: {lines[0]}"


def _raised_at(exception):
    return traceback.extract_tb(exception.__traceback__)[-1]


def _is_communication(exception):
    named = re.search("gloo|nccl|connection", str(exception).lower())
    return isinstance(exception, dist.DistError) or named is not None


def _print_error(message):
    print(f"error: {message}", file=sys.stderr, flush=True)


def _print(line):
    """One write, so that ranks do not mix; not through sys.stderr, whose lock the hung thread may
    hold."""
    os.write(2, f"[watchdog] {line}\n".encode())
