"""The fused kernels of a decode step, each against float64: rows, shapes about slices and units, blocks, schedules."""

from __future__ import annotations

import numpy as np
import pytest
from devices import all_devices, devices
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neox.gpu import fused
from neox.gpu.device import Array, Device, dtype_named

STEP = 2.0**-24  # largest relative error of one rounding in float32
SHORT = st.sampled_from(("float16", "bfloat16"))
ROWS = st.sampled_from((1, 2, 7, 8, 9, 16))
seeds = st.integers(0, 2**32 - 1)


def numbers(rng: np.random.Generator, dtype: str, *shape: int, scale: float = 1) -> NDArray:
    return (scale * rng.normal(size=shape)).astype(dtype_named(dtype))


def wide(*arrays: NDArray) -> list[NDArray]:
    return [array.astype(np.float64) for array in arrays]


def roundings(*inputs: int) -> int:
    """Of the longest chain of additions to a sum over these inputs.

    A warp takes every 8th slice of 32 numbers, in two products of 16 and a sum each. Tensor cores cut digits off instead
    of rounding: twice the error. Then 8 warps and, at most, three terms more.
    """
    slices = sum(-(-count // 32) for count in inputs)
    return 2 * 2 * 17 * -(-slices // 8) + 8 + 3


def check_output(
    device: Device, N: int, C: int, F: int, dtype: str, blocks: int = 3, biased: bool = True, seed: int = 0
) -> None:
    rng = np.random.default_rng(seed)
    z, activated = numbers(rng, dtype, N, C), numbers(rng, dtype, N, F)
    dense, down = numbers(rng, dtype, C, C, scale=C**-0.5), numbers(rng, dtype, C, F, scale=F**-0.5)
    dense_bias, down_bias = numbers(rng, dtype, C, scale=0.3), numbers(rng, dtype, C, scale=0.3)
    x = rng.normal(size=(N, C)).astype(np.float32)
    stream = device.array(x)
    a, w, b, c, v, d = (device.array(array) for array in (z, dense, dense_bias, activated, down, down_bias))
    fused.fused_output(a, w, b if biased else None, c, v, d, stream, blocks)

    factors = wide(z, dense, activated, down)
    terms = wide(x, down_bias, dense_bias * biased)
    exact = factors[0] @ factors[1].T + factors[2] @ factors[3].T + sum(terms)
    magnitudes = np.abs(factors[0]) @ np.abs(factors[1]).T + np.abs(factors[2]) @ np.abs(factors[3]).T
    error = np.abs(stream.get() - exact)
    assert (error <= roundings(C, F) * STEP * (magnitudes + sum(map(np.abs, terms)))).all()


COLUMNS = st.sampled_from((8, 24, 40, 120, 264))
INNER = st.sampled_from((8, 32, 136, 320, 1544))  # the last: a round of slices, and one more


@settings(max_examples=40)
@given(devices(), ROWS, COLUMNS, INNER, SHORT, st.sampled_from((1, 2, 5, 264)), st.booleans(), seeds)
def test_the_outputs_of_both_branches_are_added(device, N, C, F, dtype, blocks, biased, seed) -> None:
    check_output(device, N, C, F, dtype, blocks, biased, seed)


def test_shapes_and_dtypes_of_the_output_are_checked() -> None:
    device = all_devices()[0]
    empty = device.empty
    right: dict[str, Array] = {
        "z": empty((3, 24), "float16"), "dense": empty((24, 24), "float16"), "dense_bias": empty(24, "float16"),
        "activated": empty((3, 40), "float16"), "down": empty((24, 40), "float16"), "down_bias": empty(24, "float16"),
        "x": device.zeros((3, 24), "float32"),
    }  # fmt: skip
    fused.fused_output(*right.values())
    for name, wrong in [
        ("z", empty((3, 16), "float16")), ("dense", empty((24, 16), "float16")), ("x", empty((3, 24), "float16")),
        ("dense_bias", empty(24, "float32")), ("activated", empty((2, 40), "float16")), ("x", empty((3, 25), "float32")),
        ("down", empty((24, 40), "bfloat16")), ("down_bias", empty(25, "float16")),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            fused.fused_output(*(right | {name: wrong}).values())


def output_arrays(device: Device, N: int, C: int, F: int, dtype: str) -> list[Array]:
    shapes = (N, C), (C, C), (C,), (N, F), (C, F), (C,)
    return [*(device.empty(shape, dtype) for shape in shapes), device.empty((N, C), "float32")]


def test_what_tensor_cores_cannot_take_is_refused() -> None:
    device = all_devices()[0]
    for sizes, message in [
        ((17, 24, 40, "float16"), "up to 16 rows, not 17"),
        ((3, 24, 40, "float32"), "16 bits, not float32"),
        ((3, 24, 36, "float16"), "rows of 36 numbers are not whole pieces of 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            fused.fused_output(*output_arrays(device, *sizes))
