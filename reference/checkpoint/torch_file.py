"""A file that torch.save wrote, read without torch, and without trusting it.

Such a file is a zip archive (torch_writer.py shows its parts) around a pickle, and a pickle is a program. Python's own
machine for it calls whatever the file names, and reserves as much memory as the file asks for. This one knows the few
instructions that a mapping of tensors is made of, calls nothing, and refuses everything else by name, or leaves a
placeholder where the caller knows that something is there which it will not read. Tensors are views of the mapped file:
none is copied. Nothing that a file says can make a message long or more than linear work: what is built is not printed.

Files of torch before 1.6 are no zip archives; they are refused too.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from neox.reference.checkpoint.mapped import Mapped, map_file
from neox.reference.checkpoint.stored import SPELLED, Index, dtype_named
from neox.reference.checkpoint.torch_writer import LOCAL_HEADER
from neox.reference.errors import InputError
from neox.reference.model import Array

STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    # Buffers beside the weights: the causal mask and the like.
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


# What the state of a training holds beside the weights: sizes, NumPy's random state, DeepSpeed's loss scale. And
# TransformerEngine's own state, which lies between the weights.
TRAINING_STATE = frozenset(
    {
        "torch.Size",
        "_codecs.encode",
        "_io.BytesIO",
        "numpy.dtype",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *(f"deepspeed.runtime.fp16.loss_scaler.{name}" for name in ("LossScaler", "DynamicLossScaler")),
    }
)

INSTRUCTIONS_READ = 1 << 20  # of a pickle. A tensor takes forty; each can make a hundred bytes of one


class Refused(Exception):
    """The file is not a mapping of tensors; the text says why."""


def shown(name: str) -> str:
    """What a file calls something, short enough for a message."""
    return name if len(name) <= 80 else f"{name[:77]}..."


# The archive.


class Archive:
    """The entries of a zip file, as views of the mapped file."""

    def __init__(self, file: Mapped) -> None:
        self.path = file.path
        self._bytes = file.content
        with zipfile.ZipFile(file.path) as archive:
            self._entries = {info.filename: info for info in archive.infolist()}
        file.check()  # what zipfile has seen is what is mapped
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused("it holds no data.pkl")
        self.root = pickles[0].removesuffix("data.pkl")
        if "byteorder" in self and self.view("byteorder").tobytes() != b"little":
            raise Refused("its numbers have their first byte last")

    def __contains__(self, name: str) -> bool:
        return self.root + name in self._entries

    def view(self, name: str) -> Array:
        """The bytes of an entry, which must lie in the file as they are."""
        info = self._entries.get(self.root + name)
        if info is None:
            raise Refused(f"{shown(name)} is missing")
        name = shown(name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused(f"{name} is compressed or encrypted")
        header = self._slice(info.header_offset, LOCAL_HEADER).tobytes()
        if header[:4] != b"PK\x03\x04":
            raise Refused(f"{name} is not where the archive says")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        return self._slice(info.header_offset + LOCAL_HEADER + name_length + extra_length, info.file_size)

    def _slice(self, start: int, size: int) -> Array:
        if not 0 <= start <= start + size <= self._bytes.size:
            raise Refused("an entry reaches beyond the end of the file")
        return self._bytes[start : start + size]


# Tensors.


@dataclass(frozen=True)
class Storage:
    dtype: str
    key: str


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _sizes(values: Any) -> tuple[int, ...]:
    if not (isinstance(values, tuple) and len(values) <= 8 and all(map(_is_size, values))):
        raise Refused("a tensor whose shape or strides are not up to eight small numbers")
    return values


def _tensor(archive: Archive, storage: Any, offset: Any, shape: Any, strides: Any) -> Array:
    """A view of the storage. It may be transposed, but not larger than what is stored."""
    shape, strides = _sizes(shape), _sizes(strides)
    if not (isinstance(storage, Storage) and _is_size(offset) and len(shape) == len(strides)):
        raise Refused("a tensor without storage, offset, shape and strides")
    dtype = dtype_named(storage.dtype, archive.path)
    content = archive.view(f"data/{storage.key}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    stored = content.size // dtype.itemsize
    if prod(shape) > stored or (prod(shape) and last >= stored):
        raise Refused(f"a tensor of {list(shape)} does not fit its storage of {stored} numbers")
    if not prod(shape):
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, content, offset * dtype.itemsize, tuple(s * dtype.itemsize for s in strides))


# The pickle.

MARK = object()
OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


@dataclass(frozen=True)
class Name:
    """Something that a pickle names, to be called or to tell a dtype. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Placeholder:
    """Something that was not made."""


