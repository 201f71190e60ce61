"""The model's laws, over drawn shapes and seeds: what must hold whatever the weights are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from checks import FLOAT64
from closeness import FLOAT32_STEP, FLOAT64_STEP, assert_close, largest, relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loops import logits
from numpy.typing import NDArray
from strategies import TINY, arrays_of, configs, draw_ids, random_model, seeds

from neox.reference.config import Config
from neox.reference.decode import extend, new_cache
from neox.reference.model import (
    LayerNorm,
    Model,
    Params,
    apply_rotary,
    forward,
    layer_norm,
    rotary_tables,
    softmax,
)
from neox.reference.prefill import prefill

pytestmark = pytest.mark.filterwarnings("error")

dtypes = st.sampled_from(["float32", "float64"])


# forward is the model that the equations describe.


@settings(max_examples=25)
@given(configs(), seeds, st.integers(1, 3), st.integers(1, 9))
def test_forward_is_the_plain_loops(config: Config, seed: int, batch: int, length: int):
    m = random_model(config, seed, "float64")
    ids = draw_ids(config, batch, length, seed)
    assert_close(forward(m, ids), logits(m, ids), FLOAT64)


def test_forward_is_the_plain_loops_beyond_a_thousand_positions():
    config = Config(61, 8, 1, 1, 5, rotary_pct=0.5)
    m = random_model(config, 0, "float64")
    ids = draw_ids(config, 1, 1100, 0)
    assert_close(forward(m, ids), logits(m, ids), FLOAT64)


def rounded(name: str, array: NDArray) -> NDArray:
    """A tap that rounds what passes through it to float32."""
    return array.astype(np.float32).astype(np.float64)


@settings(max_examples=25)
@given(configs(), seeds, st.integers(1, 3), st.integers(1, 37))
def test_float32_errs_no_more_than_its_rounding_explains(config: Config, seed: int, batch: int, length: int):
    """The model in float64 with each named intermediate rounded once shows how far roundings carry in this model.

    In float32 an intermediate is rounded not once but at each of up to n = max(C, F) additions; their errors add up
    like a random walk, so to sqrt(n) of one. The few unnamed intermediates (softmax, the norms' products) are worth
    twice that.
    """
    ids = draw_ids(config, batch, length, seed)
    exact_model = random_model(config, seed, "float64")
    exact = forward(exact_model, ids)
    once = relative_error(forward(exact_model, ids, rounded), exact)
    bound = 2 * math.sqrt(max(config.hidden_size, config.intermediate_size)) * max(once, FLOAT32_STEP)
    assert bound < 1e-5  # or this would prove less than the parity that is declared
    assert_close(forward(random_model(config, seed), ids), exact, bound)


# Attention looks back only, and never at another text.


@given(configs(), seeds, dtypes, st.integers(2, 12), st.data())
def test_the_future_changes_nothing_not_even_a_bit(
    config: Config, seed: int, dtype: str, length: int, data: st.DataObject
):
    changed = data.draw(st.integers(1, length - 1))
    m = random_model(config, seed, dtype)
    before = draw_ids(config, 2, length, seed)
    after = before.copy()
    after[:, changed:] = (after[:, changed:] + 1) % config.vocab_size
    x, y = forward(m, before), forward(m, after)
    assert np.array_equal(x[:, :changed], y[:, :changed])
    assert not np.array_equal(x[:, changed:], y[:, changed:])


@given(configs(), seeds, dtypes, st.integers(2, 3), st.integers(1, 9))
def test_other_rows_of_a_batch_change_nothing_not_even_a_bit(
    config: Config, seed: int, dtype: str, batch: int, length: int
):
    m = random_model(config, seed, dtype)
    before = draw_ids(config, batch, length, seed)
    after = before.copy()
    after[1:] = (after[1:] + 1) % config.vocab_size
    assert np.array_equal(forward(m, before)[0], forward(m, after)[0])


@given(configs(), seeds, st.integers(2, 3), st.integers(1, 9))
def test_a_batch_is_its_rows_one_by_one(config: Config, seed: int, batch: int, length: int):
    """To within rounding, not to the bit: for another number of rows BLAS adds up a product in another order."""
    m = random_model(config, seed, "float64")
    ids = draw_ids(config, batch, length, seed)
    together = forward(m, ids)
    for row in range(batch):
        assert_close(together[row : row + 1], forward(m, ids[row : row + 1]), FLOAT64)


@given(configs(), seeds, dtypes, st.integers(1, 9))
def test_equal_rows_give_equal_logits(config: Config, seed: int, dtype: str, length: int):
    """To within rounding: a row at the edge of a block of BLAS's can be added up in another order than one inside."""
    m = random_model(config, seed, dtype)
    ids = np.repeat(draw_ids(config, 1, length, seed), 2, axis=0)
    first, second = forward(m, ids)
    assert_close(first, second, FLOAT64 if dtype == "float64" else 1e-5)


def test_a_text_is_more_than_its_last_token():
    """The opposite of all of the above: what may matter does. Every earlier token changes the last logits."""
    m = random_model(TINY, 0, "float64")
    ids = draw_ids(TINY, 1, 8, 0)
    last = forward(m, ids)[0, -1]
    for t in range(8):
        other = ids.copy()
        other[0, t] = (other[0, t] + 1) % TINY.vocab_size
        assert relative_error(forward(m, other)[0, -1], last) > 1e-3


# Rotary.


@given(configs(), seeds, st.integers(0, 2047), st.integers(0, 2047), st.integers(0, 1000))
def test_scores_depend_on_the_distance_only(config: Config, seed: int, query: int, key: int, shift: int):
    """q k at positions (m, n) and (m+s, n+s), up to the float32 rounding of four angles.

    An angle of p radians is rounded by at most p steps and so is its frequency: 2p steps for each of four angles, and a
    rounding of each cosine; a turn by e moves a product of vectors by at most e |q| |k|.
    """
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 1, 1, 1, config.head_dim))

    def score(m: int, n: int) -> NDArray:
        tables = [rotary_tables(config, np.array([[p]])) for p in (m, n)]
        return np.sum(apply_rotary(q, *tables[0]) * apply_rotary(k, *tables[1]))

    radians = 2 * (query + key + shift)
    bound = (2 * radians + 8) * FLOAT32_STEP * float(np.linalg.norm(q) * np.linalg.norm(k))
    assert_close(score(query + shift, key + shift), score(query, key), rtol=0, atol=bound)


