"""Train variants of a configuration one after another in this process, or in the ranks that
torchrun starts, by train.py's own loop: processes start and groups of ranks meet once.

    python benchmarks/steps.py JOB.json

benchmarks/train.py writes the job, {config, steps, trace, variants: {name: words}, folder}, and
reads folder/results.jsonl: a line a variant, in order, with "error" where its words are refused.
What fails later ends the process, as it ends a run.

Around train.py's functions stand probes: of the time at which a step begins, its passes end and it
ends, on the device's clock; and, after the `steps` timed ones, a profiler over `trace` more. Left
behind by a variant are process groups, of which those of one layout are used again, Triton's
compiled kernels, and cuBLAS's workspace as job.deterministic has it.
"""

import gc
import json
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch._inductor.config
import torch.distributed as dist
from torch.profiler import record_function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where train.py is
import train
from benchmarks.parts import PARTS, PREFIX, attribute, label, new_profiler, trace, within
from benchmarks.timing import mark, milliseconds, synchronise
from lmoe.checks import check_config
from lmoe.config import load_config
from lmoe.files import in_one_line
from lmoe.metrics import setup_logging
from lmoe.parallel.dims import build_dims, init_distributed, resolve_sizes
from lmoe.resolve import resolve_batch_size
from lmoe.signals import StopRequest, one_line_errors

WARMUP = 5  # steps that medians leave out, where there are more


class Probe:
    """Stands around train.parallelize and train.train_step in one run."""

    def __init__(self, steps, traced, device):
        self.steps = steps
        self.traced = traced
        self.device = device
        self.step = 0
        self.marks = []  # of each timed step: its begin, the end of its passes, its end
        self.parallelize = train.parallelize
        self.train_step = train.train_step
        self.model = self.profiler = self.events = None

    def build(self, model, config, dims):
        parallel = self.parallelize(model, config, dims)
        self.model = model
        return parallel._replace(forward_backward=self.passes(parallel.forward_backward))

    def passes(self, forward_backward):
        def run(*args, **kwargs):
            outputs = forward_backward(*args, **kwargs)
            self.marks[-1].append(mark(self.device))
            return outputs

        return within(run, "passes")

    def take_step(self, *args, **kwargs):
        self.step += 1
        if self.traced and self.step == self.steps + 1:
            label(self.model)
            self.profiler = new_profiler()
            self.profiler.start()
        self.marks.append([mark(self.device)])
        with record_function(PREFIX + "step"), record_function(PREFIX + "optimizer"):
            result = self.train_step(*args, **kwargs)
        self.marks[-1].append(mark(self.device))
        if self.traced and self.step == self.steps + self.traced:
            self.end()
        return result

    def end(self):
        synchronise()
        self.profiler.stop()
        if dist.get_rank() == 0:
            with tempfile.TemporaryDirectory() as folder:
                self.events = trace(self.profiler, Path(folder) / "trace.json")
        self.profiler = None

    def times(self):
        """Medians over the timed steps, ms."""
        marks = self.marks[: self.steps]
        marks = marks[WARMUP:] or marks
        times = {}
        for i, name in enumerate(("forward_backward_ms", "optimizer_ms")):
            times[name] = statistics.median(milliseconds(m[i], m[i + 1]) for m in marks)
        return times


def forget():
    """Give back what a variant has left in the process. Returns GiB that live on on the GPU."""
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)
    gc.enable()
    gc.collect()
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


class Runner:
    """Trains variants in this process, one after another."""

    def __init__(self, device):
        self.device = device
        self.runs = 0
        self.layouts = {}

    def build_dims(self, config, device):
        """Take the groups of an earlier variant of the same layout."""
        sizes = tuple(resolve_sizes(config, dist.get_world_size()).items())
        if sizes not in self.layouts:
            self.layouts[sizes] = build_dims(config, device)
        return self.layouts[sizes]

    def connect_store(self, connect):
        """Let the watchdog of a run not read what an earlier one has left."""
        store = connect()
        return store and dist.PrefixStore(f"run/{self.runs}", store)

    def run(self, words, folder, steps, traced):
        """Train for `steps` steps in a new folder, and trace `traced` more (0, or 2 at least).
        Returns what benchmarks/train.py keeps of a variant, on the first rank; ValueError where
        the words are refused."""
        self.runs += 1
        config = load_config([*words, f"--job.folder={folder}"])
        config.training.steps = steps + traced
        check_config(config, dist.get_world_size(), self.device)
        resolve_batch_size(config, dist.get_world_size())
        left = forget()
        probe = Probe(steps, traced, self.device)
        connect = train.connect_store
        stand_ins = {
            "parallelize": probe.build,
            "train_step": probe.take_step,
            "build_dims": self.build_dims,
            "connect_store": lambda: self.connect_store(connect),
        }
        stop = StopRequest()
        # What async_tp sets for good.
        settings = torch._inductor.config.patch(_micro_pipeline_tp=False)
        with mock.patch.multiple(train, **stand_ins), settings:
            train.train(config, self.device, stop)
        if stop.agreed:
            raise SystemExit(f"stopped by {stop.received or 'another rank'}")
        if dist.get_rank() > 0:
            return None
        entries = read_entries(Path(folder) / "metrics.jsonl")[:steps]
        result = summary(entries, config) | probe.times() | {"left_gib": left}
        if probe.events is not None:
            try:
                result["parts"] = shares(attribute(probe.events), result["step_ms"])
            except Exception as error:  # the times stand
                print(f"the trace was not taken apart: {in_one_line(error)}", flush=True)
        return result


def read_entries(path):
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


def summary(entries, config):
    timed = entries[WARMUP:] or entries
    rate = statistics.median(e["tokens_per_second"] for e in timed)
    tokens = config.training.global_batch_size * config.data.seq_len
    return {
        "loss": [e["loss"] for e in entries],
        "tokens_per_second": rate,
        "step_ms": 1e3 * tokens / rate,
        "mfu": timed[0]["mfu"] and statistics.median(e["mfu"] for e in timed),
        "memory_gib": max(e["memory_gib"] for e in entries),
        "entries": entries,
    }


def shares(ms, step_ms):
    """Add shares of a timed step to the result of `attribute`: a profiler hardly lengthens kernels,
    but it holds up the host, and so idle time is of the steps without one."""
    busy = sum(ms[part] for part in PARTS)
    share = {part: ms[part] / step_ms for part in PARTS}
    share["idle"] = max(0.0, 1 - busy / step_ms)
    return {"ms": ms, "busy_ms": busy, "share": share}


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    results = Path(job["folder"]) / "results.jsonl"
    with one_line_errors(lambda message: print(f"error: {message}"), RuntimeError):
        runner = Runner(init_distributed())
    setup_logging(dist.get_rank())
    for name, words in job["variants"].items():
        words = [f"--config={job['config']}", *words]
        try:
            result = runner.run(words, f"{job['folder']}/{name}", job["steps"], job["trace"])
        except ValueError as error:
            result = {"error": in_one_line(error)}
        if dist.get_rank() == 0:
            with results.open("a") as file:
                file.write(json.dumps(result) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
