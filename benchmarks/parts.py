"""The parts of a training step in a profiler's trace.

`label` puts ranges around the parts of a model, and `attribute` gives each kernel to the innermost
range in which the host launched it; in a backward pass, to that in which the forward of the node
ran (autograd's sequence numbers). Beyond that

    communication   kernels of NCCL (gloo), for as long as nothing else runs
    fsdp            what FSDP's own ranges launch: casts, copies in and out, reductions
    optimizer       what a step does after its passes: sums of loose gradients, norm, AdamW, metrics
    experts         in a block all but `mixer`: the second norm, router, dispatch, experts
    other           embedding, last norm, sums of gradients, batches, and what nothing claims

A compiled block is one call, of which no range can tell the halves apart. There grouped products
and the router's fp32 ones are the experts', and of the rest in order: up to the last dense product
before the first grouped one, the mixer's (in a backward pass, what it repeats); and in a backward
pass from the first dense product after the first grouped one on. So a shared expert may
go to either, as may what the compiler moves, such as the passes over rows that it puts off together
with the weights' gradients. On a CPU the host's operators stand for kernels.
"""

import bisect
import json
import re
from collections import defaultdict

import torch
from torch.profiler import record_function

from benchmarks.timing import length

# A moment counts as the first of them that runs.
PARTS = ("mixer", "experts", "head", "optimizer", "other", "fsdp", "communication")
PREFIX = "benchmark:"
_NODE = "autograd::engine::evaluate_function"
_EXPERTS = re.compile(r"^(aten|lmoe)::.*(grouped|expert)")
_DENSE = re.compile(r"^aten::(mm|addmm|bmm)$")
_EXCHANGE = re.compile(r"nccl|gloo", re.IGNORECASE)
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_ON_HOST = {"cpu_op", "user_annotation"}
_LAUNCH = {"cuda_runtime", "cuda_driver"}


def within(function, name):
    """`function` in a range of this name."""

    def ranged(*args, **kwargs):
        with record_function(PREFIX + name):
            return function(*args, **kwargs)

    return ranged


def is_compiled(function):
    return hasattr(function, "_torchdynamo_orig_callable")


def label(model):
    """Put ranges around the halves of every block, or the whole where it is compiled, and the
    head."""

    def put(owner, method, name):
        setattr(owner, method, within(getattr(owner, method), name))

    for block in model.blocks:
        if is_compiled(block.forward):
            put(block, "forward", "block")
        else:
            put(block, "mix", "mixer")
            put(block, "forward", "experts")
    if model.head is not None:
        put(model.head, "forward", "head")


class _Frame:
    """A range or an operator of the host. part: of what is launched in it; region: the call of a
    compiled block that it belongs to."""

    def __init__(self, event, part, region, backward):
        self.end = event["ts"] + event["dur"]
        self.event = event
        self.part = part
        self.region = region
        self.backward = backward
        name = event["name"]
        self.leaf = event["cat"] == "cpu_op" and "::" in name and not name.startswith(_NODE)


class _Region(list):
    """The launches of a call of a compiled block, in order: (kernels, kind)."""

    backward = False

    def halves(self):
        """Yield (kernels, part) of each launch."""
        kinds = [kind for _, kind in self]
        if "experts" not in kinds:  # a dense layer's
            yield from ((kernels, "other") for kernels, _ in self)
            return
        low = "dense" in kinds  # precision of the mixer's products
        dense = [i for i, kind in enumerate(kinds) if kind == ("dense" if low else "dense fp32")]
        first = kinds.index("experts")
        mine = max((i for i in dense if i < first), default=-1)
        again = min((i for i in dense if i > first and self.backward), default=len(self))
        for i, (kernels, kind) in enumerate(self):
            experts = kind == "experts" or low and kind == "dense fp32" or mine < i < again
            yield kernels, "experts" if experts else "mixer"