@given(configs(), seeds, st.integers(0, 2047))
def test_rotation_keeps_norms_and_leaves_the_rest_alone(config: Config, seed: int, position: int):
    """cos^2 + sin^2 is 1 to within the rounding of two float32 numbers: each pair keeps its length to that."""
    x = np.random.default_rng(seed).standard_normal((1, 2, 1, config.head_dim))
    y = apply_rotary(x, *rotary_tables(config, np.array([[position]])))
    half, rotated = config.rotary_ndims // 2, config.rotary_ndims
    assert np.array_equal(y[..., rotated:], x[..., rotated:])
    for i in range(half):
        before, after = np.hypot(x[..., i], x[..., i + half]), np.hypot(y[..., i], y[..., i + half])
        assert_close(after / before, np.ones_like(after), rtol=2 * FLOAT32_STEP)


def test_position_zero_is_not_rotated():
    x = np.random.default_rng(0).standard_normal((1, 5, 1, 24))
    assert np.array_equal(apply_rotary(x, *rotary_tables(TINY, np.array([[0]]))), x)


# Symmetries of the architecture.


def with_heads_permuted(m: Model, order: NDArray) -> Model:
    """The heads' rows of QKV and their columns of dense, both in another order."""
    width, heads = m.config.head_dim, m.config.num_attention_heads

    def permuted(layer: Any) -> Any:
        qkv, dense = layer.attention.query_key_value, layer.attention.dense
        by_head = qkv.weight.reshape(heads, 3 * width, -1)[order].reshape(qkv.weight.shape)
        bias = None if qkv.bias is None else qkv.bias.reshape(heads, 3 * width)[order].ravel()
        columns = dense.weight.reshape(-1, heads, width)[:, order].reshape(dense.weight.shape)
        attention = replace(
            layer.attention,
            query_key_value=replace(qkv, weight=by_head, bias=bias),
            dense=replace(dense, weight=columns),
        )
        return replace(layer, attention=attention)

    return replace(m, params=replace(m.params, layers=tuple(map(permuted, m.params.layers))))