class Machine:
    """Runs the instructions of one pickle. What it can build: mappings, sequences, plain values, tensors.

    left_out: what it may name besides, and gets a placeholder for.
    """

    def __init__(self, archive: Archive, left_out: frozenset[str]) -> None:
        self.archive = archive
        self.left_out = left_out
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the pickle leaves when it stops."""
        content = io.BytesIO(self.archive.view("data.pkl").tobytes())
        for _ in range(INSTRUCTIONS_READ):
            name, read = self.instruction(content.read(1))
            if name == "STOP":
                return self.pop()
            INSTRUCTIONS[name](self, read(content) if read else None)
        raise Refused(f"a pickle of more than {INSTRUCTIONS_READ} instructions")

    def instruction(self, code: bytes) -> tuple[str, Callable[[io.BytesIO], Any] | None]:
        """Its name, and what reads its argument. It is refused before anything of it is read."""
        opcode = OPCODES.get(code)
        if opcode is None:
            raise Refused("a pickle without an end" if not code else f"the pickle instruction {code!r}")
        if opcode.name != "STOP" and opcode.name not in INSTRUCTIONS:
            raise Refused(f"the pickle instruction {opcode.name}")
        return opcode.name, opcode.arg.reader if opcode.arg else None

    def pop(self) -> Any:
        """The topmost value, which must not be a mark."""
        if not self.stack or self.stack[-1] is MARK:
            raise Refused("a pickle that takes more than it has")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """All values above the last mark, which goes too."""
        for depth, value in enumerate(reversed(self.stack)):
            if value is MARK:
                items = self.stack[len(self.stack) - depth :]
                del self.stack[len(self.stack) - depth - 1 :]
                return items
        raise Refused("a pickle that takes more than it has")

    def top(self, kind: type | tuple[type, ...]) -> Any:
        """The topmost value, which stays, to be filled."""
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise Refused("a pickle that fills what it has not made")
        return self.stack[-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    # Instructions that need more than a line.

    def take(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def recall(self, index: int) -> None:
        """PUT's counterpart: a value that was kept."""
        if index not in self.memo:
            raise Refused("a pickle that recalls what it has not kept")
        self.push(self.memo[index])

    def keep(self, index: int) -> None:
        """The topmost value, under a number."""
        value = self.pop()
        self.push(value)
        self.memo[index] = value

    def set_items(self, items: list[Any]) -> None:
        """Keys and values in turn into the mapping on top."""
        mapping = self.top(dict)
        if len(items) % 2:
            raise Refused("a mapping with a key that has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (isinstance(key, str) or _is_size(key)):  # others could take for ever to hash
                raise Refused(f"a mapping with a {type(key).__name__} for a key")
            mapping[key] = value

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def stack_global(self) -> None:
        """A name whose two parts are on the stack."""
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise Refused("a pickle that names what is not text")
        self.push(Name(module, name))

    def build(self) -> None:
        """State beside the items of a mapping, as the versions of a state_dict: not needed."""
        self.pop()
        self.top((dict, Placeholder))

    def persistent(self) -> None:
        """A reference to a storage in the archive."""
        place = self.pop()
        if not (isinstance(place, tuple) and len(place) == 5 and isinstance(place[1], Name)):
            raise Refused("a reference to something that is not a storage")
        kind, key = place[1], place[2]
        if kind.module != "torch" or kind.name not in STORAGES:
            raise Refused(f"a storage of type {shown(str(kind))}")
        if not isinstance(key, str):
            raise Refused("a storage without a name")
        self.push(Storage(STORAGES[kind.name], key))

    def reduce(self) -> None:
        """A call, of one of the few functions that stand for torch's."""
        arguments, function = self.pop(), self.pop()
        if not (isinstance(function, Name) and isinstance(arguments, tuple)):
            raise Refused("a call of what is no function")
        if str(function) in self.left_out:
            self.push(Placeholder())
        elif str(function) in CALLS:
            self.push(CALLS[str(function)](self.archive, arguments))
        else:
            raise Refused(shown(str(function)))


def _rebuilt(archive: Archive, arguments: tuple) -> Array:
    if len(arguments) < 4:
        raise Refused("a tensor without storage, offset, shape and strides")
    return _tensor(archive, *arguments[:4])


def _parameter(archive: Archive, arguments: tuple) -> Array:
    if not (arguments and isinstance(arguments[0], np.ndarray)):
        raise Refused("a parameter without a tensor")
    return arguments[0]


def _ordered(archive: Archive, arguments: tuple) -> dict:
    if arguments:
        raise Refused("a mapping made of something else")
    return {}


def _name(machine: Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.push(Name(module, name))


def _push(machine: Machine, argument: Any) -> None:
    machine.push(argument)


def _nothing(machine: Machine, argument: Any) -> None:
    """Framing and the version of the protocol."""


def _pushed(make: Callable[[], Any]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.push(make())


CALLS: dict[str, Callable[[Archive, tuple], Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_tensor": _rebuilt,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered,
}

INSTRUCTIONS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "MARK": _pushed(lambda: MARK),
    "NONE": _pushed(lambda: None),
    "NEWTRUE": _pushed(lambda: True),
    "NEWFALSE": _pushed(lambda: False),
    "EMPTY_DICT": _pushed(dict),
    "EMPTY_LIST": _pushed(list),
    "EMPTY_TUPLE": _pushed(tuple),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"), _push),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.take(1),
    "TUPLE2": lambda machine, _: machine.take(2),
    "TUPLE3": lambda machine, _: machine.take(3),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_item(),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, index: machine.keep(index)),
    "MEMOIZE": lambda machine, _: machine.keep(len(machine.memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.recall(index)),
    "GLOBAL": _name,
    "STACK_GLOBAL": lambda machine, _: machine.stack_global(),
    "BINPERSID": lambda machine, _: machine.persistent(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine, _: machine.reduce()),
    "BUILD": lambda machine, _: machine.build(),
}


# Files.

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch before 1.6 begin; those before 0.1 are tar


def _what_it_is(file: Mapped) -> str:
    """Of a file that is no zip archive."""
    beginning = file.content[:512].tobytes()
    if beginning.startswith(LEGACY) or beginning[257:262] == b"ustar":
        return "was saved by torch before 1.6: load it with torch and save it again"
    return "is not a whole file of torch: download it again"


@dataclass(frozen=True)
class Saved:
    """content: mappings, sequences, plain values, and tensors as read-only views of the mapped file."""

    file: Mapped
    content: Any


def read_torch(path: Path, left_out: frozenset[str] = frozenset()) -> Saved:
    """What was saved. left_out: names of what may be there and is not made.

    InputError if there is no such file, it is damaged, or it holds anything else.
    """
    file = map_file(path)
    try:
        return Saved(file, Machine(Archive(file), left_out).run())
    except InputError:
        raise
    except Refused as reason:
        raise InputError(f"{path} is refused: {reason}") from reason
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} {_what_it_is(file)}") from error
    except (ValueError, OverflowError, NotImplementedError, struct.error) as error:  # a pickle or an archive cut short
        raise InputError(f"{path} is not a whole file of torch ({shown(str(error))}): download it again") from error


@dataclass(frozen=True)
class TorchTensor:
    """A tensor in a file of torch (a Stored of stored.py)."""

    file: Mapped
    array: Array

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def dtype(self) -> str:
        return SPELLED.get(self.array.dtype.name, self.array.dtype.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read(self) -> Array:
        self.file.check()
        return self.array

    def part(self, index: Index) -> Array:
        return self.read()[index]


def tensors_in(content: Any, file: Mapped) -> dict[str, TorchTensor]:
    """The tensors of a mapping; what else it holds is left out. InputError if it is no mapping."""
    if not isinstance(content, dict):
        raise InputError(f"{file.path} is refused: it holds no mapping of tensors")
    return {str(name): TorchTensor(file, value) for name, value in content.items() if isinstance(value, np.ndarray)}


def torch_tensors(path: Path, left_out: frozenset[str] = frozenset()) -> dict[str, TorchTensor]:
    """The tensors of a file by name; InputError as of read_torch."""
    saved = read_torch(path, left_out)
    return tensors_in(saved.content, saved.file)
