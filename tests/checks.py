"""The checks that the tests of the model and the table of its mutants share: plain functions that raise AssertionError.

They reach every function through its module, so that they see what a mutant has put there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
from closeness import FLOAT32_STEP, assert_close, largest
from loops import gelu_erf, gelu_tanh, logits
from numpy.typing import NDArray
from strategies import TINY, draw_ids, random_model

from neox.reference import cores, decode, model, normal, prefill, project
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.model import LayerNorm, Model

# Two orders of the same float64 sums differ by a few 1e-16 of the largest term for each of the some thirty operations
# in a row; 1e-15 is what is measured. 1e-12 leaves room for another BLAS, and is far below what any change of an
# equation does: the smallest, float32 against float64 rotary angles, is 1e-8.
FLOAT64 = 1e-12

# Between them these take every branch of model.py and give each field of Config a value that is not its default.
PARITY = {
    "20b": TINY,
    "gelu": replace(TINY, hidden_act="gelu"),
    "sequential": replace(TINY, use_parallel_residual=False, hidden_act="gelu"),
    "no-attention-bias": replace(TINY, attention_bias=False, layer_norm_eps=1e-3),
    "tied": replace(TINY, tie_word_embeddings=True),
    "every-dim-rotates": replace(TINY, rotary_pct=1.0, rotary_emb_base=500),
    "float16-angles": replace(TINY, rotary_dtype="float16"),
    "head-96": replace(TINY, hidden_size=192, num_attention_heads=2, num_hidden_layers=2),
}


@cache
def parity_case(name: str) -> tuple[Model, NDArray, NDArray]:
    """A model in float64, ids (B,T), and the logits the loops find."""
    m = random_model(PARITY[name], seed=3, dtype="float64")
    ids = draw_ids(m.config, batch=2, length=7, seed=5)
    return m, ids, logits(m, ids)


def parity(names: Iterable[str] = PARITY) -> None:
    """forward equals the float64 loops."""
    for name in names:
        m, ids, expected = parity_case(name)
        assert_close(model.forward(m, ids), expected, FLOAT64)


# Primitives.


def norm_of_large_mean() -> None:
    """LayerNorm in float32 of entries 1000 +- 1 is that of the same entries in float64.

    Each entry less the mean is exact; the mean is rounded to a step of 2^-14 = 6e-5 (between 512 and 1024), and summing
    rounds a few steps more. That moves every entry alike, by 1e-4 or so, and the variance by the square of that. A
    variance as the mean of squares less the square of the mean is off by 6e-2: 2^-4, the step of 1e6.
    """
    x = (1000 + np.random.default_rng(0).standard_normal((3, 6144))).astype(np.float32)
    p = LayerNorm(np.ones(6144, np.float32), np.zeros(6144, np.float32))
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    assert_close(model.layer_norm(x, p, 1e-5), expected, rtol=0, atol=3e-4)


def softmax_of_huge_scores() -> None:
    """exp of 1e4 is infinite in float64; softmax of such scores is not."""
    p = model.softmax(np.array([[1e4, 1e4, -1e4], [-1e5, -1e5 + math.log(3), -1e5]]))
    assert_close(p, np.array([[0.5, 0.5, 0], [0.2, 0.6, 0.2]]), rtol=1e-10)  # 1e5 itself has steps of 1.5e-11


def future_with_huge_scores() -> None:
    """The future stays unseen when its scores are the largest by far.

    GPT-NeoX once masked with -10000, which scores of Pythia exceed.
    """
    rng = np.random.default_rng(0)
    q = np.full((1, 1, 3, 4), 300.0)
    k = q * np.array([1, -1, 2])[:, None]  # scores 1.8e5, -1.8e5 and 3.6e5
    v = rng.standard_normal((1, 1, 3, 4))
    expected = np.stack([v[0, 0, 0], v[0, 0, 0], v[0, 0, 2]])[None, None]
    assert_close(model.causal_attend(q, k, v), expected, rtol=1e-14)


def rotary_table() -> None:
    """At position p and pair i: cos and sin of p base^(-2i/R), every operation rounded to float32.

    With base 16 and R = 4 the frequencies are 1 and 1/4 exactly, so the angles are too.
    """
    config = Config(61, 16, 1, 1, 29, rotary_pct=0.25, rotary_emb_base=16)
    positions = [[0, 1, 2, 1000, 2047]]
    cos, sin = model.rotary_tables(config, np.array(positions))
    angles = np.array([[p, p / 4] for p in positions[0]])[None, None]
    # One rounding to float32, of values up to 1.
    assert_close(cos, np.cos(angles), rtol=FLOAT32_STEP)
    assert_close(sin, np.sin(angles), rtol=FLOAT32_STEP)


def activations() -> None:
    """Both GELUs against the C library's erfc and tanh, to a few steps of the dtype relative to each entry.

    For the tanh form 1 + tanh cancels for negative x, which leaves an error of a step of 1 times |x| there.
    """
    x = np.concatenate([np.linspace(-6, 6, 241), [1e-300, -1e-300, 0.0, 40.0, -40.0, 1e3, -1e3]])
    assert_close(model.ACTIVATIONS["gelu"](x), np.array([gelu_erf(float(v)) for v in x]), rtol=0, atol=1e-14)
    assert_close(model.ACTIVATIONS["gelu_fast"](x), np.array([gelu_tanh(float(v)) for v in x]), rtol=0, atol=1e-14)


def tail_in_float64() -> None:
    """Q(x) to 2e-14 of itself, which its docstring promises, where x < 6."""
    x = np.linspace(0, 6, 601)[:-1]
    exact = np.array([math.erfc(v / math.sqrt(2)) / 2 for v in x])
    assert_close(normal.upper_tail(x) / exact, np.ones_like(x), rtol=2e-14)


def stored_in_fewer_bits() -> None:
    """A product with a float16 or bfloat16 matrix is that with the matrix widened, in blocks and shares of any size."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 7)).astype(np.float32)
    for stored in (np.float16, ml_dtypes.bfloat16):
        for scale in (1.0, 2.0**-16):  # the second makes float16's subnormal numbers
            weight = (rng.standard_normal((11, 7)) * scale).astype(stored)
            for block_bytes in (1, 4 * 7 * 4, 1 << 20):  # a row at a time; four, so that the last block is short; all
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(project, "BLOCK_BYTES", block_bytes)
                    patch.setattr(project, "SHARE_BYTES", 2 * 7 * 3)  # worth three shares
                    patch.setattr(cores, "cores", lambda: 3)
                    y = project.project(x, weight)
                assert y.dtype == np.float32
                wide, magnitude = weight.astype(np.float64), np.abs(weight.astype(np.float64))
                # Sums of 7 products: each is rounded once and each of 6 additions once more.
                atol = 7 * FLOAT32_STEP * (np.abs(x.astype(np.float64)) @ magnitude.T).max()
                assert_close(y, x.astype(np.float64) @ wide.T, rtol=0, atol=atol)


