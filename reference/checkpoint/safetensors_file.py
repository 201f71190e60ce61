"""One safetensors file: eight bytes that say how long the header is, the header in JSON, then the tensors end to end.

The library checks the file; the tensors are then mapped into memory and read from disk when they are first used. The
library itself would copy each one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from neox.reference.errors import InputError
from neox.reference.model import Array

WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64")
NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: what it is and where it lies."""

    path: Path
    dtype: str  # as safetensors spells it: F16, BF16, ...
    shape: tuple[int, ...]
    offset: int  # in bytes, from the beginning of the file

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _check(path: Path) -> None:
    """InputError unless the library accepts the header and every tensor lies inside the file."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a safetensors file")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a whole safetensors file ({reason}): download it again") from error


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; InputError if the file is damaged."""
    _check(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def numpy_dtype(stored: Stored) -> np.dtype:
    """InputError for bfloat16 without ml_dtypes, from which NumPy learns it. Only for WEIGHT_DTYPES."""
    if stored.dtype != "BF16":
        return np.dtype(NAMES[stored.dtype])
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        message = f'{stored.path} holds bfloat16, which needs one more package: pip install "neox20b[bf16]"'
        raise InputError(message) from error
    bfloat16: np.dtype = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def mapped(stored: Stored) -> Array:
    """The tensor where it lies on disk: read-only, no copy, no more memory than the pages in use."""
    return np.asarray(np.memmap(stored.path, numpy_dtype(stored), "r", stored.offset, stored.shape))
