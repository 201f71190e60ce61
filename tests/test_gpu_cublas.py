"""What cuBLAS is asked for, with no card: a stand-in that does what its manual says on the memory that it is given."""

from __future__ import annotations

import builtins
import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import mutant
from numpy.typing import NDArray

from neox.gpu import cublas
from neox.gpu import device as device_module
from neox.gpu.device import dtype_named
from neox.reference.errors import InputError

HANDLE = 77
DTYPES = {0: "float32", 2: "float16", 14: "bfloat16"}  # of library_types.h
DISALLOW_REDUCED_PRECISION_REDUCTION = 16
COMPUTE_32F = 68


def number(address: int) -> float:
    return ctypes.c_float.from_address(address).value


class Library:
    """cublasGemmEx on the CPU: C = alpha op(A) op(B) + beta C."""

    def __init__(self, *memory: NDArray) -> None:
        self.memory = {array.ctypes.data: array for array in memory}
        self.mode: int | None = None

    def create(self) -> int:
        return HANDLE

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
        assert (number(alpha), number(beta)) == (1, 0)
        A = self.columns(a, kind_a, lead_a, *((k, m) if op_a else (m, k))).astype(np.float64)
        B = self.columns(b, kind_b, lead_b, *((n, k) if op_b else (k, n))).astype(np.float64)
        self.columns(c, kind_c, lead_c, m, n)[...] = (A.T if op_a else A) @ (B.T if op_b else B)


def matrix(array: NDArray) -> cublas.Matrix:
    return cublas.Matrix(array.ctypes.data, array.shape, array.dtype.name)


def check_product(N: int, outputs: int, inputs: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = (rng.integers(-9, 9, size).astype(dtype_named(dtype)) for size in ((N, inputs), (outputs, inputs)))
    out = np.full((N, outputs), np.nan, np.float32)
    library = Library(x, weight, out)
    cublas.multiply(library, cublas.open_handle(library), matrix(x), matrix(weight), matrix(out))
    assert np.array_equal(out, x.astype(np.float64) @ weight.T.astype(np.float64))


sizes = st.integers(1, 9)


@given(sizes, sizes, sizes, st.sampled_from(tuple(cublas.TYPES)), st.integers(0, 2**32 - 1))
def test_cublas_is_asked_for_the_product(N, outputs, inputs, dtype, seed) -> None:
    check_product(N, outputs, inputs, dtype, seed)


MUTANTS = [
    ("open_handle", "cublas.setMathMode(handle, ALL_IN_32F)", "pass"),
    ("multiply", "TRANSPOSED, NONE", "NONE, TRANSPOSED"),
    ("multiply", "TRANSPOSED, NONE", "NONE, NONE"),
    ("multiply", "outputs, N, inputs", "N, outputs, inputs"),
    ("multiply", "TYPES[weight.dtype], inputs", "TYPES[weight.dtype], outputs"),
    ("multiply", "TYPES[x.dtype], inputs", "TYPES[x.dtype], N"),
    ("multiply", "TYPES[out.dtype], outputs", "TYPES[out.dtype], N"),
    ("multiply", "TYPES[out.dtype]", "TYPES[x.dtype]"),
    ("multiply", "ZERO.ctypes.data", "ONE.ctypes.data"),
    ("multiply", "COMPUTE_32F", "COMPUTE_32F + 6"),  # which lets float32 be rounded to 16 bits
    ("multiply", "COMPUTE_32F", "COMPUTE_32F - 4"),  # which adds in 16 bits
]


@pytest.mark.parametrize(("function", "right", "wrong"), MUTANTS)
def test_another_question_is_noticed(monkeypatch, function, right, wrong) -> None:
    changed = mutant(wrong, "check_product", function, (right, wrong), module=cublas)
    monkeypatch.setattr(cublas, function, changed.build())
    with pytest.raises(AssertionError):
        check_product(3, 5, 7, "float16", 0)


class Stream:
    inside = False

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False


def test_the_seam_asks_in_its_stream_and_opens_one_handle(monkeypatch) -> None:
    x, weight, out = np.ones((3, 8), np.float16), np.ones((5, 8), np.float16), np.zeros((3, 5), np.float32)
    stream, opened = Stream(), []

    class Watched(Library):
        def create(self) -> int:
            opened.append(self)
            return super().create()

        def gemmEx(self, *passed: int) -> None:
            assert stream.inside
            super().gemmEx(*passed)

    cupy = SimpleNamespace(cuda=SimpleNamespace(Stream=lambda **_: stream))
    monkeypatch.setattr(device_module, "_import_cupy", lambda: cupy)
    monkeypatch.setattr(cublas, "import_cublas", lambda: Watched(x, weight, out))
    device = device_module.CudaDevice()
    arrays = [device_module.Array(device, a, a.ctypes.data, a.shape, a.dtype) for a in (x, weight, out)]
    for _ in range(2):
        out[:] = 0
        device.matmul(*arrays)
        assert (out == 8).all()
    assert len(opened) == 1


def test_a_missing_library_is_told_in_one_line(monkeypatch) -> None:
    imported = builtins.__import__

    def without_cublas(name, *arguments, **named):
        if name.startswith("cupy_backends"):
            raise ImportError("libcublas.so.13 was not found")
        return imported(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_cublas)
    with pytest.raises(InputError, match=r"need cuBLAS, which CuPy does not find: pip install 'cupy-cuda13x\[ctk\]'"):
        cublas.import_cublas()
