"""Attention of many queries on tensor cores against float64: ragged texts, chunks, sizes about those of the tiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
from devices import ROUNDING, all_devices, devices
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from paged import paged
from test_kernels_attention_decode import PAGES, STEP, of_all

from neox.gpu import ops
from neox.gpu.device import Device, dtype_named

HEAD_DIMS = (24, 64, 80, 96, 128)
SHORT = ("float16", "bfloat16")
COUNTS = st.one_of(st.integers(1, 40), st.sampled_from((63, 64, 65, 127, 128, 129, 330)))
SPANS = st.lists(st.tuples(st.one_of(st.just(0), COUNTS), COUNTS), min_size=1, max_size=3)  # position, count
SEEDS = st.integers(0, 2**32 - 1)
Span = tuple[int, int]


def places(spans: list[Span]) -> tuple[NDArray, NDArray]:
    """Span i is of text I - i of I + 1: `count` queries from `position` on."""
    texts = np.repeat(np.arange(len(spans), 0, -1, dtype=np.int32), [count for _, count in spans])
    return texts, np.concatenate([np.arange(p, p + count, dtype=np.int32) for p, count in spans])


def hide(spans: list[Span], *caches: NDArray) -> None:
    """What no query may see is NaN: texts of no query, and all beyond the last query of each text."""
    for cache in caches:
        cache[0] = np.nan
        for i, (position, count) in enumerate(spans):
            cache[len(spans) - i, :, position + count :] = np.nan


def run(device: Device, q: NDArray, keys: NDArray, values: NDArray, spans: list[Span], size: int = 0) -> NDArray:
    (N, H, D), (texts, positions) = q.shape, places(spans)
    z = device.empty((N, H * D), q.dtype)
    tiles = device.array(ops.query_tiles(texts, positions))
    cut, pages = paged(size, keys, values)
    k, v = map(device.array, cut)
    ops.attention_prefill(device.array(q.reshape(N, -1)), k, v, device.array(pages), tiles, z)
    return z.get().reshape(N, H, D)


def drawn(
    spans: list[Span], H: int, D: int, dtype: str, scale: float, seed: int, common: int = 0
) -> tuple[NDArray, NDArray, NDArray]:
    """The first `common` positions of all texts are equal: where there are pages, they share them."""
    rng, S = np.random.default_rng(seed), max(p + count for p, count in spans) + 2
    q = rng.normal(size=(sum(count for _, count in spans), H, D))
    keys, values = rng.normal(size=(2, len(spans) + 1, H, S, D))
    q, keys, values = (a.astype(dtype_named(dtype)) for a in (scale * q, scale * keys, values))
    keys[:, :, :common], values[:, :, :common] = keys[:1, :, :common], values[:1, :, :common]
    hide(spans, keys, values)
    return q, keys, values


def allowed(q: NDArray, keys: NDArray, values: NDArray, spans: list[Span], exact: NDArray) -> NDArray:
    """What rounding may do to each number: of probabilities and of the average to 16 bits, of all else in float32.

    An mma adds 16 products and a sum. Tensor cores cut digits off instead of rounding: twice the error. What a score,
    scaled, errs by is the relative error of its probability, and once more of the weight. The sums over keys are of mma
    too; at most once for each 16 keys they are scaled by a power of 2, which errs by 2 roundings.
    """
    places_, D, S = places(spans), q.shape[-1], keys.shape[2]
    magnitudes = of_all(q, keys, np.abs(values), *places_, np.float64)
    wide_q, wide_keys = (np.abs(np.nan_to_num(a.astype(np.float64))) for a in (q, keys))
    scores = np.stack([np.einsum("hd,hsd->hs", a, wide_keys[t]) for a, t in zip(wide_q, places_[0], strict=True)])
    of_scores = 2 * (2 * 17 * -(-D // 16) + 2) * scores.max(axis=2, keepdims=True) / math.sqrt(D)
    of_sums = 2 * (2 * 17 + 4) * (S // 16 + 1)
    return ROUNDING[q.dtype.name] * (magnitudes + np.abs(exact)) + STEP * (of_scores + of_sums) * magnitudes


def check_prefill(
    device: Device,
    spans: list[Span],
    H: int,
    D: int,
    dtype: str,
    scale: float = 1,
    seed: int = 0,
    size: int = 0,
    common: int = 0,
) -> None:
    """size: of pages, 0 if each text has one."""
    q, keys, values = drawn(spans, H, D, dtype, scale, seed, common)
    exact = of_all(q, keys, values, *places(spans), np.float64)
    errors = np.abs(run(device, q, keys, values, spans, size).astype(np.float64) - exact)
    assert (errors <= allowed(q, keys, values, spans, exact)).all()


def check_counting(device: Device, spans: list[Span], H: int, D: int, dtype: str, size: int = 0) -> None:
    """Of equal scores and whole values the sums are exact, and so large that float16 could not hold them."""
    q, keys, values = drawn(spans, H, D, dtype, 0, 0)
    values[:] = np.random.default_rng(1).integers(1, 100, values.shape)
    hide(spans, keys, values)
    exact = of_all(q, keys, values, *places(spans), np.float64)
    errors = np.abs(run(device, q, keys, values, spans, size).astype(np.float64) - exact)
    assert (errors <= (ROUNDING[dtype] + 2 * STEP) * exact).all()  # of the quotient, in float32 and in 16 bits


@given(
    devices(), SPANS, st.integers(1, 3), st.sampled_from(HEAD_DIMS), st.sampled_from(SHORT), PAGES, st.integers(0, 70),
    SEEDS,
)  # fmt: skip
def test_prefill_errs_no_more_than_its_roundings(device, spans, H, D, dtype, size, common, seed) -> None:
    check_prefill(device, spans, H, D, dtype, 1, seed, size, common)


@given(devices(), SPANS, st.integers(1, 3), st.sampled_from(HEAD_DIMS), st.sampled_from(SHORT), PAGES)
def test_each_query_averages_all_it_sees_and_nothing_else(device, spans, H, D, dtype, size) -> None:
    check_counting(device, spans, H, D, dtype, size)


@pytest.mark.parametrize("D", [8, 56, 112, 136, 256])
def test_other_multiples_of_8(D) -> None:
    """One fragment of dims, an odd number of them, and those for which 16 keys at a time are taken."""
    check_prefill(all_devices()[0], [(3, 18), (0, 65)], 2, D, "float16")


@pytest.mark.parametrize("dtype", SHORT)
def test_scores_beyond_float16_stay_finite(dtype) -> None:
    q = 300 * np.random.default_rng(0).normal(size=(2, 96))
    assert np.linalg.norm(q, axis=1).min() ** 2 > 65504
    for device in all_devices():
        check_prefill(device, [(0, 70), (37, 5)], 2, 96, dtype, 300)


def test_positions_over_1000() -> None:
    for device in all_devices():
        check_prefill(device, [(1000, 70)], 1, 96, "float16")
        check_counting(device, [(1000, 70)], 1, 24, "bfloat16", 64)


def test_the_naive_kernel_says_the_same() -> None:
    """Both lie within what is allowed of the exact result."""
    spans = [(9, 70), (0, 5)]
    q, keys, values = drawn(spans, 2, 80, "float16", 1, 5)
    exact = of_all(q, keys, values, *places(spans), np.float64)
    device, bound = all_devices()[0], allowed(q, keys, values, spans, exact)
    z = device.empty((75, 160), "float16")
    texts, positions = map(device.array, places(spans))
    cut, pages = paged(16, keys, values)
    k, v = map(device.array, cut)
    ops.attention_decode_naive(device.array(q.reshape(75, -1)), k, v, device.array(pages), texts, positions, z)
    difference = run(device, q, keys, values, spans).astype(np.float64) - z.get().reshape(q.shape)
    assert (np.abs(difference) <= 2 * bound).all()


@given(SPANS, st.integers(0, 70))
def test_tiles_hold_each_query_once(spans, start) -> None:
    """Of a chunk that begins anywhere; those with the most keys first."""
    texts, positions = (a[min(start, len(a) - 1) :] for a in places([*spans, (0, 1)]))
    tiles = ops.query_tiles(texts, positions)
    assert sorted(n for _, first, _, count in tiles for n in range(first, first + count)) == list(range(len(texts)))
    for text, first, position, count in tiles:
        assert (texts[first : first + count] == text).all()
        assert positions[first : first + count].tolist() == list(range(position, position + count))
    assert 1 <= tiles[:, 3].min() <= tiles[:, 3].max() <= 64
    assert len(tiles) <= sum(-(-count // 64) for _, count in spans) + 1
    assert (np.diff(tiles[:, 2:].sum(axis=1)) <= 0).all()


def test_shapes_and_dtypes_are_checked() -> None:
    device = all_devices()[0]
    empty = device.empty
    right = {
        "q": empty((3, 48), "float16"), "keys": empty((2, 2, 9, 24), "float16"),
        "values": empty((2, 2, 9, 24), "float16"), "pages": device.zeros((2, 1), "int32"),
        "tiles": device.array(np.array([[1, 0, 0, 3]], np.int32)),
        "out": empty((3, 48), "float16"),
    }  # fmt: skip
    ops.attention_prefill(*right.values())
    for name, wrong in [
        ("q", empty((3, 48), "float32")), ("q", empty((3, 47), "float16")), ("values", empty((2, 2, 9, 16), "float16")),
        ("values", empty((2, 2, 9, 24), "bfloat16")), ("tiles", device.zeros((1, 3), "int32")),
        ("pages", device.zeros((2, 1), "int64")),
        ("tiles", device.zeros((1, 4), "int64")), ("out", empty((3, 48), "float32")),
        ("out", empty((4, 48), "float16")),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            ops.attention_prefill(*(right | {name: wrong}).values())
    for D, dtype in ((12, "float16"), (264, "float16"), (24, "float32")):
        q, keys = empty((3, 2 * D), dtype), empty((2, 2, 9, D), dtype)
        with pytest.raises(ValueError, match="tensor cores take"):
            ops.attention_prefill(q, keys, keys, right["pages"], right["tiles"], q)
