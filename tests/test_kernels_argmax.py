"""The likeliest id, bit for bit as NumPy finds it: equals, masks and what is not finite; and positions that advance."""

from __future__ import annotations

import numpy as np
import pytest
from devices import all_devices, devices
from hypothesis import given
from hypothesis import strategies as st

from neox.gpu import ops
from neox.gpu.device import Device


def check_argmax(device: Device, N: int, V: int, masked: float, levels: int = 0, seed: int = 0) -> None:
    """masked: the part of the ids that is ruled out. levels: of how many values the logits are, 0 for all distinct."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(N, V)) if not levels else rng.integers(-levels, levels + 1, (N, V))
    logits = (drawn - 5).astype(np.float32)  # below 0 mostly: what was never written must not win
    allowed = (rng.random(V) >= masked).astype(np.uint8)
    allowed[rng.integers(V)] = 1
    ids = device.empty(N, "int32")
    ops.argmax(device.array(logits), device.array(allowed) if masked else None, ids)
    assert np.array_equal(ids.get(), np.where(allowed, logits, -np.inf).argmax(axis=1))


@given(
    devices(), st.integers(1, 4), st.sampled_from((1, 2, 31, 32, 33, 101, 1023, 1024, 1025, 3000)),
    st.sampled_from((0, 0.1, 0.9)), st.sampled_from((0, 1, 3)), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_argmax_is_the_lowest_of_the_likeliest(device, N, V, masked, levels, seed) -> None:
    check_argmax(device, N, V, masked, levels, seed)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_told(wrong) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 77)).astype(np.float32)
    logits[1, 50] = logits[2, 9] = wrong
    allowed = np.ones(77, np.uint8)
    allowed[9] = 0  # of an id that is ruled out it does not matter
    likeliest = np.where(allowed, logits, -9).argmax(axis=1)
    for device in all_devices():
        ids = device.empty(3, "int32")
        ops.argmax(device.array(logits), device.array(allowed), ids)
        assert ids.get().tolist() == [likeliest[0], -1, likeliest[2]]


def check_advance(device: Device, N: int) -> None:
    start = np.arange(N, dtype=np.int32) * 3
    positions = device.array(start)
    ops.advance(positions)
    assert np.array_equal(positions.get(), start + 1)


def test_every_position_advances_by_one() -> None:
    for device in all_devices():
        for N in (1, 5, 255, 256, 257):
            check_advance(device, N)


def test_shapes_and_dtypes_are_checked() -> None:
    device = all_devices()[0]
    logits, ids = device.zeros((2, 9), "float32"), device.zeros(2, "int32")
    for wrong in [
        (device.zeros((2, 9), "float16"), None, ids),
        (logits, device.zeros(8, "uint8"), ids),
        (logits, device.zeros(9, "int32"), ids),
        (logits, None, device.zeros(3, "int32")),
        (logits, None, device.zeros(2, "int64")),
    ]:
        with pytest.raises(ValueError, match="must be"):
            ops.argmax(*wrong)
    with pytest.raises(ValueError, match="must be"):
        ops.advance(device.zeros(2, "int64"))
