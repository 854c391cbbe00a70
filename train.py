"""Train a model: ./run_train.sh [--section.key=value ...], or python train.py --config=FILE for one
process. --help lists all keys."""

import contextlib
import gc
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lmoe.checkpoint import Checkpointer, read_extra
from lmoe.checks import check_config, check_same_model
from lmoe.config import help_text, load_config, load_saved_config, to_toml
from lmoe.data.loader import build_loader
from lmoe.data.tokenizer import load_tokenizer
from lmoe.evaluate import validate
from lmoe.kernels.check import check_kernels
from lmoe.metrics import (
    Metrics,
    Throughput,
    console_line,
    logger,
    memory_gib,
    peak_flops,
    setup_logging,
)
from lmoe.model.batch import LossWeights
from lmoe.model.build import build_model, moe_layer_count
from lmoe.model.model import count_parameters
from lmoe.model.moe.router import update_bias
from lmoe.optimizer import build_optimizer, clip_and_step, learning_rate, total_norm
from lmoe.parallel.context import make_builder
from lmoe.parallel.dims import build_dims, init_distributed, local_device
from lmoe.parallel.parallelize import DTYPES, parallelize
from lmoe.profiling import Tracer, memory_snapshot
from lmoe.resolve import resolve_batch_size, resolve_vocab_size
from lmoe.scans import triton_cases
from lmoe.watchdog import Watchdog, connect_store

IGNORE = -100


class StopRequest:
    """SIGTERM or SIGUSR1 asks for a checkpoint and a clean end after the step under way."""

    def __init__(self):
        self.received, self.agreed, self.training = None, False, False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if number == signal.SIGINT and not self.training:
            raise SystemExit(130)  # nothing to save yet
        self.received = signal.Signals(number).name


@contextlib.contextmanager
def one_line_errors(refuse):
    """Before training a ValueError is a user's mistake: refuse(message) says it in one line, and
    the exit code is 1."""
    try:
        yield
    except ValueError as error:
        refuse(str(error))
        raise SystemExit(1) from None


def set_determinism(enabled):
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def resume_or_start(config, checkpointer, model, optimizer, tokenizer):
    """Load what this run goes on from. Returns (step, data state): the run's own newest checkpoint,
    else checkpoint.load, else nothing."""
    path, only_model = checkpointer.find(), False
    if path is None and config.checkpoint.load:
        only_model = config.checkpoint.load_only_model
        path = checkpointer.find(config.checkpoint.load)
    if path is None:
        return 0, None
    check_same_model(config, load_saved_config(path), path)
    if read_extra(path)["tokenizer"] != tokenizer.digest:
        raise ValueError(
            f"data.tokenizer = {config.data.tokenizer!r} is not the tokenizer that {path} was"
            " trained with"
        )
    if only_model:
        checkpointer.load_model(model, path)
        logger.info("took the weights of %s: a new branch", path)
        return 0, None
    extra = checkpointer.load(model, [optimizer], path)
    return extra["step"], extra["data"]


def loss_weights(config):
    """What makes a step's auxiliary losses, added up over layers, microbatches and ranks, means."""
    rows, layers = (
        config.training.global_batch_size,
        max(1, moe_layer_count(config.model, config.moe)),
    )
    split = config.parallel.cp * config.parallel.tp  # over so many ranks is a microbatch
    return LossWeights(
        1 / (rows * layers),
        1 / (rows * config.data.seq_len * layers),
        config.training.batch_size / (rows * split),
    )


