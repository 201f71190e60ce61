"""Texts that come and go in a batch, on a device: the backend of reference/batching.py over the cache of decode.py.

Each text has a row of the cache to itself while it is there. A step passes the new positions of all texts through the
model together; where each has one, their attention is that of decoding, else that of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neox.gpu import ops
from neox.gpu.decode import BLOCKS, SMALLEST_SHARE, new_cache, through_layers
from neox.gpu.device import Array
from neox.gpu.model import Mix, Model, Place, mix_each, new_workspace, placed, unembed
from neox.reference.batching import Segment, cuts
from neox.reference.config import Config
from neox.reference.errors import InputError


@dataclass
class Row:
    """A text's place in the cache."""

    index: int
    length: int = 0  # positions that are filled


class DeviceBackend:
    """A model on a device with room for `rows` texts of up to `capacity` positions each."""

    def __init__(self, model: Model, rows: int, capacity: int) -> None:
        """InputError if the device has not enough memory."""
        self._model = model
        self._cache = new_cache(model, rows, capacity)
        self._free = list(range(rows))[::-1]

    @property
    def config(self) -> Config:
        return self._model.config

    @property
    def capacity(self) -> int:
        return self._cache.keys.shape[3]

    def open(self, capacity: int) -> Row:
        """InputError if a text is to become longer than a row, or if all rows are taken."""
        if capacity > self.capacity:
            raise InputError(f"{capacity} positions, but a text can have {self.capacity} here")
        if not self._free:
            raise InputError("all rows of the cache are taken")
        return Row(self._free.pop())

    def close(self, memory: Row) -> None:
        self._free.append(memory.index)

    def advance(self, segments: Sequence[Segment[Row]]) -> list[NDArray]:
        """Logits in float32, (wanted,V) of each segment."""
        lengths = [len(s.ids) for s in segments]
        texts = np.repeat(np.array([s.memory.index for s in segments], np.int32), lengths)
        positions = np.concatenate([np.arange(len(s.ids), dtype=np.int32) + s.memory.length for s in segments])
        x = self._through_layers(np.concatenate([np.asarray(s.ids, np.int32) for s in segments]), texts, positions)
        for s, length in zip(segments, lengths, strict=True):
            s.memory.length += length
        last = [np.arange(cut.stop - s.wanted, cut.stop) for s, cut in zip(segments, cuts(lengths), strict=True)]
        logits = self._logits(x, np.concatenate(last).astype(np.int32))
        return [logits[cut] for cut in cuts(map(len, last))]

    def _through_layers(self, ids: NDArray, texts: NDArray, positions: NDArray) -> Array:  # 3 x (N) -> (N,C)
        model, device = self._model, self._model.device
        alone = len(set(texts.tolist())) == len(texts)
        place, mix = self._one_each(texts, positions) if alone else placed(model, texts, positions)
        work = new_workspace(model, len(ids))
        through_layers(model, self._cache, device.array(ids), place, work, mix)
        return work.x

    def _one_each(self, texts: NDArray, positions: NDArray) -> tuple[Place, Mix]:
        """One position of each text: its keys are shared out, so that few texts keep the whole device busy."""
        device, heads = self._model.device, self.config.num_attention_heads
        splits = max(1, min(BLOCKS // (len(texts) * heads), self.capacity // SMALLEST_SHARE))
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
