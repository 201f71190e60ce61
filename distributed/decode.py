"""Decoding on a shard with a cache: reference/decode.py over several ranks.

Keys and values are those of the rank's own heads, so the cache is cut like the heads are, and nothing of it travels. A
step of N texts makes the collectives of model.py once, for one position of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from neox.distributed.model import Shard, embed, layer
from neox.reference.config import Config
from neox.reference.decode import Cache, checked_for, keep_rows, mix_over, query_blocks
from neox.reference.generate import padded
from neox.reference.model import Array, rotary_tables, unembed
from neox.reference.prefill import CHUNK


class RankDecoder(Protocol):
    """A rank's share in decoding: as Decoder of reference/generate.py, but the logits are of the rank's own ids.

    All ranks are asked for the same, in the same order.
    """

    @property
    def config(self) -> Config: ...

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Array:
        """Read the prompts; (B, ids of this rank)."""
        ...

    def step(self, ids: Sequence[int]) -> Array:
        """Append one id to each text; (B, ids of this rank)."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        ...


def new_cache(shard: Shard, batch: int, capacity: int, padding: Array) -> Cache:
    """An empty cache for this rank's heads."""
    config, dtype = shard.config, shard.model.dtype
    dense = shard.model.params.layers[0].attention.dense.weight
    heads = dense.shape[1] // config.head_dim
    shape = (config.num_hidden_layers, batch, heads, capacity, config.head_dim)
    return Cache(np.empty(shape, dtype), np.empty(shape, dtype), padding)


def extend(shard: Shard, cache: Cache, ids: Array) -> Array:
    """Append ids to the text of every row; what the last layer makes of them.  (B,T) -> (B,T,C)"""
    start, length = cache.length, ids.shape[1]
    positions = np.arange(start, start + length) - cache.padding[:, None]  # (B,T)
    rotary = rotary_tables(shard.config, np.maximum(positions, 0))
    blocks = query_blocks(cache, start, length)
    x = embed(shard, ids)
    for index in range(shard.config.num_hidden_layers):
        x = layer(shard, index, x, rotary, mix_over(cache, index, start, blocks))
    cache.length += length
    return x


class ShardDecoder:
    """A shard of the reference model and the texts that it is in the middle of: a RankDecoder."""

    def __init__(self, shard: Shard, progress: Callable[[int], object] = lambda positions: None) -> None:
        """progress is called while prompts are read, with the number of positions that were."""
        self._shard = shard
        self._progress = progress
        self._cache: Cache

    @property
    def config(self) -> Config:
        return self._shard.config

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Array:
        ids, padding = padded(prompts)
        self._cache = new_cache(self._shard, len(prompts), capacity, padding)
        for first in range(0, ids.shape[1], CHUNK):
            x = self._extend(ids[:, first : first + CHUNK])
            self._progress(x.shape[1])
        return self._logits(x)

    def step(self, ids: Sequence[int]) -> Array:
        return self._logits(self._extend(np.array(ids)[:, None]))

    def keep(self, rows: Sequence[int]) -> None:
        self._cache = keep_rows(self._cache, rows)

    def _extend(self, ids: Array) -> Array:
        return extend(self._shard, self._cache, checked_for(self._shard.model, self._cache, ids))

    def _logits(self, x: Array) -> Array:  # (B,T,C) -> (B, ids of this rank)
        return unembed(self._shard.model, x[:, -1:])[:, 0]
