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
import json
import logging
import re
import shutil
import sys
import threading
import warnings
from collections import ChainMap
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner

from lmoe.checkpoint_files import (
    check_file,
    checkpoints,
    clean,
    newest,
    prune,
    publish,
    read_manifest,
    reading,
    seal,
    verify,
)
from lmoe.checkpoint_state import (
    HostMemory,
    empty_optimizer_state,
    model_tensors,
    optimizer_tensors,
    rng_state,
    set_rng_state,
)

__all__ = ["CheckpointError", "Checkpointer", "load_model", "newest", "read_extra", "verify"]
logger = logging.getLogger(__name__)
# One process needs no group.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(RuntimeError):
    """A save that failed; every rank raises the same one. The checkpoints before it are
    untouched."""


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
    """Plans with the tensors of the state, writes their copies."""

    def __init__(self, copies):
        super().__init__()
        self.copies = copies

    def lookup_object(self, index):
        return self.copies[index.fqn]


class Checkpointer:
    """Saves and loads a run's checkpoints in `folder`. Every method is to be called on all ranks,
    in the same order.

    keep: how many checkpoints stay (0: all). async_save: only the copy to the CPU stops training; a
    thread writes. process_group: a gloo group of all ranks that nobody else uses; by default a new
    one (None without torch.distributed). A background save that fails does not stop training: the
    failure is logged, the previous checkpoints stay, and the next save tries again. The last save
    of a run does raise, through wait().
    """

    def __init__(self, folder, keep=3, async_save=True, process_group=None):
        self.folder = Path(folder)
        self.keep = keep
        self.async_save = async_save
        self.group = process_group
        self.rank = 0
        self.world = 1
        if dist.is_initialized():
            self.group = process_group or dist.new_group(backend="gloo")
            self.rank = dist.get_rank(self.group)
            self.world = dist.get_world_size(self.group)
        self._thread = None  # of the last save, until its end is reported
        self._failure = None  # why the last save failed
        self._host = HostMemory()
        self._whole = set()  # checkpoints hashed by this process

    # ----------------------------------------------------------------------------------------------
    # saving

    def save(self, step, model, optimizers, extra, files=None, save_files=None, sync=False):
        """Write step-<step>.

        optimizers: list of torch optimizers over parameters of `model`, whose state is made of
        tensors. extra: what JSON can hold (data position, schedule ...), returned by load. files:
        name -> text to lie beside it; save_files(folder) may write more. Returns once training may
        go on: with async_save after the copy to the CPU, else (or with sync) when the checkpoint is
        whole. Raises CheckpointError in the latter case only.
        """
        self._join()
        self.poll()
        state = model_tensors(model) | optimizer_tensors(model, optimizers)
        meta = {
            "step": step,
            "world_size": self.world,
            "torch": torch.__version__,
            "optimizers": sorted({type(optimizer).__name__ for optimizer in optimizers}),
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
        if self._failure and self.rank == 0:
            logger.error(
                f"{self._failure}; training goes on, and the checkpoints before it are untouched"
            )
        return self._failure

    def wait(self):
        """Wait for the save in flight; CheckpointError if the last save failed."""
        self._join()
        self._thread = None
        if self._failure:
            raise CheckpointError(self._failure)

    def _join(self):
        if self._thread is not None:
            self._thread.join()

    def _save(self, step, state, copies, rng, files, save_files):
        """The background part of a save. Its collectives come in the same order on every rank: only
        one save is in flight at a time, and nothing else uses the group meanwhile. Never raises:
        the outcome is self._failure. Of `state`, which training is changing, only shapes and
        layouts are read."""
        final = self.folder / f"step-{step}"
        tmp = self.folder / f"step-{step}.tmp"
        self._failure = None
        try:
            self._together(lambda: self._prepare(tmp))
            # Copying ahead is for tensors on a GPU and would wait for training's stream.
            writer = _Writer(tmp, per_thread_copy_ahead=0)
            dcp.save(
                state,
                storage_writer=writer,
                planner=_Planner(copies),
                process_group=self.group,
            )
            sealed = self._together(lambda: self._finish(tmp, rng, files, save_files))
            self._together(lambda: self._publish(tmp, final, sealed))
        except dcp.CheckpointException as error:
            # torch has told every rank of every rank's failure
            rank, (reason, _) = min(error.failures.items())
            self._failure = f"saving step-{step} failed: rank {rank}: {_one_line(reason)}"
        except CheckpointError as error:
            self._failure = f"saving step-{step} failed: {error}"
        except Exception as error:
            # a rank is gone, so the group is of no more use: torchrun or the watchdog ends the job
            self._failure = f"saving step-{step} failed on rank {self.rank}: {_one_line(error)}"
        if self._failure and self.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)  # a full disk needs the room

    def _prepare(self, tmp):
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            clean(self.folder)
            tmp.mkdir()

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
        return seal(tmp, [str(path.relative_to(tmp)) for path in mine])

    def _publish(self, tmp, final, sealed):
        if self.rank == 0:
            publish(tmp, final, dict(ChainMap(*sealed)))
            try:
                prune(self.folder, self.keep)
            except OSError as error:
                logger.warning(
                    f"{final} is saved, but an older checkpoint could not be removed: {error}"
                )

    # ----------------------------------------------------------------------------------------------
    # loading

    def load(self, model, optimizers, path=None):
        """Resume: weights, buffers, optimizer state and, on as many ranks as saved it, the random
        generators, all in place, bitwise.

        path: a checkpoint, or a folder of them; by default the newest whole one of this run. -> the
        `extra` given to save, or None if there is none to load. ValueError if what is there is
        damaged or does not fit, naming the files, tensors or keys.
        """
        path = self.find(path)
        if path is None:
            return None
        with reading(path):
            meta = _read_meta(path)
            names = sorted({type(optimizer).__name__ for optimizer in optimizers})
            if names != meta["optimizers"]:
                raise ValueError(
                    f"optimizer.name: {path} was saved with {meta['optimizers']} and cannot resume"
                    f" with {names}; set checkpoint.load_only_model to start from its weights"
                )
            saved = _saved_tensors(path)
            wanted = model_tensors(model)
            states = empty_optimizer_state(model, optimizers, saved)
            for _, _, name, state in states:
                wanted |= {f"optim.{name}.{key}": tensor for key, tensor in state.items()}
            self._fill(wanted, saved, path, same_dtype=True)
            for optimizer in optimizers:
                optimizer.state.clear()
            for optimizer, parameter, _, state in states:
                optimizer.state[parameter] = state
            if meta["world_size"] == self.world:
                set_rng_state(torch.load(path / f"rng-{self.rank}.pt", weights_only=True))
        if self.rank == 0:
            logger.info(f"resumed from {path}")
        return meta["extra"]

    def load_model(self, model, path):
        """Weights and buffers only, to start a branch: `path` is a checkpoint or a folder of them.
        Weights are rounded to the model's dtypes. -> the `extra` of that checkpoint. ValueError as
        for load."""
        path = self.find(path)
        with reading(path):
            saved = _saved_tensors(path).items()
            saved = {key: entry for key, entry in saved if key.startswith("model.")}
            self._fill(model_tensors(model), saved, path, same_dtype=False)
            return _read_meta(path)["extra"]

    def find(self, path=None):
        """The checkpoint that load(path=path) would load, every file of it hashed (each rank hashes
        its share), or None.

        In a folder of checkpoints damaged ones are passed over, each with one line; a damaged
        `path` itself is refused.
        """
        folder = self.folder if path is None else Path(path)

        def look():  # ranks that do so one after the other may see different things
            return self.rank == 0 and (bool(read_manifest(folder)[0]), checkpoints(folder))

        is_one, candidates = self._together(look)[0]
        if is_one or (path is not None and not candidates):
            if problems := self._problems(folder):
                raise ValueError(f"checkpoint {folder} cannot be loaded: {_some(problems)}")
            return folder
        for candidate in candidates:
            problems = self._problems(candidate)
            if not problems:
                return candidate
            if self.rank == 0:
                logger.warning(f"checkpoint {candidate} skipped: {_some(problems)}")
        if candidates:
            raise ValueError(
                f"no whole checkpoint in {folder} (newest: {_some(problems)}); move them away to"
                " start anew"
            )
        return None

    def _problems(self, path):
        if path in self._whole:
            return []
        files, problems = read_manifest(path)
        # The largest first, each to the rank with the least to do so far: the same division on
        # every rank.
        load = [0] * self.world
        for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
            rank = load.index(min(load))
            load[rank] += files[name]["bytes"] + 1
            if rank == self.rank:
                problems += check_file(path, name, files[name])
        problems = sorted({problem for part in self._gather(problems) for problem in part})
        if not problems:
            self._whole.add(path)
        return problems

    def _fill(self, wanted, saved, path, same_dtype):
        """Read the tensors `wanted` in place; ValueError where those of the checkpoint differ."""
        problems = [f"{key} is missing" for key in sorted(set(wanted) - set(saved))]
        # What no rank has a place for: ranks may hold different layers.
        unexpected = set.intersection(*self._gather(set(saved) - set(wanted)))
        problems += [f"{key} is unexpected" for key in sorted(unexpected)]
        for key in sorted(set(wanted) & set(saved)):
            here = wanted[key]
            shape = saved[key].size
            dtype = saved[key].properties.dtype
            if here.shape != shape:
                problems.append(f"{key} has shape {tuple(shape)} instead of {tuple(here.shape)}")
            elif same_dtype and here.dtype != dtype:
                problems.append(f"{key} is {dtype} instead of {here.dtype}")
        if problems:
            raise ValueError(f"checkpoint {path} does not fit this model: {_some(problems)}")
        reader = dcp.FileSystemReader(path)
        dcp.load(wanted, storage_reader=reader, process_group=self.group)

    # ----------------------------------------------------------------------------------------------
    # all together

    def _gather(self, value):
        if self.group is None:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _together(self, work):
        """work() of every rank as a list; where it fails on any rank, every rank raises the same
        CheckpointError."""
        try:
            outcome = (work(), None)
        except Exception as error:
            outcome = (None, _one_line(error))
        outcomes = self._gather(outcome)
        for rank, (_, error) in enumerate(outcomes):
            if error is not None:
                raise CheckpointError(f"rank {rank}: {error}")
        return [value for value, _ in outcomes]


