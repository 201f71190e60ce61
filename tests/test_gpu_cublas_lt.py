"""What cublasLt is asked for, with no card: cublas_lt.cpp stands for it, and computes what its header says."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from cards import STREAM, a_card, compiled_cublas_lt
from devices import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Mutant, mutant
from numpy.typing import NDArray
from strategies import seeds

from neox.gpu import cublas_lt
from neox.gpu import device as device_module
from neox.gpu.cublas import Matrix
from neox.gpu.device import Array, dtype_named

SUCCESS, NOT_SUPPORTED = 0, 15


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> ctypes.CDLL:
    return compiled_cublas_lt(tmp_path_factory.mktemp("cublas_lt") / "libcublasLt.so.13")


@pytest.fixture
def lt(built) -> Iterator[ctypes.CDLL]:
    counted = ("opened", "asked", "computed")
    for name in counted:
        number(built, name).value = 0
    yield built
    for name, value in (("offered", 1), ("offer_state", SUCCESS), ("offer_status", SUCCESS)):
        number(built, name).value = value


def number(library: ctypes.CDLL, name: str) -> ctypes.c_int:
    return ctypes.c_int.in_dll(library, name)


def address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.c_size_t.in_dll(library, name).value


class Memory:
    """Arrays that lie apart, each aligned to 16 bytes and no more. What no array holds must stay as it is."""

    def __init__(self) -> None:
        self.bytes = np.full(1 << 18, 255, np.uint8)
        self.used = np.zeros(self.bytes.size, bool)
        self.next = -self.bytes.ctypes.data % 256 + 16 + (64 << 10)  # wrong sizes go past an array, not past the memory

    def hold(self, values: NDArray) -> NDArray:
        place = slice(self.next, self.next + values.nbytes)
        self.next = -(-place.stop // 256) * 256 + 16 + (self.next - 16) % 256
        self.used[place] = True
        held = self.bytes[place].view(values.dtype).reshape(values.shape)
        held[...] = values
        return held

    def is_whole(self) -> bool:
        return bool((self.bytes[~self.used] == 255).all())


def matrix(array: NDArray) -> Matrix:
    return Matrix(array.ctypes.data, (array.shape[0], array.shape[1]), array.dtype.name)


def gelu_fast(x: NDArray) -> NDArray:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


WORKSPACE = 0x7F0000000000  # the stand-in needs none


def check_product(
    library: cublas_lt.Library, sizes: tuple[int, int, int], dtype: str, gelu: bool, add: bool, seed: int = 0
) -> None:
    """Whole numbers, which float32 adds exactly, some of them too large to be added in 16 bits."""
    (N, outputs, inputs), rng, memory = sizes, np.random.default_rng(seed), Memory()
    kind, most = dtype_named(dtype), 4095 if dtype == "float32" else 127
    result = kind if gelu else np.dtype(np.float32)
    x = memory.hold(rng.integers(-most, most + 1, (N, inputs)).astype(kind))
    weight = memory.hold(rng.integers(-9, 10, (outputs, inputs)).astype(kind))
    bias = memory.hold(rng.integers(1, 99, outputs).astype(result))
    before = rng.integers(1, 99, (N, outputs)) if add else np.full((N, outputs), np.nan)
    out = memory.hold(before.astype(result))
    sums = x.astype(np.float64) @ weight.T.astype(np.float64) + bias.astype(np.float64) + (before if add else 0)
    done = cublas_lt.multiply(
        library, STREAM, matrix(x), matrix(weight), bias.ctypes.data, matrix(out), gelu=gelu, add=add
    )
    assert done
    assert memory.is_whole()
    assert np.array_equal(out, (gelu_fast(sums) if gelu else sums).astype(result))
    seen = (address(library.functions, f"last_{name}") for name in ("stream", "workspace", "workspace_bytes"))
    assert tuple(seen) == (STREAM, WORKSPACE, cublas_lt.WORKSPACE_BYTES)


SEVERAL = [
    ((3, 8, 16), "float16", False, True),
    ((3, 8, 16), "float16", True, False),
    ((5, 8, 16), "float16", False, True),
    ((3, 24, 16), "float16", False, True),
    ((3, 8, 64), "float16", True, False),
    ((3, 8, 16), "float16", False, False),
    ((3, 8, 16), "bfloat16", False, True),
    ((3, 8, 16), "bfloat16", True, False),
    ((7, 12, 20), "float32", False, True),
    ((7, 12, 20), "float32", True, False),
]


def check_several(functions: ctypes.CDLL) -> None:
    library = cublas_lt.open_library(functions, WORKSPACE)
    for case in (*SEVERAL, *SEVERAL):
        check_product(library, *case)
    assert number(functions, "asked").value == len(SEVERAL) - 1  # the same plan serves with and without addition


def test_products_are_right_and_planned_once(lt) -> None:
    check_several(lt)


pieces = st.integers(1, 6).map(lambda n: 8 * n)


@settings(max_examples=50)
@given(st.integers(1, 9), pieces, pieces, st.sampled_from(DTYPES), st.booleans(), seeds)
def test_cublas_lt_is_asked_for_the_product(built, N, outputs, inputs, dtype, gelu, seed) -> None:
    check_product(cublas_lt.open_library(built, WORKSPACE), (N, outputs, inputs), dtype, gelu, not gelu, seed)


MUTANTS = [
    ("multiply", "ONE if add else ZERO", "ONE"),
    ("multiply", "ONE if add else ZERO", "ZERO"),
    ("multiply", "(ONE.ctypes.data", "(ZERO.ctypes.data"),
    ("multiply", "weight.address, A, x.address, B", "x.address, A, weight.address, B"),
    ("multiply", "weight.address, A, x.address, B", "weight.address, B, x.address, A"),
    ("multiply", "out.address, D, out.address, D", "x.address, D, out.address, D"),
    ("multiply", "out.address, D, out.address, D", "out.address, A, out.address, D"),
    ("multiply", "out.address, D, out.address, D", "out.address, D, out.address, A"),
    ("multiply", "byref(plan.algorithm)", "byref(Algorithm())"),
    ("multiply", "library.workspace", "0"),
    ("multiply", "library.workspace, WORKSPACE_BYTES", "library.workspace, 0"),
    ("multiply", "WORKSPACE_BYTES, stream", "WORKSPACE_BYTES, 0"),
    ("multiply", "library.handle", "None"),
    ("multiply", "c_void_p(bias)", "c_void_p(16)"),
    ("multiply", "c_void_p(bias)", "c_void_p(x.address)"),
    ("multiply", "_set(", "(lambda *_: None)("),
    ("multiply", "key = x.shape, weight.shape,", "key = x.shape,"),
    ("multiply", "key = x.shape, weight.shape,", "key = weight.shape,"),
    ("multiply", "x.dtype, out.dtype, gelu", "x.dtype, out.dtype"),
    ("multiply", "x.dtype, out.dtype, gelu", "out.dtype, gelu"),
    ("multiply", "x.dtype, out.dtype, gelu", "x.dtype, out.dtype, gelu, add"),
    ("multiply", "if key not in library.plans", "if True"),
    ("multiply", "GELU_BIAS if gelu else BIAS", "GELU_BIAS"),
    ("multiply", "GELU_BIAS if gelu else BIAS", "BIAS"),
    ("multiply", "GELU_BIAS if gelu else BIAS", "(GELU_BIAS if gelu else BIAS) - BIAS"),
    ("_plan", "A, B, D, D", "B, A, D, D"),
    ("_plan", "A, B, D, D", "A, B, A, D"),
    ("_plan", "A, B, D, D", "A, B, D, A"),
    ("_plan", "library.handle", "None"),
    ("_plan", "_preference(functions), 1,", "_preference(functions), 0,"),
    ("_plan", "_preference(functions)", '_create(functions, "cublasLtMatmulPreferenceCreate")'),
    ("_product", "TRANSPOSED", "0"),
    ("_product", "TRANSA", "TRANSA + 1"),
    ("_product", "c_int32(TRANSPOSED)", "c_uint64(TRANSPOSED)"),
    ("_product", "c_uint32(epilogue)", "c_uint64(epilogue)"),
    ("_product", "c_uint32(epilogue)", "c_uint32(1)"),
    ("_product", "c_void_p(ALIGNMENT)", "c_void_p()"),
    ("_product", "c_void_p(ALIGNMENT)", "c_void_p(2 * ALIGNMENT)"),
    ("_product", "COMPUTE_32F", "COMPUTE_32F + 6"),  # which lets float32 be rounded to 16 bits
    ("_product", "COMPUTE_32F", "COMPUTE_32F - 4"),  # which adds in 16 bits
    ("_product", '"float32"', '"float16"'),
    ("_layout", "columns, rows, columns", "rows, columns, columns"),
    ("_layout", "columns, rows, columns", "columns, rows, rows"),
    ("_layout", "TYPES[matrix.dtype]", "2"),
    ("_preference", "c_uint64(WORKSPACE_BYTES)", "c_uint64(2 * WORKSPACE_BYTES)"),
    ("_preference", "c_uint64(WORKSPACE_BYTES)", "c_uint32(WORKSPACE_BYTES)"),
    ("_preference", "c_uint32(IN_COMPUTE_TYPE)", "c_uint32(7)"),
    ("_preference", "c_uint32(IN_COMPUTE_TYPE)", "c_uint32(1)"),
    ("_preference", "c_uint32(IN_COMPUTE_TYPE)", "c_uint32(4)"),
    ("_preference", "c_uint32(ALIGNMENT)", "c_uint32(2 * ALIGNMENT)"),
    *(("_preference", "in MIN_ALIGNMENTS", f"in MIN_ALIGNMENTS if alignment != {one}") for one in (5, 6, 7, 8)),
]


@pytest.mark.parametrize(("function", "right", "wrong"), MUTANTS)
def test_another_question_is_noticed(lt, monkeypatch, function, right, wrong) -> None:
    changed = mutant(wrong, "check_several", function, (right, wrong), module=cublas_lt)
    monkeypatch.setattr(cublas_lt, function, changed.build())
    with pytest.raises((AssertionError, RuntimeError)):
        check_several(lt)


@pytest.mark.parametrize("name", ["TRANSA", "EPILOGUE", "BIAS_POINTER", "BIAS", "GELU_BIAS", "MAX_WORKSPACE_BYTES"])
@pytest.mark.parametrize("by", [-1, 1])
def test_another_number_of_the_header_is_noticed(lt, monkeypatch, name, by) -> None:
    monkeypatch.setattr(cublas_lt, name, getattr(cublas_lt, name) + by)
    with pytest.raises((AssertionError, RuntimeError)):
        check_several(lt)


# Where it cannot.


def refused(functions: ctypes.CDLL, shifts: Sequence[int] = (0, 0, 0, 0), outputs: int = 8, inputs: int = 8) -> bool:
    """Whether a product is, of x, weight, out and bias that lie this many bytes off; nothing is written then."""
    memory = Memory()
    x, weight = memory.hold(np.ones((3, inputs), np.float16)), memory.hold(np.ones((outputs, inputs), np.float16))
    bias, out = memory.hold(np.ones(outputs + 4, np.float32)), memory.hold(np.ones((3, outputs), np.float32))
    held = zip(map(matrix, (x, weight, out)), shifts[:3], strict=True)
    factor, other, result = (Matrix(m.address + by, m.shape, m.dtype) for m, by in held)
    library = cublas_lt.open_library(functions, WORKSPACE)
    done = cublas_lt.multiply(library, STREAM, factor, other, bias.ctypes.data + shifts[3], result, add=True)
    assert done or (out == 1).all()
    return not done


def check_refusals(functions: ctypes.CDLL) -> None:
    assert not refused(functions)
    for which in range(4):
        for by in (2, 4, 8):
            assert refused(functions, [by * (i == which) for i in range(4)])
    assert refused(functions, outputs=6)  # 24 bytes of float32
    assert refused(functions, inputs=12)  # 24 bytes of float16
    assert not refused(functions, outputs=12)
    assert number(functions, "computed").value == 2


def test_memory_in_other_pieces_is_refused(lt) -> None:
    check_refusals(lt)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(x.address, weight.address, bias, out.address, *rows)", changed)
        for changed in (
            "(weight.address, bias, out.address, *rows)",
            "(x.address, bias, out.address, *rows)",
            "(x.address, weight.address, out.address, *rows)",
            "(x.address, weight.address, bias, *rows)",
            "(x.address, weight.address, bias, out.address)",
        )
    ]
    + [("% ALIGNMENT", "% 8"), ("% ALIGNMENT", "% 32"), ("for matrix in (x, weight, out)", "for matrix in (x, weight)")]
    + [("for matrix in (x, weight, out)", "for matrix in (out,)")],
)
def test_a_wrong_refusal_is_noticed(lt, monkeypatch, right, wrong) -> None:
    changed = mutant(wrong, "check_refusals", "multiply", (right, wrong), module=cublas_lt)
    monkeypatch.setattr(cublas_lt, "multiply", changed.build())
    with pytest.raises((AssertionError, RuntimeError)):
        check_refusals(lt)


NOTHING = [("offered", 0), ("offer_state", NOT_SUPPORTED), ("offer_status", NOT_SUPPORTED)]


def check_nothing_offered(functions: ctypes.CDLL, name: str, value: int) -> None:
    number(functions, name).value = value
    assert refused(functions)
    assert number(functions, "computed").value == 0


@pytest.mark.parametrize(("name", "value"), NOTHING)
def test_what_has_no_kernel_is_refused(lt, name, value) -> None:
    check_nothing_offered(lt, name, value)


UNSEEN = ("status or found.state", "status or not count", "not count or found.state")


@pytest.mark.parametrize(("nothing", "wrong"), list(zip(NOTHING, UNSEEN, strict=True)))
def test_an_offer_that_is_not_looked_at_is_noticed(lt, monkeypatch, nothing, wrong) -> None:
    right = "status or not count or found.state"
    changed = mutant(wrong, "check_nothing_offered", "_plan", (right, wrong), module=cublas_lt)
    monkeypatch.setattr(cublas_lt, "_plan", changed.build())
    with pytest.raises((AssertionError, RuntimeError)):
        check_nothing_offered(lt, *nothing)


def test_a_product_that_fails_is_an_error(lt) -> None:
    library = cublas_lt.open_library(lt, WORKSPACE)
    out = np.ones((3, 8), np.float32)
    memory = Memory()
    x, weight, out = (memory.hold(np.ones(size, np.float32)) for size in ((3, 8), (8, 8), (3, 8)))
    arguments = (library, STREAM, matrix(x), matrix(weight), out.ctypes.data, matrix(out))
    assert cublas_lt.multiply(*arguments)
    (plan,) = library.plans.values()
    assert plan is not None
    plan.algorithm.data[7] += 1
    with pytest.raises(RuntimeError, match="cublasLtMatmul failed with status 7"):
        cublas_lt.multiply(*arguments)


# Through the seam.


def check_seam(monkeypatch, beside: ctypes.CDLL | None, outputs: int, expected: int) -> None:
    """Sums of both libraries are the same; expected: how many of them are cublasLt's."""
    device, library = a_card(monkeypatch, beside)
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-9, 9, size).astype(np.float16) for size in ((3, 8), (outputs, 8)))
    before, bias = (rng.integers(1, 99, size).astype(np.float32) for size in ((3, outputs), outputs))
    product = x.astype(np.float32) @ weight.T.astype(np.float32)
    factors = device.array(x), device.array(weight)
    for added, add in ((None, False), (bias, False), (None, True), (bias, True)):
        out = device.array(before if add else np.full_like(before, np.nan))
        device.matmul(*factors, out, None if added is None else device.array(added), add=add)
        assert np.array_equal(out.memory, product + (0 if added is None else added) + (before if add else 0))
    activated = device.array(np.full((3, outputs), np.nan, np.float16))
    done = device.matmul_gelu_fast(*factors, device.array(bias.astype(np.float16)), activated)
    assert done == (expected > 0)
    right = gelu_fast((product + bias).astype(np.float64)).astype(np.float16)
    assert np.array_equal(activated.memory, right) if done else np.isnan(activated.memory).all()
    assert library.opened == 1
    if beside is not None:
        assert number(beside, "computed").value == expected
        assert number(beside, "opened").value == 1
    if beside is not None and expected:
        assert address(beside, "last_stream") == STREAM
        kept: Array = device.kept("cublasLt's workspace", lambda: pytest.fail("there is none"))
        assert (address(beside, "last_workspace"), kept.nbytes) == (kept.address, cublas_lt.WORKSPACE_BYTES)
        assert address(beside, "last_workspace_bytes") == kept.nbytes


