"""Checkpoints: saved while training goes on, published when whole, loaded into any other layout.

    python -m lmoe.checkpoint verify outputs/ckpt            # or one step-N of it

Tensors go through torch.distributed.checkpoint under flat names, so that a file knows nothing of
the ranks that wrote it:
    model.<parameter or persistent buffer>      optim.<parameter>.<exp_avg | exp_avg_sq | step |
                                                ...>
Beside them lie meta.json (step, world size, what the caller passed as `extra`) and rng-<rank>.pt.
lmoe/checkpoint_files.py says which files make a whole checkpoint and in which order it appears.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import warnings
from collections import ChainMap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner

from lmoe.checkpoint_files import (
    MANIFEST,
    WRITING,
    Gone,
    begin,
    checkpoint_folder,
    checkpoints,
    examine,
    is_there,
    newest,
    prune,
    publish,
    read_manifest,
    reading,
    seal,
    some,
    verify,
)
from lmoe.checkpoint_find import CheckpointError, Finder, one_line
from lmoe.checkpoint_metadata import read_meta, read_tensors
from lmoe.checkpoint_state import (
    HostMemory,
    Reader,
    check_step_counts,
    empty_optimizer_state,
    model_tensors,
    optimizer_tensors,
    read_rng_state,
    rng_state,
    set_rng_state,
)
from lmoe.command import end_with_reader, given_path, printable, reason
from lmoe.files import in_one_line

__all__ = ["CheckpointError", "Checkpointer", "load_model", "newest", "read_extra", "verify"]
logger = logging.getLogger(__name__)
# One process needs no group.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class _Writer(dcp.FileSystemWriter):
    """Names the reason of a write that failed: torch.save hides a full disk behind a complaint
    about its own position in the file."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            reason = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            raise reason or error from None


class _Planner(DefaultSavePlanner):
    """Plans with the tensors of the state, writes their copies; advance() at each."""

    def __init__(self, copies, advance):
        super().__init__()
        self.copies = copies
        self.advance = advance

    def lookup_object(self, index):
        self.advance()
        return self.copies[index.fqn]


