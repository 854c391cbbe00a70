"""From sources to the microbatches of each optimizer step.

The global sample order does not know ranks, workers or processes: step s of a loader takes the next
G = batch_size * world * microbatches samples, and microbatch m of rank r the block number m * world
+ r of them. So 1 rank with 4 microbatches and 4 ranks with 1 train on the same rows in the same
step. The position in the order is the loader's whole state.
"""

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from dataclasses import InitVar, dataclass
from pathlib import Path

import numpy as np
import torch

from lmoe.data.order import SampleOrder
from lmoe.data.packing import check_ids, pack, padding_row
from lmoe.data.position import check_sources, restore, seed_of, state_of
from lmoe.data.sources import open_sources
from lmoe.data.tokenizer import MAX_IDS
from lmoe.signals import end_with_parent

logger = logging.getLogger("lmoe")


@dataclass
class Loader:
    """Iterating gives, per optimizer step, the list of this rank's `microbatches` HostBatches; it
    never ends.

    sources: all of one seq_len; weights: their shares of the samples. batch_size: rows per
    microbatch. rank, world: of data parallelism. seed: of the order. resumed: of state(), from a
    run with any number of ranks, workers and rows, whose seed stays; None starts afresh.
    accept_changes: go on though a source has changed. workers: processes that read and pack (0:
    this one); prefetch: microbatches that each keeps ready. vocab_size: ids from there on are
    refused.
    """

    sources: list
    weights: list
    batch_size: int
    rank: int = 0
    world: int = 1
    microbatches: int = 1
    seed: int = 0
    resumed: InitVar[dict | None] = None
    accept_changes: bool = False
    workers: int = 0
    prefetch: int = 2
    vocab_size: int = MAX_IDS

    def __post_init__(self, resumed):
        assert 0 <= self.rank < self.world
        self.step_samples = self.batch_size * self.world * self.microbatches
        self.steps = 0
        self._start = order_of(self.sources, self.weights, self.seed)
        self.left_out = {}  # what sources of earlier mixtures had given
        if resumed is not None:
            self.left_out = restore(self._start, self.sources, resumed, self.accept_changes)
        self._mark = self._start.copy()

    def state(self, steps=None):
        """The state after `steps` steps of this loader (default: as many as the iterator has
        given), as position.state_of describes it."""
        steps = self.steps if steps is None else steps
        position = self._start.position + steps * self.step_samples
        if position < self._mark.position:
            self._mark = self._start.copy()
        self._mark.skip(position - self._mark.position)
        return state_of(self._mark, self.sources, self.left_out)

    def _places(self):
        """The places of this rank's microbatches, without end. The permutation is worked out here,
        for this rank's rows only."""
        order = self._start.copy()
        while True:
            places = order.take(self.step_samples)
            for m in range(self.microbatches):
                start = (m * self.world + self.rank) * self.batch_size
                yield order.locate(places[start : start + self.batch_size]).tolist()

    def __iter__(self):
        # Not at the top: a machine that only reads text may lack it.
        from torchdata.stateful_dataloader import StatefulDataLoader

        with warnings.catch_warnings():
            # torchdata 0.11 calls what newer torch deprecates
            warnings.filterwarnings("ignore", ".*set_vital")
            batches = StatefulDataLoader(
                _Batches(self.sources, self.vocab_size),
                sampler=self._places(),
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=self.prefetch if self.workers else None,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_start_worker,
                snapshot_every_n_steps=0,  # its own state is not used: ours is a position
            )
        self.steps = 0
        step = []
        try:
            for batch in batches:
                if isinstance(batch, ValueError):
                    raise batch
                step.append(batch)
                if len(step) == self.microbatches:
                    self.steps += 1
                    yield step
                    step = []
        finally:
            # Ends the processes now, though an exception's traceback may keep this frame.
            del batches


class _Batches(torch.utils.data.Dataset):
    """Map-style dataset: the places of a microbatch -> HostBatch. Errors travel as values: a
    worker's would arrive as a traceback."""

    def __init__(self, sources, vocab_size):
        self.sources = sources
        self.vocab_size = vocab_size

    def __getitem__(self, places):
        try:
            return pack(read_rows(self.sources, places, self.vocab_size))
        except (ValueError, OSError) as error:
            return ValueError(str(error))


