"""What the branches add to the residual stream: bit for bit as NumPy adds in float32, in the reference's order."""

from __future__ import annotations

import numpy as np
import pytest
from devices import DTYPES, all_devices, devices
from hypothesis import given
from hypothesis import strategies as st

from neox.gpu import ops
from neox.gpu.device import Device, dtype_named

COLUMNS = st.sampled_from((1, 37, 120, 255, 256, 257, 600))


def drawn(rng: np.random.Generator, N: int, C: int, dtype: str, biased: bool) -> tuple:
    y = rng.normal(size=(N, C)).astype(np.float32)
    return y, (0.3 * rng.normal(size=C)).astype(dtype_named(dtype)) if biased else None


def check_residual(device: Device, N: int, C: int, dtype: str, biased: bool = True, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    (y, bias), x = drawn(rng, N, C, dtype, biased), (1e5 * rng.normal(size=(N, C))).astype(np.float32)
    stream = device.array(x)
    ops.residual(device.array(y), device.array(bias) if biased else None, dtype_named(dtype), stream)
    assert np.array_equal(stream.get(), (y + bias.astype(np.float32) if biased else y) + x)


def check_residual_pair(device: Device, N: int, C: int, dtype: str, biased: bool = True, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    (m, of_m), (a, of_a), x = (
        drawn(rng, N, C, dtype, True),
        drawn(rng, N, C, dtype, biased),
        (10 * rng.normal(size=(N, C))).astype(np.float32),
    )
    stream = device.array(x)
    given_a = device.array(of_a) if biased else None
    ops.residual_pair(device.array(m), device.array(of_m), device.array(a), given_a, dtype_named(dtype), stream)
    both = (m + of_m.astype(np.float32)) + (a + of_a.astype(np.float32) if biased else a)
    assert np.array_equal(stream.get(), both + x)


@pytest.mark.parametrize("check", [check_residual, check_residual_pair])
@given(devices(), st.integers(1, 4), COLUMNS, st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**32 - 1))
def test_branches_are_added_as_the_reference_adds(check, device, N, C, dtype, biased, seed) -> None:
    check(device, N, C, dtype, biased, seed)


def test_shapes_and_dtypes_are_checked() -> None:
    device = all_devices()[0]
    half = dtype_named("float16")
    y, bias, x = device.zeros((2, 8), "float32"), device.zeros(8, "float16"), device.zeros((2, 8), "float32")
    for wrong in [
        (device.zeros((2, 8), "float16"), bias, half, x),
        (device.zeros((3, 8), "float32"), bias, half, x),
        (y, device.zeros(7, "float16"), half, x),
        (y, device.zeros(8, "float32"), half, x),
        (y, bias, half, device.zeros((2, 8), "float16")),
    ]:
        with pytest.raises(ValueError, match="must be"):
            ops.residual(*wrong)
