"""Decoding with a cache: the same model, one piece of text at a time.

Position t attends to the keys and values of all positions before it. They do not change when text is appended, so they
are kept: a step then costs one position's arithmetic instead of the whole text's. Held to `cached == uncached` for
every way of cutting the text into pieces.

Dimensions as in model.py; S is the cache's length after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from neox.reference.errors import InputError
from neox.reference.model import (
    Array,
    Mix,
    Model,
    Tap,
    attend,
    checked,
    embed,
    layer,
    rotary_tables,
    unembed,
)

BLOCK = 128  # queries whose scores are computed at a time: they stay in the cache of the processor


@dataclass
class Cache:
    """Keys (after rotation) and values of the text so far, and how long it is.

    Prompts of unequal length are padded on the left: the first padding[b] positions of row b hold no text. They are
    never attended to and positions are counted after them, so they change nothing.
    """

    keys: Array  # (L,B,H,S,D), S up to the capacity
    values: Array  # (L,B,H,S,D)
    padding: Array  # (B,)
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]


def new_cache(model: Model, batch: int, capacity: int, padding: Array | None = None) -> Cache:
    """An empty cache for `batch` texts of up to `capacity` positions, padding included."""
    config = model.config
    shape = (config.num_hidden_layers, batch, config.num_attention_heads, capacity, config.head_dim)
    padding = np.zeros(batch, np.int64) if padding is None else padding
    return Cache(np.empty(shape, model.dtype), np.empty(shape, model.dtype), padding)


def keep_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """The cache of these texts only, ascending, in the memory of the old one."""
    kept = list(rows)  # to NumPy a tuple would be an index into several axes
    for part in (*cache.keys, *cache.values):  # one layer at a time, so that no second cache stands in memory
        part[: len(kept)] = part[kept]
    keys, values = cache.keys[:, : len(kept)], cache.values[:, : len(kept)]
    return Cache(keys, values, cache.padding[kept], cache.length)


def mask_between(cache: Cache, start: int, stop: int) -> Array:  # (B,1,T,S)
    """0 where the queries start..stop may see the keys 0..stop, -inf in their future and on padding.

    A padded query sees itself, only to have something to average; nothing reads what comes of it.
    """
    query, key = np.arange(start, stop)[:, None], np.arange(stop)[None]
    seen = (key <= query) & ((key >= cache.padding[:, None, None]) | (key == query))  # (B,T,S)
    return np.where(seen, 0, -np.inf).astype(cache.keys.dtype)[:, None]


Blocks = list[tuple[slice, Array]]


def query_blocks(cache: Cache, start: int, length: int) -> Blocks:
    """The queries start... in blocks, each with its mask (B,1,T,S) for the keys up to its own end.

    What lies in the future of a whole block is thus not computed at all.
    """
    blocks = [slice(first, min(first + BLOCK, length)) for first in range(0, length, BLOCK)]
    return [(block, mask_between(cache, start + block.start, start + block.stop)) for block in blocks]


def nothing() -> None:
    return None


def mix_over(cache: Cache, index: int, start: int, blocks: Blocks, appended: Callable[[], object] = nothing) -> Mix:
    """Attention of layer `index` over the cache, to which it first appends the keys and values of positions start...

    `appended` is called between the two.
    """

    def mix(q: Array, k: Array, v: Array, tap: Tap) -> Array:  # (B,H,T,D) x 3 -> (B,H,T,D)
        length = q.shape[2]
        keys, values = cache.keys[index], cache.values[index]  # (B,H,S,D)
        keys[:, :, start : start + length] = k
        values[:, :, start : start + length] = v
        appended()
        z = np.empty_like(q)
        for block, mask in blocks:
            seen = mask.shape[-1]
            z[:, :, block] = attend(q[:, :, block], keys[:, :, :seen], values[:, :, :seen], mask, tap)
        return z

    return mix


def checked_for(model: Model, cache: Cache, ids: ArrayLike) -> Array:  # (B,T)
    """ids as an array, or an InputError: out of the vocabulary, the model's context or the cache's capacity."""
    array = checked(model.config, ids)
    stop = cache.length + array.shape[1]
    longest = stop - int(cache.padding.min())
    if longest > model.config.max_position_embeddings:
        raise InputError(f"{longest} tokens, but the model's context is {model.config.max_position_embeddings}")
    if stop > cache.capacity:
        raise InputError(f"{stop} tokens, but this cache holds {cache.capacity}")
    return array


def through_layers(
    model: Model, cache: Cache, ids: Array, start: int, appended: Callable[[], object] = nothing
) -> Array:
    """What the last layer makes of ids at positions start... of the cache, which it fills.  (B,T) -> (B,T,C)"""
    positions = np.arange(start, start + ids.shape[1]) - cache.padding[:, None]  # (B,T)
    rotary = rotary_tables(model.config, np.maximum(positions, 0))
    blocks = query_blocks(cache, start, ids.shape[1])
    x = embed(model, ids)
    for i, p in enumerate(model.params.layers):
        x = layer(p, model.config, x, rotary, mix_over(cache, i, start, blocks, appended))
    return x


def extend(model: Model, cache: Cache, ids: ArrayLike) -> Array:  # (B,T) -> (B,T,V)
    """Append ids to the text of every row; returns the logits after every one of them.

    InputError if an id is out of range, the cache is full, or a text is longer than the model's context.
    """
    ids = checked_for(model, cache, ids)
    x = through_layers(model, cache, ids, cache.length)
    cache.length += ids.shape[1]
    return unembed(model, x)
