"""Texts that come and go in a batch, on a device: the backend of reference/batching.py over a cache of pages.

Keys and values lie in pages that texts with the same beginning share (paging.py). A step passes the new positions of
all texts through the model together. Where each has one, it is a step of decode.py: ids, positions, pages and how each
text is sampled lie in device memory, so the launches for as many texts are captured once, whichever they are. The
device goes on by itself: it is told only what changed otherwise, as when texts come and go.

Ids are chosen on the device, and logits come back only of texts for which they are wanted. What a text's seed gives
depends on no other text, and not on whether its logits are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from neox.gpu import ops
from neox.gpu.decode import (
    Cache,
    Step,
    new_pages,
    new_partial,
    new_step,
    run_step,
    through_layers,
    trial_of,
)
from neox.gpu.device import Array
from neox.gpu.launches import Launches
from neox.gpu.model import MANY, Model, new_workspace, placed, unembed
from neox.gpu.paging import Holding, PagePool
from neox.gpu.sampling import Samplings, draw, new_samplings, on_device
from neox.reference.batching import Chosen, Segment, cuts
from neox.reference.config import Config
from neox.reference.sampling import GREEDY, Sampling

PAGE = 64  # positions: as many keys as attention takes at a time


def table_of(holdings: Sequence[Holding], width: int) -> NDArray[np.int32]:  # (B,P)
    """The pages of each text; -1 where it has fewer than `width`."""
    table = np.full((len(holdings), width), -1, np.int32)
    for row, holding in zip(table, holdings, strict=True):
        row[: len(holding.pages)] = holding.pages
    return table


@dataclass
class Known:
    """Device memory of which the host knows what its first rows hold, so as not to copy the same again."""

    array: Array
    values: NDArray | None = None  # None: nothing is known

    def set(self, values: NDArray) -> None:
        if self.values is None or not np.array_equal(self.values, values):
            self.array[: len(values)].set(values)
            self.values = values


def fetched(rows: Array) -> NDArray:
    """A copy in host memory; of none, nothing is copied and nothing waited for."""
    return rows.get() if rows.size else np.empty(rows.shape, rows.dtype)


class Steps:
    """Steps of one position of each text, over memory for as many texts as have come at once, or a few more."""

    def __init__(self, model: Model, keys: Array, values: Array, width: int, allowed: Array) -> None:
        """width: pages of the longest text. allowed: uint8 (V), 0 for ids that must not be chosen."""
        self._model, self._width = model, width
        self._keys, self._values = keys, values
        self._allowed = allowed
        self._most = 0  # texts that there is memory for
        self._step: Step
        self._ids: Known
        self._positions: Known
        self._table: Known  # int32 (most,P)
        self._samplings: Samplings
        self._sampled: Sequence[Sampling]  # what these are
        self._launches: dict[int, Launches] = {}  # by the number of texts

    def run(
        self, ids: NDArray, positions: NDArray, table: NDArray, samplings: Sequence[Sampling]
    ) -> tuple[Array, NDArray]:
        """2 x int32 (N), (N,P) -> the logits float32 (N,V), until the next step, and the ids int32 (N) chosen."""
        count = len(ids)
        if count > self._most:
            self._make_room(1 << (count - 1).bit_length())  # or each text more would have all captured again
        if count not in self._launches:
            self._launches[count] = self._launches_of(count)
        self._tell(ids, positions, table, samplings)
        self._ids.values = self._positions.values = None  # in case that the step fails
        self._launches[count].run()
        chosen = self._step.ids[:count].get()
        self._ids.values, self._positions.values = chosen, positions + 1
        return self._step.logits[:count], chosen

    def _tell(self, ids: NDArray, positions: NDArray, table: NDArray, samplings: Sequence[Sampling]) -> None:
        """What is not there already. While the same texts go on, nothing is copied but a new page's number."""
        self._ids.set(ids)
        self._positions.set(positions)
        self._table.set(table)
        if samplings != self._sampled:
            self._samplings.set(samplings)
            self._sampled = samplings

    def _make_room(self, most: int) -> None:
        """All of it, or nothing changes: a device that has no memory left serves fewer texts as before."""
        device = self._model.device
        step = new_step(self._model, most, self._model.config.max_position_embeddings)
        step.place.texts.set(np.arange(most, dtype=np.int32))
        table, samplings = device.empty((most, self._width), np.int32), new_samplings(device, most)
        self._most, self._launches = most, {}
        self._step, self._ids, self._positions = step, Known(step.ids), Known(step.place.positions)
        self._table, self._samplings, self._sampled = Known(table), samplings, []

    def _launches_of(self, count: int) -> Launches:
        """Of fewer texts keys are shared out among more blocks."""
        among = new_partial(self._model, count, self._model.config.max_position_embeddings)
        cache = Cache(self._keys, self._values, self._table.array[:count])
        step = replace(self._step.first(count), partial=among)
        launch = partial(run_step, self._model, cache, step, self._allowed, samplings=self._samplings)
        return Launches(self._model.device, launch, trial_of(self._model, step))


