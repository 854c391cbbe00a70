"""The state of a running job for its checkpoints: named tensors of model and optimizers, copies of
them, reading them back, and random generators."""

import copy
import io
import random
import struct
import sys
import weakref
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lmoe.checkpoint_metadata import SavedTensor, read_pickle
from lmoe.files import in_one_line, open_regular, read_regular
from lmoe.model.init import clean_name, local

RNG_NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "LongStorage"),
    ("torch", "ByteStorage"),
    ("collections", "OrderedDict"),
}


def model_tensors(model):
    """Parameters (sharded or plain) and persistent buffers: {"model.<name>": the tensor itself,
    detached}.

    FSDP2 leaves parameters whole after an evaluation, and whole ones are copies; its state_dict
    hook shards them again. So this comes before anything that looks at model.named_parameters().
    """
    stages = getattr(model, "stages", [model])
    return {
        f"model.{clean_name(name)}": tensor
        for stage in stages
        for name, tensor in stage.state_dict().items()
    }


def optimizer_tensors(model, optimizers):
    """{"optim.<parameter name>.<state>": tensor}. A parameter that never had a gradient has no
    state."""
    return {
        f"optim.{name}.{key}": tensor
        for optimizer, parameter, name in _optimized(model, optimizers)
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def _optimized(model, optimizers):
    names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer, parameter, names[id(parameter)]


def empty_optimizer_state(model, optimizers, saved, trained):
    """Room for the optimizer state in a checkpoint: [(optimizer, parameter, name, {key: tensor})],
    laid out as the optimizer would; for all of its parameters that have any state there, and for
    every one where none has, although some steps were `trained`.

    A state of the parameter's shape is sharded like it; anything else is plain.
    """
    keys = [key.removeprefix("optim.") for key in saved if key.startswith("optim.")]
    names = {key.rpartition(".")[0] for key in keys}
    made = {optimizer: _made_by(optimizer) for optimizer in optimizers}
    states = []
    for optimizer, parameter, name in _optimized(model, optimizers):
        probe, tensors = made[optimizer][parameter]
        state = {}
        for key, tensor in tensors.items():
            like = parameter if tensor.shape == probe.shape else tensor
            state[key] = torch.empty_like(like, dtype=tensor.dtype)
        if state and (name in names or trained and not names):
            states.append((optimizer, parameter, name, state))
    return states


def _made_by(optimizer):
    """Find what state an optimizer makes, by a step of a copy on tiny parameters: {parameter: (the
    tiny one, {key: tensor})}."""
    trial = copy.copy(optimizer)
    trial.state = defaultdict(dict)
    trial.param_groups = []
    probes = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Of one number at least two: the shape tells its moments from its step count.
            place = {"dtype": parameter.dtype, "device": parameter.device}
            probes[parameter] = torch.ones((2,) * max(1, parameter.ndim), **place)
            probes[parameter].grad = torch.ones_like(probes[parameter])
        trial.param_groups.append(group | {"params": [probes[p] for p in group["params"]]})
    trial.step()
    return {parameter: (probe, trial.state[probe]) for parameter, probe in probes.items()}


def check_step_counts(states, path):
    """Refuse step counts that no optimizer counts to; ValueError names the first."""
    for _, _, name, state in states:
        count = float(state["step"]) if "step" in state else 0.0
        if not (count >= 0 and count.is_integer()):
            raise ValueError(f"checkpoint {path}: optim.{name}.step is {count}, no count of steps")


class HostMemory:
    """Copies of a rank's tensors in one block of host memory, kept from save to save and pinned
    where there is a GPU.

    Not allocated with pin_memory=True, which rounds up to a power of two, up to twice the model and
    optimizer.
    """

    def __init__(self):
        self.block = np.empty(0, np.uint8)

    @torch.no_grad()
    def copy(self, state):
        """{key: CPU copy of this rank's part}, contiguous; valid until the next call."""
        parts = {key: local(tensor) for key, tensor in state.items()}
        starts = {}
        size = 0
        for key, part in parts.items():
            starts[key] = size
            size += -(-part.nbytes // 64) * 64
        if self.block.size < size:
            self.block = None  # before there are two
            self.block = np.empty(size, np.uint8)
            if torch.cuda.is_available():
                pointer = self.block.ctypes.data
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(pointer, size, 0))
                release = torch.cuda.cudart().cudaHostUnregister
                weakref.finalize(self.block, release, pointer).atexit = False
        copies = {}
        for key, part in parts.items():
            # frombuffer and not a view: the writer would clone a tensor that is only a piece of its
            # storage, and keep the clone.
            place = {"dtype": part.dtype, "count": part.numel(), "offset": starts[key]}
            flat = torch.frombuffer(self.block, **place) if part.numel() else part.cpu()
            copies[key] = flat.view(part.shape).copy_(part, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def rng_state():
    """This rank's generators, as tensors and plain numbers (so that loading runs no pickled
    code)."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": (version, torch.tensor(numbers, dtype=torch.int64), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def read_rng_state(file: Path) -> dict:
    """Read what rng_state gave and torch.save wrote. ValueError if it is anything else."""
    try:
        data = read_regular(file)
        stored = _stored(data)

        def value(item):
            if type(item) in (str, int, float, type(None)):
                return item
            storage, start, size, stride, *_ = item.arguments
            _, kind, key, device, _ = storage.arguments
            if type(key) is not str:  # or it could take for ever to say
                raise ValueError("a tensor without a name")
            dtype = torch.int64 if kind == "LongStorage" else torch.uint8
            numbers = torch.frombuffer(bytearray(data[stored[f"data/{key}"]]), dtype=dtype)
            if (start, size, stride, device) != (0, (len(numbers),), (1,), "cpu"):
                raise ValueError("a tensor that no generator has")
            return numbers

        def values(item):
            if type(item) is not tuple:
                return value(item)
            if len(item) > 5:  # a pickle may name one thing any number of times
                raise ValueError("a part that no generator has")
            return tuple(map(value, item))

        state = read_pickle(data[stored["data.pkl"]], RNG_NAMES)
        return {key: values(state[key]) for key in ("python", "numpy", "torch", "cuda")}
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"no state of generators: {in_one_line(error)}") from None


def set_rng_state(state: dict) -> None:
    """Set this rank's generators to what rng_state gave; ValueError for anything else."""
    try:
        version, numbers, gauss = state["python"]
        name, keys, position, has_gauss, cached = state["numpy"]
        # NumPy checks neither, and would read beyond its state.
        if keys.shape != (624,) or type(position) is not int or not 0 <= position <= 624:
            raise ValueError("NumPy's does not fit")
        if gauss is not None and type(gauss) is not float:
            raise ValueError("Python's does not fit")
        random.setstate((version, tuple(numbers.tolist()), gauss))
        keys = keys.numpy().astype(np.uint32)
        np.random.set_state((name, keys, position, int(has_gauss), float(cached)))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as e:
        raise ValueError(f"no state of generators: {in_one_line(e)}") from None


class Reader(dcp.FileSystemReader):
    """Reads tensors from the places that were checked, as bytes: torch's own reader unpickles."""

    def __init__(
        self, path: Path, tensors: dict[str, SavedTensor], advance: Callable[[], None]
    ) -> None:
        super().__init__(path)
        self.advance = advance
        self.folder = path
        self.tensors = tensors

    def read_metadata(self, *_, **__) -> Metadata:
        entries = {}
        places = {}
        for key, tensor in self.tensors.items():
            chunks = []
            for chunk in tensor.chunks:
                offsets = torch.Size(chunk.offsets)
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
                places[MetadataIndex(key, offsets)] = (tensor.dtype, chunk)
            properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
            entries[key] = TensorStorageMetadata(properties, torch.Size(tensor.size), chunks)
        return Metadata(entries, storage_data=places)

    def read_data(self, plan, planner):
        items = [(*self.storage_data[item.storage_index], item) for item in plan.items]
        for dtype, chunk, item in sorted(items, key=lambda found: found[1][2:4]):
            try:
                piece = _read_chunk(self.folder / chunk.file, getattr(torch, dtype), chunk)
            except (ValueError, LookupError) as error:
                raise ValueError(f"{chunk.file}: {item.storage_index.fqn}: {error}") from None
            for dim, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                piece = piece.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece)
            planner.commit_tensor(item, target)
            self.advance()
        done = torch.futures.Future()
        done.set_result(None)
        return done


def _read_chunk(file: Path, dtype: torch.dtype, chunk) -> Tensor:
    """Read a piece of a tensor: the bytes of the one storage in an archive of torch.save."""
    data = bytearray(chunk.length)
    with open_regular(file) as stream:
        stream.seek(chunk.start)
        if stream.readinto(data) != chunk.length:
            raise ValueError("it is cut")
    count = torch.Size(chunk.sizes).numel()
    if count == 0:
        return torch.empty(chunk.sizes, dtype=dtype)
    place = _stored(data)["data/0"]
    if place.stop - place.start != count * dtype.itemsize:
        raise ValueError(f"{place.stop - place.start} bytes for {count} numbers of {dtype}")
    return torch.frombuffer(data, dtype=dtype, count=count, offset=place.start).view(chunk.sizes)


class _View(io.RawIOBase):
    """Bytes as a file, without the copy of them that io.BytesIO makes."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = memoryview(data)
        self.position = 0

    def seek(self, offset, whence=0):
        self.position = max(0, (0, self.position, len(self.data))[whence] + offset)
        return self.position

    def tell(self):
        return self.position

    def readinto(self, buffer):
        piece = self.data[self.position : self.position + len(buffer)]
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)


def _stored(data: bytes | bytearray) -> dict[str, slice]:
    """Find where the files of an archive of torch.save lie in it: {name: from where to where}. They
    are never compressed. ValueError if it is none."""
    places = {}
    try:
        with zipfile.ZipFile(_View(data)) as archive:
            for info in archive.infolist():
                lengths = struct.unpack_from("<HH", data, info.header_offset + 26)
                start = info.header_offset + 30 + sum(lengths)
                stop = start + info.file_size
                if info.compress_type != zipfile.ZIP_STORED or stop > len(data):
                    raise ValueError("it is compressed or cut")
                places[info.filename.partition("/")[2]] = slice(start, stop)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error, OSError):
        raise ValueError("it is no archive of torch.save") from None
    if data[places.get("byteorder", slice(0))] not in (b"", sys.byteorder.encode()):
        raise ValueError("it was written on a machine of another byte order")
    return places
