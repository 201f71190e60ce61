"""The wrappers of inline assembly: one tile through cp.async, ldmatrix and mma against NumPy.

On the host device this holds the stand-ins to the fragment layouts; on a card, the assembly itself.
"""

from __future__ import annotations

import numpy as np
import pytest
from devices import all_devices, devices
from hypothesis import given
from hypothesis import strategies as st
from nvrtc import architectures, require_nvrtc, usage
from test_host_device import sources

from neox.gpu.device import Device, dtype_named
from neox.gpu.source import Source

TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
STEP = 2.0**-24


@pytest.fixture(scope="module")
def wrappers(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return sources(tmp_path_factory.mktemp("kernels"), "wrappers.cu")


def check_tile(device: Device, source: Source, dtype: str, by_columns: bool, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(16, 16)).astype(dtype_named(dtype))
    b = rng.normal(size=(16, 8)).astype(dtype_named(dtype))
    c = rng.normal(size=(16, 8)).astype(np.float32)
    d = device.array(c)
    stored_a, stored_b = (np.ascontiguousarray(x.T) if by_columns else x for x in (a, b))
    kernel = f"tile<{TYPES[dtype]}, {str(by_columns).lower()}>"
    device.launch(source, kernel, 1, 32, (device.array(stored_a), device.array(stored_b), d))
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    # Products are exact in float32; 16 additions, each of which rounds a sum no larger than that of the magnitudes.
    magnitudes = np.abs(c) + np.abs(wide_a) @ np.abs(wide_b)
    assert (np.abs(d.get() - (c + wide_a @ wide_b)) <= 16 * STEP * magnitudes).all()


@given(devices(), st.sampled_from(tuple(TYPES)), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_tile_is_the_product(wrappers, device, dtype, by_columns, seed) -> None:
    check_tile(device, wrappers, dtype, by_columns, seed)


def test_an_unwanted_copy_gives_zeros(wrappers) -> None:
    for device in all_devices():
        y = device.empty(4, "float32")
        device.launch(wrappers, "unwanted", 1, 1, (device.array(np.ones(4, np.float32)), y))
        assert (y.get() == 0).all()


def test_the_assembly_compiles_for_every_card(wrappers) -> None:
    require_nvrtc()
    for arch in architectures():
        assert all(taken.spilled_bytes == 0 for taken in usage(wrappers, arch).values())
