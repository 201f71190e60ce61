"""Memory of the host device: between two pages that may not be touched, and NaN until it is written.

    | guard page | head, under a page | data | tail, under 16 bytes | guard page |

Data ends as near to the second guard page as its alignment allows, so that an access beyond it faults at once. Head and
tail hold a pattern that is compared after each launch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
ALIGNMENT = 16  # of the widest vector access
PATTERN = 0xA5
NAN = 0xFF  # a number whose bytes are all this is NaN in float16, bfloat16, float32 and float64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PROT_NONE = 0
FAR = 1 << 16  # from an array: an address so far away was not meant for it


def _mapped(length: int, sharing: int) -> int:
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, sharing | mmap.MAP_ANONYMOUS
    base = _libc.mmap(None, length, protection, flags, -1, 0)
    if base is None or base == ctypes.c_void_p(-1).value:
        raise MemoryError(f"{length} bytes")
    return int(base)


class HostMemory:
    """`size` bytes at `address`, given back when nothing refers to this object any more.

    Processes that this one starts by fork see what it and they write there (module.at_once).
    """

    living: ClassVar[weakref.WeakSet[HostMemory]] = weakref.WeakSet()

    def __init__(self, size: int) -> None:
        data = _round_up(size, ALIGNMENT)
        pages = _round_up(data, PAGE)
        length = pages + 2 * PAGE
        base = _mapped(length, mmap.MAP_SHARED)
        for guard in (base, base + PAGE + pages):
            _libc.mprotect(guard, PAGE, PROT_NONE)
        self.size = size
        self.address: int = base + PAGE + pages - data
        self.bytes = _view(self.address, size)
        self._head = _view(base + PAGE, pages - data)
        self._tail = _view(self.address + size, data - size)
        self._head[:] = self._tail[:] = PATTERN
        self.bytes[:] = NAN
        weakref.finalize(self, _libc.munmap, base, length)
        HostMemory.living.add(self)

    def trespass(self) -> str | None:
        """Where something was written just outside the data, if so; forgets it."""
        found = None
        for part, side in ((self._head, "before"), (self._tail, "after")):
            written = np.flatnonzero(part != PATTERN)
            if written.size:
                distance = part.size - written[-1] if side == "before" else written[0] + 1
                found = f"{distance} byte(s) {side} an array of {self.size} bytes"
                part[:] = PATTERN
        return found


class SharedMemory:
    """`size` bytes, zeros at first, that other processes of this machine can map as well; gone with the last of them.

    The file behind it has no name, so nothing can be left over; others find it among the open files of this process.
    """

    def __init__(self, size: int, opened: str | None = None) -> None:
        """opened: the `name` of what another process has made. OSError if it is not there, or something else is."""
        if opened is not None and not os.readlink(opened).startswith("/memfd:neox"):
            raise OSError(f"{opened} is another file")
        file = os.memfd_create("neox") if opened is None else os.open(opened, os.O_RDWR)
        if opened is None:
            os.ftruncate(file, size)
        self._mapping = mmap.mmap(file, size)
        self._file = file
        self.name = f"/proc/{os.getpid()}/fd/{file}"
        self.size = size
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8)
        self.address: int = self.bytes.ctypes.data
        weakref.finalize(self, os.close, file)

    def trespass(self) -> str | None:
        """What is beside it is not known."""
        return None


_stacks: dict[tuple[int, bool], tuple[int, int]] = {}


def stacks(threads: int, stride: int, early: bool) -> int:
    """Where stacks for so many threads begin, each above a page that may not be touched: the same for every library.

    Stacks of its own for each library would run into the system's limit on the number of mappings, which is 65530.
    early: of a launch that begins before the one before it, which needs others.
    """
    base, reserved = _stacks.get((stride, early), (0, 0))
    if reserved < threads:
        if base:
            _libc.munmap(base, reserved * stride)
        base = _mapped(threads * stride, mmap.MAP_PRIVATE)
        for guard in range(base, base + threads * stride, stride):
            _libc.mprotect(guard, PAGE, PROT_NONE)
        _stacks[stride, early] = base, threads
    return base


def describe(address: int) -> str:
    """Where an address lies, in terms of the nearest living array; empty if none is near."""
    nearest = min(HostMemory.living, key=lambda m: _distance(address, m), default=None)
    if nearest is None or _distance(address, nearest) > FAR:
        return ""
    offset = address - nearest.address
    where = f"{-offset} byte(s) before" if offset < 0 else f"{offset - nearest.size} byte(s) after the end of"
    return f", {where} an array of {nearest.size} bytes"


def _distance(address: int, memory: HostMemory) -> int:
    return max(memory.address - address, address - (memory.address + memory.size - 1), 0)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _view(address: int, size: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
