"""Start the ranks of a job on this machine, pass signals on to them, and say how they ended where
they could not: what ./run_train.sh runs."""

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from lmoe.command import asks_for_help, end_with_reader
from lmoe.messages import read_text
from lmoe.signals import LAUNCHER, before_first_step

USAGE = """\
./run_train.sh [--config=FILE.toml] [--section.key=value ...]    train on this machine

In the environment:
  NGPU=N          processes here, one for each GPU (default: the GPUs here, or 1)
  CONFIG=FILE     the configuration where --config names none (default: train_configs/debug.toml)
  NNODES=N        machines of the job (default: 1); each runs this script, with its own NODE_RANK,
                  from 0 on, and the same MASTER_ADDR, the host of NODE_RANK 0
  MASTER_PORT=N   port of the job's store (default: a free one, with NNODES 29500)
  RUN_ID=NAME     tells apart jobs that share MASTER_ADDR and MASTER_PORT (default: lmoe)
  TRAIN=FILE      the script to run (default: train.py)
  PYTHON=FILE     the interpreter (default: python or python3)

TERM, USR1, HUP and Ctrl-C: the run saves a checkpoint and ends with exit code 0. A second Ctrl-C
ends it at once.

All keys and what they mean: python train.py --help
"""
ROOT = Path(__file__).absolute().parent.parent
MOST = 65535  # of an integer in the environment: the last port
YOUNG = 1.0  # seconds in which a Python that starts would answer INT with a traceback
GONE = "the next start goes on from the newest checkpoint"
KILLED = {
    "SIGKILL": (
        "by hand, or by the kernel where the host's memory ran out (dmesg tells; fewer"
        f" data.workers, or fewer ranks, need less); {GONE}"
    ),
    "SIGSEGV": f"a crash outside of Python, which PYTHONFAULTHANDLER=1 locates; {GONE}",
    "SIGBUS": f"a file that was cut while it was mapped, or a full /dev/shm; {GONE}",
    "SIGABRT": f"a failed check outside of Python, told above; {GONE}",
}


def say(line: str) -> None:
    """Print a line on standard error, from a signal handler too."""
    os.write(2, f"{line}\n".encode(errors="replace"))


def setting(name: str, default: int, least: int) -> int:
    """Read an integer of the environment; ValueError where it is none."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or len(text) > 5 or not least <= int(text) <= MOST:
        raise ValueError(f"{name}={text!r}: it takes an integer from {least} to {MOST}")
    return int(text)


class Signals:
    """Pass signals on to the ranks here. Before they run, one ends this process; a second INT kills
    them."""

    def __init__(self):
        self.passed = []
        self.agent = None
        self.started = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._hear)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, self._hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def watch(self, agent) -> None:
        """Take the ranks of torch's agent, which is about to start them."""
        self.started = time.monotonic()
        self.agent = agent

    def _hear(self, number, frame):
        number = signal.Signals(number)
        workers = self.agent.get_worker_group().workers if self.agent else []
        pids = [worker.id for worker in workers if worker.id is not None]
        if not pids:
            say(before_first_step(number.name))
            os._exit(128 + number)
        self.passed.append(number)
        wait = self.started + YOUNG - time.monotonic()
        if self.passed.count(signal.SIGINT) > 1:
            send(pids, signal.SIGKILL)
        elif number == signal.SIGINT and wait > 0:
            threading.Timer(wait, send, (pids, number)).start()
        else:
            send(pids, as_heard(number))


def as_heard(number: signal.Signals) -> signal.Signals:
    """Find what the ranks are sent: they know no HUP."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def send(pids: list[int], number: int) -> None:
    """Send a signal to processes of which some may be gone."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def explain(rank: int, code: int, passed: list[signal.Signals]) -> tuple[int, str | None]:
    """Find the job's exit code, and a line where the ranks have said nothing. rank, code: of the
    first that failed, negative for a signal; passed: signals of the user."""
    if passed.count(signal.SIGINT) > 1:
        return 128 + signal.SIGINT, "ended by a second Ctrl-C without saving"
    number = -code if code < 0 else code - 128
    if number not in {s.value for s in signal.Signals}:
        return code, None if code == 1 else f"error: rank {rank} ended with exit code {code}"
    name = signal.Signals(number).name
    for sent in passed:
        if as_heard(sent) == number:
            return 128 + sent, before_first_step(sent.name)
    advice = f": {KILLED[name]}" if name in KILLED else ""
    return 128 + number, f"error: rank {rank} was ended by {name}{advice}"


def start(words: list[str], signals: Signals) -> int:
    """Run the job's ranks here to their end; ValueError where the environment does not fit."""
    nodes = setting("NNODES", 1, 1)
    node = setting("NODE_RANK", 0, 0)
    port = setting("MASTER_PORT", 29500 if nodes > 1 else 0, 0)
    setting("NGPU", 1, 1)
    host = os.environ.get("MASTER_ADDR")
    if nodes > 1 and not host:
        raise ValueError(f"NNODES={nodes} needs MASTER_ADDR, the host of NODE_RANK 0")
    script = os.environ.get("TRAIN") or str(ROOT / "train.py")
    if not any(word == "--config" or word.startswith("--config=") for word in words):
        words = [
            f"--config={os.environ.get('CONFIG') or ROOT / 'train_configs/debug.toml'}",
            *words,
        ]

    import torch
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    from lmoe.rendezvous import Alone, several

    gpus = torch.cuda.device_count()
    processes = setting("NGPU", max(gpus, 1), 1)
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(len(here) // processes, 1)))
    if gpus and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # less fragmentation under changing expert loads
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # they are passed on instead
    # Of semaphores, by a process that outlives a killed rank: more words than the reason.
    quiet = "ignore:resource_tracker:UserWarning"
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
    logging.disable()  # what failed is told by the ranks, else by `explain`

    rendezvous = several(nodes, node == 0, host, port) if nodes > 1 else Alone(port)
    spec = WorkerSpec(
        role="train",
        local_world_size=processes,
        rdzv_handler=rendezvous,
        entrypoint=sys.executable,
        # The agent puts the local rank in where it finds ${local_rank}.
        args=tuple(word.replace("$", "$$") for word in ("-u", script, *words)),
        max_restarts=0,
    )
    agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=os.devnull))
    signals.watch(agent)
    result = agent.run()
    if result is None or not result.is_failed():
        return 0
    rank, failure = next(iter(result.failures.items()))  # in the order of their ends
    code, line = explain(rank, failure.exitcode, signals.passed)
    if line is None and nodes == 1 and rendezvous.store.check(["lmoe/watchdog/0/said"]):
        said = read_text(rendezvous.store.get("lmoe/watchdog/0/said"))
        line = said and f"error: {said}"
    if line is not None:
        say(line)
    return code


def main(words: list[str]) -> int:
    signals = Signals()
    if words in (["--help"], ["-h"]):
        end_with_reader()
        print(USAGE, end="")
        return 0
    if asks_for_help(words):
        os.execv(sys.executable, [sys.executable, str(ROOT / "train.py"), *words])
    try:
        return start(words, signals)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    except (OSError, RuntimeError) as error:  # of the machine, and of meeting other machines
        cause = error.__cause__ or error
        say(f"error: the job cannot be started: {(str(cause) or repr(cause)).splitlines()[0]}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
