"""A card without a card: what its device asks of cuBLAS is computed by stand-ins, on NumPy's memory."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from neox.gpu import cublas, cublas_lt
from neox.gpu import device as device_module
from neox.gpu.device import dtype_named
from neox.gpu.host.build import compiler

HANDLE, STREAM = 77, 0x57E4000
DTYPES = {0: "float32", 2: "float16", 14: "bfloat16"}  # of library_types.h
DISALLOW_REDUCED_PRECISION_REDUCTION = 16
COMPUTE_32F = 68


def compiled_cublas_lt(path: Path) -> ctypes.CDLL:
    """cublas_lt.cpp, as a library of this name."""
    source = Path(__file__).with_name("cublas_lt.cpp")
    command = [compiler()[0], "-std=c++17", "-O1", "-Wall", "-shared", "-fPIC", str(source), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    library = ctypes.CDLL(str(path))
    for name, types in cublas_lt.FUNCTIONS.items():
        getattr(library, name).argtypes = types
    return library


def number(address: int) -> float:
    return ctypes.c_float.from_address(address).value


class Library:
    """cublasGemmEx on the CPU: C = alpha op(A) op(B) + beta C."""

    def __init__(self, *memory: NDArray) -> None:
        self.memory = {array.ctypes.data: array for array in memory}
        self.mode: int | None = None

    def create(self) -> int:
        return HANDLE

    def getVersion(self, handle: int) -> int:
        assert handle == HANDLE
        return 130100

    def setMathMode(self, handle: int, mode: int) -> None:
        assert handle == HANDLE
        self.mode = mode

    def columns(self, address: int, kind: int, leading: int, rows: int, count: int) -> NDArray:
        """A matrix (rows, count) as BLAS has it: columns one after another, each `leading` elements from the last."""
        array = self.memory[address]
        assert array.dtype == dtype_named(DTYPES[kind])
        assert leading >= rows
        assert leading * count <= array.size
        return array.reshape(-1)[: leading * count].reshape(count, leading)[:, :rows].T

    def gemmEx(self, *passed: int) -> None:
        handle, op_a, op_b, m, n, k, alpha, a, kind_a, lead_a, b, kind_b, lead_b, *rest = passed
        beta, c, kind_c, lead_c, kind, _ = rest
        assert (handle, self.mode, kind) == (HANDLE, DISALLOW_REDUCED_PRECISION_REDUCTION, COMPUTE_32F)
        assert number(alpha) == 1
        A = self.columns(a, kind_a, lead_a, *((k, m) if op_a else (m, k))).astype(np.float64)
        B = self.columns(b, kind_b, lead_b, *((n, k) if op_b else (k, n))).astype(np.float64)
        C = self.columns(c, kind_c, lead_c, m, n)
        before = number(beta) * C if number(beta) else 0  # as the manual says: with beta 0, C may be anything
        C[...] = before + (A.T if op_a else A) @ (B.T if op_b else B)


class Stream:
    inside = False
    ptr = STREAM

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False


class Watched(Library):
    """Asked by a device: in its stream, by one handle."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        self.opened = 0

    def create(self) -> int:
        self.opened += 1
        return super().create()

    def gemmEx(self, *passed: int) -> None:
        assert self.stream.inside
        super().gemmEx(*passed)


class Card(device_module.CudaDevice):
    """Its arrays are NumPy's, and known to the library."""

    def _allocate(self, size: int) -> tuple[NDArray, int]:
        memory = np.full(size, 255, np.uint8)  # NaN
        return memory, memory.ctypes.data

    def array(self, values: NDArray) -> device_module.Array:
        held = values.copy()
        cublas.import_cublas().memory[held.ctypes.data] = held
        return device_module.Array(self, held, held.ctypes.data, held.shape, held.dtype)


def a_card(monkeypatch, beside: ctypes.CDLL | None) -> tuple[Card, Watched]:
    """And its cuBLAS, beside which cublasLt may be."""
    stream = Stream()
    library = Watched(stream)
    cupy = SimpleNamespace(cuda=SimpleNamespace(Stream=lambda **_: stream))
    monkeypatch.setattr(device_module, "_import_cupy", lambda: cupy)
    monkeypatch.setattr(cublas, "import_cublas", lambda: library)
    monkeypatch.setattr(cublas_lt, "load", {13: beside}.get)
    return Card(), library