class Checkpointer(Finder):
    """Saves and loads a run's checkpoints in `folder`. Every method is to be called on all ranks,
    in the same order.

    keep: how many checkpoints stay (0: all). async_save: only the copy to the CPU stops training; a
    thread writes. process_group: a gloo group of all ranks that nobody else uses; by default a new
    one (None without torch.distributed). A background save that fails does not stop training: the
    failure is logged, the previous checkpoints stay, and the next save tries again. The last save
    of a run does raise, through wait(). advance(): called as long as the caller waits for work here
    that goes on.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 3,
        async_save: bool = True,
        process_group: dist.ProcessGroup | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(process_group, advance)
        self.folder = Path(folder)
        self.keep = keep
        self.async_save = async_save
        self._thread = None  # of the last save, until its end is reported
        self._failure = None  # why the last save failed
        self._saved = None  # what the last save wrote and nobody was told yet
        self._written = 0  # pieces, by which one sees that a save goes on
        self._host = HostMemory()
        self._published = []  # checkpoints that this process wrote, newest first (rank 0)

    # ----------------------------------------------------------------------------------------------
    # saving

    def save(
        self,
        step,
        model,
        optimizers,
        extra,
        files=None,
        save_files=None,
        sync=False,
        healthy: bool = True,
    ):
        """Write step-<step>.

        optimizers: list of torch optimizers over parameters of `model`, whose state is made of
        tensors. extra: what JSON can hold (data position, schedule ...), returned by load. files:
        name -> text to lie beside it; save_files(folder) may write more. healthy: whether the run
        is in good health; the newest checkpoint of which that is true is never removed. Returns
        once training may go on: with async_save after the copy to the CPU, else (or with sync) when
        the checkpoint is whole. Raises CheckpointError in the latter case only.
        """
        self._join()
        self.poll()
        self._unlock()
        state = model_tensors(model) | optimizer_tensors(model, optimizers)
        meta = {
            "step": step,
            "world_size": self.world,
            "torch": torch.__version__,
            "optimizers": sorted({type(optimizer).__name__ for optimizer in optimizers}),
            "healthy": bool(healthy),
            "extra": extra,
        }
        files = {**(files or {}), "meta.json": json.dumps(meta, indent=1)}
        arguments = (step, state, self._host.copy(state), rng_state(), files, save_files)
        self._thread = threading.Thread(
            target=self._save, args=arguments, name=f"save step-{step}", daemon=True
        )
        self._thread.start()
        if sync or not self.async_save:
            self.wait()

    def poll(self):
        """Log the end of a background save, once. To be called every step; returns why it failed,
        or None."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread = None
        self._tell()
        if self._failure and self.rank == 0:
            logger.error(
                f"{self._failure}; training goes on, and the checkpoints before it are untouched"
            )
        return self._failure

    def wait(self):
        """Wait for the save in flight and log its end; CheckpointError if the last save failed."""
        self._join()
        self._thread = None
        self._tell()
        if self._failure:
            raise CheckpointError(self._failure)

    def _tell(self):
        if self._saved and self.rank == 0:
            logger.info(self._saved)
        self._saved = None

    def _join(self):
        seen = self._written
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(timeout=1)
            if self._written != seen:
                seen = self._written
                self.advance()

    def _note(self):
        self._written += 1

    def _save(self, step, state, copies, rng, files, save_files):
        """The background part of a save. Its collectives come in the same order on every rank: only
        one save is in flight at a time, and nothing else uses the group meanwhile. Never raises:
        the outcome is self._failure. Of `state`, which training is changing, only shapes and
        layouts are read."""
        final = self.folder / f"step-{step}"
        tmp = None
        self._failure = None
        try:
            self._together(lambda: self._prepare(step))
            tmp = self._gather(self._tmp)[0]
            # Copying ahead is for tensors on a GPU and would wait for training's stream.
            writer = _Writer(tmp, per_thread_copy_ahead=0)
            dcp.save(
                state,
                storage_writer=writer,
                planner=_Planner(copies, self._note),
                process_group=self.group,
            )
            sealed = self._together(lambda: self._finish(tmp, rng, files, save_files))
            self._together(lambda: self._publish(tmp, final, sealed))
        except dcp.CheckpointException as error:
            # torch has told every rank of every rank's failure
            rank, (reason, _) = min(error.failures.items())
            self._failure = f"saving step-{step} failed: rank {rank}: {one_line(reason)}"
        except CheckpointError as error:
            self._failure = f"saving step-{step} failed: {error}"
        except Exception as error:
            # a rank is gone, so the group is of no more use: torchrun or the watchdog ends the job
            self._failure = f"saving step-{step} failed on rank {self.rank}: {one_line(error)}"
        if self._failure and tmp and self.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)  # a full disk needs the room

    def _prepare(self, step):
        self._tmp = begin(self.folder, step) if self.rank == 0 else None

    def _finish(self, tmp, rng, files, save_files):
        """Write the files that are not tensors; flush and hash all files of this rank. -> manifest
        entries"""
        torch.save(rng, tmp / f"rng-{self.rank}.pt")
        if self.rank == 0:
            for name, text in files.items():
                (tmp / name).write_text(text)
            if save_files is not None:
                save_files(tmp)
        mine = [path for path in tmp.rglob("*") if _owner(path) == self.rank and path.is_file()]
        names = [str(path.relative_to(tmp)) for path in mine]
        return seal(tmp, [name for name in names if name != WRITING], self._note)

    def _publish(self, tmp, final, sealed):
        if self.rank != 0:
            return
        files = dict(ChainMap(*sealed))
        publish(tmp, final, files)
        self._whole.pop(final, None)
        self._damaged.discard(final)
        self._published = [final, *(path for path in self._published if path != final)]
        size = sum(entry["bytes"] for entry in files.values())
        self._saved = f"saved {final.name} ({in_bytes(size)}) to {final}"
        try:
            hashed = [path for path in checkpoints(self.folder) if path in self._whole]
            known = [*self._published, *(path for path in hashed if path not in self._published)]
            prune(self.folder, self.keep, known, self._damaged)
        except OSError as error:
            logger.warning(
                f"{final} is saved, but older checkpoints could not be looked at:"
                f" {in_one_line(error)}"
            )

    # ----------------------------------------------------------------------------------------------
    # loading

    def load(self, model, optimizers, path=None):
        """Resume: weights, buffers, optimizer state and, on as many ranks as saved it, the random
        generators, all in place, bitwise.

        path: a checkpoint, a folder of them or that of a job; by default the newest whole one of
        this run. -> the `extra` given to save, or None if there is none to load. ValueError if what
        is there is damaged or does not fit, naming the files, tensors or keys.
        """
        path = self.find(path)
        if path is None:
            return None
        with self._found(path):
            meta, saved, files = self._describe(path)
            names = sorted({type(optimizer).__name__ for optimizer in optimizers})
            if names != meta["optimizers"]:
                raise ValueError(
                    f"optimizer.name: {path} was saved with {meta['optimizers']} and cannot resume"
                    f" with {names}; set checkpoint.load_only_model to start from its weights"
                )
            wanted = model_tensors(model)
            states = empty_optimizer_state(model, optimizers, saved, trained=meta["step"] > 0)
            for _, _, name, state in states:
                wanted |= {f"optim.{name}.{key}": tensor for key, tensor in state.items()}
            self._fill(wanted, saved, path, same_dtype=True)
            self._together(lambda: check_step_counts(states, path), ValueError)
            for optimizer in optimizers:
                optimizer.state.clear()
            for optimizer, parameter, _, state in states:
                optimizer.state[parameter] = state
            if meta["world_size"] == self.world:
                self._together(lambda: self._restore_generators(path, files), ValueError)
        if self.rank == 0:
            logger.info(f"resumed from {path}")
        return meta["extra"]

    def load_model(self, model, path):
        """Weights and buffers only, to start a branch: `path` is a checkpoint, a folder of them or
        that of a job. Weights are rounded to the model's dtypes. -> the `extra` of that checkpoint.
        ValueError as for load."""
        path = self.find(path)
        with self._found(path):
            meta, saved, _ = self._describe(path)
            saved = {key: entry for key, entry in saved.items() if key.startswith("model.")}
            self._fill(model_tensors(model), saved, path, same_dtype=False)
        return meta["extra"]

    @contextlib.contextmanager
    def _found(self, path):
        """Give up the lock of find at the end, and see that nobody replaced the checkpoint: a save
        of the same step by another process does, locked or not."""
        try:
            yield
            replaced = self._lock is not None and not is_there(self._lock, path)
            if any(self._gather(replaced)):
                raise ValueError(f"checkpoint {path} was replaced while it was read: start again")
        finally:
            self._unlock()

    def _describe(self, path):
        """(meta.json, its tensors, the files of its manifest) as rank 0 reads them."""

        def read():
            files, problems = read_manifest(path)
            if problems:
                raise ValueError(some(problems))
            return read_meta(path), read_tensors(path, files), files

        return self._first(read, f"checkpoint {path}: ")

    def _restore_generators(self, path, files):
        name = f"rng-{self.rank}.pt"
        if name not in files:
            raise ValueError(f"checkpoint {path}: {name}: not listed in {MANIFEST}")
        try:
            set_rng_state(read_rng_state(path / name))
        except (ValueError, OSError) as error:
            raise ValueError(f"checkpoint {path}: {name}: {in_one_line(error)}") from None

    def _fill(self, wanted, saved, path, same_dtype):
        """Read the tensors `wanted` in place; ValueError where those of the checkpoint differ."""
        problems = [f"{key} is missing" for key in sorted(set(wanted) - set(saved))]
        # What no rank has a place for: ranks may hold different layers.
        unexpected = set.intersection(*self._gather(set(saved) - set(wanted)))
        problems += [f"{key} is unexpected" for key in sorted(unexpected)]
        for key in sorted(set(wanted) & set(saved)):
            here = wanted[key]
            shape = saved[key].size
            dtype = getattr(torch, saved[key].dtype)
            if tuple(here.shape) != shape:
                problems.append(f"{key} has shape {shape} instead of {tuple(here.shape)}")
            elif same_dtype and here.dtype != dtype:
                problems.append(f"{key} is {dtype} instead of {here.dtype}")
        # Other layers may not fit on other ranks.
        problems = sorted({problem for part in self._gather(problems) for problem in part})
        if problems:
            raise ValueError(f"checkpoint {path} does not fit this model: {some(problems)}")
        try:
            reader = Reader(path, saved, self.advance)
            dcp.load(wanted, storage_reader=reader, process_group=self.group)
        except dcp.CheckpointException as error:
            _, (reason, _) = min(error.failures.items())
            raise ValueError(f"checkpoint {path}: {in_one_line(reason)}") from None


