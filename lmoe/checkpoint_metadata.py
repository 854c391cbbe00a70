"""Read what a checkpoint says about its tensors without running any of it.

torch writes `.metadata` as a pickle, and a pickle is a program: unpickling a stranger's runs the
stranger's code. Here the few opcodes that torch writes build records, which are then checked
against the manifest. Nothing is imported or called. Standard library only.
"""

import json
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

from lmoe.files import in_one_line, read_regular

METADATA = ".metadata"
META = "meta.json"
_DCP = "torch.distributed.checkpoint"
ADMITTED = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((f"{_DCP}.metadata", name) for name in ("TensorStorageMetadata", "TensorProperties")),
    *((f"{_DCP}.metadata", name) for name in ("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}
DTYPE_BYTES = (
    {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "complex128": 16}
    | {"int64": 8, "int32": 4, "int16": 2, "int8": 1, "bool": 1}
    | {"uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1}
    | {"float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1}
)
ARCHIVE_BYTES = 1 << 16  # that an archive of torch.save has at most, beside its tensor


class Chunk(NamedTuple):
    """A piece of a tensor: where in it, and where in which file (an archive of torch.save)."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class SavedTensor(NamedTuple):
    """dtype: its name, as in torch.<name>."""

    dtype: str
    size: tuple[int, ...]
    chunks: list[Chunk]


class Name(str):
    """A name by which a pickle calls something. A word, never the object."""


class Record:
    """A stand-in for what a pickle would have built: of which kind, from which arguments, with
    which state."""

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: Any, arguments: Any) -> None:
        if type(kind) is not Name:
            raise ValueError(f"it calls {shown(kind)}")
        self.kind = kind
        self.arguments = arguments
        self.state = None


def shown(value: object) -> str:
    """Make a short printable word of something that a stranger wrote."""
    text = value if isinstance(value, str) and value.isprintable() else type(value).__name__
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else text
    return text if len(text) <= 100 else f"{text[:97]}..."


_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "BINFLOAT"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(data: bytes, admitted: set[tuple[str, str]]) -> Any:
    """Read a pickle into records, numbers, strings, tuples, lists and dicts. ValueError at any
    opcode or name that is not admitted; what it asks of memory is bounded by its length."""
    stack: list = []
    below: list[list] = []  # stacks under the marks
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        op = opcode.name
        if op in _LITERALS:
            stack.append(argument)
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op == "BINGET" or op == "LONG_BINGET":
            stack.append(memo[argument])
        elif op in _TUPLES:
            count = _TUPLES[op]
            if len(stack) < count:
                raise ValueError("it is cut")
            stack[-count:] = [tuple(stack[-count:])]
        elif op == "NEWOBJ" or op == "REDUCE":
            arguments = stack.pop()
            stack[-1] = Record(stack[-1], arguments)
        elif op == "BUILD":
            state = stack.pop()
            if type(stack[-1]) is not Record:
                raise ValueError(f"it sets attributes of {shown(stack[-1])}")
            stack[-1].state = state
        elif op == "MARK":
            below.append(stack)
            stack = []
        elif op == "TUPLE":
            items = stack
            stack = below.pop()
            stack.append(tuple(items))
        elif op == "SETITEMS" or op == "SETITEM":
            items, stack = (stack, below.pop()) if op == "SETITEMS" else (stack[-2:], stack)
            if op == "SETITEM":
                del stack[-2:]
            # Not tuples: the hash of one that is nested deep enough overflows the C stack.
            if len(items) % 2 or not all(type(key) in (str, Record) for key in items[::2]):
                raise ValueError("it holds a table with other keys than names")
            if type(stack[-1]) is not dict:
                raise ValueError(f"it sets items of {shown(stack[-1])}")
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif op == "APPENDS" or op == "APPEND":
            items, stack = (stack, below.pop()) if op == "APPENDS" else ([stack.pop()], stack)
            if type(stack[-1]) is not list:
                raise ValueError(f"it appends to {shown(stack[-1])}")
            stack[-1].extend(items)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op == "STACK_GLOBAL" or op == "GLOBAL":
            if op == "STACK_GLOBAL":
                name = stack.pop()
                module = stack.pop()
            else:
                module, name = argument.split(" ", 1)
            known = isinstance(module, str) and isinstance(name, str) and (module, name) in admitted
            if not known and not (module == "torch" and name in DTYPE_BYTES):
                raise ValueError(
                    f"it calls for {shown(module)}.{shown(name)}, which describes no tensor"
                )
            stack.append(Name(name))
        elif op == "BINPUT" or op == "LONG_BINPUT":
            memo[argument] = stack[-1]
        elif op == "BINPERSID":
            stack[-1] = Record(Name("persistent"), stack[-1])
        elif op == "STOP":
            return stack.pop()
        elif op not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the opcode {op}, which no description of tensors needs")
    raise ValueError("it is cut")


def read_tensors(path: Path, files: dict[str, dict]) -> dict[str, SavedTensor]:
    """Read which tensors a checkpoint holds and where. files: what its manifest lists. ValueError
    naming .metadata where that is damaged, holds anything else, or points outside of the files."""
    try:
        root = read_pickle(read_regular(path / METADATA), ADMITTED)
        state = _state(root, "Metadata")
        places = {}
        for index, info in _table(state["storage_data"]).items():
            place = _state(index, "MetadataIndex")
            if type(place["fqn"]) is not str:  # hashed below: see read_pickle
                raise ValueError("a tensor has no name")
            places[place["fqn"], _size(place["offset"])] = _state(info, "_StorageInfo")
        entries = _table(state["state_dict_metadata"]).items()
        return {key: _tensor(key, entry, places, files) for key, entry in entries}
    except OSError as error:
        raise ValueError(f"{METADATA}: unreadable ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{METADATA}: not read: {in_one_line(error)}") from None
    except (LookupError, TypeError, AttributeError, MemoryError):
        raise ValueError(f"{METADATA}: not read: it is no description of tensors") from None


def _tensor(key: Any, entry: Any, places: dict, files: dict[str, dict]) -> SavedTensor:
    if type(key) is not str or not key.isprintable():
        raise ValueError(f"a tensor is called {shown(key)}")
    state = _state(entry, "TensorStorageMetadata")
    dtype, layout = _state(state["properties"], "TensorProperties", tuple)[:2]
    if type(dtype) is not Name or dtype not in DTYPE_BYTES:
        raise ValueError(f"{shown(key)} has no dtype that torch saves")
    if _record(layout, "_get_layout").arguments != ("torch.strided",):
        raise ValueError(f"{shown(key)} is not strided")
    size = _size(state["size"])
    chunks = []
    for chunk in state["chunks"]:
        chunk = _state(chunk, "ChunkStorageMetadata")
        offsets = _size(chunk["offsets"])
        sizes = _size(chunk["sizes"])
        inside = len(offsets) == len(sizes) == len(size)
        if not inside or any(a + n > m for a, n, m in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"{shown(key)} has a piece that lies outside of it")
        place = places.pop((key, offsets))  # once: tensors may share their lists of pieces
        file = place["relative_path"]
        start = _natural(place["offset"])
        length = _natural(place["length"])
        if type(file) is not str or file not in files:
            raise ValueError(
                f"{shown(key)} lies in {shown(file)}, which the manifest does not list"
            )
        needed = _product(sizes) * DTYPE_BYTES[dtype]
        if start + length > files[file]["bytes"] or not needed <= length <= needed + ARCHIVE_BYTES:
            raise ValueError(f"{shown(key)} lies outside of {shown(file)}")
        if place.get("transform_descriptors"):
            raise ValueError(f"{shown(key)} would have to be transformed")
        chunks.append(Chunk(offsets, sizes, file, start, length))
    # Starts that differ and a sum that fits: no element is left as it was in memory.
    starts = {chunk.offsets for chunk in chunks if _product(chunk.sizes)}
    filled = [_product(chunk.sizes) for chunk in chunks if _product(chunk.sizes)]
    if len(starts) != len(filled) or sum(filled) != _product(size):
        raise ValueError(f"the pieces of {shown(key)} do not make it up")
    return SavedTensor(str(dtype), size, chunks)


def _record(value: Any, kind: str) -> Record:
    if type(value) is not Record or value.kind != kind:
        raise ValueError(f"it has {shown(getattr(value, 'kind', value))} in the place of {kind}")
    return value


def _state(value: Any, kind: str, form: type = dict) -> Any:
    state = _record(value, kind).state
    if type(state) is not form:
        raise ValueError(f"a {kind} of it has no state")
    return state


def _table(value: Any) -> dict:
    if type(value) is not dict:
        raise ValueError("it lacks its table of tensors")
    return value


def _size(value: Any) -> tuple[int, ...]:
    (numbers,) = _record(value, "Size").arguments
    if type(numbers) is not tuple or len(numbers) > 64:
        raise ValueError("it has a shape that is none")
    return tuple(_natural(number) for number in numbers)


def _natural(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise ValueError(f"it has {shown(number)} where a size or a position belongs")
    return number


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def read_meta(path: Path) -> dict:
    """Read meta.json: step, world_size, optimizers, extra, and healthy, which earlier versions did
    not write. ValueError naming it where it is damaged or holds something else."""
    try:
        meta = json.loads(read_regular(Path(path) / META).decode())
    except OSError as error:
        raise ValueError(f"{META}: unreadable ({error.strerror})") from None
    except (ValueError, RecursionError, MemoryError):
        raise ValueError(f"{META}: unreadable") from None
    meta = {"healthy": True} | meta if isinstance(meta, dict) else {}
    kinds = {"step": int, "world_size": int, "optimizers": list, "healthy": bool}
    for key, kind in kinds.items():
        if type(meta.get(key)) is not kind:
            raise ValueError(f"{META}: no {kind.__name__} under {key!r}")
    if "extra" not in meta or not all(isinstance(name, str) for name in meta["optimizers"]):
        raise ValueError(f"{META}: extra is missing, or optimizers are no names")
    return meta


def description_problems(path: Path, files: dict[str, dict]) -> list[str]:
    """List what is wrong with what .metadata and meta.json say: 'file: reason' each."""
    problems = []
    for read in (lambda: read_tensors(path, files), lambda: read_meta(path)):
        try:
            read()
        except ValueError as error:
            problems.append(str(error))
    return problems


def is_healthy(path: Path) -> bool:
    """Tell whether a checkpoint was saved in good health; those that do not say were."""
    try:
        return read_meta(path)["healthy"]
    except ValueError:
        return False
