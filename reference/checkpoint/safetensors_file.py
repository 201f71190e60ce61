"""One safetensors file: eight bytes that say how long the header is, the header in JSON, then the tensors end to end.

The library checks the file; the tensors are then mapped into memory and read from disk when they are first used. The
library itself would copy each one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from neox.reference.checkpoint.mapped import Mapped, map_file
from neox.reference.checkpoint.stored import SPELLED, Index, numpy_dtype
from neox.reference.errors import InputError
from neox.reference.model import Array


@dataclass(frozen=True)
class SafeTensor:
    """A tensor in a safetensors file (a Stored of stored.py)."""

    file: Mapped
    dtype: str  # as safetensors spells it: F16, BF16, ...
    shape: tuple[int, ...]
    offset: int  # in bytes, from the beginning of the file

    @property
    def path(self) -> Path:
        return self.file.path

    def read(self) -> Array:
        """The tensor where it lies on disk: read-only, no copy, no more memory than the pages in use."""
        self.file.check()
        return np.ndarray(self.shape, numpy_dtype(self), self.file.content, self.offset)

    def part(self, index: Index) -> Array:
        return self.read()[index]


def _check(path: Path) -> None:
    """InputError unless the library accepts the header and every tensor lies inside the file."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a whole safetensors file ({reason}): download it again") from error


def read_header(path: Path) -> dict[str, SafeTensor]:
    """The tensors of a file by name; InputError if the file is damaged."""
    file = map_file(path)
    _check(path)
    file.check()  # what the library has seen is what is mapped
    length = int.from_bytes(file.content[:8].tobytes(), "little")
    header = json.loads(file.content[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    return {
        name: SafeTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


# Writing.


@dataclass(frozen=True)
class Entry:
    """A tensor to write. What it holds is asked for when its turn comes, so that no two need be in memory at once."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _header(entries: Sequence[Entry]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        spelled = SPELLED[entry.dtype.name]
        content[entry.name] = {"dtype": spelled, "shape": list(entry.shape), "data_offsets": [begin, end]}
    header = json.dumps(content, separators=(",", ":")).encode("utf-8")
    return header + b" " * (-len(header) % 8)  # so that every tensor is aligned in a mapped file


def write_safetensors(path: Path, entries: Sequence[Entry], progress: Callable[[int], object] = lambda _: None) -> None:
    """One tensor after the other. progress is called after each with the number of bytes it had."""
    header = _header(entries)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for entry in entries:
            array = np.ascontiguousarray(entry.read())
            assert (array.dtype, array.shape) == (entry.dtype, entry.shape), entry.name
            file.write(array.reshape(-1).view(np.uint8).data)
            progress(entry.nbytes)
