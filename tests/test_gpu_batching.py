"""Texts that come and go in a batch on a device: each is what it would be alone, and every row comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from closeness import assert_close
from devices import all_devices
from gpu_models import SMALL, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import draw_ids, seeds

import neox.gpu as gpu
from neox.gpu.batching import DeviceBackend, Row
from neox.gpu.device import Device
from neox.gpu.model import forward
from neox.reference.batching import Batch, Job, Limits, Segment
from neox.reference.errors import InputError
from neox.reference.generate import Piece, Request

CONFIG = replace(SMALL, num_hidden_layers=2, eos_token_id=7)
# float32 logits of two kinds of attention, whose sums are taken in different orders: some 200 roundings of 2^-24.
FLOAT32 = 1e-5


@cache
def model(device: Device, dtype: str = "float32") -> gpu.Model:
    return gpu.to_device(drawn(CONFIG, 1, dtype), device, dtype)


@cache
def logits_after(device: Device, ids: tuple[int, ...]) -> np.ndarray:  # (V,)
    return forward(model(device), [ids])[0, -1]


class Checked(DeviceBackend):
    """Holds the logits of every text to a forward pass of all that it has read so far."""

    def __init__(self, device: Device, rows: int) -> None:
        super().__init__(model(device), rows, CONFIG.max_position_embeddings)
        self.device, self.read = device, dict[int, tuple[int, ...]]()
        self.open_rows: set[int] = set()

    def open(self, capacity: int) -> Row:
        row = super().open(capacity)
        assert row.index not in self.open_rows
        self.open_rows.add(row.index)
        self.read[row.index] = ()
        return row

    def close(self, memory: Row) -> None:
        self.open_rows.remove(memory.index)
        super().close(memory)

    def advance(self, segments: Sequence[Segment[Row]]) -> list[np.ndarray]:
        found = super().advance(segments)
        for s, logits in zip(segments, found, strict=True):
            read = self.read[s.memory.index] = (*self.read[s.memory.index], *map(int, s.ids))
            assert s.memory.length == len(read)
            assert len(logits) == s.wanted
            for back, row in enumerate(logits[::-1]):
                assert_close(row, logits_after(self.device, read[: len(read) - back]), FLOAT32)
        return found


VISITS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 4), st.integers(0, 5), st.none() | st.integers(0, 5), st.booleans()),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("device", all_devices()[:2])
@settings(max_examples=6)
@given(VISITS, st.integers(1, 3), st.integers(1, 30), seeds)
def test_every_text_is_as_alone(device: Device, visits: list[tuple], rows: int, chunk: int, seed: int) -> None:
    """visits: length of a prompt, tokens to add, step of arrival, steps after which it is cancelled, scored or not."""
    backend = Checked(device, rows)
    batch = Batch(backend, Limits(rows * CONFIG.max_position_embeddings, rows, 9, chunk))
    cancelled: dict[int, int] = {}
    finished: set[int] = set()
    for step in range(300):
        for i, (length, count, arrival, patience, scored) in enumerate(visits):
            if step == arrival:
                prompt = tuple(draw_ids(CONFIG, 1, length, seed + i)[0].tolist())
                handle = batch.submit(Job(Request(prompt, count), 0 if scored else None))
                if patience is not None:
                    cancelled[handle] = step + patience
        for handle in [handle for handle, when in cancelled.items() if when == step]:
            batch.cancel(handle)
        events = batch.step()
        finished |= {e.index for e in events if isinstance(e, Piece) and e.finish_reason is not None}
        assert len(backend.open_rows) == batch.running <= rows
        if step > 10 and not batch.running + batch.waiting:
            break
    assert not backend.open_rows
    assert finished | set(cancelled) == set(range(len(visits)))


def test_a_row_cannot_be_outgrown_nor_shared() -> None:
    backend = DeviceBackend(model(all_devices()[0]), 2, 9)
    with pytest.raises(InputError, match="10 positions, but a text can have 9 here"):
        backend.open(10)
    first, second = backend.open(9), backend.open(1)
    assert {first.index, second.index} == {0, 1}
    with pytest.raises(InputError, match="all rows of the cache are taken"):
        backend.open(1)
    backend.close(first)
    assert backend.open(3) == Row(first.index)
