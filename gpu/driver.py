"""The one call of CUDA's driver that CuPy has no word for: a launch that may begin before those before it have ended.

From "Programmatic Dependent Launch" of the CUDA programming guide; structures and numbers are those of cuda.h.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

OLDEST = 12030  # as driverGetVersion counts: from CUDA 12.3 on a graph knows such launches
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
SUCCESS = 0
LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class Attribute(ctypes.Structure):
    """CUlaunchAttribute. Its value is a union of 64 bytes, of which this one is an int."""

    _fields_ = [("id", ctypes.c_int), ("_", ctypes.c_char * 4), ("value", ctypes.c_int), ("__", ctypes.c_char * 60)]


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    ]


class DriverError(RuntimeError):
    """The driver refused a launch."""


def open_driver() -> Any:
    """OSError if there is none."""
    driver = ctypes.CDLL(LIBRARY)
    driver.cuLaunchKernelEx.argtypes = [ctypes.POINTER(Config), *[ctypes.c_void_p] * 3]
    return driver


def launch_early(
    driver: Any,
    function: int,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    stream: int,
    arguments: Sequence[np.generic],
) -> None:
    """Once every block before it has begun and allows it. function: a CUfunction. DriverError if it cannot be."""
    values = [np.array(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
    early = Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
    sizes = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), shared_bytes
    config = Config(*sizes, stream, ctypes.pointer(early), 1)
    status = driver.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
    if status != SUCCESS:
        raise DriverError(f"cuLaunchKernelEx returned {status}")