def note_share(shares: list[tuple[int, int]], first: int, last: int) -> None:
    shares.append((first, last))


def shares_are_the_whole() -> None:
    """Each of a range's steps lies in one share, whole, and there are as many shares as can be used."""
    for length, step, most, count in ((11, 1, 9, 3), (11, 4, 9, 3), (11, 4, 2, 2), (1, 5, 9, 1), (12, 4, 9, 3)):
        shares: list[tuple[int, int]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cores, "cores", lambda: 3)
            cores.in_shares(partial(note_share, shares), length, step, most)
        firsts, lasts = zip(*sorted(shares), strict=True)
        assert len(shares) == count
        assert (0, *lasts) == (*firsts, length)
        assert not any(first % step for first in firsts)


def same_dtype() -> None:
    """float32 in, float32 out: no constant makes a float64 of it on the way."""
    m = random_model(TINY, seed=3)
    seen: dict[str, np.dtype] = {}

    def look(name: str, array: NDArray) -> NDArray:
        seen[name] = array.dtype
        return array

    for act in ("gelu", "gelu_fast"):
        seen["logits"] = model.forward(replace(m, config=replace(TINY, hidden_act=act)), [[1, 2, 3]], look).dtype
        assert {name for name, dtype in seen.items() if dtype != np.float32} == set()


def ruffled(array: NDArray) -> NDArray:
    """Neither proportional to the array nor a shift of it, which a LayerNorm or a softmax would undo."""
    return array + 0.5 * np.cos(np.arange(array.size)).reshape(array.shape)


def taps_replace() -> None:
    """Whatever a tap returns is what the model goes on with: each name, changed, changes the logits."""
    m, ids, expected = parity_case("sequential")
    names: dict[str, NDArray] = {}
    model.forward(m, ids, lambda name, array: names.setdefault(name, array))

    def ruffle(target: str) -> model.Tap:
        return lambda name, array: ruffled(array) if name == target else array

    for target in names:
        assert largest(model.forward(m, ids, ruffle(target)) - expected) > 1e-6, f"{target} was not replaced"


# Decoding with the cache.


def extended(m: Model, ids: NDArray, parts: Iterable[int], padding: NDArray | None = None) -> NDArray:
    """The logits of every position when ids go through a cache in parts of these lengths."""
    kv = decode.new_cache(m, ids.shape[0], ids.shape[1], padding)
    # What lies in the cache beyond its length is not the text's: it must never be read.
    kv.keys[...], kv.values[...] = np.nan, np.nan
    result, start = [], 0
    for part in parts:
        result.append(decode.extend(m, kv, ids[:, start : start + part]))
        start += part
    return np.concatenate(result, axis=1)