def make_step(model, forward_backward, optimizer, config, dims):
    """One optimizer step as a function of its microbatches, the number of valid labels over all
    ranks, and the learning rate.

    It returns device tensors, the same on every rank, and never waits for the device: losses [4]
    (loss, z-loss, balance loss, router z-loss), tokens per expert [MoE layers, E], the gradient
    norm before clipping, and 1.0 where a non-finite step was skipped.
    """
    parameters, moe_layers, numbers = (
        list(model.parameters()),
        model.moe_layers(),
        model.moe_numbers(),
    )
    count = moe_layer_count(config.model, config.moe)

    def run(microbatches, normaliser, lr):
        outputs = forward_backward(microbatches, normaliser)
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = total_norm(parameters, dims.stage_world)
        skip = clip_and_step(optimizer, norm, config.training.max_norm)
        optimizer.zero_grad()

        # What the step reports, and what moves the router biases: one all-reduce of one float64
        # vector.
        losses = torch.stack([torch.stack([o.loss, o.z_loss]) for o in outputs]).double().sum(0)
        vector = losses.new_zeros(4 + count * config.moe.experts)
        vector[:2] = losses
        counts = vector[4:].view(count, -1) if count else vector[4:]
        if moe_layers:  # those of this rank's pipeline stages
            vector[2:4] = (
                torch.stack([torch.stack([s.balance, s.z]) for o in outputs for s in o.stats])
                .double()
                .sum(0)
            )
            for place, of_layer in zip(numbers, zip(*(o.stats for o in outputs)), strict=True):
                counts[place] = torch.stack([s.counts for s in of_layer]).double().sum(0)
        if dims.world > 1:
            dist.all_reduce(vector)
        if config.moe.bias_rate:
            for layer, place in zip(moe_layers, numbers, strict=True):
                update_bias(layer.router.bias, counts[place], config.moe.bias_rate, skip)
        return vector[:4], counts, norm, skip

    return run


def shown(measured):
    return "".join(f"  {name} {value:.4f}" for name, value in measured.items())


