"""What cuBLAS is asked for, with no card: a stand-in that does what its manual says on the memory that it is given."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from cards import Library, a_card
from hypothesis import given
from hypothesis import strategies as st
from mutants import Mutant, mutant
from numpy.typing import NDArray

from neox.gpu import cublas
from neox.gpu import device as device_module
from neox.gpu.device import dtype_named
from neox.reference.errors import InputError


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


def check_seam(monkeypatch) -> None:
    device, library = a_card(monkeypatch, None)
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
    ("_matmul", 'self.kept("cuBLAS", _open_cublas)', "_open_cublas()"),
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