def attribute(events):
    """Take the traceEvents of a profiler, which hold at least two ranges "benchmark:step", apart.
    Returns ms of a step, without the first: of each of PARTS, the moments in which it ran and none
    before it did; "span", from the end of a step's work to the end of the next one's; and "all
    communication", hidden or not."""
    events = [e for e in events if e.get("ph") == "X" and e.get("dur") is not None]
    host = sorted(
        (e | {"args": e.get("args", {})} for e in events if e.get("cat") in _ON_HOST),
        key=lambda e: (e["ts"], -e["dur"]),
    )
    steps = [e["ts"] for e in host if e["name"] == PREFIX + "step"]
    main = next(e["tid"] for e in host if e["name"] == PREFIX + "step")
    kernels = defaultdict(list)
    for e in events:
        if e.get("cat") in _ON_DEVICE:
            kernels[e["args"].get("correlation")].append(e)
    threads = {e["tid"] for e in host}
    callers = {e["args"]["External id"]: e["tid"] for e in host if "External id" in e["args"]}

    def thread(e):  # some drivers give threads other numbers
        return e["tid"] if e["tid"] in threads else callers.get(e["args"].get("External id"))

    launches = [
        (e["ts"], thread(e), kernels[e["args"]["correlation"]])
        for e in events
        if e.get("cat") in _LAUNCH and e.get("args", {}).get("correlation") in kernels
    ]
    found = _attribute(host, sorted(launches, key=lambda launch: launch[0]), main)

    spans = defaultdict(list)
    begin = end = None
    timed = []
    for part, launched, kernel in found:
        interval = kernel["ts"], kernel["ts"] + kernel["dur"]
        if bisect.bisect(steps, launched) <= 1:
            begin = max(begin or 0, interval[1])
        else:
            timed.append((part, interval))
            end = max(end or 0, interval[1])
    for part, (start, stop) in timed:
        spans[part].append((max(start, begin), max(stop, begin)))
    ms = {}
    union = []
    for part in PARTS:
        before = length(union)
        union += spans[part]
        ms[part] = length(union) - before
    ms |= {"span": end - begin, "all communication": length(spans["communication"])}
    return {name: value / 1e3 / (len(steps) - 1) for name, value in ms.items()}


def _attribute(host, launches, main):
    """[(part, time of the launch, kernel)] of all kernels, or, without launches, of the operators
    of the host that call no other."""
    found = []
    stacks = defaultdict(list)  # thread -> frames
    forward = {}  # sequence number -> frame of the operator that made the node
    regions = []

    def give(frame, launched, kernel, kind):
        if _EXCHANGE.search(kernel["name"]):
            found.append(("communication", launched, kernel))
        elif frame is not None and frame.region is not None:
            frame.region.append(((launched, kernel), kind))
        else:
            found.append((frame.part if frame is not None else "other", launched, kernel))

    def pop(stack, until):
        while stack and stack[-1].end <= until:
            frame = stack.pop()
            if frame.leaf and not launches:
                kind = _kind([*stack, frame])
                give(frame, frame.event["ts"], frame.event, kind)

    def push(event):
        stack = stacks[event["tid"]]
        pop(stack, event["ts"])
        above = stack[-1] if stack else None
        if above is not None and event["cat"] == "cpu_op":
            above.leaf = False
        part, region, backward = (
            (above.part, above.region, above.backward) if above else ("other", None, False)
        )
        name = event["name"]
        number = event["args"].get("Sequence number")
        if name.startswith(PREFIX):
            part = name.removeprefix(PREFIX)
            region = _Region() if part == "block" else None
            part = part if part in PARTS else "other"
        elif name.startswith("FSDP::"):
            part, region = "fsdp", None
        elif name.startswith(_NODE):
            part, region, backward = "other", None, True
        # A node in C++ says its number here, one in Python in the frame below.
        if event["args"].get("Fwd thread id") and region is None:
            of = forward.get(number)
            part = of.part if of else "other"
            if of is not None and of.region is not None:
                region = _Region()
                region.backward = True
        if region is not None and region is not (above and above.region):
            regions.append(region)
        frame = _Frame(event, part, region, backward)
        # The last operator to see a number made the node. Repetitions in a backward pass make none
        # that runs.
        if number is not None and event["tid"] == main and not backward:
            forward[number] = frame
        stack.append(frame)

    i = 0
    for event in host:
        while i < len(launches) and launches[i][0] < event["ts"]:
            _launch(stacks, launches[i], pop, give)
            i += 1
        push(event)
    for launch in launches[i:]:
        _launch(stacks, launch, pop, give)
    for stack in stacks.values():
        pop(stack, float("inf"))
    for region in regions:
        found += [(part, *kernel) for kernel, part in region.halves()]
    return found


def _launch(stacks, launch, pop, give):
    launched, thread, kernels = launch
    stack = stacks[thread]
    pop(stack, launched)
    for kernel in kernels:
        give(stack[-1] if stack else None, launched, kernel, _kind(stack))


def _kind(stack):
    """Tell what operator of a compiled block is running: experts, dense, dense fp32 or None."""
    if any(_EXPERTS.search(frame.event["name"]) for frame in stack):
        return "experts"
    for frame in stack:
        if _DENSE.search(frame.event["name"]):
            types = frame.event["args"].get("Input type") or [""]
            return "dense fp32" if types[0] == "float" else "dense"
    return None


def trace(profiler, path):
    """The events of a profiler that has ended. path: of a file that it writes meanwhile."""
    profiler.export_chrome_trace(str(path))
    return json.loads(path.read_text())["traceEvents"]


def new_profiler():
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, record_shapes=True)
