"""Train a model: ./run_train.sh [--section.key=value ...], or python train.py --config=FILE for one
process. --help lists all keys."""

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C during the imports has nothing to say

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lmoe.checkpoint import Checkpointer, CheckpointError
from lmoe.checks import check_config
from lmoe.command import as_word, asks_for_help, end_with_reader, leave
from lmoe.config import Config, help_text, load_config, to_toml
from lmoe.data.loader import Loader, ValidationBatches, build_loader
from lmoe.data.packing import HostBatch
from lmoe.data.tokenizer import Tokenizer, load_tokenizer
from lmoe.evaluate import validate
from lmoe.folder import Lock, make_folder, saving_alone
from lmoe.health import gives_finite_loss, locate_non_finite
from lmoe.kernels.check import check_kernels
from lmoe.metrics import AHEAD, StepLog, logger, setup_logging
from lmoe.model.build import build_model, needs_dense_mask, on_meta
from lmoe.model.model import Model, count_parameters
from lmoe.optimizer import (
    build_optimizer,
    clip_and_step,
    learning_rate,
    total_norm,
    update_router_biases,
)
from lmoe.parallel.context import make_builder
from lmoe.parallel.dims import (
    Dims,
    build_dims,
    init_distributed,
    leave_hangs_to_the_watchdog,
    local_device,
)
from lmoe.parallel.parallelize import DTYPES, Parallel, parallelize
from lmoe.parallel.stats import loss_weights, reduce_stats
from lmoe.profiling import Tracer, memory_snapshot
from lmoe.resolve import resolve_batch_size, resolve_vocab_size
from lmoe.resume import resume_or_start
from lmoe.scans import triton_cases
from lmoe.signals import StopRequest, one_line_errors
from lmoe.watchdog import Watchdog, connect_store


