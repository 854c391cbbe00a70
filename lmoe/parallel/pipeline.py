"""Pipeline parallelism: each rank of the axis pp holds some of the blocks, microbatches flow
through them, gradients flow back.

The schedules are torch.distributed.pipelining's. A stage is a Model of a contiguous run of blocks
(Model.part) and the root of its own FSDP2 units, which that library knows how to hold back until
the last microbatch. Stage s belongs to rank s % pp. Every rank of a pipeline has the microbatches
in full; only activations [T, D], residuals that mixers give over the depth, and their gradients
travel.
"""

import itertools

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules

from lmoe.model.model import Output

# parallel.schedule -> (torch's schedule, whether a rank may hold several stages)
SCHEDULES = {
    "gpipe": (schedules.ScheduleGPipe, False),
    "1f1b": (schedules.Schedule1F1B, False),
    "interleaved": (schedules.ScheduleInterleaved1F1B, True),
    "zero_bubble": (schedules.ScheduleInterleavedZeroBubble, True),
}


def stages_per_rank(parallel):
    """parallel: ParallelConfig."""
    return parallel.stages_per_rank or (2 if SCHEDULES[parallel.schedule][1] else 1)


def check_pipeline(config, sizes):
    """Refuse what no pipeline can run. sizes: {axis: ranks} as resolve_sizes gives it."""
    parallel = config.parallel
    pp = sizes["pp"]
    if pp == 1:
        if parallel.schedule != "1f1b" or parallel.stages_per_rank:
            raise ValueError(
                "parallel.schedule and parallel.stages_per_rank are for parallel.pp above 1"
            )
        return
    looped = SCHEDULES[parallel.schedule][1]
    if parallel.stages_per_rank > 1 and not looped:
        raise ValueError(
            f"parallel.stages_per_rank = {parallel.stages_per_rank}: parallel.schedule ="
            f" {parallel.schedule} runs one stage a rank; interleaved and zero_bubble run several"
        )
    held = stages_per_rank(parallel)
    if config.model.layers < pp * held:
        raise ValueError(
            f"model.layers = {config.model.layers} are fewer than the stages of parallel.pp x"
            f" stages a rank = {pp} x {held}; lower parallel.pp or"
            " parallel.stages_per_rank"
        )
    rows = config.training.batch_size * sizes["dp_replicate"] * sizes["dp_shard"]
    total = config.training.global_batch_size or rows
    microbatches = total // rows
    least = f"training.batch_size x data-parallel ranks x parallel.pp = {rows * pp}"
    if microbatches < pp:
        raise ValueError(
            f"training.global_batch_size = {total} makes {microbatches} microbatches a step, fewer"
            f" than the stages of parallel.pp = {pp}, which would idle; set it to {least} at least"
        )
    if looped and microbatches % (microbatches // pp):
        raise ValueError(
            f"training.global_batch_size = {total} makes {microbatches} microbatches a step, which"
            f" parallel.schedule = {parallel.schedule} cannot run in rounds of equal size; set it"
            f" to a multiple of {least}"
        )
    if config.model.tie_embeddings:
        raise ValueError(
            "model.tie_embeddings = true: embedding and head lie on different stages of a pipeline;"
            " set it to false"
        )
    if parallel.schedule == "zero_bubble":
        check_zero_bubble(config)


def check_zero_bubble(config):
    """Torch splits the backward pass by walking the graph twice, first for the inputs and later for
    the weights."""
    key = "parallel.schedule = zero_bubble"
    if torch.__version__ < (2, 13):
        raise ValueError(
            f"{key}: torch {torch.__version__} splits the backward pass wrongly; take torch 2.13 or"
            " the schedule interleaved"
        )
    refusals = {
        "goes back through a block twice, which recomputation forbids; set"
        " activation_checkpoint.mode = none": config.activation_checkpoint.mode != "none",
        "splits the backward pass of every block, and a compiled one is whole; set"
        " compile.enable = false": config.compile.enable,
        "needs the gathered weights from a block's forward to its second backward; set"
        " parallel.reshard_after_forward = false": config.parallel.reshard_after_forward,
    }
    for reason, refused in refusals.items():
        if refused:
            raise ValueError(f"{key} {reason}")


def split(costs, stages):
    """[range of each stage's blocks]: contiguous runs, none empty, whose largest cost is least, and
    among those the most even ones.

    costs: of every block. Exact: the least peak first, then the least sum of squares under that
    peak. Among equals the first stages, which hold most microbatches at a time, get fewer blocks.
    """
    before = [0, *itertools.accumulate(costs)]

    def best(join, peak):
        """(value, borders) of the cheapest way to split all blocks; join(value so far, cost of a
        stage) -> value."""
        reached = {0: (0, [0])}  # end of the stages so far -> the cheapest way there
        for _ in range(stages):
            further = {}
            for start, (value, borders) in reached.items():
                for end in range(start + 1, len(before)):
                    cost = before[end] - before[start]
                    if cost <= peak:
                        way = join(value, cost), [*borders, end]
                        further[end] = min(way, further.get(end, way))
            reached = further
        return reached[len(costs)]

    peak, _ = best(max, before[-1])
    _, borders = best(lambda value, cost: value + cost * cost, peak)
    return [range(*run) for run in itertools.pairwise(borders)]


def split_stages(model, config, dims):
    """Leave in the whole model (on the meta device) this rank's blocks, and fill model.stages."""
    count = dims.pp * stages_per_rank(config.parallel)
    costs = [block.flops_per_token(config.data.seq_len) for block in model.blocks]
    costs[-1] += model.head.flops_per_token()  # an embedding costs nothing
    runs = split(costs, count)
    mine = range(dims.index("pp"), count, dims.pp)
    model.stages = [model.part(runs[s], s == 0, s == count - 1) for s in mine]
    for s, stage in zip(mine, model.stages):
        stage.incoming = model.residuals_into(runs[s].start)
        stage.outgoing = model.residuals_into(runs[s].stop)
    kept = model.part([number for s in mine for number in runs[s]], 0 in mine, count - 1 in mine)
    for part in ("embed", "blocks", "norm", "head"):
        setattr(model, part, getattr(kept, part))


def entering(x):
    """Take what another stage sent as a stage works with it: its gradient will be sent in turn."""
    if x.requires_grad:
        x = x.view_as(x)
        x.register_hook(torch.Tensor.contiguous)
    return x


class Stage:
    """A stage of this rank. It makes the stage's module a function of (x or nothing, number of the
    microbatch), as the schedules call it: tokens, labels and borders are looked up here, statistics
    and losses stay here."""

    def __init__(self, module):
        self.module = module
        self.run = module.forward
        self.first = module.embed is not None
        self.last = module.head is not None
        self.clear()
        # The module itself, not a wrapper: torch's pipelining looks for FSDP's root and its
        # parameters' names stay what they are.
        module.forward = self.forward
        module.register_forward_pre_hook(self.read_number, prepend=True, with_kwargs=True)

    def load(self, batches, normaliser):
        """Take the (tokens, labels, seq) of the microbatches to come."""
        self.batches = batches
        self.normaliser = normaliser

    def clear(self):
        self.batches = []
        self.outputs = {}

    @staticmethod
    def read_number(module, args, kwargs):
        """The number comes as a host tensor [1]. Read before FSDP's hook, which would move it to
        the device, and the host would wait."""
        return args, {"number": int(kwargs["number"])}

    def forward(self, *received, number):
        """x [T, D] and the residuals of the stage before -> a tuple of those for the next, or
        loss + z-loss. A second call for a microbatch overwrites the first."""
        tokens, labels, seq = self.batches[number]
        x, *residuals = [entering(t) for t in received] or [tokens]
        residuals = dict(zip(self.module.incoming, residuals, strict=True))
        output = self.run(x, seq, labels, self.normaliser, residuals=residuals)
        if not self.last:
            x, residuals, stats = output
            self.outputs[number] = Output(None, None, stats)
            # Copies: a stage that splits its backward pass detaches its results in place, which no
            # view of another tensor allows.
            return x.contiguous(), *(
                residuals[name].clone(memory_format=torch.contiguous_format)
                for name in self.module.outgoing
            )
        self.outputs[number] = output.detach()
        return output.loss + output.z_loss


class Pipeline:
    """The stages of this rank and what runs them. dims: Dims."""

    def __init__(self, model, config, dims):
        self.stages = [Stage(module) for module in model.stages]
        self.dims = dims
        self.group = dims.group("pp")
        self.place = dims.index("pp")
        self.schedule, self.looped = SCHEDULES[config.parallel.schedule]
        self.dim = config.model.dim
        self.dtype = getattr(torch, config.training.dtype)
        wide = torch.promote_types(self.dtype, torch.float32)
        self.zero = torch.zeros((), dtype=wide, device=dims.device)
        self.schedules = {}
        self.sending = []

    def build_schedule(self, microbatches, rows):
        """Torch's schedule of a step of so many microbatches, whose activations have so many rows
        on this rank."""
        count = self.dims.pp * len(self.stages)
        loss = torch.empty((), dtype=self.zero.dtype, device="meta", requires_grad=True)
        # Shapes are given, so that torch finds them out neither by messages nor by calling the
        # stages.
        stages = [
            PipelineStage(
                stage.module,
                self.place + i * self.dims.pp,
                count,
                self.dims.device,
                input_args=self.received(stage, rows, "meta"),
                output_args=(loss,)
                if stage.last
                else self.border(rows, stage.module.outgoing, "meta"),
                group=self.group,
            )
            for i, stage in enumerate(self.stages)
        ]
        # The losses are divided by the step's number of labels already, so gradients are summed
        # over microbatches.
        return self.schedule(
            stages if self.looped else stages[0],
            microbatches,
            loss_fn=lambda loss, _: loss,
            scale_grads=False,
        )

    def rows(self, tokens):
        """Rows of x for this rank's tokens of a microbatch: tensor parallel ranks share them."""
        return len(tokens) // self.dims.tp

    def received(self, stage, rows, device):
        """Empty tensors like those that a stage receives."""
        return () if stage.first else self.border(rows, stage.module.incoming, device)

    def border(self, rows, residuals, device):
        """Empty tensors like those that cross a border between stages. residuals: Model.incoming or
        outgoing; tensor parallel ranks share the tokens of x and the heads of those."""
        tp = self.dims.tp
        shapes = [(rows * tp, heads // tp, *rest) for heads, *rest in residuals.values()]
        return tuple(
            torch.empty(shape, dtype=self.dtype, device=device, requires_grad=device == "meta")
            for shape in ((rows, self.dim), *shapes)
        )

    def forward_backward(self, microbatches, normaliser):
        key = len(microbatches), self.rows(microbatches[0][0])
        if key not in self.schedules:
            self.schedules[key] = self.build_schedule(*key)
        for stage in self.stages:
            stage.load(microbatches, normaliser)
        numbers = torch.arange(len(microbatches))
        self.schedules[key].step(number=numbers, target=numbers, return_outputs=False)
        outputs = [self.output(number) for number in range(len(microbatches))]
        for stage in self.stages:
            stage.clear()
        return outputs

    def output(self, number):
        """The Output of a microbatch: this rank's parts of the losses, and the statistics of all
        its layers."""
        outputs = [stage.outputs[number] for stage in self.stages]
        stats = {name: s for output in outputs for name, s in output.stats.items()}
        loss, z_loss = outputs[-1][:2] if self.stages[-1].last else (self.zero, self.zero)
        return Output(loss, z_loss, stats)

    @torch.no_grad()
    def evaluate(self, tokens, labels, seq):
        """Each stage in turn: receive, run, send on. A rank goes on to its next stage or call once
        the send before is done, so that consecutive calls overlap as far as the pipeline is long,
        and the order of messages is the same on both sides."""
        loss = self.zero
        for stage in self.stages:
            stage.load([(tokens, labels, seq)], 1.0)
            received = self.received(stage, self.rows(tokens), self.dims.device)
            for t in received:
                dist.recv(t, group=self.group, group_src=(self.place - 1) % self.dims.pp)
            results = stage.module(*received, number=0)
            if stage.last:
                loss = stage.outputs[0].loss
            else:
                self.send(results)
            stage.clear()
        return loss

    def send(self, tensors):
        for work, _ in self.sending:
            work.wait()
        # They stay until they have gone.
        self.sending = [
            (dist.isend(t, group=self.group, group_dst=(self.place + 1) % self.dims.pp), t)
            for t in tensors
        ]