def cached_is_uncached() -> None:
    """A text in parts of 1, 3, 1 and 2 tokens, and blocks of 2 queries, against forward."""
    for name in ("20b", "sequential"):
        m, ids, _ = parity_case(name)
        expected = model.forward(m, ids)
        for block in (2, 128):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(decode, "BLOCK", block)
                assert_close(extended(m, ids, [1, 3, 1, 2]), expected, FLOAT64)


def padded(texts: list[NDArray]) -> tuple[NDArray, NDArray]:
    """Texts of unequal length in one array, filled up on the left; and by how much each was."""
    longest = max(map(len, texts))
    padding = np.array([longest - len(text) for text in texts])
    return np.stack([np.pad(text, (n, 0), constant_values=1) for text, n in zip(texts, padding, strict=True)]), padding


def padding_changes_nothing() -> None:
    """Three texts of 6, 2 and 5 tokens in one batch, in two parts, against each by itself."""
    m, _, _ = parity_case("20b")
    texts = [draw_ids(m.config, 1, length, seed=length)[0] for length in (6, 2, 5)]
    ids, padding = padded(texts)
    batch = extended(m, ids, [5, 1], padding)
    for row, text, n in zip(batch, texts, padding, strict=True):
        assert_close(row[n:], model.forward(m, text[None])[0], FLOAT64)


def prefill_is_forward() -> None:
    """The last logits of a prompt that goes in by chunks of 3, with several shares in each, and then of a step."""
    m, ids, _ = parity_case("20b")
    expected = model.forward(m, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "CHUNK", 3)
        patch.setattr(prefill, "SMALLEST_SHARE", 1)
        patch.setattr(prefill, "cores", lambda: 2)
        kv = decode.new_cache(m, 2, 8)
        kv.keys[...], kv.values[...] = np.nan, np.nan
        assert_close(prefill.prefill(m, kv, ids[:, :-1]), expected[:, -2], FLOAT64)
        assert kv.length == ids.shape[1] - 1
    assert_close(decode.extend(m, kv, ids[:, -1:])[:, 0], expected[:, -1], FLOAT64)


def shares_wait() -> None:
    """A share reads the keys of those before it only when they are there, however late the first share comes."""
    m, ids, _ = parity_case("20b")
    through_layers = decode.through_layers

    def late(m: Model, kv: decode.Cache, ids: NDArray, start: int, *rest: Callable[[], object]) -> NDArray:
        time.sleep(0.05 if start == 0 else 0)
        return through_layers(m, kv, ids, start, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "SMALLEST_SHARE", 1)
        patch.setattr(prefill, "cores", lambda: 3)
        patch.setattr(prefill, "through_layers", late)
        kv = decode.new_cache(m, 2, 8)
        kv.keys[...], kv.values[...] = np.nan, np.nan
        assert_close(prefill.prefill(m, kv, ids), model.forward(m, ids)[:, -1], FLOAT64)


def refusal(append: Callable, m: Model, kv: decode.Cache, ids: list[list[int]]) -> str | None:
    """Why these ids were refused, or None if they were not; what is refused must leave the cache as it was."""
    before = (kv.length, kv.keys.copy(), kv.values.copy())
    try:
        append(m, kv, ids)
    except InputError as error:
        assert kv.length == before[0]
        assert np.array_equal(kv.keys, before[1], equal_nan=True)
        assert np.array_equal(kv.values, before[2], equal_nan=True)
        return str(error)
    return None


def limits_are_kept() -> None:
    """The context counts a row's own tokens, the capacity counts padding too."""
    m = random_model(replace(TINY, max_position_embeddings=5), seed=3)
    for append in (decode.extend, prefill.prefill):
        kv = decode.new_cache(m, 2, 8, np.array([1, 3]))
        assert refusal(append, m, kv, [[0, 1, 2, 3], [0, 1, 2, 3]]) is None
        outside = "token id 101 is outside the vocabulary of 101"
        assert refusal(append, m, kv, [[1, 101], [1, 2]]) == outside
        # Row 0 would have 6 tokens of its own, row 1 only 4.
        too_long = "6 tokens, but the model's context is 5"
        assert refusal(append, m, kv, [[1, 2, 3], [1, 2, 3]]) == too_long
        assert refusal(append, m, kv, [[1, 2], [1, 2]]) is None  # exactly the context
        small = decode.new_cache(m, 1, 3)
        assert refusal(append, m, small, [[1, 2]]) is None
        assert refusal(append, m, small, [[1, 2]]) == "4 tokens, but this cache holds 3"
        assert refusal(append, m, small, [[1]]) is None  # exactly the capacity


CHECKS = {
    check.__name__: check
    for check in (
        parity,
        norm_of_large_mean,
        softmax_of_huge_scores,
        future_with_huge_scores,
        rotary_table,
        activations,
        tail_in_float64,
        stored_in_fewer_bits,
        shares_are_the_whole,
        same_dtype,
        taps_replace,
        cached_is_uncached,
        padding_changes_nothing,
        prefill_is_forward,
        shares_wait,
        limits_are_kept,
    )
}
