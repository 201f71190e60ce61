"""A file that torch.load reads, written without torch.

Since torch 1.6 such a file is a zip archive, nothing in it compressed:

    archive/data.pkl    a pickle: a mapping of names to calls of torch._utils._rebuild_tensor_v2
    archive/data/0      the bytes of the first tensor; data/1, ...
    archive/version     3
    archive/byteorder   little

The pickle is assembled here from its few opcodes: the pickle module could name torch's functions only where torch is
installed.

Source: torch/serialization.py and caffe2/serialize/inline_container.cc of pytorch/pytorch.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from neox.reference.errors import InputError
from neox.reference.model import Array

STORAGES = {"float16": "HalfStorage", "bfloat16": "BFloat16Storage", "float32": "FloatStorage"}
ALIGNMENT = 64  # of each tensor in the file, so that it can be used where it is mapped
LOCAL_HEADER = 30  # bytes before the name of an entry of a zip archive
ROOT = "archive"


# The pickle.


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _string(value: str) -> bytes:
    encoded = value.encode("utf-8")
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """In elements, of an array whose last axis is contiguous."""
    return tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))


EMPTY_ORDERED = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE


def _tensor(array: Array, key: str) -> bytes:
    """A call of _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)."""
    storage = _global("torch", STORAGES[array.dtype.name])
    place = _tuple(_string("storage"), storage, _string(key), _string("cpu"), _integer(array.size))
    sizes, strides = (_tuple(*map(_integer, values)) for values in (array.shape, _strides(array.shape)))
    arguments = _tuple(place + pickle.BINPERSID, _integer(0), sizes, strides, pickle.NEWFALSE, EMPTY_ORDERED)
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _state(tensors: Mapping[str, Array]) -> bytes:
    items = b"".join(_string(name) + _tensor(array, str(key)) for key, (name, array) in enumerate(tensors.items()))
    return pickle.PROTO + b"\x02" + EMPTY_ORDERED + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


# The archive.


def _entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """One whose bytes begin at a multiple of ALIGNMENT: an extra field that nobody reads fills up its header."""
    info = zipfile.ZipInfo(f"{ROOT}/{name}")
    assert archive.fp is not None
    begins = archive.fp.tell() + LOCAL_HEADER + len(info.filename.encode())
    filling = -(begins + 4) % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", filling) + b"Z" * filling
    return info


def write_torch(path: Path, tensors: Mapping[str, Array]) -> None:
    """A mapping of names to tensors, float16, bfloat16 or float32. Nothing is copied but what is not contiguous.

    InputError for another dtype.
    """
    unknown = sorted({array.dtype.name for array in tensors.values()} - set(STORAGES))
    if unknown:
        raise InputError(f"{', '.join(unknown)} cannot be written as torch tensors, only {', '.join(STORAGES)}")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry(archive, "data.pkl"), _state(tensors))
        archive.writestr(_entry(archive, "byteorder"), "little")
        for key, array in enumerate(tensors.values()):
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            archive.writestr(_entry(archive, f"data/{key}"), content.data)
        archive.writestr(_entry(archive, "version"), "3\n")