def test_the_seam_asks_for_what_cublas_lt_can_and_falls_back(lt, monkeypatch) -> None:
    check_seam(monkeypatch, lt, 8, 3)


def test_the_seam_falls_back_where_rows_are_no_whole_pieces(lt, monkeypatch) -> None:
    check_seam(monkeypatch, lt, 5, 0)


def test_the_seam_falls_back_where_nothing_is_offered(lt, monkeypatch) -> None:
    number(lt, "offered").value = 0
    check_seam(monkeypatch, lt, 8, 0)


def test_the_seam_falls_back_where_there_is_no_cublas_lt(monkeypatch) -> None:
    check_seam(monkeypatch, None, 8, 0)


@pytest.mark.parametrize(
    ("function", "right", "wrong"),
    [
        ("_matmul", "bias is not None and self._with_epilogue", "bias is not None and False and self._with_epilogue"),
        ("_matmul", "add=add", "add=False"),
        ("_matmul", "add=add", "add=True"),
        ("_matmul", "add=add", "gelu=True"),
        ("_matmul", "bias is not None and self._with_epilogue", "bias is not None and not self._with_epilogue"),
        ("_matmul_gelu_fast", "gelu=True", "gelu=False"),
        ("_matmul_gelu_fast", "gelu=True", "gelu=True, add=True"),
        ("_with_epilogue", "bias.address", "x.address"),
        ("_with_epilogue", "_matrix(x), _matrix(weight)", "_matrix(weight), _matrix(x)"),
        ("_with_epilogue", "self.stream", "0"),
        ("_with_epilogue", 'self.kept("cublasLt", self._open_cublas_lt)', "self._open_cublas_lt()"),
        ("_open_cublas_lt", "cublas_lt.WORKSPACE_BYTES", "cublas_lt.WORKSPACE_BYTES // 2"),
        ("_open_cublas_lt", "workspace.address", "16"),
    ],
)
def test_a_wrong_seam_is_noticed(lt, monkeypatch, function, right, wrong) -> None:
    changed = Mutant(wrong, "check_seam", device_module.CudaDevice, function, ((right, wrong),))
    monkeypatch.setattr(device_module.CudaDevice, function, changed.build())
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check_seam(monkeypatch, lt, 8, 3)


@pytest.mark.parametrize(("platform", "name"), [("linux", "libcublasLt.so.12"), ("win32", "cublasLt64_12.dll")])
def test_the_library_is_found_by_its_name(built, monkeypatch, platform, name) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", {name: built}.__getitem__)
    assert cublas_lt.load(12) is built


def test_a_library_that_is_missing_is_none(monkeypatch) -> None:
    assert cublas_lt.load(999) is None