class DeviceBackend:
    """A model on a device with room for texts of `positions` together, whole pages of `size` at least."""

    def __init__(self, model: Model, positions: int, size: int = PAGE) -> None:
        """InputError if the device has not enough memory."""
        self._model = model
        self._pool = PagePool(-(-positions // size), size)
        self._keys, self._values = new_pages(model, self._pool.count, size, f"{self._pool.count * size} positions")
        self._width = -(-model.config.max_position_embeddings // size)
        self._allowed = Known(model.device.empty(model.config.vocab_size, np.uint8))
        self._steps = Steps(model, self._keys, self._values, self._width, self._allowed.array)

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
        return [logits for logits, _ in self.choose(segments, np.ones(self.config.vocab_size, bool))]

    def choose(self, segments: Sequence[Segment[Holding]], allowed: NDArray) -> list[Chosen]:
        """The same, and ids, which are drawn by numbers of the device. ValueError for a repetition penalty."""
        for s in segments:
            self._pool.reserve(s.memory, len(s.ids))
        ids = np.concatenate([np.asarray(s.ids, np.int32) for s in segments])
        positions = np.concatenate([np.arange(len(s.ids), dtype=np.int32) + s.memory.length for s in segments])
        table = table_of([s.memory for s in segments], self._width)
        self._allowed.set(allowed.astype(np.uint8))
        one_each = len(ids) == len(segments) <= MANY
        found = (self._one_each if one_each else self._together)(segments, ids, positions, table)
        for s in segments:
            self._pool.filled(s.memory, s.ids)
        return found

    def _one_each(
        self, segments: Sequence[Segment[Holding]], ids: NDArray, positions: NDArray, table: NDArray
    ) -> list[Chosen]:
        samplings = [s.sampling or GREEDY for s in segments]
        logits, chosen = self._steps.run(ids, positions, table, samplings)
        return [
            (fetched(logits[i : i + s.wanted]), None if s.sampling is None else int(chosen[i]))
            for i, s in enumerate(segments)
        ]

    def _together(
        self, segments: Sequence[Segment[Holding]], ids: NDArray, positions: NDArray, table: NDArray
    ) -> list[Chosen]:
        """Any numbers of positions, end to end, as prompts are read."""
        model, device, bounds = self._model, self._model.device, cuts(len(s.ids) for s in segments)
        texts = np.repeat(np.arange(len(segments), dtype=np.int32), [len(s.ids) for s in segments])
        place, mix = placed(model, texts, positions)
        work, cache = new_workspace(model, len(ids)), Cache(self._keys, self._values, device.array(table))
        through_layers(model, cache, device.array(ids), place, work, mix)
        wanted = [np.arange(cut.stop - s.wanted, cut.stop) for s, cut in zip(segments, bounds, strict=True)]
        logits = fetched(self._logits(work.x, np.concatenate(wanted)))
        ends = {cut.stop - 1: s.sampling for s, cut in zip(segments, bounds, strict=True) if s.sampling is not None}
        chosen = self._drawn(work.x, ends, positions)
        return [(logits[cut], chosen.get(b.stop - 1)) for cut, b in zip(cuts(map(len, wanted)), bounds, strict=True)]

    def _drawn(self, x: Array, ends: Mapping[int, Sampling], positions: NDArray) -> dict[int, int]:
        """The id that follows each of these rows of x, by how it is to be chosen."""
        if not ends:
            return {}
        device, count, rows = self._model.device, len(ends), np.array([*ends])
        ids, numbers = device.empty(count, np.int32), device.empty(count, np.uint64)
        texts, samplings = device.array(np.arange(count, dtype=np.int32)), on_device([*ends.values()], device)
        last = device.array(positions[rows])
        draw(self._logits(x, rows), self._allowed.array, samplings, texts, last, numbers, ids)
        return dict(zip(ends, ids.get().tolist(), strict=True))

    def _logits(self, x: Array, rows: NDArray) -> Array:  # (N,C), (M) -> (M,V)
        model, device, C, V = self._model, self._model.device, self.config.hidden_size, self.config.vocab_size
        logits = device.empty((len(rows), V), np.float32)
        if len(rows):
            picked = device.empty((len(rows), C), np.float32)
            ops.embedding(
                device.array(rows.astype(np.int32)), x, picked
            )  # rows are picked as those of an embedding are
            unembed(model, picked, device.empty((len(rows), C), model.dtype), logits)
        return logits
