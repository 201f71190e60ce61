"""Decoding with a cache is the model: for every way to cut a text, with padding, in chunks and in blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from checks import FLOAT64, extended, padded, refusal
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import TINY, configs, draw_ids, random_model, seeds

from neox.reference import cores, decode, prefill
from neox.reference.config import Config
from neox.reference.decode import extend, new_cache
from neox.reference.errors import InputError
from neox.reference.model import Model, forward

pytestmark = pytest.mark.filterwarnings("error")


@st.composite
def compositions(draw: st.DrawFn, length: int) -> list[int]:
    """A way to cut a text of this length into parts."""
    cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
    return np.diff([0, *cuts, length]).tolist()


def all_compositions(length: int) -> list[list[int]]:
    if length == 0:
        return [[]]
    return [[first, *rest] for first in range(1, length + 1) for rest in all_compositions(length - first)]


def small_blocks(patch: pytest.MonkeyPatch, chunk: int = 512, block: int = 128, shares: int = 1) -> None:
    """Let short texts cross the boundaries that long ones do."""
    patch.setattr(decode, "BLOCK", block)
    patch.setattr(prefill, "CHUNK", chunk)
    patch.setattr(prefill, "SMALLEST_SHARE", 1)
    patch.setattr(prefill, "cores", lambda: shares)


# Every split.


@pytest.mark.parametrize("parallel", [True, False])
def test_cached_is_uncached_for_every_split_of_seven_tokens(parallel: bool):
    config = replace(TINY, use_parallel_residual=parallel, num_hidden_layers=2)
    m = random_model(config, 1, "float64")
    ids = draw_ids(config, 2, 7, 1)
    expected = forward(m, ids)
    splits = all_compositions(7)
    assert len(splits) == 64
    for parts in splits:
        assert_close(extended(m, ids, parts), expected, FLOAT64)


@given(configs(), seeds, st.integers(1, 3), st.integers(1, 37), st.integers(1, 9), st.data())
def test_cached_is_uncached_for_drawn_splits(
    config: Config, seed: int, batch: int, length: int, block: int, data: st.DataObject
):
    parts = data.draw(compositions(length))
    m = random_model(config, seed, "float64")
    ids = draw_ids(config, batch, length, seed)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, block=block)
        assert_close(extended(m, ids, parts), forward(m, ids), FLOAT64)


@pytest.mark.parametrize("length", [7, 8, 9, 15, 16, 17])
def test_at_and_beside_the_boundary_of_a_block(length: int, monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch, block=8)
    m = random_model(TINY, 1, "float64")
    ids = draw_ids(TINY, 2, length + 2, 1)
    for parts in ([length, 2], [1, length, 1], [2, length]):
        assert_close(extended(m, ids, parts), forward(m, ids), FLOAT64)


def test_float32_cached_is_float32_uncached():
    """Two float32 runs in different order: within the parity that is declared, 1e-5."""
    m = random_model(TINY, 1)
    ids = draw_ids(TINY, 2, 37, 1)
    assert_close(extended(m, ids, [5] + [1] * 32), forward(m, ids), 1e-5)


def test_cached_is_uncached_beyond_a_thousand_positions():
    config = Config(61, 48, 2, 2, 37, rotary_pct=0.25)
    m = random_model(config, 1, "float64")
    ids = draw_ids(config, 1, 1300, 1)
    expected = forward(m, ids)
    cache = new_cache(m, 1, 1300)
    assert_close(prefill.prefill(m, cache, ids[:, :1297]), expected[:, 1296], FLOAT64)
    for t in range(1297, 1300):
        assert_close(extend(m, cache, ids[:, t : t + 1])[:, 0], expected[:, t], FLOAT64)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cached_is_uncached_for_either_rounding_of_angles(dtype: str):
    """Half precision rounds angles much, but the same way with and without a cache."""
    config = replace(TINY, rotary_dtype=dtype)
    m = random_model(config, 1, "float64")
    ids = draw_ids(config, 2, 33, 1)
    assert_close(extended(m, ids, [20, 1, 12]), forward(m, ids), FLOAT64)


# Prefill.


@given(
    configs(),
    seeds,
    st.integers(1, 3),
    st.integers(1, 37),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_prefill_is_forward_whatever_its_chunks_blocks_and_shares(
    config: Config, seed: int, batch: int, length: int, chunk: int, block: int, shares: int
):
    m = random_model(config, seed, "float64")
    ids = draw_ids(config, batch, length + 1, seed)
    expected = forward(m, ids)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, chunk, block, shares)
        cache = new_cache(m, batch, length + 1)
        cache.keys[...], cache.values[...] = np.nan, np.nan
        assert_close(prefill.prefill(m, cache, ids[:, :-1]), expected[:, -2], FLOAT64)
        assert_close(extend(m, cache, ids[:, -1:])[:, 0], expected[:, -1], FLOAT64)


@pytest.mark.parametrize("length", [7, 8, 9, 15, 16, 17])
def test_prefill_at_and_beside_the_boundary_of_a_chunk(length: int, monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch, chunk=8)
    m = random_model(TINY, 1, "float64")
    ids = draw_ids(TINY, 2, length, 1)
    done: list[int] = []
    cache = new_cache(m, 2, length)
    assert_close(prefill.prefill(m, cache, ids, done.append), forward(m, ids)[:, -1], FLOAT64)
    assert done == [8] * (length // 8) + ([length % 8] if length % 8 else [])
    assert cache.length == length


def test_prefill_goes_on_where_a_text_has_got_to():
    m = random_model(TINY, 1, "float64")
    ids = draw_ids(TINY, 2, 20, 1)
    cache = new_cache(m, 2, 20)
    extend(m, cache, ids[:, :3])
    assert_close(prefill.prefill(m, cache, ids[:, 3:]), forward(m, ids)[:, -1], FLOAT64)


def test_a_share_that_fails_stops_the_others_and_leaves_the_length(monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch, shares=3)
    right = decode.through_layers

    def failing(m: Model, cache: decode.Cache, ids: NDArray, start: int, *rest: object) -> NDArray:
        if start == 0:
            raise MemoryError("no room")
        return right(m, cache, ids, start, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prefill, "through_layers", failing)
    m = random_model(TINY, 1)
    cache = new_cache(m, 1, 9)
    before = cores.cores()
    with pytest.raises(MemoryError, match="no room"):
        prefill.prefill(m, cache, draw_ids(TINY, 1, 9, 1))
    assert cache.length == 0
    assert cores.cores() == before


def test_prefill_works_where_the_threads_of_blas_cannot_be_set(monkeypatch: pytest.MonkeyPatch):
    """As where NumPy has another BLAS than OpenBLAS: one share, or several if someone insists."""
    monkeypatch.setattr(cores, "_CONTROL", None)
    assert cores.cores() == 1
    m = random_model(TINY, 1, "float64")
    ids = draw_ids(TINY, 2, 9, 1)
    expected = forward(m, ids)[:, -1]
    assert_close(prefill.prefill(m, new_cache(m, 2, 9), ids), expected, FLOAT64)
    small_blocks(monkeypatch, shares=2)
    assert_close(prefill.prefill(m, new_cache(m, 2, 9), ids), expected, FLOAT64)


def test_blas_gets_its_threads_back():
    before = cores.cores()
    with cores.one_blas_thread():
        assert cores.cores() == 1
    assert cores.cores() == before


# Padding.


@given(configs(), seeds, st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(1, 7), st.data())
def test_padding_on_the_left_changes_nothing(
    config: Config, seed: int, lengths: list[int], block: int, data: st.DataObject
):
    """Prompts of unequal length in one batch against each by itself, from whole prompts and cut anywhere."""
    m = random_model(config, seed, "float64")
    texts = [draw_ids(config, 1, length, seed + i)[0] for i, length in enumerate(lengths)]
    ids, padding = padded(texts)
    parts = data.draw(compositions(max(lengths)))
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, block=block)
        batch = extended(m, ids, parts, padding)
    for row, text, n in zip(batch, texts, padding, strict=True):
        assert_close(row[n:], forward(m, text[None])[0], FLOAT64)


@given(configs(), seeds, st.lists(st.integers(1, 15), min_size=2, max_size=3), st.integers(1, 8), st.integers(1, 3))
def test_padded_prefill_and_steps_are_each_text_alone(
    config: Config, seed: int, lengths: list[int], chunk: int, shares: int
):
    m = random_model(config, seed, "float64")
    texts = [draw_ids(config, 1, length + 2, seed + i)[0] for i, length in enumerate(lengths)]
    ids, padding = padded([text[:-2] for text in texts])
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, chunk=chunk, shares=shares)
        cache = new_cache(m, len(texts), ids.shape[1] + 2, padding)
        cache.keys[...], cache.values[...] = np.nan, np.nan
        steps = [prefill.prefill(m, cache, ids)]
        steps += [extend(m, cache, np.array([[text[t]] for text in texts]))[:, 0] for t in (-2, -1)]
    for row, text in enumerate(texts):
        assert_close(np.stack([step[row] for step in steps]), forward(m, text[None])[0, -3:], FLOAT64)


def test_the_tokens_that_pad_do_not_matter_not_even_a_bit():
    m = random_model(TINY, 1)
    ids, padding = padded([draw_ids(TINY, 1, length, 1)[0] for length in (3, 8)])
    other = ids.copy()
    other[0, :5] = 77
    for parts in ([8], [4, 4], [1] * 8):
        x, y = extended(m, ids, parts, padding), extended(m, other, parts, padding)
        assert np.array_equal(x[0, 5:], y[0, 5:])
        assert np.array_equal(x[1], y[1])


def test_no_logits_of_a_padded_batch_are_nan():
    """Those of padding are meaningless but finite, so that nothing downstream has to step around them."""
    m = random_model(TINY, 1)
    ids, padding = padded([draw_ids(TINY, 1, length, 1)[0] for length in (1, 9)])
    assert np.isfinite(extended(m, ids, [4, 5], padding)).all()


# Limits.


def test_a_text_may_fill_the_context_and_no_more():
    m = random_model(replace(TINY, max_position_embeddings=9), 1)
    cache = new_cache(m, 1, 20)
    assert refusal(extend, m, cache, [[1] * 9]) is None
    assert refusal(extend, m, cache, [[1]]) == "10 tokens, but the model's context is 9"


def test_what_is_refused_can_be_followed_by_what_is_right():
    m = random_model(TINY, 1, "float64")
    ids = draw_ids(TINY, 1, 6, 1)
    cache = new_cache(m, 1, 6)
    extend(m, cache, ids[:, :4])
    refused: tuple[list, ...] = ([[1, 2, 3]], [[101]], [[-1]], [[]], [1])
    for bad in refused:
        for append in (extend, prefill.prefill):
            with pytest.raises(InputError):
                append(m, cache, bad)
    assert_close(extend(m, cache, ids[:, 4:]), forward(m, ids)[:, 4:], FLOAT64)


def test_a_cache_does_not_read_what_another_text_left():
    """A cache whose length is set back to 0 serves the next text as a new one does."""
    m = random_model(TINY, 1)
    ids = draw_ids(TINY, 2, 6, 1)
    cache = new_cache(m, 1, 6)
    extend(m, cache, ids[:1])
    cache.length = 0
    assert np.array_equal(extend(m, cache, ids[1:]), extend(m, new_cache(m, 1, 6), ids[1:]))


def test_the_capacity_is_what_was_asked_for():
    cache = new_cache(random_model(TINY), 3, 11)
    assert cache.capacity == 11
    assert cache.keys.shape == cache.values.shape == (3, 3, 5, 11, 24)
    assert cache.length == 0
    assert cache.padding.tolist() == [0, 0, 0]
