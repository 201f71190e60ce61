"""Both GELUs on the device, with their bias: against float64, and in the far tail where they could cancel."""

from __future__ import annotations

import math

import numpy as np
import pytest
from devices import DTYPES, all_devices, assert_no_worse, devices
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from neox.gpu import ops
from neox.gpu.device import Device, dtype_named
from neox.reference.model import ACTIVATIONS

STEP = 2.0**-24  # largest relative error of one rounding in float32


def exact_gelu(x: NDArray) -> NDArray:
    return np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.ravel().tolist()]).reshape(x.shape)


def exact_gelu_fast(x: NDArray) -> NDArray:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


EXACT = {"gelu": exact_gelu, "gelu_fast": exact_gelu_fast}


def check_gelu(device: Device, N: int, F: int, activation: str, dtype: str, scale: float = 2, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    x = (scale * rng.normal(size=(N, F))).astype(np.float32)
    bias = (0.3 * rng.normal(size=F)).astype(dtype_named(dtype))
    y = device.empty((N, F), dtype)
    ops.bias_gelu(device.array(x), device.array(bias), activation, y)
    exact = EXACT[activation](x.astype(np.float64) + bias.astype(np.float64))
    oracle = ACTIVATIONS[activation](x + bias.astype(np.float32)).astype(bias.dtype)
    # One rounding of x + bias, whose slope is under 1.2, and a few of the function and its product.
    assert_no_worse(y.get(), oracle, exact, 8 * STEP * np.abs(exact).max())


@given(
    devices(), st.integers(1, 4), st.sampled_from((1, 31, 37, 255, 256, 257, 600)), st.sampled_from(tuple(EXACT)),
    st.sampled_from(DTYPES), st.sampled_from((0.1, 2, 30)), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_gelu_errs_no_more_than_float32_numpy(device, N, F, activation, dtype, scale, seed) -> None:
    check_gelu(device, N, F, activation, dtype, scale, seed)


def check_tail(device: Device, activation: str) -> None:
    """Relative error entry by entry: of rounding the argument of exp or erfc, times how strongly they react to it."""
    x = np.linspace(-8, -0.5, 200, dtype=np.float32)[None]
    wide = x.astype(np.float64)
    exponent = {"gelu": wide**2, "gelu_fast": 1.6 * (np.abs(wide) + 0.044715 * np.abs(wide) ** 3)}[activation]
    y = device.empty(x.shape, "float32")
    ops.bias_gelu(device.array(x), device.zeros(200, "float32"), activation, y)
    exact = EXACT[activation](wide)
    assert (np.abs(y.get() - exact) <= STEP * (4 * exponent + 16) * np.abs(exact)).all()


@pytest.mark.parametrize("activation", EXACT)
def test_the_tail_keeps_its_digits(activation) -> None:
    for device in all_devices():
        check_tail(device, activation)


@pytest.mark.parametrize("activation", EXACT)
def test_the_far_ends_are_the_limits(activation) -> None:
    x = np.array([[-1e30, -3e4, -100, 0, 100, 3e4, 1e30]], np.float32)
    for device in all_devices():
        y = device.empty(x.shape, "float32")
        ops.bias_gelu(device.array(x), device.zeros(7, "float32"), activation, y)
        assert np.array_equal(y.get(), np.maximum(x, 0))


def test_shapes_and_dtypes_are_checked() -> None:
    device = all_devices()[0]
    x, bias = device.empty((2, 8), "float32"), device.empty(8, "float16")
    for given_x, given_bias, out in [
        (device.empty((2, 8), "float16"), bias, device.empty((2, 8), "float16")),
        (x, device.empty(7, "float16"), device.empty((2, 8), "float16")),
        (x, bias, device.empty((2, 8), "float32")),
    ]:
        with pytest.raises(ValueError, match="must be"):
            ops.bias_gelu(given_x, given_bias, "gelu", out)
