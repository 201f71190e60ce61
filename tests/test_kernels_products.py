"""The matrix products on the device, each against float64: shapes about the tiles' sizes, dtypes, schedules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from devices import DTYPES, ROUNDING, all_devices, devices
from hypothesis import given
from hypothesis import strategies as st
from mutants import Mutant
from numpy.typing import NDArray

from neox.gpu import ops
from neox.gpu.device import Array, CaptureError, Device, HostDevice, dtype_named
from neox.gpu.model import FEW, MANY, Linear, linear

STEP = 2.0**-24  # largest relative error of one rounding in float32
Product = Callable[[Array, Array, Array], None]


def factors(N: int, outputs: int, inputs: int, dtype: str, scale: float, seed: int) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(seed)
    x = (scale * rng.normal(size=(N, inputs))).astype(dtype_named(dtype))
    return x, (rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)).astype(dtype_named(dtype))


def check(device: Device, product: Product, x: NDArray, weight: NDArray, roundings: int) -> None:
    """roundings: of the longest chain of additions and, in float32, multiplications that leads to a sum.

    Each errs by at most STEP of a partial sum, which is no larger than the sum of the products' magnitudes.
    """
    y = device.empty((len(x), len(weight)), "float32")
    product(device.array(x), device.array(weight), y)
    wide_x, wide_weight = x.astype(np.float64), weight.astype(np.float64)
    magnitudes = np.abs(wide_x) @ np.abs(wide_weight).T
    assert (np.abs(y.get() - wide_x @ wide_weight.T) <= roundings * STEP * magnitudes).all()


def check_product_naive(
    device: Device, N: int, outputs: int, inputs: int, dtype: str, scale: float = 1, seed: int = 0
) -> None:
    check(device, ops.product_naive, *factors(N, outputs, inputs, dtype, scale, seed), 2 * inputs)


def check_matvec(
    device: Device, N: int, outputs: int, pieces: int, dtype: str, scale: float = 1, seed: int = 0
) -> None:
    """A lane adds one piece, of 8 products, of every 32; then 5 exchanges."""
    check(device, ops.matvec, *factors(N, outputs, 8 * pieces, dtype, scale, seed), 2 * 8 * -(-pieces // 32) + 5)


def check_gemm(device: Device, N: int, outputs: int, pieces: int, dtype: str, scale: float = 1, seed: int = 0) -> None:
    """An mma adds 16 products and a sum. Tensor cores cut digits off instead of rounding: twice the error."""
    check(device, ops.gemm, *factors(N, outputs, 8 * pieces, dtype, scale, seed), 2 * 17 * -(-8 * pieces // 16))


def check_wide(
    device: Device, N: int, outputs: int, pieces: int, dtype: str, blocks: int = 3, scale: float = 1, seed: int = 0
) -> None:
    """As gemm; and at the end, the parts of as many blocks. Twice, since the second finds what the first has left."""
    inputs = 8 * pieces
    x, weight = factors(N, outputs, inputs, dtype, scale, seed)

    def twice(x: Array, weight: Array, out: Array) -> None:
        device._kept.clear()
        ops.wide(x, weight, out, blocks=blocks)
        first = out.get()
        ((partial, arrived),) = device._kept.values()
        assert not arrived.get().any()
        for array in (partial, out):
            array.set(np.full(array.shape, np.nan, np.float32))
        ops.wide(x, weight, out, blocks=blocks)
        assert np.array_equal(out.get(), first)

    check(device, twice, x, weight, 2 * 17 * -(-inputs // 16) + blocks)


seeds = st.integers(0, 2**32 - 1)
SCALES = st.sampled_from((1, 0.03, 3000))  # the last: sums beyond what float16 can hold


@given(devices(), st.integers(1, 9), st.integers(1, 40), st.integers(1, 70), st.sampled_from(DTYPES), SCALES, seeds)
def test_the_naive_product_is_right(device, N, outputs, inputs, dtype, scale, seed) -> None:
    check_product_naive(device, N, outputs, inputs, dtype, scale, seed)


# Pieces of 8: a lane's first, all lanes' first, all of a step in float32 and in 16 bits, and the ones about these.
PIECES = st.one_of(st.integers(1, 40), st.sampled_from((63, 64, 65, 127, 128, 129, 160, 257)))


@given(devices(), st.integers(1, 17), st.integers(1, 40), PIECES, st.sampled_from(DTYPES), SCALES, seeds)
def test_the_skinny_product_is_right(device, N, outputs, pieces, dtype, scale, seed) -> None:
    check_matvec(device, N, outputs, pieces, dtype, scale, seed)


# A fragment, a warp's quarter, a tile and two, and the sizes about these; slices of 4 pieces, of which 3 stand ready.
TILES = st.one_of(st.integers(1, 40), st.sampled_from((15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 130)))
SLICES = st.one_of(st.integers(1, 20), st.sampled_from((48, 49)))


@given(devices(), TILES, TILES, SLICES, st.sampled_from(("float16", "bfloat16")), SCALES, seeds)
def test_the_product_on_tensor_cores_is_right(device, N, outputs, pieces, dtype, scale, seed) -> None:
    check_gemm(device, N, outputs, pieces, dtype, scale, seed)


# A slice is 8 pieces, of which 4 stand ready; a tile 128 outputs; blocks that share none, one or several tiles.
OUTPUTS = st.sampled_from((1, 7, 100, 127, 128, 129, 300, 513))
BLOCKS = st.sampled_from((1, 2, 3, 5, 8, 13, 264))


@given(
    devices(), st.sampled_from((1, 5, 16, 17, 31, 32, 33, 63, 64)), OUTPUTS, st.integers(1, 60),
    st.sampled_from(("float16", "bfloat16")), BLOCKS, SCALES, seeds,
)  # fmt: skip
def test_the_product_of_a_batch_is_right_however_its_tiles_are_cut(
    device, N, outputs, pieces, dtype, blocks, scale, seed
) -> None:
    check_wide(device, N, outputs, pieces, dtype, blocks, scale, seed)


def test_what_the_product_of_a_batch_cannot_take_is_refused() -> None:
    device, empty = all_devices()[0], all_devices()[0].empty
    for N, dtype, said in ((65, "float16", "up to 64 rows of 16 bits"), (3, "float32", "of 16 bits are multiplied so")):
        with pytest.raises(ValueError, match=said):
            ops.wide(empty((N, 16), dtype), empty((5, 16), dtype), empty((N, 5), "float32"))
    assert not ops.can_wide(device, dtype_named("float32"), 3)
    assert not ops.can_wide(device, dtype_named("float16"), 65)
    assert ops.can_wide(device, dtype_named("float16"), 64)


def test_tensor_cores_take_16_bits() -> None:
    device = all_devices()[0]
    with pytest.raises(ValueError, match="numbers of 16 bits, not float32"):
        ops.gemm(device.empty((3, 16), "float32"), device.empty((5, 16), "float32"), device.empty((3, 5), "float32"))


@pytest.mark.parametrize("product", [ops.matvec, ops.gemm, ops.wide])
def test_rows_that_are_no_whole_pieces_are_refused(product) -> None:
    device = all_devices()[0]
    x, y = device.empty((3, 12), "float16"), device.empty((3, 5), "float32")
    with pytest.raises(ValueError, match="rows of 12 numbers are not whole pieces of 8"):
        product(x, device.empty((5, 12), "float16"), y)
    offset = device.empty(2 * 24 + 4, "float16")[4:].reshape(3, 16)
    with pytest.raises(ValueError, match="at multiples of 16 bytes"):
        product(offset, device.empty((5, 16), "float16"), y)


def by_library(x: Array, weight: Array, out: Array) -> None:
    out.device.matmul(x, weight, out)


@given(devices(), TILES, TILES, st.integers(1, 300), st.sampled_from(DTYPES), SCALES, seeds)
def test_the_product_by_a_library_is_right(device, N, outputs, inputs, dtype, scale, seed) -> None:
    """Whatever its order of additions."""
    check(device, by_library, *factors(N, outputs, inputs, dtype, scale, seed), 2 * 2 * inputs)


def check_sums(
    device: Device, sizes: tuple[int, int, int], dtype: str, scale: float, biased: bool, add: bool, seed: int = 0
) -> None:
    """Two additions more."""
    (N, outputs, inputs), rng = sizes, np.random.default_rng(seed)
    x, weight = factors(N, outputs, inputs, dtype, scale, seed)
    bias = (scale * rng.normal(size=outputs)).astype(np.float32)
    before = (scale * rng.normal(size=(N, outputs))).astype(np.float32)
    out = device.array(before) if add else device.empty((N, outputs), "float32")
    device.matmul(device.array(x), device.array(weight), out, device.array(bias) if biased else None, add=add)
    exact, magnitudes = sums_of(x, weight)
    exact, magnitudes = exact + biased * bias + add * before, magnitudes + biased * np.abs(bias) + add * np.abs(before)
    assert (np.abs(out.get() - exact) <= (4 * inputs + 2) * STEP * magnitudes).all()


def check_gelu_fast(device: Device, sizes: tuple[int, int, int], dtype: str, scale: float, seed: int = 0) -> None:
    """Each number errs by its rounding, and by no more than a few of float32 before that, also where GELU is small."""
    N, outputs, inputs = sizes
    x, weight = factors(N, outputs, inputs, dtype, scale, seed)
    bias = np.random.default_rng(seed).normal(size=outputs).astype(x.dtype)
    out = device.empty((N, outputs), dtype)
    done = device.matmul_gelu_fast(device.array(x), device.array(weight), device.array(bias), out)
    if not done:  # a card whose library cannot do it with rows of this size; of float32 nothing is promised
        assert outputs * x.itemsize % 16 or inputs * x.itemsize % 16 or dtype == "float32"
        return
    sums, magnitudes = sums_of(x, weight)
    s = sums + bias.astype(np.float64)
    with np.errstate(over="ignore"):
        exact = s / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (s + 0.044715 * s**3)))
    of_sum = 1.2 * (4 * inputs + 1) * STEP * (magnitudes + np.abs(bias.astype(np.float64)))  # the slope is under 1.2
    # The exponent is rounded a few times, which exp amplifies by its size; beyond 100, exp(-100) is nothing.
    exponent = np.minimum(1.6 * np.abs(s) * (1 + 0.044715 * s * s), 100)
    of_function = (8 + 4 * exponent) * STEP * np.abs(exact)
    of_result = ROUNDING[dtype] * np.abs(exact) + (2.0**-25 if dtype == "float16" else 2.0**-126)
    assert (np.abs(out.get().astype(np.float64) - exact) <= of_result + of_function + of_sum).all()


def check_epilogues(device: Device) -> None:
    """Of one input GELU is seen best: its sums are all but exact."""
    for dtype in ("float32", "float16"):
        for biased, add in ((False, False), (True, False), (True, True)):
            check_sums(device, (7, 24, 40), dtype, 1, biased, add)
        check_gelu_fast(device, (40, 24, 1), dtype, 1)


def sums_of(x: NDArray, weight: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """In float64, and of the products' magnitudes."""
    wide_x, wide_weight = x.astype(np.float64), weight.astype(np.float64)
    return wide_x @ wide_weight.T, np.abs(wide_x) @ np.abs(wide_weight).T


