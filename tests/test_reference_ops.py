"""Each primitive of the model against numbers that can be worked out by hand, and against the C library."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from closeness import FLOAT32_STEP, FLOAT64_STEP, assert_close
from loops import frequencies, gelu_erf, gelu_tanh
from numpy.typing import NDArray
from strategies import TINY, draw_ids, map_matrices, random_model

from neox.reference.config import Config
from neox.reference.decode import extend, mask_between, new_cache
from neox.reference.errors import InputError
from neox.reference.model import (
    LayerNorm,
    Linear,
    apply_rotary,
    attend,
    attention,
    causal_attend,
    causal_mask,
    embed,
    forward,
    gelu,
    gelu_fast,
    layer,
    layer_norm,
    linear,
    mlp,
    rotary_tables,
    softmax,
    unembed,
)
from neox.reference.normal import upper_tail
from neox.reference.prefill import prefill
from neox.reference.project import project, widen

pytestmark = pytest.mark.filterwarnings("error")

DTYPES = [np.float32, np.float64]
STEP: dict[type, float] = {np.float32: FLOAT32_STEP, np.float64: FLOAT64_STEP}


def array(*values: Any, dtype: type = np.float64) -> NDArray:
    return np.array(values, dtype)


# LayerNorm.


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_by_hand(dtype: Any):
    """Mean 3, variance (4+1+0+9)/4 = 3.5, eps 0.5: the root is 2. All numbers are exact in binary."""
    p = LayerNorm(array(1, 2, 3, 4, dtype=dtype), array(10, 20, 30, 40, dtype=dtype))
    y = layer_norm(array(1, 2, 3, 6, dtype=dtype), p, 0.5)
    assert y.tolist() == [1 * -1 + 10, 2 * -0.5 + 20, 3 * 0 + 30, 4 * 1.5 + 40]


def test_layer_norm_of_equal_entries_is_its_bias():
    p = LayerNorm(array(1, 2, 3, 4), array(10, 20, 30, 40))
    assert layer_norm(np.full((2, 4), 7.0), p, 1e-5).tolist() == [[10, 20, 30, 40]] * 2


def test_layer_norm_treats_each_row_by_itself_and_leaves_its_input_alone():
    rng = np.random.default_rng(0)
    x, p = rng.standard_normal((2, 3, 5)), LayerNorm(rng.standard_normal(5), rng.standard_normal(5))
    before = x.copy()
    y = layer_norm(x, p, 1e-5)
    assert np.array_equal(x, before)
    for index in np.ndindex(2, 3):
        assert_close(y[index], layer_norm(x[index], p, 1e-5), rtol=8 * FLOAT64_STEP)


# GELU.


def test_gelu_by_table():
    """x P(Z < x) with P from tables of the normal distribution."""
    x = array(0, 1, -1, 2, -2, 3)
    expected = [0, 0.8413447460685429, -0.15865525393145707, 1.9544997361036416, -0.0455002638963584, 2.9959503059]
    assert_close(gelu(x), np.array(expected), rtol=1e-10)


def test_gelu_fast_by_hand():
    """tanh(0.7978845608 * 1.044715) = tanh(0.8335620) = 0.68238 at 1; at 0 it is 0."""
    assert_close(gelu_fast(array(0, 1, -1)), array(0, 0.8411919906, -0.1588080094), rtol=1e-10)


@pytest.mark.parametrize(("function", "exact"), [(gelu, gelu_erf), (gelu_fast, gelu_tanh)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_everywhere(dtype: Any, function: Callable, exact: Callable):
    """Within 4 steps of 1 for |x| < 1 and of |x| beyond, as every intermediate is at most that large.

    In float32 the tail's polynomial adds 3e-6 of x Q(x), which is at most 0.17: nine steps more.
    """
    x = np.concatenate([np.linspace(-40, 40, 4001), np.linspace(-1, 1, 401)]).astype(dtype)
    expected = np.array([exact(float(v)) for v in x])
    error = np.abs(function(x) - expected) / np.maximum(1, np.abs(x))
    steps = 13 if dtype is np.float32 else 40  # 2e-14 of 0.17, in float64
    assert error.max() < steps * STEP[dtype]


@pytest.mark.parametrize("function", [gelu, gelu_fast])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_at_the_ends(dtype: Any, function: Callable):
    """x where nothing is lost, 0 where nothing is left, x/2 near 0; the sign of a zero is not declared."""
    tiny, smallest = np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal
    x = array(0.0, -0.0, 9, 40, 1e4, -40, -1e4, dtype=dtype)
    assert function(x).tolist() == [0, 0, 9, 40, 1e4, 0, 0]
    near = array(tiny, -tiny, 4 * smallest, -4 * smallest, dtype=dtype)
    assert_close(function(near) / near, np.full(4, 0.5), rtol=0.25)  # a subnormal of few bits rounds coarsely
    assert -1e-13 < float(function(array(-8, dtype=dtype))[0]) <= 0


@pytest.mark.parametrize(("dtype", "promised"), [(np.float32, 3e-6), (np.float64, 2e-14)])
def test_tail_of_the_normal(dtype: Any, promised: float):
    """Against erfc: relative to itself up to 6, as its docstring promises; beyond, by its size."""
    x = np.concatenate([[0.0, np.finfo(dtype).smallest_subnormal, np.finfo(dtype).tiny], np.linspace(0, 6, 5003)[:-1]])
    x = x.astype(dtype)
    x = x[x < 6]
    exact = np.array([math.erfc(float(v) / math.sqrt(2)) / 2 for v in x])
    assert_close(upper_tail(x) / exact, np.ones_like(exact), rtol=promised)
    beyond = np.linspace(6, 40, 1001).astype(dtype)
    exact = np.array([math.erfc(float(v) / math.sqrt(2)) / 2 for v in beyond])
    assert (upper_tail(beyond) >= 0).all()
    assert_close(upper_tail(beyond), exact, rtol=100 * promised)
    assert upper_tail(x).dtype == dtype


# Softmax.


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_by_hand(dtype: Any):
    p = softmax(array(0, math.log(2), math.log(5), -np.inf, dtype=dtype))
    assert p[3] == 0
    assert_close(p, array(1 / 8, 2 / 8, 5 / 8, 0), rtol=8 * STEP[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_softmax_is_a_distribution_at_every_scale(dtype: Any, scale: float):
    x = (scale * np.random.default_rng(0).standard_normal((3, 5, 7))).astype(dtype)
    before = x.copy()
    p = softmax(x)
    assert np.array_equal(x, before)
    assert (p >= 0).all()
    assert_close(p.sum(-1), np.ones((3, 5)), rtol=8 * STEP[dtype])


# Rotary.


def test_rotary_tables_of_the_20b_bit_for_bit():
    """24 of 96 dims: 12 frequencies, taken in float64 one by one and rounded where it is declared."""
    config = replace(TINY, hidden_size=192, num_attention_heads=2, rotary_pct=0.25)
    positions = np.array([[0, 1, 2, 3, 1023, 1024, 2047], [5, 6, 7, 8, 9, 10, 11]])
    cos, sin = rotary_tables(config, positions)
    assert cos.shape == sin.shape == (2, 1, 7, 12)
    assert cos.dtype == sin.dtype == np.float32
    for (row, t), position in np.ndenumerate(positions):
        for i, frequency in enumerate(frequencies(24, 10000)):
            angle = float(np.float32(position) * frequency)
            assert cos[row, 0, t, i] == np.float32(math.cos(angle))
            assert sin[row, 0, t, i] == np.float32(math.sin(angle))


def test_rotary_frequencies_by_hand():
    """base 10000, R = 8: 1, 1/10, 1/100 and 1/1000 of a radian a position; the sine of a small angle is the angle."""
    config = Config(61, 8, 1, 1, 29, rotary_pct=1.0)
    _, sin = rotary_tables(config, np.array([[1]]))
    expected = array(0.8414709848, 0.0998334166, 0.0099998333, 0.0009999998)
    assert_close(sin[0, 0, 0], expected, rtol=1e-7)


def test_rotary_tables_in_float16_by_hand():
    """R = 4 and base 10000 give the frequencies 1 and 0.01, which in half precision is 0.0100021.

    position 100:  0.0100021 * 100 = 1.00021, half: 1.0; cos 0.5403 = 1106.5/2048, half: 1107/2048;
                   sin 0.84147 = 1723.3/2048, half: 1723/2048
    position 1999: 0.0100021 * 1999 = 19.9943, half (steps of 1/64): 20.0; cos 0.408082 = 1671.5/4096, half: 1672/4096;
                   sin 0.912945 = 1869.7/2048, half: 1870/2048. In float32 the angle is 19.99 and the cosine 0.4172.
    """
    config = Config(61, 4, 1, 1, 29, rotary_pct=1.0, rotary_dtype="float16")
    cos, sin = rotary_tables(config, np.array([[100, 1999]]))
    assert cos.dtype == sin.dtype == np.float16
    assert cos[0, 0, :, 1].tolist() == [1107 / 2048, 1672 / 4096]
    assert sin[0, 0, :, 1].tolist() == [1723 / 2048, 1870 / 2048]
    wide, _ = rotary_tables(replace(config, rotary_dtype="float32"), np.array([[1999]]))
    assert_close(wide[0, 0, 0, 1:], array(math.cos(19.99)), rtol=4e-6)  # 1999 times half a step of 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quarter_turn_by_hand(dtype: Any):
    """cos 0 and sin 1 take (x1, x2) to (-x2, x1): dim 0 is paired with dim 2, dim 1 with dim 3; 4 and 5 stay."""
    x = array(1, 2, 3, 4, 5, 6, dtype=dtype).reshape(1, 1, 1, 6)
    cos, sin = np.zeros((1, 1, 1, 2), np.float32), np.ones((1, 1, 1, 2), np.float32)
    assert apply_rotary(x, cos, sin).ravel().tolist() == [-3, -4, 1, 2, 5, 6]
    assert x.ravel().tolist() == [1, 2, 3, 4, 5, 6]


def test_rotary_turns_every_row_by_its_own_positions():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 24))
    positions = np.array([[0, 1, 2, 3], [7, 8, 9, 10]])
    together = apply_rotary(x, *rotary_tables(TINY, positions))
    for row in range(2):
        alone = apply_rotary(x[row : row + 1], *rotary_tables(TINY, positions[row : row + 1]))
        assert np.array_equal(together[row : row + 1], alone)


# Attention.


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_mask_by_hand(dtype: Any):
    mask = causal_mask(3, np.dtype(dtype))
    assert mask.dtype == dtype
    assert mask.tolist() == [[0, -np.inf, -np.inf], [0, 0, -np.inf], [0, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_by_hand(dtype: Any):
    """D = 4, so scores are halved: 2 ln 2 and 2 ln 5 become ln 2 and ln 5, weights 2/7 and 5/7."""
    q = array(2, 0, 0, 0, dtype=dtype).reshape(1, 1, 1, 4)
    k = np.array([[math.log(2), 9, 9, 9], [math.log(5), 8, 8, 8]], dtype)[None, None]
    v = np.array([[7, 14, 0, 0], [0, 7, 14, 21]], dtype)[None, None]
    z = attend(q, k, v, np.zeros((1, 2), dtype))
    assert_close(z[0, 0, 0], array(2, 4 + 5, 10, 15), rtol=8 * STEP[dtype])


def test_equal_keys_average_what_came_before():
    v = np.random.default_rng(0).standard_normal((1, 1, 5, 4))
    z = causal_attend(v, np.ones_like(v), v)
    running = np.cumsum(v, axis=2) / np.arange(1, 6)[:, None]
    assert_close(z, running, rtol=16 * FLOAT64_STEP)


def test_a_masked_key_weighs_exactly_nothing():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 3, 5, 6))
    mask = np.where(np.arange(5) == 2, -np.inf, 0.0)
    expected = attend(q, k, v, mask)
    k[:, :, 2], v[:, :, 2] = 1e6, -1e6
    assert np.array_equal(attend(q, k, v, mask), expected)


def test_mask_over_a_padded_cache_by_hand():
    """Queries 1 and 2 of a row with two positions of padding: query 1 is padding itself and sees only itself."""
    cache = new_cache(random_model(TINY), 2, 4, np.array([0, 2]))
    no = -np.inf
    assert mask_between(cache, 1, 3)[:, 0].tolist() == [[[0, 0, no], [0, 0, 0]], [[no, 0, no], [no, no, 0]]]


# Linear.


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_by_hand(dtype: Any):
    p = Linear(np.array([[1, 2], [3, 4], [5, 6]], dtype), array(10, 20, 30, dtype=dtype))
    x = np.array([[1, 0], [0, 1], [2, -1]], dtype)
    assert linear(x, p).tolist() == [[11, 23, 35], [12, 24, 36], [10, 22, 34]]
    assert linear(x, Linear(p.weight, None)).tolist() == [[1, 3, 5], [2, 4, 6], [0, 2, 4]]


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (2, 3, 7), (2, 0, 7), (1, 1, 1, 7)])
def test_project_takes_any_leading_shape(shape: tuple[int, ...], stored: Any):
    rng = np.random.default_rng(0)
    x, w = rng.integers(-8, 8, shape).astype(np.float32), rng.integers(-8, 8, (11, 7)).astype(stored)
    y = project(x, w)
    assert y.dtype == np.float32
    assert y.shape == (*shape[:-1], 11)
    assert np.array_equal(y, np.einsum("...i,oi->...o", x, w.astype(np.float32)))  # small integers: exact


def test_project_takes_rows_that_do_not_lie_together():
    rng = np.random.default_rng(0)
    x, w = rng.integers(-8, 8, (5, 4, 6)).astype(np.float32), rng.integers(-8, 8, (3, 5)).astype(np.float16)
    assert np.array_equal(project(x.T, w), np.einsum("itb,oi->bto", x, w.astype(np.float32)))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wide", DTYPES)
def test_widen_is_exact_for_every_finite_number(stored: Any, wide: Any):
    """All bit patterns, so also both zeros and every subnormal."""
    numbers = np.arange(2**16, dtype=np.uint16).view(stored)
    with np.errstate(invalid="ignore"):  # NaNs are among them
        numbers = numbers[np.isfinite(numbers.astype(np.float64))]
    out = np.empty(numbers.shape, wide)
    widen(numbers, out)
    assert np.array_equal(out, numbers.astype(wide))
    assert np.array_equal(np.signbit(out), np.signbit(numbers))


# Whole model.


def outputs(dtype: Any, act: str) -> dict[str, NDArray]:
    """What every public function makes of arrays of one dtype."""
    m = random_model(replace(TINY, hidden_act=act), dtype=np.dtype(dtype).name)
    p, config = m.params.layers[0], m.config
    x = embed(m, np.array([[3, 1, 4]]))
    q = np.random.default_rng(0).standard_normal((1, 5, 3, 24)).astype(dtype)
    tables = rotary_tables(config, np.arange(3)[None])
    return {
        "project": project(x, p.attention.dense.weight),
        "linear": linear(x, p.attention.dense),
        "layer_norm": layer_norm(x, p.input_layernorm, config.layer_norm_eps),
        "gelu": gelu(x),
        "gelu_fast": gelu_fast(x),
        "upper_tail": upper_tail(np.abs(x)),
        "softmax": softmax(x),
        "apply_rotary": apply_rotary(q, *tables),
        "causal_mask": causal_mask(3, np.dtype(dtype)),
        "attend": attend(q, q, q, causal_mask(3, np.dtype(dtype))),
        "causal_attend": causal_attend(q, q, q),
        "attention": attention(p.attention, config.head_dim, x, tables, lambda q, k, v, tap: causal_attend(q, k, v)),
        "mlp": mlp(p.mlp, act, x),
        "layer": layer(p, config, x, tables),
        "embed": x,
        "unembed": unembed(m, x),
        "forward": forward(m, [[3, 1, 4]]),
        "extend": extend(m, new_cache(m, 1, 4), [[3, 1, 4]]),
        "prefill": prefill(m, new_cache(m, 1, 4), [[3, 1, 4]]),
        "cache": new_cache(m, 1, 4).keys,
    }


@pytest.mark.parametrize("act", ["gelu", "gelu_fast"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_that_goes_in_comes_out(dtype: Any, act: str):
    wrong = {name: y.dtype.name for name, y in outputs(dtype, act).items() if y.dtype != dtype}
    assert wrong == {}


def test_forward_takes_lists_and_any_integer():
    m = random_model(TINY)
    expected = forward(m, [[3, 1, 4]])
    assert expected.shape == (1, 3, TINY.vocab_size)
    for kind in (np.uint8, np.int32, np.int64, np.uint64):
        assert np.array_equal(forward(m, np.array([[3, 1, 4]], kind)), expected)


BAD_IDS: dict[str, tuple[Any, str]] = {
    "one dimension": ([1, 2], r"shape \[batch, seq\], not int64 of shape \(2,\)"),
    "a number": (3, "not int64 of shape"),
    "real": ([[1.0, 2.0]], "must be integers .* not float64"),
    "truth values": ([[True, False]], "must be integers .* not bool"),
    "no tokens": (np.zeros((1, 0), int), r"shape \(1, 0\)"),
    "no rows": (np.zeros((0, 3), int), r"shape \(0, 3\)"),
    "negative": ([[1, -1]], "token id -1 is outside the vocabulary of 101"),
    "too large": ([[1, 101]], "token id 101 is outside the vocabulary of 101"),
    "too many": (np.zeros((1, 65), int), "65 tokens, but the model's context is 64"),
    "text": ([["a"]], "must be integers"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids_are_refused_in_one_line(case: str):
    ids, message = BAD_IDS[case]
    m = random_model(TINY)
    for answer in (forward, lambda m, ids: extend(m, new_cache(m, 1, 80), ids)):
        with pytest.raises(InputError, match=message) as error:
            answer(m, ids)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_a_model_stored_in_half_precision_computes_as_its_widened_twin(stored: str):
    """Same numbers, products cut into other blocks: float32 rounding apart, about 1e-6 over three layers."""
    half = np.dtype(stored) if stored == "float16" else np.dtype(ml_dtypes.bfloat16)
    ids = draw_ids(TINY, 2, 9, seed=0)
    narrow = random_model(TINY).params
    kept = map_matrices(narrow, lambda w: w.astype(half))
    twin = map_matrices(narrow, lambda w: w.astype(half).astype(np.float32))
    m = random_model(TINY)
    y = forward(replace(m, params=kept), ids)
    assert y.dtype == np.float32
    assert_close(y, forward(replace(m, params=twin), ids), rtol=2e-6)
