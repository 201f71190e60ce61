"""Attention of one query over the cache: both versions against float64, over lengths, splits and huge scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from devices import DTYPES, all_devices, assert_no_worse, devices
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from paged import paged

from neox.gpu import ops
from neox.gpu.device import Array, Device, dtype_named
from neox.reference.model import softmax

STEP = 2.0**-24  # largest relative error of one rounding in float32
PAGES = st.sampled_from((0, 1, 3, 16, 64))
HEAD_DIMS = (24, 64, 80, 96, 128)
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from((63, 64, 65, 127, 128, 129, 330)))


def attention(q: NDArray, keys: NDArray, values: NDArray, length: int) -> NDArray:
    """(H,D), 2 x (H,S,D) -> (H,D): over the first `length` keys."""
    scores = np.einsum("hd,hsd->hs", q / math.sqrt(q.shape[-1]), keys[:, :length])
    return np.einsum("hs,hsd->hd", softmax(scores), values[:, :length])


def of_all(q: NDArray, keys: NDArray, values: NDArray, texts: NDArray, positions: NDArray, dtype: type) -> NDArray:
    q, keys, values = (a.astype(dtype) for a in (q, keys, values))
    rows = [attention(q[n], keys[t], values[t], p + 1) for n, (t, p) in enumerate(zip(texts, positions, strict=True))]
    return np.stack(rows)


def floor(q: NDArray, keys: NDArray, values: NDArray, additions: int, length: int) -> float:
    """What rounding in float32 can do to an average.

    A score errs by its `additions` roundings, each of a sum no larger than that of the magnitudes, and so does its
    probability relatively; both the average and its weight are sums of up to `length` terms, of a few roundings each.
    """
    q, keys, values = (np.abs(np.nan_to_num(a.astype(np.float64))) for a in (q, keys, values))
    magnitude = np.einsum("nhd,thsd->nths", q, keys).max() / math.sqrt(q.shape[-1])
    return float(STEP * values.max() * (4 * additions * magnitude + 2 * length + 16))


def check_attention(
    device: Device,
    lengths: list[int],
    H: int,
    D: int,
    dtype: str,
    splits: int,
    scale: float = 1,
    seed: int = 0,
    size: int = 0,
    common: int = 0,
) -> None:
    """splits 0: the naive kernel. Query n belongs to text N - n of N + 1; the cache is NaN beyond each text.

    size: of pages, 0 if each text has one. The first `common` positions of all texts are equal: they share pages.
    """
    rng, T, N, S = np.random.default_rng(seed), dtype_named(dtype), len(lengths), max(lengths) + 2
    q = (scale * rng.normal(size=(N, H, D))).astype(T)
    keys, values = (rng.normal(size=(N + 1, H, S, D)).astype(T) for _ in range(2))
    keys = (scale * keys.astype(np.float32)).astype(T)
    keys[:, :, :common], values[:, :, :common] = keys[:1, :, :common], values[:1, :, :common]
    texts, positions = np.arange(N, 0, -1, dtype=np.int32), np.array(lengths, np.int32) - 1
    for t, p in zip(texts, positions, strict=True):
        keys[t, :, p + 1 :] = values[t, :, p + 1 :] = np.nan
    keys[0] = values[0] = np.nan
    z = device.empty((N, H * D), dtype)
    cut, pages = paged(size, keys, values, seed=seed)
    arguments = [device.array(a) for a in (q.reshape(N, -1), *cut, pages, texts, positions)]
    run(device, arguments, splits, (N, H, splits, D + 2), z)
    exact = of_all(q, keys, values, texts, positions, np.float64)
    oracle = of_all(q, keys, values, texts, positions, np.float32).astype(T)
    additions = 32 if splits else D
    assert_no_worse(z.get().reshape(N, H, D), oracle, exact, floor(q, keys, values, additions, max(lengths)))


def run(device: Device, arguments: list[Array], splits: int, shape: tuple[int, ...], z: Array) -> None:
    q, keys, values, pages, texts, positions = arguments
    if splits:
        ops.attention_decode(q, keys, values, pages, texts, positions, device.empty(shape, "float32"), z)
    else:
        ops.attention_decode_naive(q, keys, values, pages, texts, positions, z)


@given(
    devices(), st.lists(LENGTHS, min_size=1, max_size=3), st.integers(1, 3), st.sampled_from(HEAD_DIMS),
    st.sampled_from(DTYPES), st.integers(1, 9), PAGES, st.integers(0, 40), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_decode_errs_no_more_than_float32_numpy(device, lengths, H, D, dtype, splits, size, common, seed) -> None:
    check_attention(device, lengths, H, D, dtype, splits, 1, seed, size, common)


@given(
    devices(), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 3), st.sampled_from((24, 10, 96)),
    st.sampled_from(DTYPES), PAGES, st.integers(0, 40), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_naive_decode_errs_no_more_than_float32_numpy(device, lengths, H, D, dtype, size, common, seed) -> None:
    check_attention(device, lengths, H, D, dtype, 0, 1, seed, size, common)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("splits", [0, 3])
def test_scores_beyond_float16_stay_finite(dtype, splits) -> None:
    q = 300 * np.random.default_rng(0).normal(size=(2, 96))
    assert np.linalg.norm(q, axis=1).min() ** 2 > 65504
    for device in all_devices():
        check_attention(device, [5, 37], 2, 96, dtype, splits, 300)


@pytest.mark.parametrize("D", [8, 32, 256, 768])
def test_other_multiples_of_8(D) -> None:
    check_attention(all_devices()[0], [37, 2], 2, D, "float16", 2)


def test_more_than_1000_keys() -> None:
    for device in all_devices():
        check_attention(device, [1100], 1, 24, "float32", 5)
        check_attention(device, [1100], 1, 96, "float16", 3, size=64)


def test_shapes_and_dtypes_are_checked() -> None:
    device = all_devices()[0]
    empty = device.empty
    right = {
        "q": empty((3, 48), "float16"), "keys": empty((2, 2, 9, 24), "float16"),
        "values": empty((2, 2, 9, 24), "float16"), "pages": device.zeros((2, 1), "int32"),
        "texts": device.zeros(3, "int32"), "positions": device.zeros(3, "int32"),
        "partial": empty((3, 2, 4, 26), "float32"), "out": empty((3, 48), "float16"),
    }  # fmt: skip
    ops.attention_decode(*right.values())
    for name, wrong in [
        ("q", empty((3, 48), "float32")), ("q", empty((3, 47), "float16")), ("values", empty((2, 2, 9, 16), "float16")),
        ("pages", device.zeros((2, 1), "int64")), ("texts", device.zeros(2, "int32")),
        ("positions", device.zeros(3, "int64")),
        ("partial", empty((3, 2, 4, 25), "float32")), ("partial", empty((3, 1, 4, 26), "float32")),
        ("out", empty((3, 48), "float32")),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            ops.attention_decode(*(right | {name: wrong}).values())
    odd = {"q": empty((3, 24), "float16"), "keys": empty((2, 2, 9, 12), "float16")}
    with pytest.raises(ValueError, match="multiple of 8"):
        ops.attention_decode(*(right | odd | {"values": odd["keys"], "out": odd["q"]}).values())