@given(
    devices(), TILES, TILES, st.integers(1, 300), st.sampled_from(DTYPES), SCALES, st.booleans(), st.booleans(), seeds
)
def test_sums_by_a_library_take_a_bias_and_what_is_there(
    device, N, outputs, inputs, dtype, scale, biased, add, seed
) -> None:
    check_sums(device, (N, outputs, inputs), dtype, scale, biased, add, seed)


@given(devices(), TILES, TILES, st.integers(1, 300), st.sampled_from(DTYPES), SCALES, seeds)
def test_gelu_by_a_library_is_rounded_once(device, N, outputs, inputs, dtype, scale, seed) -> None:
    check_gelu_fast(device, (N, outputs, inputs), dtype, scale, seed)


@pytest.mark.parametrize("scale", [0.1, 2, 30])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(257, 48, 64), (300, 256, 512), (512, 640, 128)])
def test_epilogues_are_right_where_a_library_has_them(sizes, dtype, scale) -> None:
    """Rows are whole pieces of 16 bytes."""
    device = all_devices()[0]
    check_gelu_fast(device, sizes, dtype, scale)
    check_sums(device, sizes, dtype, scale, biased=True, add=True)


WRONG_SUMS = [
    ("_sums", "+ self._values(bias)", "- self._values(bias)"),
    ("_sums", "sums if bias is None else", "sums if True else"),
    ("_matmul", "self._values(out) + sums", "sums"),
    ("_matmul", "self._values(out) + sums", "2 * self._values(out) + sums"),
    ("_matmul", "if add else", "if True else"),
    ("_matmul_gelu_fast", "x, weight, bias)", "x, weight, None)"),
    ("_matmul_gelu_fast", "0.044715", "0.0447"),
    ("_matmul_gelu_fast", "0.044715", "0"),
    ("_matmul_gelu_fast", "sums = self._sums(x, weight, bias)", "sums = self._sums(x, weight, bias).astype(x.dtype)"),
]