@given(configs(), seeds)
def test_the_order_of_heads_is_a_name_only(config: Config, seed: int):
    assume(config.num_attention_heads > 1)
    m = random_model(config, seed, "float64")
    ids = draw_ids(config, 1, 6, seed)
    order = np.roll(np.arange(config.num_attention_heads), 1)
    assert_close(forward(with_heads_permuted(m, order), ids), forward(m, ids), FLOAT64)


@given(seeds, st.floats(-1e3, 1e3))
def test_softmax_does_not_see_a_shift(seed: int, shift: float):
    """To the rounding of x + shift: steps of the shift's size, in the exponent."""
    x = np.random.default_rng(seed).standard_normal((3, 11))
    assert_close(softmax(x + shift), softmax(x), rtol=(4 * abs(shift) + 64) * FLOAT64_STEP)


@given(seeds, st.floats(0.5, 100), st.floats(-100, 100))
def test_layer_norm_does_not_see_scale_and_shift(seed: int, scale: float, shift: float):
    """With eps 0. x * scale + shift is rounded to steps of up to 500, of which scale * x keeps at least 0.5."""
    rng = np.random.default_rng(seed)
    x, p = rng.standard_normal((3, 37)), LayerNorm(rng.standard_normal(37), rng.standard_normal(37))
    assert_close(layer_norm(scale * x + shift, p, 0.0), layer_norm(x, p, 0.0), rtol=1e5 * FLOAT64_STEP)


@given(seeds)
def test_layer_norm_has_mean_zero_and_variance_one(seed: int):
    x = 3 + 5 * np.random.default_rng(seed).standard_normal((4, 37))
    y = layer_norm(x, LayerNorm(np.ones(37), np.zeros(37)), 0.0)
    assert_close(y.mean(-1), np.zeros(4), rtol=0, atol=64 * FLOAT64_STEP)
    assert_close(y.var(-1), np.ones(4), rtol=64 * FLOAT64_STEP)


# Taps.


