"""Texts that come and go in a batch, on a device: the backend of reference/batching.py over a cache of pages.

Keys and values lie in pages that texts with the same beginning share (paging.py); where each text's pages are, the
kernels are told anew at each step. A step passes the new positions of all texts through the model together; where each
has one, their attention is that of decoding, else that of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from neox.gpu import ops
from neox.gpu.decode import BLOCKS, SMALLEST_SHARE, Cache, through_layers
from neox.gpu.device import Array
from neox.gpu.model import Mix, Model, Place, mix_each, new_workspace, placed, unembed
from neox.gpu.paging import Holding, PagePool
from neox.reference.batching import Segment, cuts
from neox.reference.config import Config
from neox.reference.errors import InputError

PAGE = 64  # positions: as many keys as attention takes at a time


def new_pages(model: Model, count: int, size: int) -> tuple[Array, Array]:
    """Keys and values of all layers, 2 x (L,pages,H,S,D). InputError if the device has not enough memory."""
    config, device = model.config, model.device
    shape = (config.num_hidden_layers, count, config.num_attention_heads, size, config.head_dim)
    position = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize  # bytes of one
    needed, free = count * size * position, device.free_memory()
    if needed > free:
        raise InputError(
            f"the keys and values of {count * size} positions take {needed / 1e9:.3g} GB, and the device has "
            f"{free / 1e9:.3g} GB free: {free // position} would fit"
        )
    return device.empty(shape, model.dtype), device.empty(shape, model.dtype)


def table_of(holdings: Sequence[Holding]) -> NDArray[np.int32]:  # (B,P)
    """The pages of each text; -1 where it has fewer than others."""
    table = np.full((len(holdings), max(len(h.pages) for h in holdings)), -1, np.int32)
    for row, holding in zip(table, holdings, strict=True):
        row[: len(holding.pages)] = holding.pages
    return table


class DeviceBackend:
    """A model on a device with room for texts of `positions` together, whole pages of `size` at least."""

    def __init__(self, model: Model, positions: int, size: int = PAGE) -> None:
        """InputError if the device has not enough memory."""
        self._model = model
        self._pool = PagePool(-(-positions // size), size)
        self._keys, self._values = new_pages(model, self._pool.count, size)

    @property
    def config(self) -> Config:
        return self._model.config

    def open(self, capacity: int, ids: Sequence[int]) -> Holding | None:
        """InputError if a text is to become longer than all pages together."""
        return self._pool.open(capacity, ids)

    def recall(self, memory: Holding, ids: Sequence[int]) -> int:
        """Whole pages, of texts that are there or were there lately."""
        return self._pool.recall(memory, ids)

    def close(self, memory: Holding) -> None:
        self._pool.close(memory)

    def advance(self, segments: Sequence[Segment[Holding]]) -> list[NDArray]:
        """Logits in float32, (wanted,V) of each segment."""
        lengths = [len(s.ids) for s in segments]
        for s, length in zip(segments, lengths, strict=True):
            self._pool.reserve(s.memory, length)
        x = self._through_layers(segments)
        last = [np.arange(cut.stop - s.wanted, cut.stop) for s, cut in zip(segments, cuts(lengths), strict=True)]
        logits = self._logits(x, np.concatenate(last).astype(np.int32))
        for s in segments:
            self._pool.filled(s.memory, s.ids)
        return [logits[cut] for cut in cuts(map(len, last))]

    def _through_layers(self, segments: Sequence[Segment[Holding]]) -> Array:  # (N,C)
        """What the last layer makes of the segments' ids, end to end; their pages are filled."""
        model, device, lengths = self._model, self._model.device, [len(s.ids) for s in segments]
        ids = np.concatenate([np.asarray(s.ids, np.int32) for s in segments])
        texts = np.repeat(np.arange(len(segments), dtype=np.int32), lengths)
        positions = np.concatenate([np.arange(len(s.ids), dtype=np.int32) + s.memory.length for s in segments])
        cache = Cache(self._keys, self._values, device.array(table_of([s.memory for s in segments])))
        place, mix = placed(model, texts, positions) if max(lengths) > 1 else self._one_each(texts, positions)
        work = new_workspace(model, len(ids))
        through_layers(model, cache, device.array(ids), place, work, mix)
        return work.x

    def _one_each(self, texts: NDArray, positions: NDArray) -> tuple[Place, Mix]:
        """One position of each text: its keys are shared out, so that few texts keep the whole device busy."""
        device, heads = self._model.device, self.config.num_attention_heads
        splits = max(1, min(BLOCKS // (len(texts) * heads), (int(positions.max()) + 1) // SMALLEST_SHARE))
        place = Place(device.array(texts), device.array(positions))
        return place, mix_each(place, device.empty((len(texts), heads, splits, self.config.head_dim + 2), np.float32))

    def _logits(self, x: Array, rows: NDArray) -> NDArray:  # (N,C), (M) -> (M,V)
        model, device, C, V = self._model, self._model.device, self.config.hidden_size, self.config.vocab_size
        if not len(rows):
            return np.empty((0, V), np.float32)
        picked = device.empty((len(rows), C), np.float32)
        ops.embedding(device.array(rows), x, picked)  # rows of x are picked as rows of an embedding are
        logits = device.empty((len(rows), V), np.float32)
        unembed(model, picked, device.empty((len(rows), C), model.dtype), logits)
        return np.array(logits.get())