def load_model(model, path):
    """Load the weights of a checkpoint (or of the newest in a folder) for use outside of training.
    See Checkpointer.load_model."""
    return Checkpointer(Path(path).parent).load_model(model, path)


def read_extra(path):
    """Read what was given to save as `extra`."""
    return _read_meta(path)["extra"]


def _saved_tensors(path):
    """{key: its shape, dtype and shards} in a checkpoint."""
    return dcp.FileSystemReader(path).read_metadata().state_dict_metadata


def _some(problems):
    more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return "; ".join(problems[:5] + more)


def _one_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _owner(path):
    """The rank that writes a file: rng-3.pt and __3_0.distcp are of rank 3, others of rank 0."""
    match = re.match(r"(?:rng-|__)(\d+)", path.name)
    return int(match[1]) if match else 0


def _read_meta(path):
    return json.loads((Path(path) / "meta.json").read_text())


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m lmoe.checkpoint", description="Look at checkpoints."
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "verify", help="hash every file; exit code 1 if damaged"
    )
    command.add_argument("folder", type=Path, help="a checkpoint (step-N) or a folder of them")
    folder = parser.parse_args(arguments).folder
    damaged = False
    for path in checkpoints(folder) or [folder]:
        problems = verify(path)
        damaged |= bool(problems)
        files = read_manifest(path)[0]
        size = sum(entry["bytes"] for entry in files.values()) / 2**30
        verdict = "damaged" if problems else f"whole, {len(files)} files, {size:.3f} GiB"
        print(f"{path}: {verdict}")
        for problem in problems:
            print(f"    {problem}")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
