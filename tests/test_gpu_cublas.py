"""What cuBLAS is asked for, with no card: a stand-in that does what its manual says on the memory that it is given."""

from __future__ import annotations

import builtins
import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import Mutant, mutant
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
        assert number(alpha) == 1
        A = self.columns(a, kind_a, lead_a, *((k, m) if op_a else (m, k))).astype(np.float64)
        B = self.columns(b, kind_b, lead_b, *((n, k) if op_b else (k, n))).astype(np.float64)
        C = self.columns(c, kind_c, lead_c, m, n)
        before = number(beta) * C if number(beta) else 0  # as the manual says: with beta 0, C may be anything
        C[...] = before + (A.T if op_a else A) @ (B.T if op_b else B)


def matrix(array: NDArray) -> cublas.Matrix:
    return cublas.Matrix(array.ctypes.data, array.shape, array.dtype.name)


def check_product(N: int, outputs: int, inputs: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = (rng.integers(-9, 9, size).astype(dtype_named(dtype)) for size in ((N, inputs), (outputs, inputs)))
    product = x.astype(np.float64) @ weight.T.astype(np.float64)
    for before, added in ((np.nan, False), (5, True)):
        out = np.full((N, outputs), before, np.float32)
        library = Library(x, weight, out)
        cublas.multiply(library, cublas.open_handle(library), matrix(x), matrix(weight), matrix(out), added)
        assert np.array_equal(out, product + before if added else product)


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
    ("multiply", "ONE if add else ZERO", "ONE"),
    ("multiply", "ONE if add else ZERO", "ZERO"),
    ("multiply", "ONE if add else ZERO", "ZERO if add else ONE"),
    ("multiply", "inputs, ONE.ctypes.data", "inputs, ZERO.ctypes.data"),
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

    def array(self, values: NDArray) -> device_module.Array:
        held = values.copy()
        cublas.import_cublas().memory[held.ctypes.data] = held
        return device_module.Array(self, held, held.ctypes.data, held.shape, held.dtype)


def a_card(monkeypatch) -> tuple[Card, Watched]:
    stream = Stream()
    library = Watched(stream)
    cupy = SimpleNamespace(cuda=SimpleNamespace(Stream=lambda **_: stream))
    monkeypatch.setattr(device_module, "_import_cupy", lambda: cupy)
    monkeypatch.setattr(cublas, "import_cublas", lambda: library)
    return Card(), library


def check_seam(monkeypatch) -> None:
    device, library = a_card(monkeypatch)
    rng = np.random.default_rng(0)
    for N in (3, 6, 300):
        x, weight = (rng.integers(-9, 9, size).astype(np.float16) for size in ((N, 8), (5, 8)))
        before, bias = (rng.integers(1, 99, size).astype(np.float32) for size in ((N, 5), 5))
        product = x.astype(np.float32) @ weight.T.astype(np.float32)
        factors = device.array(x), device.array(weight)
        for added, add in ((None, False), (bias, False), (None, True), (bias, True)):
            out = device.array(before if add else np.full_like(before, np.nan))
            device.matmul(*factors, out, None if added is None else device.array(added), add=add)
            assert np.array_equal(out.memory, product + (0 if added is None else added) + (before if add else 0))
    assert library.opened == 1


def test_the_seam_asks_in_its_stream_and_opens_one_handle(monkeypatch) -> None:
    check_seam(monkeypatch)


SEAM_MUTANTS = [
    ("_matmul", "_matrix(out), add", "_matrix(out), False"),
    ("_matmul", "_matrix(out), add", "_matrix(out), True"),
    ("_matmul", "if bias is not None", "if False"),
    ("_matmul", "if bias is not None", "if bias is not None and not add"),
    ("_matmul", "out, None, True", "out, None, add"),
    ("_matmul", "x.shape[0]), bias.reshape(bias.size, 1)", "x.shape[0]), self._ones(bias.size)"),
    ("_matmul", "with self._stream:", "if True:"),
    ("_matmul", "if self._cublas is None", "if True"),
    ("_ones", "(count - 1)", "(count // 2)"),
]


@pytest.mark.parametrize(("function", "right", "wrong"), SEAM_MUTANTS)
def test_a_wrong_seam_is_noticed(monkeypatch, function, right, wrong) -> None:
    changed = Mutant(wrong, "check_seam", device_module.CudaDevice, function, ((right, wrong),))
    monkeypatch.setattr(device_module.CudaDevice, function, changed.build())
    with pytest.raises((AssertionError, ValueError)):
        check_seam(monkeypatch)


def test_a_missing_library_is_told_in_one_line(monkeypatch) -> None:
    imported = builtins.__import__

    def without_cublas(name, *arguments, **named):
        if name.startswith("cupy_backends"):
            raise ImportError("libcublas.so.13 was not found")
        return imported(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_cublas)
    with pytest.raises(InputError, match=r"need cuBLAS, which CuPy does not find: pip install 'cupy-cuda13x\[ctk\]'"):
        cublas.import_cublas()
