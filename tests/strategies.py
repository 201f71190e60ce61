"""What hypothesis draws: the shape of a model, a seed, lengths. Arrays come from the seed, never from hypothesis.

Weights are those of `random_model`: N(0, 1/fan_in), LayerNorm weights 1+0.3N, biases 0.3N. At the scale at which models
are initialized (0.02, ones and zeros) attention is almost uniform and the norms are identities: a model with no rotary
at all would pass for the right one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from neox.reference.config import Config
from neox.reference.model import MLP, Attention, Layer, Linear, Model, Params
from neox.reference.random_weights import random_model

__all__ = [
    "TINY",
    "arrays_of",
    "checksum",
    "configs",
    "draw_ids",
    "map_matrices",
    "random_model",
    "rotary_pct",
    "seeds",
]

# Every dimension is different, none divides another more often than the architecture asks, and R = 6 has three
# frequencies: with one (R = 2) neighbours and halves are the same pairing.
TINY = Config(
    vocab_size=101,
    hidden_size=120,
    num_hidden_layers=3,
    num_attention_heads=5,
    intermediate_size=37,
    rotary_pct=0.25,
    max_position_embeddings=64,
)

HEADS = [1, 2, 3, 5, 7]
HEAD_AND_ROTARY_DIMS = [
    (24, 6),
    (16, 4),
    (14, 4),
    (20, 10),
    (18, 12),
    (12, 12),  # every dim rotates
    (10, 10),
    (96, 24),  # the 20B's
    (10, 2),  # a single frequency
]

seeds = st.integers(0, 2**32 - 1)


def rotary_pct(head_dim: int, rotary_ndims: int) -> float:
    """The fraction whose product with head_dim is cut to rotary_ndims."""
    pct = rotary_ndims / head_dim
    while int(head_dim * pct) < rotary_ndims:
        pct = float(np.nextafter(pct, 2))
    return pct


@st.composite
def configs(draw: st.DrawFn, /, **fixed: Any) -> Config:
    """A small model's config, any field of which can be fixed: configs(use_parallel_residual=True)."""
    heads = draw(st.sampled_from(HEADS))
    head_dim, rotary_ndims = draw(st.sampled_from(HEAD_AND_ROTARY_DIMS))
    if head_dim > 24:
        heads = min(heads, 2)  # keeps the wide ones fast
    drawn = Config(
        vocab_size=draw(st.sampled_from([61, 83, 101])),
        hidden_size=heads * head_dim,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        intermediate_size=draw(st.sampled_from([29, 37, 4 * heads * head_dim])),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_fast"])),
        rotary_pct=rotary_pct(head_dim, rotary_ndims),
        rotary_emb_base=draw(st.sampled_from([10000, 10000, 500])),
        max_position_embeddings=64,
        layer_norm_eps=draw(st.sampled_from([1e-5, 1e-3])),
        use_parallel_residual=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
    )
    return replace(drawn, **fixed)


def draw_ids(config: Config, batch: int, length: int, seed: int) -> NDArray:  # (B,T)
    """Token ids over the whole vocabulary."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


def map_matrices(params: Params, change: Callable[[NDArray], NDArray]) -> Params:
    """The same parameters with every matrix changed; vectors stay."""

    def linear(p: Linear) -> Linear:
        return replace(p, weight=change(p.weight))

    def layer(p: Layer) -> Layer:
        attention = Attention(linear(p.attention.query_key_value), linear(p.attention.dense))
        return replace(p, attention=attention, mlp=MLP(linear(p.mlp.dense_h_to_4h), linear(p.mlp.dense_4h_to_h)))

    layers = tuple(map(layer, params.layers))
    return replace(params, embed_in=change(params.embed_in), layers=layers, embed_out=change(params.embed_out))


def arrays_of(part: Any) -> Iterator[NDArray]:
    """Every array of a dataclass of parameters, in the order of its fields."""
    for value in part if isinstance(part, tuple) else [getattr(part, field.name) for field in fields(part)]:
        if isinstance(value, np.ndarray):
            yield value
        elif value is not None:
            yield from arrays_of(value)


def checksum(model: Model) -> int:
    """Of every parameter's bytes: tells drawn weights that changed from a model that did."""
    total = 0
    for array in arrays_of(model.params):
        total = zlib.crc32(np.ascontiguousarray(array).tobytes(), total)
    return total
