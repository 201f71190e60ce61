"""Texts that come and go in a batch on a device: each is what it would be alone, and every page comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from closeness import assert_close
from devices import all_devices
from gpu_models import SMALL, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Mutant
from strategies import draw_ids, seeds

import neox.gpu as gpu
from neox.gpu import batching
from neox.gpu.batching import DeviceBackend, Steps
from neox.gpu.decode import CachedDecoder
from neox.gpu.device import Device
from neox.gpu.model import forward
from neox.gpu.paging import Holding
from neox.reference import batching as reference
from neox.reference.batching import Batch, Event, Failure, Job, Limits, Scores, Segment
from neox.reference.errors import InputError
from neox.reference.generate import Piece, Request, complete, gathered
from neox.reference.sampling import Sampling

CONFIG = replace(SMALL, num_hidden_layers=2, eos_token_id=7)
# float32 logits of two kinds of attention, whose sums are taken in different orders: some 200 roundings of 2^-24. In
# float16 what two kernels round can be neighbours: 8 roundings in a row, all the same way.
ROUNDED = {"float32": 1e-5, "float16": 8 * 2.0**-11}
LONGEST = 30  # prompt


@cache
def model(device: Device, dtype: str = "float32") -> gpu.Model:
    return gpu.to_device(drawn(CONFIG, 1, dtype), device, dtype)


@cache
def logits_after(device: Device, dtype: str, ids: tuple[int, ...]) -> np.ndarray:  # (V,)
    return forward(model(device, dtype), [ids])[0, -1]


class Checked(DeviceBackend):
    """Holds the logits of every text to a forward pass of all that it has read so far."""

    def __init__(self, device: Device, dtype: str, positions: int, size: int) -> None:
        super().__init__(model(device, dtype), positions, size)
        self.device, self.dtype = device, dtype
        self.read: dict[int, tuple[int, ...]] = {}  # of each text that is there
        self.opened: list[Holding] = []
        self.passed = 0  # positions that went through the model

    def open(self, capacity: int, ids: Sequence[int]) -> Holding | None:
        memory = super().open(capacity, ids)
        if memory is not None:
            assert memory.length <= len(ids)
            self.opened.append(memory)
        return memory

    def recall(self, memory: Holding, ids: Sequence[int]) -> int:
        length = super().recall(memory, ids)
        self.read[id(memory)] = tuple(map(int, ids[:length]))
        return length

    def close(self, memory: Holding) -> None:
        self.opened = [other for other in self.opened if other is not memory]
        super().close(memory)

    def advance(self, segments: Sequence[Segment[Holding]]) -> list[np.ndarray]:
        self.passed += sum(len(s.ids) for s in segments)
        found = super().advance(segments)
        for s, logits in zip(segments, found, strict=True):
            read = self.read[id(s.memory)] = (*self.read[id(s.memory)], *map(int, s.ids))
            assert s.memory.length == len(read)
            assert len(logits) == s.wanted
            for back, row in enumerate(logits[::-1]):
                exact = logits_after(self.device, self.dtype, read[: len(read) - back])
                assert_close(row, exact, ROUNDED[self.dtype])
        held = {page for memory in self.opened for page in memory.pages}
        assert len(held) + self.free_pages == self._pool.count
        return found

    @property
    def free_pages(self) -> int:
        return self._pool.free


@dataclass(frozen=True)
class Visit:
    length: int  # of the prompt
    common: int  # of it, as in the prompts of all others
    count: int  # tokens to add
    arrival: int  # step
    patience: int | None  # steps after which it is cancelled
    scored: bool

    def prompt(self, index: int, seed: int) -> tuple[int, ...]:
        common, own = draw_ids(CONFIG, 2, LONGEST, seed)[0], draw_ids(CONFIG, 1, LONGEST, seed + 1 + index)[0]
        return tuple(np.where(np.arange(self.length) < self.common, common[: self.length], own[: self.length]).tolist())


VISITS = st.lists(
    st.builds(
        Visit, st.integers(1, LONGEST), st.integers(0, LONGEST), st.integers(1, 4), st.integers(0, 8),
        st.none() | st.integers(0, 5), st.booleans(),
    ),
    min_size=1,
    max_size=6,
)  # fmt: skip
ROOM = st.integers(LONGEST + 3, 3 * LONGEST)  # for the longest text, or for a few


def check_visits(backend: Checked, visits: Sequence[Visit], limits: Limits, seed: int) -> dict[int, list[Event]]:
    batch, heard = Batch(backend, limits), dict[int, list[Event]]()
    leaving: dict[int, int] = {}
    for step in range(300):
        for i, visit in enumerate(visits):
            if step == visit.arrival:
                request = Request(visit.prompt(i, seed), visit.count)
                handle = batch.submit(Job(request, 0 if visit.scored else None))
                heard[handle] = []
                if visit.patience is not None:
                    leaving[handle] = step + visit.patience
        for handle in [handle for handle, when in leaving.items() if when == step]:
            batch.cancel(handle)
        for event in batch.step():
            assert not isinstance(event, Failure)
            heard[event.index].append(event)
        assert len(backend.opened) == batch.running <= limits.running
        assert batch.positions <= limits.positions
        if step > 10 and not batch.running + batch.waiting:
            break
    assert not backend.opened
    assert backend.free_pages * backend._pool.size >= limits.positions
    ended = {h for h, events in heard.items() for e in events if isinstance(e, Piece) and e.finish_reason is not None}
    assert ended | set(leaving) == set(range(len(visits)))
    return heard


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("device", all_devices()[:2])
@settings(max_examples=6)
@given(VISITS, ROOM, st.sampled_from((1, 4, 7)), st.integers(1, 4), st.integers(1, 40), seeds)
def test_every_text_is_as_alone(device, dtype, visits, positions, size, running, chunk, seed) -> None:
    check_visits(Checked(device, dtype, positions, size), visits, Limits(positions, running, 9, chunk), seed)


# One of each kind, on which mutants are tried: long and short, alike and not, scored, leaving early, waiting for room.
KINDS = [
    *(Visit(30, 21, 3, 0, None, False), Visit(9, 0, 4, 0, None, False), Visit(25, 25, 4, 1, None, False)),
    *(Visit(30, 9, 2, 3, 4, False), Visit(28, 22, 3, 3, None, True), Visit(5, 5, 4, 6, None, False)),
    *(Visit(30, 30, 2, 6, None, False), Visit(1, 0, 3, 7, None, False)),
]


def check_kinds() -> None:
    for positions, size, running, chunk in ((70, 4, 5, 20), (34, 5, 3, 40), (200, 4, 4, 9)):
        backend = Checked(all_devices()[0], "float32", positions, size)
        heard = check_visits(backend, KINDS, Limits(positions, running, 9, chunk), 3)
        (scores,) = (event for event in heard[4] if isinstance(event, Scores))
        assert len(scores.logprobs) == 27


def check_sharing() -> None:
    """What two texts have in common is computed once, whether the first is still there or not."""
    device = all_devices()[0]
    shared = Visit(30, 22, 4, 0, None, False)
    later, gone = replace(shared, arrival=1), replace(shared, arrival=9)
    for visits, running, chunk in (([shared, shared], 2, 30), ([shared, later], 2, 60), ([shared, gone], 1, 60)):
        backend = Checked(device, "float32", 100, 4)
        check_visits(backend, visits, Limits(100, running, 9, chunk), 3)
        assert backend.passed == 2 * 33 - 20  # five whole pages
    backend = Checked(device, "float32", 100, 4)
    check_visits(backend, [shared, replace(gone, scored=True)], Limits(100, 1, 9, 60), 3)
    assert backend.passed == 2 * 33  # logits of every position are wanted
    backend = Checked(device, "float32", 100, 4)
    check_visits(backend, [Visit(8, 8, 1, 0, None, False), Visit(8, 8, 1, 5, None, False)], Limits(100), 3)
    assert backend.passed == 8 + 4  # the last id of a prompt is read in any case


def check_room() -> None:
    """A text waits for pages that others hold, though positions are left, and joins the sooner if it shares some."""
    batch = Batch(DeviceBackend(model(all_devices()[0]), 40, 8), Limits(1000))
    handles = [batch.submit(Job(Request([i + 1] * 17, 2, ignore_eos=True))) for i in range(3)]  # three pages each
    heard = [[event.index for event in batch.step()] for _ in range(6)]
    assert heard == [[handle] for handle in handles for _ in range(2)]
    batch = Batch(DeviceBackend(model(all_devices()[0]), 40, 8), Limits(40))
    first, second, third = (batch.submit(Job(Request([5] * 17, 8, ignore_eos=True))) for _ in range(3))
    batch.step()
    assert (batch.running, batch.positions) == (1, 24)
    assert [event.index for _ in range(7) for event in batch.step()] == [first] * 7
    batch.step()
    assert (batch.running, batch.positions) == (1, 8)  # of 24, two pages lay there
    batch.step()
    assert batch.running == 2
    assert {event.index for _ in range(9) for event in batch.step()} == {second, third}


CHECKS = {"kinds": check_kinds, "sharing": check_sharing, "room": check_room}


@pytest.mark.parametrize("name", CHECKS)
def test_texts_in_pages(name: str) -> None:
    CHECKS[name]()


def of(module: Any, function: str, name: str, check: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, check, module, function, edits)


ADVANCED = "s.memory.length += len(s.ids)"
ONCE = "self._launches[len(ids)].compiled or {}.set({})"
FIRST_IDS = "cut.start, cut.start + s.wanted"
MUTANTS = [
    of(batching, "table_of", "the first text's pages for all", "kinds", ("= holding.pages", "= holdings[0].pages")),
    of(batching, "table_of", "the last page forgotten", "kinds", ("= holding.pages", "= [*holding.pages[:-1], 0]")),
    of(batching, "table_of", "pages in reverse", "kinds", ("= holding.pages", "= holding.pages[::-1]")),
    of(DeviceBackend, "_together", "all of one text", "kinds", ("np.arange(len(seg", "0 * np.arange(len(seg")),
    of(DeviceBackend, "advance", "positions from 0", "kinds", ("+ s.memory.length", "")),
    of(DeviceBackend, "advance", "places not reserved", "kinds", ("self._pool.reserve(s.memory, len(s.ids))", "pass")),
    of(DeviceBackend, "advance", "no names", "sharing", ("self._pool.filled(s.memory, s.ids)", ADVANCED)),
    of(DeviceBackend, "_together", "logits after the first ids", "kinds", ("cut.stop - s.wanted, cut.stop", FIRST_IDS)),
    of(DeviceBackend, "advance", "logits of the first text", "kinds", ("rows[i : i + s.wanted]", "rows[: s.wanted]")),
    of(
        Steps,
        "logits",
        "the first ids for ever",
        "kinds",
        ("step.ids.set(ids)", ONCE.format("step.ids", "ids")),
    ),
    of(Steps, "logits", "positions kept", "kinds", ("step.place.positions.set(positions)", "pass")),
    of(
        Steps,
        "logits",
        "pages kept",
        "kinds",
        ("self._table[: len(ids)].set(table)", ONCE.format("self._table[: len(ids)]", "table")),
    ),
    of(Steps, "logits", "launches of any number", "kinds", ("not in self._launches", "!= 1 or not self._launches")),
    of(Steps, "logits", "memory for the first texts only", "kinds", ("> self._most", "> self._most == 0")),
    of(
        Steps,
        "_make_room",
        "texts in reverse",
        "kinds",
        ("np.int32))\n    self._table", "np.int32)[::-1])\n    self._table"),
    ),
    of(DeviceBackend, "open", "nothing shared at once", "room", ("capacity, ids)", "capacity, ())")),
    of(DeviceBackend, "recall", "nothing shared later", "sharing", ("self._pool.recall(memory, ids)", "memory.length")),
    of(DeviceBackend, "close", "pages kept", "kinds", ("self._pool.close(memory)", "pass")),
    of(reference, "beginning", "the whole prompt passed over", "sharing", ("[:-1]", "")),
    of(reference, "beginning", "passed over though logits are wanted", "sharing", (" is None", " is not Ellipsis")),
    of(Batch, "_next_to_advance", "read again", "kinds", ("text.read = text.recalled =", "text.recalled =")),
    of(Batch, "_next_to_advance", "counted twice", "room", ("text.read = text.recalled =", "text.read =")),
    of(Batch, "_next_to_advance", "asked again", "kinds", ("if text.read == 0:", "if text.read < 9:")),
    of(Batch, "_join", "no room, no matter", "room", ("if text.memory is None:", "if False:")),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_batch_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.install(monkeypatch)
    with pytest.raises((AssertionError, InputError, ValueError, IndexError, KeyError, RuntimeError, ZeroDivisionError)):
        CHECKS[mutant.check]()


@pytest.mark.parametrize("dtype", ROUNDED)
def test_texts_are_those_of_the_lone_decoder(dtype: str) -> None:
    device, start = all_devices()[0], draw_ids(CONFIG, 1, 20, 5)[0].tolist()
    asked = [Request([*start[:length], i], 9, Sampling(i % 2, seed=i)) for i, length in enumerate((20, 3, 20, 11, 20))]
    batch = Batch(DeviceBackend(model(device, dtype), 90, 4), Limits(90, 3, 9, 16))
    for request in asked:
        batch.submit(Job(request))
    events = [event for _ in range(40) for event in batch.step()]
    found = gathered((event for event in events if isinstance(event, Piece)), len(asked))
    expected = [complete(CachedDecoder(model(device, dtype)), [request])[0] for request in asked]
    assert [(text.ids, text.finish_reason) for text in found] == [(text.ids, text.finish_reason) for text in expected]


def test_pages_that_a_failed_step_left_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        raise RuntimeError("lost")

    backend, job = Checked(all_devices()[0], "float32", 60, 4), Job(Request([3] * 20, 1))
    batch = Batch(backend, Limits(60))
    batch.submit(job)
    with monkeypatch.context() as patch:
        patch.setattr(batching, "through_layers", breaks)
        with pytest.raises(RuntimeError, match="lost"):
            batch.step()
    assert (batch.running, backend.free_pages, backend.opened) == (0, 15, [])
    for passed in (20 + 20, 20 + 20 + 4):  # once in vain, then all of it, then what follows four whole pages
        batch.submit(job)
        batch.step()
        assert backend.passed == passed


@pytest.mark.parametrize(("dtype", "launches"), [("float16", 3), ("float32", 10)])
def test_a_step_is_captured_once_for_each_number_of_texts(dtype: str, launches: int) -> None:
    """Beside the layers: embedding, norm and product."""
    backend = DeviceBackend(model(all_devices()[0], dtype), 200, 8)
    batch = Batch(backend, Limits(200))
    for i in range(5):
        batch.submit(Job(Request([i] * 3, 3 + 2 * (i > 2), ignore_eos=True)))
    for _ in range(9):
        batch.step()
    graphs = {count: launches.graph for count, launches in backend._steps._launches.items()}
    assert set(graphs) == {5, 2}
    for graph in graphs.values():
        assert graph is not None
        assert len(graph.captured.launches) == 3 + CONFIG.num_hidden_layers * launches


def test_what_can_never_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = all_devices()[0]
    backend = DeviceBackend(model(device), 9, 4)  # three pages
    with pytest.raises(InputError, match="13 positions, but the cache holds 12"):
        backend.open(13, ())
    assert backend.open(12, ()) is not None
    assert backend.open(1, ()) is None
    monkeypatch.setattr(type(device), "free_memory", lambda _: 9600)  # 1920 bytes a position
    with pytest.raises(
        InputError, match=r"of 12 positions take 2.3e-05 GB, and the device has 9.6e-06 GB free, enough for 5 positions"
    ):
        DeviceBackend(model(device), 9, 4)
