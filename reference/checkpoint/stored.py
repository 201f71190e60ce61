"""A tensor of a checkpoint that has not been read: what it is, where, and how to get at it.

Every layout makes a mapping of names to these, and everything above (load.py, convert.py, distributed/) sees no more.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from neox.reference.errors import InputError
from neox.reference.model import Array

WEIGHT_DTYPES = ("F16", "BF16", "F32", "F64")  # as safetensors spells them
NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
SPELLED = {name: spelled for spelled, name in NAMES.items()}

Index = tuple[slice, ...]  # for each axis, with its start and its stop


def whole(shape: tuple[int, ...]) -> Index:
    return tuple(slice(0, length) for length in shape)


class Stored(Protocol):
    """path: a file to name when something is wrong. dtype: as safetensors spells it."""

    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Array:
        """The whole tensor: a read-only view of the mapped file where that is possible."""
        ...

    def part(self, index: Index) -> Array:
        """Some of it; nothing else is read from disk."""
        ...


def size_of(stored: Stored) -> int:
    """How many numbers it holds."""
    return prod(stored.shape)


def numpy_dtype(stored: Stored) -> np.dtype:
    """InputError for bfloat16 without ml_dtypes, from which NumPy learns it. Only for WEIGHT_DTYPES."""
    return dtype_named(NAMES[stored.dtype], stored.path)


def dtype_named(name: str, path: Path) -> np.dtype:
    """As numpy_dtype, of a name of NumPy's."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        message = f'{path} holds bfloat16, which needs one more package: pip install "neox20b[bf16]"'
        raise InputError(message) from error
    return np.dtype(ml_dtypes.bfloat16)
