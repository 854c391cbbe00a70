"""From sources to the microbatches of each optimizer step.

The global sample order does not know ranks, workers or processes: step s of a loader takes the next
G = batch_size * world * microbatches samples, and microbatch m of rank r the block number m * world
+ r of them. So 1 rank with 4 microbatches and 4 ranks with 1 train on the same rows in the same
step. The position in the order is the loader's whole state.
"""

import logging
import os
import signal
import threading
import warnings
from pathlib import Path

import torch

from lmoe.data.order import SampleOrder
from lmoe.data.packing import pack, padding_row
from lmoe.data.sources import open_sources

logger = logging.getLogger("lmoe")


class Loader:
    """Iterating gives, per optimizer step, the list of this rank's `microbatches` HostBatches; it
    never ends.

    sources: all of one seq_len; weights: their shares of the samples. batch_size: rows per
    microbatch. rank, world: of data parallelism. state: of state(), from a run with any number of
    ranks, workers and rows; None starts afresh. workers: processes that read and pack (0: this
    one); prefetch: microbatches that each keeps ready.
    """

    def __init__(
        self,
        sources,
        weights,
        *,
        batch_size,
        rank=0,
        world=1,
        microbatches=1,
        seed=0,
        state=None,
        workers=0,
        prefetch=2,
        pin_memory=False,
    ):
        assert 0 <= rank < world
        self.sources = sources
        self.batch_size, self.rank, self.world, self.microbatches = (
            batch_size,
            rank,
            world,
            microbatches,
        )
        self.workers, self.prefetch, self.pin_memory = workers, prefetch, pin_memory
        self.step_samples = batch_size * world * microbatches
        self.left_out = {}  # what sources of earlier mixtures had given
        self._start = self._restore(state, [s.samples for s in sources], weights, seed)
        self._mark, self._mark_steps = self._start.copy(), 0
        self.steps = 0

    def _restore(self, state, sizes, weights, seed):
        names = [s.name for s in self.sources]
        if state is None:
            return SampleOrder(names, sizes, weights, seed)
        old, new = state["seq_len"], self.sources[0].seq_len
        # With another sample length a source goes on after as many tokens, rounded up to a sample.
        consumed = {name: -(-count * old // new) for name, count in state["consumed"].items()}
        for source in self.sources:
            known = state["fingerprints"].get(source.name)
            if known is not None and known != source.fingerprint:
                logger.warning(
                    "data: %s has changed since the checkpoint; its sample order from here on is"
                    " another one",
                    source.name,
                )
        self.left_out = {name: count for name, count in consumed.items() if name not in names}
        return SampleOrder(
            names,
            sizes,
            weights,
            seed,
            state["position"],
            [consumed.get(name, 0) for name in names],
        )

    def state(self, steps=None):
        """The state after `steps` steps of this loader (default: as many as the iterator has
        given): a small JSON-able dict.

        position: samples of the global order; consumed: samples per source, over all epochs; in
        samples of seq_len tokens.
        """
        steps = self.steps if steps is None else steps
        if steps < self._mark_steps:
            self._mark, self._mark_steps = self._start.copy(), 0
        self._mark.skip((steps - self._mark_steps) * self.step_samples)
        self._mark_steps = steps
        consumed = {
            **self.left_out,
            **{name: int(n) for name, n in zip(self._mark.names, self._mark.consumed)},
        }
        return {
            "position": self._mark.position,
            "consumed": consumed,
            "seq_len": self.sources[0].seq_len,
            "fingerprints": {s.name: s.fingerprint for s in self.sources},
        }

    def __iter__(self):
        from torchdata.stateful_dataloader import (
            StatefulDataLoader,
        )  # not at the top: a machine that only reads text may lack it

        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*set_vital"
            )  # torchdata 0.11 calls what newer torch deprecates
            batches = StatefulDataLoader(
                _Batches(self.sources),
                sampler=_Places(self),
                batch_size=None,
                collate_fn=_identity,
                num_workers=self.workers,
                prefetch_factor=self.prefetch if self.workers else None,
                pin_memory=self.pin_memory,
                worker_init_fn=_start_worker,
                snapshot_every_n_steps=0,  # its own state is not used: ours is a position
            )
        self.steps = 0
        step = []
        try:
            for batch in batches:
                if isinstance(batch, _Failure):
                    raise ValueError(batch.message)
                step.append(batch)
                if len(step) == self.microbatches:
                    self.steps += 1
                    yield step
                    step = []
        finally:
            del (
                batches
            )  # ends the processes now, though an exception's traceback may keep this frame


class _Places:
    """Sampler: the places of this rank's microbatches, without end. The permutation is worked out
    here, for this rank's rows only."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        loader, order = self.loader, self.loader._start.copy()
        while True:
            places = order.take(loader.step_samples)
            for m in range(loader.microbatches):
                start = (m * loader.world + loader.rank) * loader.batch_size
                yield order.locate(places[start : start + loader.batch_size]).tolist()


class _Batches(torch.utils.data.Dataset):
    """Map-style dataset: the places of a microbatch -> HostBatch. Errors travel as values: a
    worker's would arrive as a traceback."""

    def __init__(self, sources):
        self.sources = sources

    def __getitem__(self, places):
        try:
            return pack([self.sources[s].row(epoch, i) for s, epoch, i in places])
        except (ValueError, OSError) as error:
            return _Failure(str(error))


class _Failure:
    def __init__(self, message):
        self.message = message


def _identity(batch):
    return batch


def _start_worker(_):
    """Signals meant for the job must not end a loader process, or a checkpoint on SIGTERM would
    find its loader dead.

    Only the process that started it may: SIGTERM is taken off the queue by a thread that looks at
    the sender.
    """
    if not hasattr(signal, "sigwaitinfo"):  # not Linux
        return
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class ValidationBatches:
    """The first `rows` samples of the validation order, in HostBatches of batch_size rows: the same
    rows on any world size.

    Batch b of rank r holds the block number b * world + r; every rank runs as many batches, filled
    up with rows without labels. Re-iterable; it reads in the calling process and shares no state
    with training.
    """

    def __init__(self, sources, weights, *, rows, batch_size, rank=0, world=1, pin_memory=False):
        self.sources, self.batch_size, self.rank, self.world, self.pin_memory = (
            sources,
            batch_size,
            rank,
            world,
            pin_memory,
        )
        order = SampleOrder(
            [s.name for s in sources], [s.samples for s in sources], weights, "validation"
        )
        places = order.take(rows)
        again = (places[:, 1, None] >= [[s.samples for s in sources]])[range(rows), places[:, 0]]
        self.rows = int(again.argmax()) if again.any() else rows
        if self.rows < rows:
            logger.info("validation: %d samples, not %d: a source has no more", self.rows, rows)
        self.places = order.locate(places[: self.rows]).tolist()

    def __len__(self):
        return -(-self.rows // (self.batch_size * self.world))

    def __iter__(self):
        for b in range(len(self)):
            start = (b * self.world + self.rank) * self.batch_size
            rows = [
                self.sources[s].row(epoch, i)
                for s, epoch, i in self.places[start : start + self.batch_size]
            ]
            rows += [padding_row(self.sources[0].seq_len, 0)] * (self.batch_size - len(rows))
            yield pack(rows).pin_memory() if self.pin_memory else pack(rows)


def build_loader(
    config, tokenizer, *, rank=0, world=1, microbatches=1, state=None, split="train", barrier=None
):
    """The one entry: a Loader over the train split, or ValidationBatches (validation.steps batches
    of training.batch_size rows in all).

    config: job.seed, job.folder, data.*, training.batch_size and, for validation, validation.steps.
    rank, world: of data parallelism. barrier(): all processes wait in it until rank 0 has tokenised
    text into data.cache (of several processes with that rank one does, the others find it done).
    ValueError names the key of [data] at fault.
    """
    cache = config.data.cache or Path(config.job.folder) / "data"
    sources, weights = open_sources(
        config.data,
        tokenizer,
        split=split,
        seed=config.job.seed,
        cache=cache,
        prepares=rank == 0,
        barrier=barrier,
    )
    shape = {
        "batch_size": config.training.batch_size,
        "rank": rank,
        "world": world,
        "pin_memory": torch.cuda.is_available(),
    }
    if split == "validation":
        return ValidationBatches(
            sources, weights, rows=config.validation.steps * config.training.batch_size, **shape
        )
    return Loader(
        sources,
        weights,
        microbatches=microbatches,
        seed=config.job.seed,
        state=state,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        **shape,
    )
