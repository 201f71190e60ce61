"""LayerNorm on the device: each kernel against float64, over shapes, dtypes, schedules and awkward rows."""

from __future__ import annotations

import numpy as np
import pytest
from devices import DTYPES, all_devices, assert_no_worse, devices
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from neox.gpu import ops
from neox.gpu.device import Device, dtype_named
from neox.reference.model import LayerNorm, layer_norm

EPS = 1e-5
STEP = 2.0**-24  # largest relative error of one rounding in float32
COLUMNS = st.one_of(st.integers(1, 300), st.sampled_from((1023, 1024, 1025, 2085)))


def rows(rng: np.random.Generator, N: int, C: int, mean: float, outlier: float) -> NDArray:
    x = (mean + rng.normal(size=(N, C)) * rng.choice((0.03, 1, 30))).astype(np.float32)
    x[:, rng.integers(C)] += outlier
    return x


def norm_parameters(rng: np.random.Generator, C: int, dtype: str) -> LayerNorm:
    weight, bias = 1 + 0.3 * rng.normal(size=C), 0.3 * rng.normal(size=C)
    return LayerNorm(weight.astype(dtype_named(dtype)), bias.astype(dtype_named(dtype)))


def widened(p: LayerNorm, dtype: type) -> LayerNorm:
    return LayerNorm(p.weight.astype(dtype), p.bias.astype(dtype))


def check(y: NDArray, x: NDArray, p: LayerNorm, additions: int) -> None:
    """additions: in the longest chain of a sum, each of which may err by one rounding of the largest partial sum.

    Their error, at most that of the mean, is multiplied by the row's scale and the weight; eight more roundings follow.
    """
    exact = layer_norm(x.astype(np.float64), widened(p, np.float64), EPS)
    oracle = layer_norm(x, widened(p, np.float32), EPS).astype(p.weight.dtype)
    scale = 1 / np.sqrt(x.astype(np.float64).var(axis=1) + EPS)
    of_mean = additions * np.abs(x).max(axis=1) * scale * np.abs(p.weight.astype(np.float64)).max()
    assert_no_worse(y, oracle, exact, STEP * (of_mean.max() + 8 * np.abs(exact).max()))


def additions_of_block(C: int) -> int:
    return -(-C // 1024) + 10


def check_block(device: Device, N: int, C: int, dtype: str, mean: float = 0, outlier: float = 0, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    x, p = rows(rng, N, C, mean, outlier), norm_parameters(rng, C, dtype)
    arguments = (device.array(x), device.array(p.weight), device.array(p.bias), EPS)
    y = device.empty((N, C), dtype)
    ops.layer_norm(*arguments, y)
    check(y.get(), x, p, additions_of_block(C))


def check_naive(device: Device, N: int, C: int, dtype: str, mean: float = 0, outlier: float = 0, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    x, p = rows(rng, N, C, mean, outlier), norm_parameters(rng, C, dtype)
    y = device.empty((N, C), dtype)
    ops.layer_norm_naive(device.array(x), device.array(p.weight), device.array(p.bias), EPS, y)
    check(y.get(), x, p, C)


def check_pair(device: Device, N: int, C: int, dtype: str, mean: float = 0, outlier: float = 0, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    x, first, second = rows(rng, N, C, mean, outlier), norm_parameters(rng, C, dtype), norm_parameters(rng, C, dtype)
    w1, b1, w2, b2 = (device.array(v) for v in (first.weight, first.bias, second.weight, second.bias))
    y1, y2 = device.empty((N, C), dtype), device.empty((N, C), dtype)
    ops.layer_norm_pair(device.array(x), w1, b1, w2, b2, EPS, y1, y2)
    check(y1.get(), x, first, additions_of_block(C))
    check(y2.get(), x, second, additions_of_block(C))


KERNELS = {"layer_norm": check_block, "layer_norm_naive": check_naive, "layer_norm_pair": check_pair}
MEANS = st.sampled_from((0, 0, 5, 1000))
OUTLIERS = st.sampled_from((0, 0, 80000, -3e5))  # beyond what float16 can hold


@pytest.mark.parametrize("kernel", KERNELS)
@given(devices(), st.integers(1, 4), COLUMNS, st.sampled_from(DTYPES), MEANS, OUTLIERS, st.integers(0, 2**32 - 1))
def test_layer_norm_errs_no_more_than_float32_numpy(kernel, device, N, C, dtype, mean, outlier, seed) -> None:
    KERNELS[kernel](device, N, C, dtype, mean, outlier, seed)


def test_more_rows_than_a_block_of_the_naive_kernel_has_threads() -> None:
    for device in all_devices():
        for N in (31, 32, 33, 65):
            check_naive(device, N, 7, "float32")


def test_shapes_and_dtypes_are_checked() -> None:
    device = all_devices()[0]
    x, w, y = device.empty((2, 8), "float32"), device.empty(8, "float16"), device.empty((2, 8), "float16")
    for arguments, message in [
        ((device.empty((2, 8), "float16"), w, w, EPS, y), "x must be .*float32"),
        ((x, w, device.empty(7, "float16"), EPS, y), "weight and bias must be float16 of shape"),
        ((x, w, device.empty(8, "float32"), EPS, y), "weight and bias must be float16 of shape"),
        ((x, w, w, EPS, device.empty((2, 8), "float32")), "out must be float16"),
        ((x, w, w, EPS, device.empty((3, 8), "float16")), r"out must be float16 of shape \(2, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.layer_norm(*arguments)
