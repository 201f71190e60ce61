"""On what the GPU tests run: the host device under many schedules, or what NEOX_TEST_DEVICE says.

That is "cuda", a card, or "stand-in": CuPy as on a card, but over the functions of stand_in_cuda.py.
"""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from neox.gpu.device import CudaDevice, Device, HostDevice

# Forward and reverse show the most; the seeds differ in style (host/schedule.h).
SCHEDULES = (("forward", 0), ("reverse", 0), ("seeded", 1), ("seeded", 2), ("seeded", 3))
DTYPES = ("float32", "float16", "bfloat16")
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # largest relative error


@cache
def host(order: str = "forward", seed: int = 0, mode: str = "check") -> HostDevice:
    return HostDevice(mode=mode, order=order, seed=seed)


@cache
def card() -> Device:
    return CudaDevice()


def on_a_card() -> bool:
    """Or on what CuPy takes for one."""
    return os.environ.get("NEOX_TEST_DEVICE") in ("cuda", "stand-in")


# On a card they would change what other tests have there, such as the weights of a model that is kept.
stopped_by_the_host = pytest.mark.skipif(
    on_a_card(), reason="a wrong program writes where it should not: the host device stops it"
)


def all_devices() -> list[Device]:
    """What a property must hold on."""
    if on_a_card():
        return [card()]
    return [host(order, seed) for order, seed in SCHEDULES]


def a_device(schedule: int) -> Device:
    """One of them: of a card there is no other schedule than its own."""
    return all_devices()[schedule % len(all_devices())]


def devices() -> st.SearchStrategy[Device]:
    return st.sampled_from(range(len(SCHEDULES))).map(a_device)


def error(actual: NDArray, exact: NDArray) -> float:
    """max |actual - exact|; NaN if either holds one."""
    return float(np.abs(np.asarray(actual, np.float64) - exact).max(initial=0))


def assert_no_worse(actual: NDArray, oracle: NDArray, exact: NDArray, floor: float) -> None:
    """The error of a low-precision result is no larger than that of a plain computation in the same precision.

    exact: in float64, from the same inputs. floor: what the order of the additions may change; stated where it is used.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == oracle.dtype
    ours, theirs = error(actual, exact), error(oracle, exact)
    assert ours <= theirs + floor, f"error {ours:.3g} exceeds the {theirs:.3g} of a plain computation plus {floor:.3g}"