def with_newest(path: Path, work: Callable[[Checkpointer, Path], Any]) -> Any:
    """work(checkpointer, checkpoint) with the newest whole checkpoint at `path` (itself one, or a
    folder of them, or that of a job), again where that one was removed or replaced meanwhile. For
    one process beside a run that saves."""
    checkpointer = Checkpointer(path)
    while True:
        found = checkpointer.find(path)
        with contextlib.suppress(Gone), reading(found):
            return work(checkpointer, found)


def load_model(model, path):
    """Load the weights of a checkpoint (or of the newest in a folder) for use outside of training.
    See Checkpointer.load_model."""
    return with_newest(path, lambda checkpointer, found: checkpointer.load_model(model, found))


def read_extra(path):
    """Read what was given to save as `extra`."""
    try:
        return read_meta(path)["extra"]
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None


def in_bytes(size: int) -> str:
    """Say a size in GiB, or in MiB where that is less than a tenth of one."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _owner(path):
    """The rank that writes a file: rng-3.pt and __3_0.distcp are of rank 3, others of rank 0."""
    match = re.match(r"(?:rng-|__)(\d+)", path.name)
    return int(match[1]) if match else 0


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m lmoe.checkpoint", description="Look at checkpoints."
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "verify", help="hash every file; exit code 1 if damaged"
    )
    command.add_argument("folder", help="a checkpoint (step-N), a folder of them, or that of a job")
    try:
        given = given_path("folder", parser.parse_args(arguments).folder)
        folder = checkpoint_folder(given)
        found = checkpoints(folder)
    except (ValueError, OSError) as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 1
    if not found and (os.path.lexists(folder / MANIFEST) or folder.name.startswith("step-")):
        found = [folder]
    if not found:
        line = f"error: {given}: no checkpoint (step-N) there, nor in its ckpt/"
        print(printable(line), file=sys.stderr)
        return 1
    damaged = False
    for path in found:
        problems = examine(path)
        if problems is None:
            print(printable(f"{path}: removed meanwhile"))
            continue
        damaged |= bool(problems)
        files = read_manifest(path)[0]
        size = sum(entry["bytes"] for entry in files.values()) / 2**30
        verdict = "damaged" if problems else f"whole, {len(files)} files, {size:.3f} GiB"
        print(printable(f"{path}: {verdict}"))
        for problem in problems:
            print(printable(f"    {problem}"))
    return 1 if damaged else 0


if __name__ == "__main__":
    end_with_reader()
    sys.exit(main())
