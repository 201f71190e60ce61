"""Bias, rotation and cache append: against apply_rotary in float64; what is not appended to stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
from devices import DTYPES, ROUNDING, all_devices, assert_no_worse, devices
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import rotary_pct

from neox.gpu import ops
from neox.gpu.device import Device, dtype_named
from neox.reference.config import Config
from neox.reference.model import apply_rotary, rotary_tables

STEP = 2.0**-24  # largest relative error of one rounding in float32
HEADS = ((24, 6), (64, 16), (80, 20), (96, 24), (128, 32), (12, 12), (10, 2))  # head_dim and rotary_ndims


def tables(H: int, D: int, R: int, positions: NDArray) -> tuple[NDArray, NDArray]:  # (S,) -> 2 x (S,R/2)
    config = Config(8, H * D, 1, H, 8, rotary_pct=rotary_pct(D, R))
    cos, sin = rotary_tables(config, positions[None])
    return cos[0, 0], sin[0, 0]


def expected(qkv: NDArray, bias: NDArray, rotary: tuple[NDArray, NDArray], D: int) -> list[NDArray]:
    """q, k, v of the reference, each (N,H,D), in the dtype of qkv."""
    N = len(qkv)
    heads = (qkv + bias.astype(qkv.dtype)).reshape(N, -1, 3, D)
    cos, sin = (table[:, None] for table in rotary)  # (N,1,R/2)
    return [apply_rotary(heads[:, :, i], cos, sin) if i < 2 else heads[:, :, i] for i in range(3)]


def check_rotary_append(
    device: Device,
    N: int,
    H: int,
    D: int,
    R: int,
    dtype: str,
    S: int = 20,
    biased: bool = True,
    seed: int = 0,
    P: int = 1,
) -> None:
    """3 texts of P pages of S positions each, of which the cache has two more."""
    rng, T = np.random.default_rng(seed), dtype_named(dtype)
    qkv = rng.normal(size=(N, 3 * H * D)).astype(np.float32)
    bias = (0.3 * rng.normal(size=3 * H * D)).astype(T) if biased else np.zeros(3 * H * D, T)
    slots = rng.choice(3 * P * S, N, replace=False)
    texts, positions = (slots // (P * S)).astype(np.int32), (slots % (P * S)).astype(np.int32)
    pages = rng.permutation(3 * P + 2)[: 3 * P].reshape(3, P).astype(np.int32)
    cos, sin = tables(H, D, R, np.arange(P * S))
    keys, values = (device.array(np.full((3 * P + 2, H, S, D), np.nan, T)) for _ in range(2))
    q = device.empty((N, H * D), dtype)
    added = device.array(bias) if biased else None
    c, s, t, p, table = (device.array(a) for a in (cos, sin, texts, positions, pages))
    ops.rotary_append(device.array(qkv), added, c, s, t, p, q, keys, values, table)

    rotary = cos[positions], sin[positions]
    held, row = pages[texts, positions // S], positions % S
    found = [q.get().reshape(N, H, D), keys.get()[held, :, row], values.get()[held, :, row]]
    exact = expected(qkv.astype(np.float64), bias, rotary, D)
    for ours, oracle, truth in zip(found, expected(qkv, bias, rotary, D), exact, strict=True):
        # Four roundings in float32 at most, of numbers of the size of a rotated pair.
        assert_no_worse(ours, oracle.astype(T), truth, 4 * STEP * np.abs(truth).max())
        assert (np.abs(ours - truth) <= ROUNDING[dtype] * np.abs(truth) + 4 * STEP * np.abs(truth).max()).all()
    untouched = np.ones((3 * P + 2, S), bool)
    untouched[held, row] = False
    for cache in (keys.get(), values.get()):
        assert np.isnan(cache.astype(np.float32).swapaxes(1, 2)[untouched]).all()


@given(
    devices(), st.integers(1, 9), st.integers(1, 5), st.sampled_from(HEADS), st.sampled_from(DTYPES), st.booleans(),
    st.sampled_from(((20, 1), (4, 5), (3, 7), (1, 9))), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_rotary_append_errs_no_more_than_float32_numpy(device, N, H, head, dtype, biased, pages, seed) -> None:
    (D, R), (S, P) = head, pages
    check_rotary_append(device, N, H, D, R, dtype, S, biased, seed, P)


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_over_1000(dtype) -> None:
    for device in all_devices():
        check_rotary_append(device, 5, 2, 24, 6, dtype, 1500)
        check_rotary_append(device, 5, 2, 24, 6, dtype, 64, P=20)


def test_shapes_and_dtypes_are_checked() -> None:
    device = all_devices()[0]
    empty = device.empty
    right = {
        "qkv": empty((4, 144), "float32"), "bias": empty(144, "float16"),
        "cos": empty((9, 3), "float32"), "sin": empty((9, 3), "float32"),
        "texts": device.zeros(4, "int32"), "positions": device.zeros(4, "int32"),
        "q": empty((4, 48), "float16"), "keys": empty((2, 2, 9, 24), "float16"),
        "values": empty((2, 2, 9, 24), "float16"), "pages": device.zeros((2, 1), "int32"),
    }  # fmt: skip
    ops.rotary_append(*(right | {"positions": device.array(np.arange(4, dtype=np.int32))}).values())
    for name, wrong in [
        ("qkv", empty((4, 144), "float16")), ("qkv", empty((4, 145), "float32")), ("bias", empty(144, "float32")),
        ("sin", empty((9, 2), "float32")), ("texts", empty(3, "int32")), ("positions", empty(4, "int64")),
        ("q", empty((4, 47), "float16")), ("values", empty((2, 2, 8, 24), "float16")),
        ("keys", empty((2, 2, 9, 24), "float32")), ("pages", empty((2, 1), "int64")),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            ops.rotary_append(*(right | {name: wrong}).values())
    wide = empty((9, 13), "float32")
    with pytest.raises(ValueError, match="26 of 24 dims"):
        ops.rotary_append(*(right | {"cos": wide, "sin": wide}).values())