def names_of(config: Config) -> list[str]:
    """Every name a tap hears, in the order of the arithmetic."""
    attention = [f"attn.hook_{name}" for name in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z")]
    middle = [] if config.use_parallel_residual else ["hook_resid_mid"]
    layer = [
        "hook_resid_pre",
        *("ln1.hook_scale", "ln1.hook_normalized"),
        *attention,
        "hook_attn_out",
        *middle,
        *("ln2.hook_scale", "ln2.hook_normalized"),
        *("mlp.hook_pre", "mlp.hook_post"),
        "hook_mlp_out",
        "hook_resid_post",
    ]
    blocks = [f"blocks.{i}.{name}" for i in range(config.num_hidden_layers) for name in layer]
    return ["hook_embed", *blocks, "ln_final.hook_scale", "ln_final.hook_normalized"]


def shape_of(name: str, config: Config, batch: int, length: int) -> tuple[int, ...]:
    heads, width = config.num_attention_heads, config.head_dim
    last = name.rpartition(".")[2]
    if last in ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z"):
        return (batch, length, heads, width)
    if last in ("hook_attn_scores", "hook_pattern"):
        return (batch, heads, length, length)
    if last in ("hook_pre", "hook_post"):
        return (batch, length, config.intermediate_size)
    return (batch, length, 1 if last == "hook_scale" else config.hidden_size)


@given(configs(), seeds, st.integers(1, 2), st.integers(1, 7))
def test_taps_hear_every_name_in_order_and_change_nothing(config: Config, seed: int, batch: int, length: int):
    heard: list[tuple[str, tuple[int, ...]]] = []

    def listen(name: str, array: NDArray) -> NDArray:
        heard.append((name, array.shape))
        return array

    m = random_model(config, seed)
    ids = draw_ids(config, batch, length, seed)
    assert np.array_equal(forward(m, ids, listen), forward(m, ids))
    assert heard == [(name, shape_of(name, config, batch, length)) for name in names_of(config)]


def test_what_a_tap_sees_of_attention():
    """Scores are -inf in the future, a pattern is a distribution, a scale is the root of variance plus eps."""
    seen: dict[str, NDArray] = {}
    m = random_model(TINY, 0, "float64")
    ids = draw_ids(TINY, 2, 6, 0)
    forward(m, ids, lambda name, array: seen.setdefault(name, array.copy()))
    future = np.triu(np.ones((6, 6), bool), 1)
    for i in range(TINY.num_hidden_layers):
        scores, pattern = seen[f"blocks.{i}.attn.hook_attn_scores"], seen[f"blocks.{i}.attn.hook_pattern"]
        assert np.array_equal(np.isneginf(scores), np.broadcast_to(future, scores.shape))
        assert (pattern[np.broadcast_to(future, pattern.shape)] == 0).all()
        assert_close(pattern.sum(-1), np.ones(pattern.shape[:-1]), rtol=16 * FLOAT64_STEP)
        x = seen[f"blocks.{i}.hook_resid_pre"]
        scale = np.sqrt(x.var(-1, keepdims=True) + TINY.layer_norm_eps)
        assert_close(seen[f"blocks.{i}.ln1.hook_scale"], scale, rtol=16 * FLOAT64_STEP)


def test_a_stream_replaced_at_the_end_decides_the_logits():
    """Patching layer 2's output with another text's gives that text's logits, whatever came before."""
    m = random_model(TINY, 0, "float64")
    mine, other = draw_ids(TINY, 2, 6, 0)[:, None]
    kept: dict[str, NDArray] = {}
    expected = forward(m, other, lambda name, array: kept.setdefault(name, array.copy()))
    last = "blocks.2.hook_resid_post"
    patched = forward(m, mine, lambda name, array: kept[name].copy() if name == last else array)
    assert np.array_equal(patched, expected)


# Parameters are never written to.


@settings(max_examples=10)
@given(configs(), seeds, dtypes)
def test_parameters_and_ids_are_never_written_to(config: Config, seed: int, dtype: str):
    m = random_model(config, seed, dtype)
    ids = draw_ids(config, 2, 7, seed)
    for array in [ids, *arrays_of(m.params)]:
        array.flags.writeable = False  # a write to it now raises
    expected = forward(m, ids)
    cache = new_cache(m, 2, 8)
    assert prefill(m, cache, ids[:, :5]).shape == (2, config.vocab_size)
    assert extend(m, cache, ids[:, 5:]).shape == (2, 2, config.vocab_size)
    assert np.array_equal(forward(m, ids), expected)


def test_parameters_cannot_be_replaced_in_place():
    m = random_model(TINY)
    assert isinstance(m.params, Params)
    for target, name in [(m, "params"), (m.params, "embed_in"), (m.params.layers[0].mlp, "dense_h_to_4h")]:
        with pytest.raises(AttributeError):
            setattr(target, name, None)


def test_drawn_weights_keep_every_part_of_the_model_at_work():
    """The scale at which the tests' models are drawn: logits and branches of order one, attention not uniform."""
    seen: dict[str, NDArray] = {}
    m = random_model(TINY, 0, "float64")
    y = forward(m, draw_ids(TINY, 3, 37, 0), lambda name, array: seen.setdefault(name, array.copy()))
    for name in ("hook_attn_out", "hook_mlp_out"):
        assert 0.05 < seen[f"blocks.1.{name}"].std() < 5
    assert 0.3 < y.std() < 3
    assert largest(seen["blocks.0.attn.hook_pattern"][:, :, -1]) > 3 / 37
