"""What is in a checkpoint: numbers about every tensor, a checksum of all, and where two checkpoints differ.

Tensors are read a piece at a time, so that nothing larger than a piece is in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from neox.reference.checkpoint.layouts import Source
from neox.reference.checkpoint.tensors import TensorSpec
from neox.reference.model import Array
from neox.reference.project import widen

PIECE = 1 << 18  # numbers: they stay in the processor's cache from one sum to the next

Progress = Callable[[int], object]  # called with how many numbers were read


@dataclass(frozen=True)
class Summary:
    """Of one tensor. smallest, largest and norm are those of its finite numbers."""

    shape: tuple[int, ...]
    dtype: str
    smallest: float
    largest: float
    norm: float
    not_a_number: int
    infinite: int
    digest: bytes


def _pieces(array: Array, progress: Progress) -> Iterator[Array]:
    """As float32, which holds every number of half precision exactly; float64 stays as it is.

    Each is written over the last.
    """
    flat = array.reshape(-1)
    buffer = np.empty(min(PIECE, flat.size), np.float64 if flat.dtype == np.float64 else np.float32)
    for start in range(0, flat.size, PIECE):
        stored = flat[start : start + PIECE]
        piece = buffer[: stored.size]
        widen(stored, out=piece)
        yield piece
        progress(piece.size)


def _digested(piece: Array) -> memoryview:
    """The bits of a number as float32, if that holds it: they depend neither on the layout nor on the dtype."""
    if piece.dtype == np.float64 and np.array_equal(piece.astype(np.float32), piece, equal_nan=True):
        piece = piece.astype(np.float32)
    return piece.astype(piece.dtype.newbyteorder("<"), copy=False).data


def summarize(array: Array, progress: Progress = lambda _: None) -> Summary:
    """Numbers about one tensor, in one pass over it."""
    smallest, largest, squares, nans, infinities = math.inf, -math.inf, 0.0, 0, 0
    digest = hashlib.sha256()
    buffer = np.empty(min(PIECE, array.size))  # new memory for each piece would cost more than what is done with it
    for piece in _pieces(array, progress):
        digest.update(_digested(piece))
        finite = piece
        if not np.isfinite([piece.min(initial=0), piece.max(initial=0)]).all():  # NaN is passed on by both
            nans += int(np.isnan(piece).sum())
            infinities += int(np.isinf(piece).sum())
            finite = piece[np.isfinite(piece)]
        if finite.size:
            smallest, largest = min(smallest, float(finite.min())), max(largest, float(finite.max()))
            wide = buffer[: finite.size]
            wide[:] = finite
            squares += float(wide @ wide)
    numbers = smallest, largest, math.sqrt(squares), nans, infinities
    return Summary(array.shape, array.dtype.name, *numbers, digest.digest())


def checksum(summaries: Mapping[str, Summary]) -> str:
    """Of all tensors under their names: the same for the same numbers in every layout, order and dtype."""
    digest = hashlib.sha256()
    for name, summary in sorted(summaries.items()):
        digest.update(f"{name} {list(summary.shape)} {summary.digest.hex()}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Difference:
    """Between two tensors of one name: how many numbers differ, and by how much at most."""

    count: int
    size: int
    largest: float  # NaN where one of the two is not finite and the other differs
    relative: float  # to the largest number of the first


def difference(spec: TensorSpec, a: Source, b: Source, progress: Progress = lambda _: None) -> Difference:
    """Of a tensor that both have."""
    count, largest, scale = 0, 0.0, 0.0
    pairs = zip(_pieces(a.get(spec), progress), _pieces(b.get(spec), lambda _: None), strict=True)
    for x, y in pairs:
        different = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        count += int(different.sum())
        if different.any():
            with np.errstate(invalid="ignore"):
                largest = float(np.maximum(largest, np.abs(x[different].astype(np.float64) - y[different]).max()))
        scale = max(scale, float(np.abs(x[np.isfinite(x)]).max(initial=0)))
    return Difference(count, spec.size, largest, largest / scale if scale else largest)
