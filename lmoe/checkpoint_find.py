"""Finding the checkpoint to load: all ranks agree on one, which stays locked while it is read."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lmoe.checkpoint_files import (
    MANIFEST,
    Gone,
    check_file,
    checkpoint_folder,
    checkpoints,
    is_there,
    lock,
    read_manifest,
    some,
    unlock,
)
from lmoe.checkpoint_metadata import description_problems
from lmoe.files import in_one_line

logger = logging.getLogger("lmoe.checkpoint")


class CheckpointError(RuntimeError):
    """A save that failed; every rank raises the same one. The checkpoints before it are
    untouched."""


class Finder:
    """Finds checkpoints on all ranks of a group, a gloo group by default.

    folder: where find() looks if it is given no path. advance(): called as reading goes on.
    """

    folder: Path

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self.advance = advance
        self.group = process_group
        self.rank = 0
        self.world = 1
        if dist.is_initialized():
            self.group = process_group or dist.new_group(backend="gloo")
            self.rank = dist.get_rank(self.group)
            self.world = dist.get_world_size(self.group)
        self._whole = {}  # checkpoints hashed by this process: which file their manifest was
        self._damaged = set()
        self._lock = None  # of the checkpoint found last, until it is loaded or training goes on

    def find(self, path=None):
        """The checkpoint that load(path=path) would load, every file of it hashed (each rank hashes
        its share), or None. No other process removes it until it is loaded, or until the next find
        or save.

        In a folder of checkpoints damaged ones are passed over, each with one line; a damaged
        `path` itself is refused.
        """
        self._join()
        while True:  # again where what was listed has been removed meanwhile
            is_one, folder, candidates = self._first(lambda: self._look(path))
            refused = is_one or (path is not None and not candidates)
            for candidate in [folder] if refused else candidates:
                problems = self._lock_and_hash(candidate)
                if problems is None and refused and not self._first(folder.exists):
                    problems = [f"{MANIFEST}: missing: no checkpoint there"]
                if problems is None:
                    break
                if not problems:
                    return candidate
                if refused:
                    raise ValueError(f"checkpoint {folder} cannot be loaded: {some(problems)}")
                self._damaged.add(candidate)
                if self.rank == 0:
                    logger.warning(f"checkpoint {candidate} skipped: {some(problems)}")
            else:
                if candidates:
                    raise ValueError(
                        f"no whole checkpoint in {folder} (newest: {some(problems)}); move them"
                        " away to start anew"
                    )
                return None

    def _look(self, path):
        folder = self.folder if path is None else checkpoint_folder(path)
        return bool(read_manifest(folder)[0]), folder, checkpoints(folder)

    def _lock_and_hash(self, path):
        """Find what is wrong with a checkpoint, on all ranks alike, or None if it has been removed
        or replaced meanwhile. If nothing is wrong, it stays locked."""
        file = None
        vanished = False
        try:
            file = lock(path)
        except Gone:
            vanished = True
        except OSError:
            pass  # the manifest cannot be read: that is the problem found below
        problems = None
        if not any(self._gather(vanished)):
            stamp = file and os.fstat(file.fileno())
            stamp = stamp and (stamp.st_dev, stamp.st_ino, stamp.st_mtime_ns)
            known = all(self._gather(stamp is not None and self._whole.get(path) == stamp))
            problems = [] if known else self._problems(path)
            if any(self._gather(file is not None and not is_there(file, path))):
                problems = None
        if problems == []:
            self._unlock()  # the one before, only now: it may be the same
            self._lock = file
            self._whole[path] = stamp
        elif file is not None:
            unlock(file)
        return problems

    def _unlock(self):
        if self._lock is not None:
            unlock(self._lock)
        self._lock = None

    def _problems(self, path):
        files, problems = read_manifest(path)
        # The largest first, each to the rank with the least to do so far: the same division on
        # every rank.
        load = [0] * self.world
        for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
            rank = load.index(min(load))
            load[rank] += files[name]["bytes"] + 1
            if rank == self.rank:
                problems += check_file(path, name, files[name], advance=self.advance)
        problems = sorted({problem for part in self._gather(problems) for problem in part})
        if files and not problems:
            problems = self._first(lambda: description_problems(path, files))
        return problems

    # ----------------------------------------------------------------------------------------------
    # all together

    def _gather(self, value):
        if self.group is None:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _first(self, work: Callable, before: str = "") -> Any:
        """work() of rank 0, on every rank; where it fails, every rank raises the ValueError."""
        outcome = [None]
        if self.rank == 0:
            try:
                outcome = [(work(), None)]
            except Exception as error:
                outcome = [(None, in_one_line(error))]
        if self.group is not None:
            first = dist.get_global_rank(self.group, 0)
            dist.broadcast_object_list(outcome, src=first, group=self.group)
        value, problem = outcome[0]
        if problem is not None:
            raise ValueError(before + problem)
        return value

    def _together(self, work: Callable, kind: type[ValueError] | None = None) -> list:
        """work() of every rank as a list; where it fails on any rank, every rank raises the same
        CheckpointError, or ValueError where work does."""
        try:
            outcome = (work(), None)
        except Exception as error:
            outcome = (None, in_one_line(error) if kind else one_line(error))
        outcomes = self._gather(outcome)
        for rank, (_, error) in enumerate(outcomes):
            if error is not None:
                raise kind(error) if kind else CheckpointError(f"rank {rank}: {error}")
        return [value for value, _ in outcomes]


def one_line(error: BaseException) -> str:
    """Name an error and what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
