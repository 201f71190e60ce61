"""Texts that come and go in a batch, on a device: the backend of reference/batching.py over a cache of pages.

Keys and values lie in pages that texts with the same beginning share (paging.py); where each text's pages are, the
kernels are told anew at each step. A step passes the new positions of all texts through the model together. Where each
has one, it is a step of decode.py: what texts come and go lies in device memory, so the launches for as many texts are
captured once, whichever they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from neox.gpu import ops
from neox.gpu.decode import (
    Cache,
    Step,
    new_pages,
    new_partial,
    new_step,
    step_through_layers,
    through_layers,
    trial_of,
)
from neox.gpu.device import Array
from neox.gpu.launches import Launches
from neox.gpu.model import MANY, Model, new_workspace, placed, unembed
from neox.gpu.paging import Holding, PagePool
from neox.reference.batching import Segment, cuts
from neox.reference.config import Config

PAGE = 64  # positions: as many keys as attention takes at a time


def table_of(holdings: Sequence[Holding], width: int) -> NDArray[np.int32]:  # (B,P)
    """The pages of each text; -1 where it has fewer than `width`."""
    table = np.full((len(holdings), width), -1, np.int32)
    for row, holding in zip(table, holdings, strict=True):
        row[: len(holding.pages)] = holding.pages
    return table


class Steps:
    """Steps of one position of each text, over memory for as many texts as have come at once, or a few more."""

    def __init__(self, model: Model, keys: Array, values: Array, width: int) -> None:
        """width: pages of the longest text."""
        self._model, self._width = model, width
        self._keys, self._values = keys, values
        self._most = 0  # texts that there is memory for
        self._step: Step
        self._table: Array  # int32 (most,P)
        self._launches: dict[int, Launches] = {}  # by the number of texts

    def logits(self, ids: NDArray, positions: NDArray, table: NDArray) -> NDArray:  # 2 x int32 (N), (N,P) -> (N,V)
        if len(ids) > self._most:
            self._make_room(1 << (len(ids) - 1).bit_length())  # or each text more would have all captured again
        if len(ids) not in self._launches:
            self._launches[len(ids)] = self._launches_of(len(ids))
        step = self._step.first(len(ids))
        step.ids.set(ids)
        step.place.positions.set(positions)
        self._table[: len(ids)].set(table)
        self._launches[len(ids)].run()
        return step.logits.get()

    def _make_room(self, most: int) -> None:
        self._most, self._launches = most, {}
        self._step = new_step(self._model, most, self._model.config.max_position_embeddings)
        self._step.place.texts.set(np.arange(most, dtype=np.int32))
        self._table = self._model.device.empty((most, self._width), np.int32)

    def _launches_of(self, count: int) -> Launches:
        """Of fewer texts keys are shared out among more blocks."""
        partial = new_partial(self._model, count, self._model.config.max_position_embeddings)
        cache = Cache(self._keys, self._values, self._table[:count])
        step = replace(self._step.first(count), partial=partial)

        def launch() -> None:
            step_through_layers(self._model, cache, step)
            unembed(self._model, step.work.x, step.work.normed, step.logits)

        return Launches(self._model.device, launch, trial_of(self._model, step))


class DeviceBackend:
    """A model on a device with room for texts of `positions` together, whole pages of `size` at least."""

    def __init__(self, model: Model, positions: int, size: int = PAGE) -> None:
        """InputError if the device has not enough memory."""
        self._model = model
        self._pool = PagePool(-(-positions // size), size)
        self._keys, self._values = new_pages(model, self._pool.count, size, f"{self._pool.count * size} positions")
        self._width = -(-model.config.max_position_embeddings // size)
        self._steps = Steps(model, self._keys, self._values, self._width)

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
        for s in segments:
            self._pool.reserve(s.memory, len(s.ids))
        ids = np.concatenate([np.asarray(s.ids, np.int32) for s in segments])
        positions = np.concatenate([np.arange(len(s.ids), dtype=np.int32) + s.memory.length for s in segments])
        table = table_of([s.memory for s in segments], self._width)
        if len(ids) == len(segments) <= MANY:
            rows = self._steps.logits(ids, positions, table)
            logits = [rows[i : i + s.wanted] for i, s in enumerate(segments)]
        else:
            logits = self._together(segments, ids, positions, table)
        for s in segments:
            self._pool.filled(s.memory, s.ids)
        return logits

    def _together(
        self, segments: Sequence[Segment[Holding]], ids: NDArray, positions: NDArray, table: NDArray
    ) -> list[NDArray]:
        """Any numbers of positions, end to end, as prompts are read."""
        model, device, bounds = self._model, self._model.device, cuts(len(s.ids) for s in segments)
        texts = np.repeat(np.arange(len(segments), dtype=np.int32), [len(s.ids) for s in segments])
        place, mix = placed(model, texts, positions)
        work, cache = new_workspace(model, len(ids)), Cache(self._keys, self._values, device.array(table))
        through_layers(model, cache, device.array(ids), place, work, mix)
        last = [np.arange(cut.stop - s.wanted, cut.stop) for s, cut in zip(segments, bounds, strict=True)]
        logits = self._logits(work.x, np.concatenate(last).astype(np.int32))
        return [logits[cut] for cut in cuts(map(len, last))]

    def _logits(self, x: Array, rows: NDArray) -> NDArray:  # (N,C), (M) -> (M,V)
        model, device, C, V = self._model, self._model.device, self.config.hidden_size, self.config.vocab_size
        if not len(rows):
            return np.empty((0, V), np.float32)
        picked = device.empty((len(rows), C), np.float32)
        ops.embedding(device.array(rows), x, picked)  # rows of x are picked as rows of an embedding are
        logits = device.empty((len(rows), V), np.float32)
        unembed(model, picked, device.empty((len(rows), C), model.dtype), logits)
        return logits.get()
