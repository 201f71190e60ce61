"""The embedding on the device: rows of the table, widened, bit for bit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from devices import DTYPES, all_devices, devices
from hypothesis import given
from hypothesis import strategies as st

from neox.gpu import ops
from neox.gpu.device import Device, dtype_named


def check_embedding(device: Device, N: int, V: int, C: int, dtype: str, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(V, C)).astype(dtype_named(dtype))
    ids = rng.integers(0, V, N).astype(np.int32)
    ids[0], ids[-1] = V - 1, 0
    x = device.empty((N, C), "float32")
    ops.embedding(device.array(ids), device.array(table), x)
    assert np.array_equal(x.get(), table[ids].astype(np.float32))


@given(
    devices(), st.integers(1, 9), st.integers(1, 101), st.sampled_from((1, 7, 120, 255, 256, 257, 600)),
    st.sampled_from(DTYPES), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_embedding_is_the_rows_of_the_table(device, N, V, C, dtype, seed) -> None:
    check_embedding(device, N, V, C, dtype, seed)


def check_embedding_share(device: Device, N: int, V: int, C: int, dtype: str, ranks: int = 3, seed: int = 0) -> None:
    """Whatever the cuts, each row comes from one share, and the others add zeros."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(V, C)).astype(dtype_named(dtype))
    cuts = sorted({0, V, *rng.integers(0, V, ranks - 1).tolist()})
    ids = np.concatenate([rng.integers(0, V, N), cuts[:-1], [V - 1]]).astype(np.int32)
    total = np.zeros((len(ids), C), np.float32)
    for first, stop in pairwise(cuts):
        x = device.empty(total.shape, "float32")
        ops.embedding_share(device.array(ids), device.array(table[first:stop]), first, x)
        held = (first <= ids) & (ids < stop)
        assert not x.get()[~held].any()
        total += x.get()
    assert np.array_equal(total, table[ids].astype(np.float32))


@given(
    devices(), st.integers(1, 9), st.integers(1, 101), st.sampled_from((1, 7, 120, 255, 256, 257)),
    st.sampled_from(DTYPES), st.integers(1, 5), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_shares_of_a_table_add_up_to_its_rows(device, N, V, C, dtype, ranks, seed) -> None:
    check_embedding_share(device, N, V, C, dtype, ranks, seed)


def test_shapes_and_dtypes_are_checked() -> None:
    device = all_devices()[0]
    table, ids = device.empty((5, 8), "float16"), device.zeros(3, "int32")
    for ids_given, out in [(device.zeros(3, "int64"), (3, 8)), (ids, (3, 7)), (ids, (2, 8))]:
        with pytest.raises(ValueError, match="must be"):
            ops.embedding(ids_given, table, device.empty(out, "float32"))
        with pytest.raises(ValueError, match="must be"):
            ops.embedding_share(ids_given, table, 0, device.empty(out, "float32"))
    with pytest.raises(ValueError, match="none of float32, float16, bfloat16"):
        ops.embedding(ids, device.empty((5, 8), "float64"), device.empty((3, 8), "float32"))