def train_step(
    model: Model,
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    config: Config,
    dims: Dims,
    batches: list[tuple],
    num_valid: float,
    lr: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Take an optimizer step on this rank's microbatches, (tokens, labels, SeqInfo) each.

    num_valid: the step's valid labels over all ranks. Returns losses {name: 0-dim}, counts {router:
    [E] tokens}, the gradients' norm before clipping, and 1.0 where it was not finite and nothing
    changed: on the device, for which the host never waits, and the same on every rank.
    """
    outputs = parallel.forward_backward(batches, num_valid)  # a plain loop or a pipeline's schedule
    parallel.unsharded.reduce()  # gradients that FSDP leaves out
    norm = total_norm(model.parameters(), dims.stage_world)
    skipped = clip_and_step(optimizer, norm, config.training.max_norm, lr)
    optimizer.zero_grad()
    losses, counts = reduce_stats(outputs, model.routers, dims)  # one all-reduce
    update_router_biases(model, counts, config.moe.bias_rate, skipped)
    return losses, counts, norm, skipped


def build_loaders(
    config: Config, tokenizer: Tokenizer, dims: Dims, state: dict | None, watchdog: Watchdog
) -> tuple[Loader, ValidationBatches | None]:
    """Open the data of training, at the position `state`, and of validation where it is asked
    for."""
    share = {"rank": dims.data_rank, "world": dims.data_world}
    share |= {"share": dims.share, "advance": watchdog.advance}
    rows = config.training.batch_size * dims.data_world
    microbatches = config.training.global_batch_size // rows
    loader = build_loader(config, tokenizer, microbatches=microbatches, state=state, **share)
    if not config.validation.every:
        return loader, None
    return loader, build_loader(config, tokenizer, split="validation", **share)


def flops_of_documents(model: Model, longest: int) -> Tensor:
    """Count the FLOPs of forward and backward passes of a document: [longest], of 1 token, of 2,
    and so on."""
    lengths = np.arange(1, longest + 1)
    return torch.from_numpy(3.0 * lengths * model.flops_per_token(lengths))


def agree(
    dims: Dims, batches: list[HostBatch], stop: StopRequest, flops: Tensor
) -> tuple[float, float]:
    """Sum the valid labels and the FLOPs of a step over all ranks, on the host, and let all of them
    know where one was asked to stop. flops: of flops_of_documents."""
    num_valid = sum(batch.num_valid for batch in batches)
    work = sum(flops[batch.cu_seqlens.diff() - 1].sum() for batch in batches)
    values = torch.tensor([num_valid, work, stop.received is not None], dtype=torch.float64)
    num_valid, work, asked = dims.sum_over_data(values).tolist()
    stop.agreed = asked > 0
    return max(num_valid, 1.0), work


def reading(batches: Iterable, refuse: Callable[[str], None]) -> Iterator:
    """Read batches; a file that is damaged or gone is one line, to `refuse`."""
    batches = iter(batches)
    while True:
        with one_line_errors(refuse):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def train(config: Config, device: torch.device, stop: StopRequest) -> None:
    """Train from the first step or the newest checkpoint to the last step or a stop."""
    started = time.perf_counter()
    rank = dist.get_rank()
    world = dist.get_world_size()
    folder = Path(config.job.folder)
    watchdog = Watchdog(connect_store(), rank, world, config.job.hang_timeout)
    snapshot = memory_snapshot(folder, rank, config.profiling.memory_snapshot)
    owned = contextlib.ExitStack()
    # The watchdog outside: where training fails it ends the process.
    with watchdog, snapshot, owned:
        with one_line_errors(watchdog.refuse, CheckpointError, MemoryError, OverflowError):
            if config.job.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
            tokenizer = load_tokenizer(config.data.tokenizer)
            resolve_vocab_size(config, tokenizer)
            check_kernels(triton_cases(config, device), device)  # once a machine and kind of scan
            make_folder(folder)
            if rank == 0:
                owned.enter_context(Lock(folder))
                if config.checkpoint.every:
                    owned.enter_context(saving_alone(folder / "ckpt"))

            # On the meta device, then sharded, then materialised; the optimizer sees the shards.
            dims = build_dims(config, device)
            with on_meta(config):
                model = build_model(config)
            size = count_parameters(model)
            flops = flops_of_documents(model, config.data.seq_len)
            parallel = parallelize(model, config, dims)
            optimizer = build_optimizer(config.optimizer, model)
            saving = config.checkpoint
            options = {"keep": saving.keep, "async_save": saving.async_save}
            checkpointer = Checkpointer(folder / "ckpt", **options, advance=watchdog.advance)
            if config.job.hang_timeout:
                leave_hangs_to_the_watchdog()
            start, data_state, totals = resume_or_start(
                config, checkpointer, model, optimizer, tokenizer
            )
            # Before anything is written: the folder may be of a run over other data.
            with watchdog.phase("preparation"):
                loader, validation = build_loaders(config, tokenizer, dims, data_state, watchdog)
            steps = config.training.steps
            if start >= steps:
                logger.info(f"nothing to do: step {start} is done and training.steps = {steps}")
                return

            dense = needs_dense_mask(config, device, DTYPES[config.training.dtype])
            weights = [loss_weights(config, model.routers, child) for child in ("ffn", "mixer")]
            make_batch = make_builder(config, dims, dense_mask=dense, weights=weights)
            validation_batch = make_builder(config, dims, dense_mask=dense)

            log = StepLog(config, dims, size, flops[-1].item() / len(flops), start, totals)
            owned.callback(log.flush)
            for source in loader.sources:
                logger.info(
                    f"data: {source.name}: {source.documents:,} documents, {source.samples:,}"
                    f" samples of {source.seq_len} tokens"
                )
            tracer = Tracer(folder, rank, config.profiling.trace_step)

            def abandon():
                stop.agreed = dims.any_rank(stop.received is not None)
                return stop.agreed

            def refuse(message):
                log.flush()  # what is wrong comes last
                watchdog.refuse(message)

            def measure():
                options = {"context": config.validation.shuffle_context, "abandon": abandon}
                with watchdog.phase("validation"), log.throughput.pause():
                    read = reading(validation, refuse)
                    return validate(parallel.evaluate, read, validation_batch, dims, **options)

            if start == 0 and validation is not None:
                log.write(0, {}, measure())

        # From here on an error is a failure, not a user's mistake.
        stop.training = True
        if config.job.gc_every:
            gc.disable()  # else every rank collects at another time, and all wait for each
        logger.info(f"set up in {time.perf_counter() - started:.1f} s")
        batches = reading(loader, refuse)
        step = start
        while step < steps and not stop.agreed:
            step += 1
            watchdog.beat(step)
            tracer.before(step)
            host_batches = next(batches)
            num_valid, work = agree(dims, host_batches, stop, flops)
            microbatches = [make_batch(batch) for batch in host_batches]
            lr = learning_rate(
                config.schedule, config.optimizer.lr, step, config.schedule.steps or steps
            )
            result = train_step(
                model, parallel, optimizer, config, dims, microbatches, num_valid, lr
            )
            last = step == steps or stop.agreed

            # Whoever asked for a stop waits for the checkpoint, not for a validation.
            every = config.validation.every
            validating = every and (step == steps or step % every == 0 and not stop.agreed)
            logged = last or validating or step == start + 1 or step % config.metrics.log_every == 0
            log.add(step, lr, work, result, logged)
            # What stands still anyway comes after all entries: those of a checkpoint's steps are
            # there before it is.
            still = last or validating or saving.every and step % saving.every == 0
            lost = log.catch_up(0 if still else AHEAD, measure if validating else None)
            last = last or stop.agreed  # which abandons a validation
            tracer.after(step)
            checkpointer.poll()
            if lost is not None:
                with one_line_errors(refuse), watchdog.phase("search for a layer"):
                    where = locate_non_finite(
                        model, parallel, microbatches, num_valid, config, dims
                    )
                    limit = config.training.max_skipped_steps
                    good = lost - limit - 1
                    origin = f" from a checkpoint of step {good} or before," if good > 0 else ""
                    raise ValueError(
                        f"the run is lost: {limit} steps in a row (training.max_skipped_steps), up"
                        f" to step {lost}, had gradients that are not finite and were skipped;"
                        f" {where}; start again,{origin} with a lower optimizer.lr"
                    )
            if saving.every and (last or step % saving.every == 0):
                data = loader.state(step - start)
                extra = {"step": step, "data": data, "tokenizer": tokenizer.digest}
                extra["totals"] = log.totals._asdict()
                files = {"config.toml": to_toml(config)}
                arguments = (step, model, [optimizer], extra, files, tokenizer.save)
                with (
                    one_line_errors(refuse, CheckpointError),
                    watchdog.phase("checkpoint"),
                    log.throughput.pause(),
                ):
                    healthy = not log.totals.skipped_in_a_row and gives_finite_loss(
                        parallel.evaluate, host_batches[0], validation_batch, dims
                    )
                    checkpointer.save(*arguments, sync=last, healthy=healthy)
            if config.job.gc_every and step % config.job.gc_every == 0:
                gc.collect(1)
        tracer.stop()
        log.close()
        reason = f"stopped by {stop.received or 'another rank'} after" if stop.agreed else "done at"
        logger.info(f"{reason} step {step}")
        if saving.every:
            path = as_word(checkpointer.folder / f"step-{step}")
            logger.info(f"continue a text: python -m lmoe.generate {path} --prompt 'def '")


def main(words: list[str]) -> None:
    rank = int(os.environ.get("RANK", 0))
    setup_logging(rank)
    stop = StopRequest()

    def refuse(message):  # all ranks read the same words, so one of them says what is wrong
        if rank == 0:
            print(f"error: {message}", file=sys.stderr, flush=True)
        else:
            # A launcher that sees this one end would end the first, which may have yet to speak.
            time.sleep(2)

    with one_line_errors(refuse):
        if asks_for_help(words):
            end_with_reader()
            print(help_text(words))
            return
        config = load_config(words)
        world = int(os.environ.get("WORLD_SIZE", 1))
        check_config(config, world, local_device())
        resolve_batch_size(config, world)

    def cannot_meet(message):  # every rank may have another reason
        print(f"error: rank {rank} cannot join the job: {message}", file=sys.stderr, flush=True)

    with one_line_errors(cannot_meet, RuntimeError, OverflowError):
        device = init_distributed()
    train(config, device, stop)
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SystemExit as ended:
        leave(ended)
