"""The wrappers of inline assembly, each by itself and one tile through all of them, against NumPy.

On the host device this holds the stand-ins to the fragment layouts; on a card, the assembly itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from devices import devices
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from nvrtc import architectures, require_nvrtc, usage
from test_host_device import sources

from neox.gpu.device import Device, dtype_named
from neox.gpu.source import Source

TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
STEP = 2.0**-24
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def wrappers(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return sources(tmp_path_factory.mktemp("kernels"), "wrappers.cu")


def words(halves: NDArray) -> NDArray[np.uint32]:
    """Pairs of numbers of 16 bits, the first in the lower bits."""
    return np.ascontiguousarray(halves).view(np.uint32)


def fragment_a(a: NDArray) -> NDArray:  # (16,16) -> (32,8)
    """PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": which elements each lane holds."""
    group, place, i = np.ogrid[:8, :4, :8]
    return a[group + 8 * (i // 2 % 2), 2 * place + i % 2 + 8 * (i // 4)].reshape(32, 8)


def fragment_b(b: NDArray) -> NDArray:  # (16,8) -> (32,4)
    group, place, i = np.ogrid[:8, :4, :4]
    return b[2 * place + i % 2 + 8 * (i // 2), group].reshape(32, 4)


def fragment_c(c: NDArray) -> NDArray:  # (16,8) -> (32,4)
    group, place, i = np.ogrid[:8, :4, :4]
    return c[group + 8 * (i // 2), 2 * place + i % 2].reshape(32, 4)


def drawn_factors(dtype: str, seed: int) -> tuple[NDArray, NDArray, NDArray]:
    """A (16,16), B (16,8), C (16,8)."""
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(16, columns)).astype(dtype_named(dtype)) for columns in (16, 8))
    return a, b, rng.normal(size=(16, 8)).astype(np.float32)


def assert_product(d: NDArray, a: NDArray, b: NDArray, c: NDArray, order: Callable[[NDArray], NDArray]) -> None:
    """d is c + a b in some order of the elements.

    Products are exact in float32. There are 16 additions, each of which rounds a sum no larger than that of the
    magnitudes, or cuts digits off, as tensor cores do: twice the error.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    error = np.abs(d - order(c + a @ b))
    assert (error <= 2 * 16 * STEP * order(np.abs(c) + np.abs(a) @ np.abs(b))).all()


def check_mma(device: Device, source: Source, dtype: str, seed: int = 0) -> None:
    a, b, c = drawn_factors(dtype, seed)
    d = device.array(fragment_c(c))
    factors = [device.array(words(part)) for part in (fragment_a(a), fragment_b(b))]
    device.launch(source, f"fragments<{TYPES[dtype]}>", 1, 32, (*factors, d))
    assert_product(d.get(), a, b, c, fragment_c)


def check_load_matrix(device: Device, source: Source, transposed: bool, seed: int = 0) -> None:
    """Lane l receives row l/4, columns 2(l%4) and the next, of each matrix, whose rows 8 lanes have named."""
    rng = np.random.default_rng(seed)
    x, rows = rng.integers(0, 2**16, (32, 8), np.uint16), rng.permutation(32).astype(np.int32)
    four, two = device.empty((32, 4), "uint32"), device.empty((32, 2), "uint32")
    arguments = (device.array(x), device.array(rows), four, two)
    device.launch(source, f"matrices<{str(transposed).lower()}>", 1, 32, arguments)
    matrices = x[rows].reshape(4, 8, 8)
    expected = words(matrices.swapaxes(1, 2) if transposed else matrices).reshape(4, 32).T
    assert np.array_equal(four.get(), expected)
    assert np.array_equal(two.get(), expected[:, :2])


def check_copies(device: Device, source: Source, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    x, wanted = rng.normal(size=(64, 4)).astype(np.float32), rng.integers(0, 2, 64, np.int32)
    y = device.empty((64, 4), "float32")
    device.launch(source, "copies", 1, 32, (device.array(x), device.array(wanted), y))
    assert np.array_equal(y.get(), np.where(wanted[:, None], x, 0))


def check_loads(device: Device, source: Source, seed: int = 0) -> None:
    x = np.random.default_rng(seed).normal(size=(32, 4)).astype(np.float32)
    y = device.empty((32, 4), "float32")
    device.launch(source, "loads", 1, 32, (device.array(x), y))
    assert np.array_equal(y.get(), x)


def check_messages(device: Device, source: Source, seed: int = 0) -> None:
    x = np.random.default_rng(seed).normal(size=(32, 4)).astype(np.float32)
    y, (words, seen), (long_words, long_seen) = (
        device.empty((32, 4), "float32"),
        *([device.empty(32, dtype) for _ in range(2)] for dtype in ("uint32", "uint64")),
    )
    device.launch(source, "messages", 1, 32, (device.array(x), words, long_words, y, seen, long_seen))
    assert np.array_equal(y.get(), x)
    assert seen.get().tolist() == [(i - 5) % 32 for i in range(32)]
    assert long_seen.get().tolist() == [((i - 3) % 32 + 1) << 33 for i in range(32)]


def check_tile(device: Device, source: Source, dtype: str, by_columns: bool, seed: int = 0) -> None:
    a, b, c = drawn_factors(dtype, seed)
    d = device.array(c)
    stored = [device.array(np.ascontiguousarray(x.T) if by_columns else x) for x in (a, b)]
    device.launch(source, f"tile<{TYPES[dtype]}, {str(by_columns).lower()}>", 1, 32, (*stored, d))
    assert_product(d.get(), a, b, c, np.asarray)


def check_all(device: Device, source: Source, seed: int = 0) -> None:
    for flag in (True, False):
        check_load_matrix(device, source, flag, seed)
        for dtype in TYPES:
            check_tile(device, source, dtype, flag, seed)
    for dtype in TYPES:
        check_mma(device, source, dtype, seed)
    check_copies(device, source, seed)
    check_loads(device, source, seed)
    check_messages(device, source, seed)


@given(devices(), st.sampled_from(tuple(TYPES)), seeds)
def test_mma_multiplies_the_matrices_that_its_fragments_hold(wrappers, device, dtype, seed) -> None:
    check_mma(device, wrappers, dtype, seed)


@given(devices(), st.booleans(), seeds)
def test_ldmatrix_gives_each_lane_its_part_of_each_matrix(wrappers, device, transposed, seed) -> None:
    check_load_matrix(device, wrappers, transposed, seed)


@given(devices(), seeds)
def test_copies_are_there_once_they_have_been_waited_for(wrappers, device, seed) -> None:
    check_copies(device, wrappers, seed)


@given(devices(), seeds)
def test_loads_that_the_caches_forget_are_loads(wrappers, device, seed) -> None:
    check_loads(device, wrappers, seed)


@given(devices(), seeds)
def test_messages_arrive(wrappers, device, seed) -> None:
    check_messages(device, wrappers, seed)


@given(devices(), st.sampled_from(tuple(TYPES)), st.booleans(), seeds)
def test_a_tile_is_the_product(wrappers, device, dtype, by_columns, seed) -> None:
    check_tile(device, wrappers, dtype, by_columns, seed)


def test_the_assembly_compiles_for_every_card(wrappers) -> None:
    require_nvrtc()
    for arch in architectures():
        assert all(taken.spilled_bytes == 0 for taken in usage(wrappers, arch).values())