def read_rows(sources, places, vocab_size):
    """Rows of the samples at places [(source, epoch, sample)], all ids below vocab_size."""
    rows = [sources[s].row(epoch, i) for s, epoch, i in places]
    for (s, *_), row in zip(places, rows):
        check_ids(row, vocab_size, sources[s].name)
    return rows


def order_of(sources, weights, seed):
    """The SampleOrder of a mixture, at its start."""
    keys = [s.fingerprint for s in sources]
    return SampleOrder(keys, [s.samples for s in sources], weights, seed)


def _start_worker(_):
    """Signals meant for the job must not end a loader process, or a checkpoint on SIGTERM would
    find its loader dead.

    Only the process that started it may, by its end or by SIGTERM, which a thread takes off the
    queue and looks at the sender.
    """
    end_with_parent()
    if not hasattr(signal, "sigwaitinfo"):  # not Linux
        return
    parent = multiprocessing.parent_process().pid
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class ValidationBatches:
    """The first `rows` samples of the validation order, in HostBatches of batch_size rows: the same
    rows on any world size.

    Batch b of rank r holds the block number b * world + r; every rank runs as many batches, filled
    up with rows without labels. Re-iterable; it reads in the calling process and shares no state
    with training.
    """

    sources: list
    weights: list
    rows: int
    batch_size: int
    rank: int = 0
    world: int = 1
    vocab_size: int = MAX_IDS

    def __post_init__(self):
        order = order_of(self.sources, self.weights, "validation")
        places = order.take(self.rows)
        again = places[:, 1] >= np.array(order.sizes)[places[:, 0]]
        there = int(np.append(again, True).argmax())
        if there < self.rows:
            logger.info(f"validation: {there} samples, not {self.rows}: a source has no more")
        self.rows, self.places = there, order.locate(places[:there]).tolist()

    def __len__(self):
        return -(-self.rows // (self.batch_size * self.world))

    def __iter__(self):
        for b in range(len(self)):
            start = (b * self.world + self.rank) * self.batch_size
            places = self.places[start : start + self.batch_size]
            rows = read_rows(self.sources, places, self.vocab_size)
            rows += [padding_row(self.sources[0].seq_len, 0)] * (self.batch_size - len(rows))
            yield pack(rows).pin_memory() if torch.cuda.is_available() else pack(rows)


def build_loader(
    config,
    tokenizer,
    *,
    rank=0,
    world=1,
    microbatches=1,
    state=None,
    split="train",
    share=lambda make: make(),
    advance=lambda: None,
):
    """The one entry: a Loader over the train split, or ValidationBatches (validation.steps batches
    of training.batch_size rows in all).

    config: job.seed, job.folder, data.*, training.batch_size and, for validation, validation.steps.
    rank, world: of data parallelism. share(make): of Dims; one process tokenises text into
    data.cache, the others wait. advance() is called as that gets on. ValueError names the key of
    [data] at fault.
    """
    data = config.data
    seed = config.job.seed
    batch_size = config.training.batch_size
    cache = data.cache or Path(config.job.folder) / "data"

    def check(found):
        if split == "train" and state is not None:
            check_sources(found, state, data.accept_changes)

    options = {"split": split, "seed": seed_of(state, seed), "cache": cache}
    options |= {"share": share, "advance": advance, "check": check}
    sources, weights = open_sources(data, tokenizer, **options)
    # The order of samples depends on what is mixed, not on which entry is written first.
    by_content = sorted(range(len(sources)), key=lambda place: sources[place].fingerprint)
    sources, weights = ([of[place] for place in by_content] for of in (sources, weights))
    if split == "validation":
        rows = config.validation.steps * batch_size
        shape = (batch_size, rank, world)
        return ValidationBatches(sources, weights, rows, *shape, tokenizer.vocab_size)
    shape = (batch_size, rank, world, microbatches)
    rest = (data.accept_changes, data.workers, data.prefetch, tokenizer.vocab_size)
    return Loader(sources, weights, *shape, seed, state, *rest)