def train(config, device, stop):
    started = time.perf_counter()
    rank, world = dist.get_rank(), dist.get_world_size()
    folder = Path(config.job.folder)
    watchdog = Watchdog(connect_store(), rank, world, config.job.hang_timeout)
    snapshot = memory_snapshot(folder, rank, config.profiling.memory_snapshot)
    with (
        watchdog,
        snapshot,
        contextlib.ExitStack() as setup,
    ):  # the watchdog outside: where training fails it ends the process
        setup.enter_context(one_line_errors(watchdog.refuse))
        set_determinism(config.job.deterministic)
        tokenizer = load_tokenizer(config.data.tokenizer)
        resolve_vocab_size(config, tokenizer)
        check_kernels(
            triton_cases(config, device), device
        )  # once a machine, version of Triton and kind of scan
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"job.folder = {config.job.folder!r} cannot be made: {error.strerror}"
            ) from None

        # Model: on the meta device, then sharded, then materialised; the optimizer sees the sharded
        # parameters.
        dims = build_dims(config.parallel, device)
        with torch.device("meta"):
            model = build_model(config)
        counted, flops_per_token = (
            count_parameters(model),
            3 * model.flops_per_token(config.data.seq_len),
        )
        forward_backward, evaluate = parallelize(model, config, dims)
        optimizer = build_optimizer(config.optimizer, model)
        run_step = make_step(model, forward_backward, optimizer, config, dims)
        checkpointer = Checkpointer(
            folder / "ckpt", keep=config.checkpoint.keep, async_save=config.checkpoint.async_save
        )
        start, data_state = resume_or_start(config, checkpointer, model, optimizer, tokenizer)

        # Data, and what each microbatch tells the layers.
        rows, seq_len = config.training.global_batch_size, config.data.seq_len
        microbatches = rows // (config.training.batch_size * dims.data_world)
        share = {"rank": dims.data_rank, "world": dims.data_world, "barrier": dist.barrier}
        with watchdog.phase("preparation"):
            loader = build_loader(
                config, tokenizer, microbatches=microbatches, state=data_state, **share
            )
            validation = (
                build_loader(config, tokenizer, split="validation", **share)
                if config.validation.every
                else None
            )
        tokens_per_step = rows * seq_len
        varlen = config.attention.varlen(config.model, device, DTYPES[config.training.dtype])
        make_batch = make_builder(config, dims, dense_mask=not varlen, weights=loss_weights(config))
        validation_batch = make_builder(config, dims, dense_mask=not varlen)

        # What will run, for people and for the record.
        if rank == 0:
            (folder / "config.toml").write_text(to_toml(config))
            print(to_toml(config), flush=True)
        peak = peak_flops(device)
        logger.info(
            "%s parameters, %s active (body %s, active %s); %d ranks; "
            "%s tokens a step in %d microbatches; %.4f GFLOP a token",
            *(f"{counted[k]:,}" for k in ("total", "active", "body", "active_body")),
            world,
            f"{tokens_per_step:,}",
            microbatches,
            flops_per_token / 1e9,
        )
        metrics = Metrics(folder, rank, tensorboard=config.metrics.tensorboard, resumed_step=start)
        tracer = Tracer(folder, rank, config.profiling.trace_step)
        throughput = Throughput()
        skipped = torch.zeros((), dtype=torch.float64, device=device)

        def save(step, sync):
            extra = {
                "step": step,
                "data": loader.state(step - start),
                "tokenizer": tokenizer.digest,
            }
            with watchdog.phase("checkpoint"), throughput.pause():
                checkpointer.save(
                    step,
                    model,
                    [optimizer],
                    extra,
                    {"config.toml": to_toml(config)},
                    tokenizer.save,
                    sync=sync,
                )

        def measure():
            with watchdog.phase("validation"), throughput.pause():
                return validate(
                    evaluate,
                    validation,
                    validation_batch,
                    dims,
                    context=config.validation.shuffle_context,
                )

        if start == 0 and validation is not None:
            measured = measure()
            metrics.write(0, measured)
            logger.info("step 0%s", shown(measured))
        setup.close()  # from here on an error is a failure, not a user's mistake
        stop.training = True

        if config.job.gc_every:
            gc.disable()  # else every rank collects at another time, and all wait for each
        logger.info("set up in %.1f s", time.perf_counter() - started)
        throughput = Throughput()
        batches = iter(loader)
        step = start
        while step < config.training.steps and not stop.agreed:
            step += 1
            watchdog.beat(step)
            tracer.before(step)
            microbatch_list = next(batches)
            valid = sum(int((batch.labels != IGNORE).sum()) for batch in microbatch_list)
            valid, asked = dims.sum_over_data(
                torch.tensor([valid, stop.received is not None], dtype=torch.float64)
            ).tolist()
            stop.agreed = asked > 0

            device_batches = [
                make_batch(
                    batch.tokens,
                    batch.labels,
                    batch.cu_seqlens,
                    config.training.batch_size,
                    seq_len,
                )
                for batch in microbatch_list
            ]
            lr = learning_rate(config.schedule, config.optimizer.lr, step, config.training.steps)
            losses, counts, norm, skip = run_step(device_batches, max(valid, 1.0), lr)
            skipped += skip
            throughput.add(tokens_per_step)

            last = step == config.training.steps or stop.agreed
            due = step == config.training.steps or (
                step % max(1, config.validation.every) == 0 and not stop.agreed
            )
            validating = (
                validation is not None and due
            )  # whoever asked for a stop waits for the checkpoint alone
            if last or validating or step == start + 1 or step % config.metrics.log_every == 0:
                names = ("loss", "z_loss", "balance_loss", "router_z_loss")
                values = dict(
                    zip(names, losses.tolist(), strict=True)
                )  # here the host waits for the device
                values |= {
                    "grad_norm": norm.item(),
                    "lr": lr,
                    "tokens": step * tokens_per_step,
                    "tokens_per_second": throughput.read(),
                }
                values["mfu"] = (
                    values["tokens_per_second"] * flops_per_token / (peak * world) if peak else None
                )
                values |= {"memory_gib": memory_gib(device), "skipped_steps": skipped.item()}
                if len(counts):
                    values["expert_load"] = (counts.amax(1) / counts.mean(1)).tolist()
                measured = measure() if validating else {}
                metrics.write(step, values | measured)
                eta = (config.training.steps - step) * tokens_per_step / values["tokens_per_second"]
                logger.info(
                    console_line(step, config.training.steps, values, eta) + shown(measured)
                )
            tracer.after(step)
            checkpointer.poll()
            if config.checkpoint.every and (last or step % config.checkpoint.every == 0):
                save(step, sync=last)
            if config.job.gc_every and step % config.job.gc_every == 0:
                gc.collect(1)
        tracer.stop()
        metrics.close()
        logger.info(
            "stopped by %s after step %d" if stop.agreed else "done%.0s at step %d",
            stop.received or "another rank",
            step,
        )


def main(words):
    if "--help" in words or "-h" in words:
        print(help_text())
        return
    rank = int(os.environ.get("RANK", 0))
    setup_logging(rank)
    stop = StopRequest()
    # All ranks read the same words, so one of them says what is wrong with these.
    with one_line_errors(
        lambda message: rank or print(f"error: {message}", file=sys.stderr, flush=True)
    ):
        config = load_config(words)
        world = int(os.environ.get("WORLD_SIZE", 1))
        check_config(config, world, local_device())
        resolve_batch_size(config, world)
    device = init_distributed()
    train(config, device, stop)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
