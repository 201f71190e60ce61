"""How many threads NumPy's matrix products use.

NumPy hands products to a BLAS, which spreads each over all cores; everything else it computes on one. Where work can be
cut into shares that need each other rarely, a thread of ours per core, each with a BLAS of one thread, keeps all cores
busy through both.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

# The names under which OpenBLAS exports its thread control: in NumPy's wheels, and where a distribution links its own.
_PREFIXES_AND_SUFFIXES = (("scipy_openblas", "64_"), ("scipy_openblas", ""), ("openblas", "64_"), ("openblas", ""))


def _openblas() -> tuple[Callable[[int], object], Callable[[], int]] | None:
    """OpenBLAS's functions that set and get its number of threads; None where NumPy uses another BLAS."""
    # A symbol looked up in NumPy's extension module is also searched in the libraries it is linked to.
    library = ctypes.CDLL(importlib.import_module("numpy._core._multiarray_umath").__file__)
    for prefix, suffix in _PREFIXES_AND_SUFFIXES:
        setter, getter = f"{prefix}_set_num_threads{suffix}", f"{prefix}_get_num_threads{suffix}"
        if hasattr(library, setter) and hasattr(library, getter):
            return library[setter], library[getter]
    return None


_CONTROL = _openblas()


def cores() -> int:
    """How many shares are worth making: the threads BLAS was given, or 1 where they cannot be taken from it."""
    return _CONTROL[1]() if _CONTROL else 1


def use_cores(count: int) -> None:
    """From now on each product runs on this many cores."""
    if _CONTROL is not None:
        _CONTROL[0](count)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within, each product runs on the core of the thread that asks for it."""
    if _CONTROL is None:
        yield
        return
    set_threads, get_threads = _CONTROL
    before = get_threads()
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


def in_shares(work: Callable[[int, int], object], length: int, step: int, most: int) -> None:
    """work(first, last) over the whole of range(length), cut at multiples of step into a share for each core.

    most: how many shares are worth a thread.
    """
    steps = -(-length // step)
    count = max(1, min(cores(), most, steps))
    if count == 1:
        work(0, length)
        return
    edges = [min(length, steps * i // count * step) for i in range(count + 1)]
    with one_blas_thread(), ThreadPoolExecutor(count) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))
