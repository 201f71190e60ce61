"""Whole models for the device: what hypothesis draws, and what their logits are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
from devices import ROUNDING, assert_no_worse
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import TINY, rotary_pct

from neox.gpu.device import dtype_named
from neox.reference.config import Config
from neox.reference.model import Array, Model, forward
from neox.reference.random_weights import random_model

STEP = 2.0**-24  # largest relative error of one rounding in float32
SMALL = replace(TINY, intermediate_size=40, max_position_embeddings=64)  # D = 24, R = 6
HEADS = ((24, 6), (96, 24), (16, 4), (80, 20), (64, 64))  # head_dim and rotary_ndims


@st.composite
def device_configs(draw: st.DrawFn) -> Config:
    """A small model whose rows the kernels can read in pieces of 8 numbers."""
    D, R = draw(st.sampled_from(HEADS))
    H = draw(st.sampled_from([1, 2, 3, 5] if D < 64 else [1, 2]))
    return Config(
        vocab_size=draw(st.sampled_from([61, 101])),
        hidden_size=H * D,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=H,
        intermediate_size=draw(st.sampled_from([8, 40, 2 * H * D])),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_fast"])),
        rotary_pct=rotary_pct(D, R),
        rotary_emb_base=draw(st.sampled_from([10000, 500])),
        rotary_dtype=draw(st.sampled_from(["float32", "float32", "float16"])),
        max_position_embeddings=64,
        use_parallel_residual=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
    )


def rounded(array: Array, dtype: str) -> Array:
    return array.astype(dtype_named(dtype)).astype(array.dtype)


def changed(part: Any, change: Callable[[Array], Array]) -> Any:
    """The same parameters with every array changed; one array in two places stays one."""
    done: dict[int, Array] = {}

    def walk(part: Any) -> Any:
        if isinstance(part, np.ndarray):
            return done.setdefault(id(part), change(part))
        if isinstance(part, tuple):
            return tuple(map(walk, part))
        return part if part is None else replace(part, **{f.name: walk(getattr(part, f.name)) for f in fields(part)})

    return walk(part)


@cache
def drawn(config: Config, seed: int, dtype: str) -> Model:
    """A drawn model as a checkpoint in `dtype` holds it."""
    model = random_model(config, seed)
    return replace(model, params=changed(model.params, lambda a: rounded(a, dtype)))


def in_float64(model: Model) -> Model:
    return Model(model.config, changed(model.params, lambda a: a.astype(np.float64)), np.dtype(np.float64))


def plain(model: Model, ids: NDArray, dtype: str, wide: tuple[str, ...] = ()) -> NDArray:
    """Logits of the reference in float32, every named intermediate rounded to `dtype` but for those that hold `wide`.

    So does transformers in that dtype: products accumulate in float32, and what an operation returns is rounded.
    """

    def tap(name: str, array: Array) -> Array:
        return array if any(part in name for part in wide) else rounded(array, dtype)

    return forward(model, ids, tap)


def assert_right(
    logits: NDArray, model: Model, ids: NDArray, dtype: str, last: bool = False, wide: tuple[str, ...] = ()
) -> None:
    """Against the float64 reference, logits err no more than a plain computation in the same precision.

    model: in float32, its weights in dtype. last: the logits are those of the last positions only.
    """
    exact = forward(in_float64(model), ids)
    oracle = plain(model, ids, dtype, wide)
    if last:
        exact, oracle = exact[:, -1], oracle[:, -1]
    assert logits.dtype == np.float32
    # Sums in another order err differently, by as much as float32 itself: 2 L + 2 products follow one another. And the
    # largest of few errors is a matter of luck: of a rounding of the largest logit, a quarter is allowed for it.
    luck = ROUNDING[dtype] / 4 if dtype != "float32" else 0
    order = 4 * (2 * model.config.num_hidden_layers + 2) * STEP
    floor = (order + luck) * np.abs(exact).max()
    assert_no_worse(logits, oracle, exact, floor)