@pytest.mark.parametrize(("function", "right", "wrong"), WRONG_SUMS)
def test_wrong_sums_of_the_host_are_noticed(function, right, wrong, monkeypatch) -> None:
    changed = Mutant(wrong, "check_epilogues", HostDevice, function, ((right, wrong),))
    device = HostDevice()
    monkeypatch.setattr(HostDevice, function, changed.build())
    with pytest.raises(AssertionError):
        check_epilogues(device)


def test_epilogues_check_shapes_and_dtypes_and_are_no_part_of_a_graph() -> None:
    device = all_devices()[0]
    x, w, b = device.empty((3, 16), "float16"), device.empty((5, 16), "float16"), device.empty(5, "float16")
    y, wide = device.empty((3, 5), "float16"), device.empty((3, 5), "float32")
    for arguments, message in [
        ((x, device.empty((5, 8), "float16"), b, y), r"weight must be float16 of shape \(5, 16\)"),
        ((x, device.empty((5, 16), "bfloat16"), b, y), "weight must be float16"),
        ((x, w, device.empty(3, "float16"), y), r"bias must be float16 of shape \(5,\)"),
        ((x, w, device.empty(5, "float32"), y), "bias must be float16"),
        ((x, w, b, wide), "out must be float16"),
        ((x, w, b, device.empty((5, 3), "float16")), r"out must be float16 of shape \(3, 5\)"),
        ((device.empty((3, 16), "int32"), device.empty((5, 16), "int32"), b, y), "int32 is none of float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            device.matmul_gelu_fast(*arguments)
    for bias in (b, device.empty(3, "float32")):
        with pytest.raises(ValueError, match=r"bias must be .*float32"):
            device.matmul(x, w, wide, bias)

    def with_gelu() -> None:
        device.matmul_gelu_fast(x, w, b, y)

    with pytest.raises(CaptureError, match="no product by a library"):
        device.capture(with_gelu)


PRODUCTS = (ops.product_naive, ops.matvec, ops.gemm, ops.wide, by_library)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_long_sum_of_equal_signs_is_exact(product, dtype) -> None:
    """As long as the 20B's longest. In float16 it would stay at 8192, in bfloat16 at 1024."""
    for device in all_devices():
        x = np.full((1, 24576), 2, dtype_named(dtype))
        y = device.empty((1, 1), "float32")
        product(device.array(x), device.array(x), y)
        assert y.get() == 4 * 24576


@pytest.mark.parametrize("product", PRODUCTS)
def test_shapes_and_dtypes_are_checked(product) -> None:
    device = all_devices()[0]
    x, w, y = device.empty((3, 16), "float16"), device.empty((5, 16), "float16"), device.empty((3, 5), "float32")
    for arguments, message in [
        ((x, device.empty((5, 8), "float16"), y), r"weight must be float16 of shape \(5, 16\)"),
        ((x, device.empty((5, 16), "bfloat16"), y), "weight must be float16"),
        ((x, w, device.empty((5, 3), "float32")), r"out must be .*float32.* of shape \(3, 5\)"),
        ((x, w, device.empty((3, 5), "float16")), "out must be .*float32"),
        ((device.empty((3, 16), "int32"), device.empty((5, 16), "int32"), y), "int32 is none of float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            product(*arguments)


# The choice among them.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 32, 33, MANY, MANY + 1])
def test_linear_is_right_and_can_be_captured_up_to_many_rows(rows, dtype) -> None:
    def product(x: Array, weight: Array, out: Array) -> None:
        linear(x, Linear(weight, None), out)
        if rows <= MANY:
            out.device.capture(lambda: linear(x, Linear(weight, None), out))
        else:
            with pytest.raises(CaptureError, match="no product by a library"):
                out.device.capture(lambda: linear(x, Linear(weight, None), out))

    check(all_devices()[0], product, *factors(rows, 24, 40, dtype, 1, 0), 2 * 2 * 40)


def test_where_wide_finds_no_room_gemm_takes_its_place(monkeypatch) -> None:
    monkeypatch.setattr(ops, "can_wide", lambda *_: False)
    monkeypatch.setattr(ops, "wide", None)
    product = lambda x, weight, out: linear(x, Linear(weight, None), out)  # noqa: E731
    check(all_devices()[0], product, *factors(33, 24, 40, "float16", 1, 0), 2 * 2 * 40)
