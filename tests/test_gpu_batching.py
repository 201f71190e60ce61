"""Texts that come and go in a batch on a device: each is what it would be alone, and every page comes back.

Ids are chosen on the device, by numbers of the text's seed and of the position: no others' seed, place in the batch or
time of arrival changes them, and nothing else is copied to the host than is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
from closeness import assert_close
from devices import all_devices, on_a_card, stopped_by_the_host
from gpu_models import SMALL, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Mutant
from strategies import draw_ids, seeds

import neox.gpu as gpu
from neox.gpu import batching, ops
from neox.gpu.batching import DeviceBackend, Known, Steps
from neox.gpu.device import Array, Device
from neox.gpu.model import forward
from neox.gpu.paging import Holding
from neox.gpu.sampling import Samplings
from neox.reference import batching as reference
from neox.reference.batching import Batch, Chosen, Event, Failure, Job, Limits, Scores, Segment
from neox.reference.errors import InputError
from neox.reference.generate import Continuation, Piece, Request, gathered
from neox.reference.sampling import GREEDY, Sampling, candidates
from neox.reference.tokenizer import Tokenizer

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


@cache
def number(device: Device, seed: int, position: int) -> float:
    """By which a text's next id is drawn, after the token at this position."""
    seeds, numbers = device.array(np.array([seed % 2**64], np.uint64)), device.empty(1, np.uint64)
    ops.uniform(seeds, device.zeros(1, np.int32), device.array(np.array([position], np.int32)), numbers)
    return float(numbers.get()[0]) / 2**64


def check_choice(logits: np.ndarray, sampling: Sampling, allowed: np.ndarray, u: float, id: int, error: float) -> None:
    """The id is what sampling by the number u gives, of logits that were up to `error` off."""
    if not sampling.temperature:
        assert allowed[id]
        assert logits[id] >= logits[allowed].max() - 2 * error
        return
    ids, p = candidates(logits, sampling, allowed=allowed)
    place = int(np.searchsorted(ids, id))
    assert ids[place] == id
    slack = np.expm1(2 * error / sampling.temperature)  # of a sum of probabilities, each of which is so far off
    assert p[:place].sum() - slack <= u <= p[: place + 1].sum() + slack


class Checked(DeviceBackend):
    """Holds logits and choices of every text to a forward pass of all that it has read so far."""

    def __init__(self, device: Device, dtype: str, positions: int, size: int) -> None:
        super().__init__(model(device, dtype), positions, size)
        self.device, self.dtype = device, dtype
        self.read: dict[int, tuple[int, ...]] = {}  # of each text that is there
        self.seeds: dict[int, int | None] = {}
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
        self.seeds.pop(id(memory), None)
        super().close(memory)

    def choose(self, segments: Sequence[Segment[Holding]], allowed: np.ndarray) -> list[Chosen]:
        self.passed += sum(len(s.ids) for s in segments)
        found = super().choose(segments, allowed)
        for s, (logits, chosen) in zip(segments, found, strict=True):
            read = self.read[id(s.memory)] = (*self.read[id(s.memory)], *map(int, s.ids))
            assert s.memory.length == len(read)
            assert len(logits) == s.wanted
            for back, row in enumerate(logits[::-1]):
                exact = logits_after(self.device, self.dtype, read[: len(read) - back])
                assert_close(row, exact, ROUNDED[self.dtype])
            self.check_choice(s, read, allowed, chosen)
        held = {page for memory in self.opened for page in memory.pages}
        assert len(held) + self.free_pages == self._pool.count
        return found

    def check_choice(self, s: Segment[Holding], read: tuple[int, ...], allowed: np.ndarray, chosen: int | None) -> None:
        assert (chosen is None) == (s.sampling is None)
        if chosen is None or s.sampling is None:
            return
        assert s.sampling.seed is not None
        assert self.seeds.setdefault(id(s.memory), s.sampling.seed) == s.sampling.seed
        exact = logits_after(self.device, self.dtype, read)
        u = number(self.device, s.sampling.seed, len(read) - 1)
        check_choice(exact, s.sampling, allowed, u, chosen, ROUNDED[self.dtype] * float(np.abs(exact).max()))

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
    sampling: Sampling = GREEDY
    logprobs: int | None = None

    def prompt(self, index: int, seed: int) -> tuple[int, ...]:
        common, own = draw_ids(CONFIG, 2, LONGEST, seed)[0], draw_ids(CONFIG, 1, LONGEST, seed + 1 + index)[0]
        return tuple(np.where(np.arange(self.length) < self.common, common[: self.length], own[: self.length]).tolist())

    def job(self, index: int, seed: int) -> Job:
        request = Request(self.prompt(index, seed), self.count, self.sampling, logprobs=self.logprobs)
        return Job(request, 0 if self.scored else None)


# Top-k and min-p decide between ids that may be as likely as each other: in 16 bits what they keep is not checked.
WAYS = {
    "float32": [
        *(GREEDY, Sampling(1.0, seed=3), Sampling(0.7, top_k=20, seed=4), Sampling(1.3, top_p=0.9, min_p=0.01, seed=3)),
        *(Sampling(1.0), Sampling(1.0, repetition_penalty=1.3, seed=5), Sampling(repetition_penalty=1.3)),
    ],
    "float16": [GREEDY, Sampling(1.0, seed=3), Sampling(1.3, seed=2**64 + 4), Sampling(0.9, repetition_penalty=1.3)],
}


def visits_of(dtype: str) -> st.SearchStrategy[list[Visit]]:
    visit = st.builds(
        Visit, st.integers(1, LONGEST), st.integers(0, LONGEST), st.integers(1, 4), st.integers(0, 8),
        st.none() | st.integers(0, 5), st.booleans(), st.sampled_from(WAYS[dtype]), st.sampled_from((None, None, 2)),
    )  # fmt: skip
    return st.lists(visit, min_size=1, max_size=6)


ROOM = st.integers(LONGEST + 3, 3 * LONGEST)  # for the longest text, or for a few


def check_visits(backend: Checked, visits: Sequence[Visit], limits: Limits, seed: int) -> dict[int, list[Event]]:
    batch, heard = Batch(backend, limits), dict[int, list[Event]]()
    leaving: dict[int, int] = {}
    for step in range(300):
        for i, visit in enumerate(visits):
            if step == visit.arrival:
                handle = batch.submit(visit.job(i, seed))
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
@given(st.data(), ROOM, st.sampled_from((1, 4, 7)), st.integers(1, 4), st.integers(1, 40), seeds)
def test_every_text_is_as_alone(device, dtype, data, positions, size, running, chunk, seed) -> None:
    visits = data.draw(visits_of(dtype))
    heard = check_visits(Checked(device, dtype, positions, size), visits, Limits(positions, running, 9, chunk), seed)
    handles = sorted(range(len(visits)), key=lambda i: visits[i].arrival)  # in their order, texts were submitted
    for handle, i in enumerate(handles):
        if visits[i].sampling.seed is not None or not visits[i].sampling.temperature:
            assert_as_alone(device, dtype, visits[i].job(i, seed), heard[handle])


@cache
def alone(device: Device, dtype: str, job: Job) -> list[Event]:
    batch = Batch(DeviceBackend(model(device, dtype), 40), Limits(40))
    batch.submit(job)
    return [event for _ in range(9) for event in batch.step()]


def assert_as_alone(device: Device, dtype: str, job: Job, heard: Sequence[Event]) -> None:
    """As far as anything was heard, ids are the same, and log-probabilities up to the rounding of logits."""
    for event, other in zip(heard, alone(device, dtype, job), strict=False):
        assert type(event) is type(other)
        if isinstance(event, Piece) and isinstance(other, Piece):
            assert (event.id, event.finish_reason) == (other.id, other.finish_reason)
            assert (event.logprob is None) == (other.logprob is None) == (job.request.logprobs is None)
            assert len(event.top) == (job.request.logprobs or 0)
            if event.logprob is not None and other.logprob is not None:
                assert abs(event.logprob - other.logprob) < 20 * ROUNDED[dtype]  # of logits up to 10


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


# Of each kind some, on which mutants of sampling are tried: side by side, and leaving and joining between each other.
DRAWN = [
    *(Visit(9, 4, 9, 0, None, False, Sampling(1.0, seed=3)), Visit(3, 0, 9, 0, None, False, WAYS["float32"][2])),
    *(Visit(6, 4, 2, 0, None, False), Visit(5, 1, 9, 1, 3, False, Sampling(1.0))),
    *(Visit(9, 2, 9, 1, None, False, WAYS["float32"][3]), Visit(20, 4, 4, 2, None, True, Sampling(1.0, seed=9))),
    *(Visit(7, 0, 8, 3, None, False, WAYS["float32"][5]), Visit(2, 0, 7, 4, None, False, Sampling(1.0, seed=8), 2)),
    *(Visit(2, 0, 7, 5, None, False), Visit(8, 8, 9, 6, None, False, Sampling(2.0, top_k=5, seed=3), 0)),
]


def check_drawn() -> None:
    device = all_devices()[0]
    for positions, running, chunk in ((200, 6, 60), (90, 3, 5)):
        backend = Checked(device, "float32", positions, 4)
        heard = check_visits(backend, DRAWN, Limits(positions, running, 9, chunk), 3)
        for i, visit in enumerate(DRAWN):
            if visit.sampling.seed is not None:
                assert_as_alone(device, "float32", visit.job(i, 3), heard[i])


@dataclass(frozen=True)
class Thirds:
    """A tokenizer that has a token for two ids of three."""

    eos: None = None

    def has_token(self, vocab_size: int) -> np.ndarray:
        return np.arange(vocab_size) % 3 > 0

    def token_bytes(self, index: int) -> bytes:
        assert index % 3
        return b"a"


def check_padding() -> None:
    """Ids without a token are not chosen, after prompts nor after single ids."""
    batch = Batch(Checked(all_devices()[0], "float32", 90, 8), Limits(90), cast(Tokenizer, Thirds()))
    for i in range(4):
        batch.submit(Job(Request([i + 1] * 3, 9, Sampling(3.0 * (i % 2), seed=i), ignore_eos=True)))
    assert sum(isinstance(event, Piece) for _ in range(9) for event in batch.step()) == 36


class Counted:
    """Bytes that are copied to the host and to the device, as long as it is in place."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.fetched = self.told = 0
        self.get, self.set = Array.get, Array.set
        patch.setattr(Array, "get", lambda array: self.count_get(array))
        patch.setattr(Array, "set", lambda array, values: self.count_set(array, values))

    def count_get(self, array: Array) -> np.ndarray:
        self.fetched += array.nbytes
        return self.get(array)

    def count_set(self, array: Array, values: np.ndarray) -> None:
        self.told += array.nbytes
        self.set(array, values)


def copied(batch: Batch[Holding], steps: int) -> list[tuple[int, int]]:
    """Bytes to the host and to the device, of each step."""
    found = []
    for _ in range(steps):
        with pytest.MonkeyPatch.context() as patch:
            counted = Counted(patch)
            batch.step()
        found.append((counted.fetched, counted.told))
    return found


def check_copies() -> None:
    """One id of each text, and logits only of those who asked for them; to the device, only what is not there."""
    id, row = 4, 4 * CONFIG.vocab_size
    backend = DeviceBackend(model(all_devices()[0]), 400, 8)
    batch = Batch(backend, Limits(400, chunk=10))
    for i, length in enumerate((4, 17, 3)):
        batch.submit(Job(Request([i] * length, 25, Sampling(i % 2, seed=i), ignore_eos=True)))
    back, to = zip(*copied(batch, 20), strict=True)
    assert back == (id, id, *[3 * id] * 18)  # of prompts that are read to their ends, 10 positions at a time
    table = 4 * 3 * -(-CONFIG.max_position_embeddings // 8)
    assert set(to[4:]) == {0, table}
    assert to[4:].count(table) <= 3 * 2  # three texts come to new pages of 8 positions, within 16
    asks = Request([5] * 3, 5, Sampling(1.0, seed=7), ignore_eos=True, logprobs=1)
    batch.submit(Job(asks))
    batch.submit(Job(replace(asks, logprobs=None, sampling=Sampling(1.0, repetition_penalty=1.1))))
    assert [back for back, _ in copied(batch, 4)] == [4 * id + 2 * row, *[5 * id + 2 * row] * 3]


def check_again() -> None:
    """A text that comes again, after a step of which nobody knows what it left in the device's memory, is as alone."""
    device, job = all_devices()[0], Job(Request((3,) * 5, 4, Sampling(1.0, seed=1)))
    batch = Batch(DeviceBackend(model(device), 40, 8), Limits(40))
    batch.submit(job)
    first = batch.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Array, "get", lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            batch.step()
    batch.submit(job)
    events = [event for _ in range(4) for event in batch.step() if isinstance(event, Piece)]
    assert [replace(event, index=0) for event in events] == [*first, *alone(device, "float32", job)[1:]]


def check_full() -> None:
    """Where there is no memory for more texts a step fails; when there is some again they are as alone."""
    device, job = all_devices()[0], Job(Request((3,) * 5, 4, Sampling(1.0, seed=1)))
    batch = Batch(DeviceBackend(model(device), 40, 8), Limits(40))
    for steps in (2, 1):  # alone, and beside a prompt
        batch.submit(job)
        for _ in range(steps):
            batch.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "new_step", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            batch.step()
    handles = [batch.submit(job) for _ in range(2)]
    heard = [event for _ in range(4) for event in batch.step() if isinstance(event, Piece)]
    for handle in handles:
        own = [replace(event, index=0) for event in heard if event.index == handle]
        assert own == alone(device, "float32", job)


def check_damaged() -> None:
    """Logits that are not finite end only their text: after a prompt with a damaged id, and after that id itself."""
    device, sampling = all_devices()[0], Sampling(1.0, seed=2)
    calm, chooses = (Job(Request((i, i + 1), 3, sampling, ignore_eos=True)) for i in (1, 5))
    (damaged, *_), others = (
        [event.id for event in alone(device, "float32", job) if isinstance(event, Piece)] for job in (chooses, calm)
    )
    assert damaged not in others[:-1]
    right = drawn(CONFIG, 1, "float32")
    embeddings = right.params.embed_in.copy()
    embeddings[damaged] = 3e38  # whose sum overflows
    wrong = replace(right, params=replace(right.params, embed_in=embeddings))
    batch = Batch(DeviceBackend(gpu.to_device(wrong, device, "float32"), 40, 4), Limits(40))
    for job in (calm, chooses, Job(Request((damaged, 3), 3, sampling))):
        batch.submit(job)
    heard = [event for _ in range(3) for event in batch.step()]
    assert [event.id for event in heard if isinstance(event, Piece) and event.index == 0] == others
    assert [event.id for event in heard if isinstance(event, Piece) and event.index > 0] == [damaged]
    failures = [event for event in heard if isinstance(event, Failure)]
    assert [event.index for event in failures] == [2, 1]
    assert all("not finite" in str(event.error) for event in failures)


CHECKS = {
    **{"kinds": check_kinds, "sharing": check_sharing, "room": check_room},
    **{
        "drawn": check_drawn,
        "padding": check_padding,
        "copies": check_copies,
        "again": check_again,
        "full": check_full,
        "damaged": check_damaged,
    },
}


@pytest.mark.parametrize("name", CHECKS)
def test_texts_in_pages(name: str) -> None:
    CHECKS[name]()


def of(module: Any, function: str, name: str, check: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, check, module, function, edits)


ADVANCED = "s.memory.length += len(s.ids)"
FIRST_IDS = "cut.start, cut.start + s.wanted"
ONCE = "self._{0}.values is None and self._{0}.set({1})"
MUTANTS = [
    of(batching, "table_of", "the first text's pages for all", "kinds", ("= holding.pages", "= holdings[0].pages")),
    of(batching, "table_of", "the last page forgotten", "kinds", ("= holding.pages", "= [*holding.pages[:-1], 0]")),
    of(batching, "table_of", "pages in reverse", "kinds", ("= holding.pages", "= holding.pages[::-1]")),
    of(DeviceBackend, "_together", "all of one text", "kinds", ("np.arange(len(seg", "0 * np.arange(len(seg")),
    of(DeviceBackend, "choose", "positions from 0", "kinds", ("+ s.memory.length", "")),
    of(DeviceBackend, "choose", "places not reserved", "kinds", ("self._pool.reserve(s.memory, len(s.ids))", "pass")),
    of(DeviceBackend, "choose", "no names", "sharing", ("self._pool.filled(s.memory, s.ids)", ADVANCED)),
    of(DeviceBackend, "_together", "logits after the first ids", "drawn", ("cut.stop - s.wanted, cut.stop", FIRST_IDS)),
    of(DeviceBackend, "_one_each", "logits of the first text", "drawn", ("logits[i : i + s", "logits[: s")),
    of(Steps, "_tell", "the first ids for ever", "kinds", ("self._ids.set(ids)", ONCE.format("ids", "ids"))),
    of(
        Steps,
        "_tell",
        "positions kept",
        "kinds",
        ("self._positions.set(pos", "self._positions.values is None and self._positions.set(pos"),
    ),
    of(Steps, "_tell", "pages kept", "kinds", ("self._table.set(table)", ONCE.format("table", "table"))),
    of(Steps, "run", "launches of any number", "kinds", ("not in self._launches", "!= 1 or not self._launches")),
    of(Steps, "run", "memory for the first texts only", "kinds", ("> self._most", "> self._most == 0")),
    of(Steps, "_make_room", "room that is not there", "full", ("step = new", "self._most = most; step = new")),
    of(Steps, "_make_room", "texts in reverse", "kinds", ("dtype=np.int32))", "dtype=np.int32)[::-1])")),
    of(DeviceBackend, "open", "nothing shared at once", "room", ("capacity, ids)", "capacity, ())")),
    of(DeviceBackend, "recall", "nothing shared later", "sharing", ("self._pool.recall(memory, ids)", "memory.length")),
    of(DeviceBackend, "close", "pages kept", "kinds", ("self._pool.close(memory)", "pass")),
    of(reference, "beginning", "the whole prompt passed over", "sharing", ("[:-1]", "")),
    of(reference, "beginning", "passed over though logits are wanted", "sharing", (" is None", " is not Ellipsis")),
    of(Batch, "_next_to_advance", "read again", "kinds", ("text.read = text.recalled =", "text.recalled =")),
    of(Batch, "_next_to_advance", "counted twice", "room", ("text.read = text.recalled =", "text.read =")),
    of(Batch, "_next_to_advance", "asked again", "kinds", ("if text.read == 0:", "if text.read < 9:")),
    of(Batch, "_join", "no room, no matter", "room", ("if text.memory is None:", "if False:")),
    of(Samplings, "set", "a neighbour's seed", "drawn", ("for seed in seeds]", "for seed in seeds[1:] + seeds[:1]]")),
    of(
        Samplings, "set", "a neighbour's way", "drawn", ("_of(s) for s in samplings", "_of(s) for s in samplings[::-1]")
    ),
    of(DeviceBackend, "_drawn", "a number used twice", "drawn", ("positions[rows]", "positions[rows] + 1")),
    of(DeviceBackend, "_drawn", "ids in reverse", "drawn", ("ids.get().tolist()", "ids.get().tolist()[::-1]")),
    of(DeviceBackend, "_drawn", "after the first rows", "drawn", ("(x, rows)", "(x, np.arange(count))")),
    of(DeviceBackend, "_drawn", "padding after a prompt", "padding", ("self._allowed.array", "None")),
    of(DeviceBackend, "choose", "padding", "padding", ("allowed.astype(np.uint8)", "1 | allowed.astype(np.uint8)")),
    of(DeviceBackend, "_one_each", "the first text's id for all", "drawn", ("int(chosen[i])", "int(chosen[0])")),
    of(DeviceBackend, "_one_each", "logits of all", "copies", ("i : i + s.wanted", "i : i + 1")),
    of(
        Steps,
        "_tell",
        "ways of texts that left",
        "drawn",
        ("samplings != self._sampled", "len(samplings) > len(self._sampled)"),
    ),
    of(Steps, "_tell", "ways at each step", "copies", ("samplings != self._sampled", "True")),
    of(Known, "set", "all at each step", "copies", ("self.values is None", "True")),
    of(Steps, "run", "known after a failure", "again", ("self._ids.values = self._positions.values = None", "pass")),
    of(Continuation, "append", "-1 is an id", "damaged", ("chosen < 0", "False")),
    of(reference, "choosable", "a new seed at each step", "drawn", ("replace(sampling, seed=new_seed())", "sampling")),
    of(reference, "choosable", "no penalty", "drawn", ("sampling.repetition_penalty != 1", "False")),
    of(Batch, "_segment", "ids in the midst of a prompt", "copies", ("sampling if last else None", "sampling")),
    of(Batch, "_segment", "logits though nobody asked", "copies", ("(sampling is None or", "(True or")),
    of(Batch, "_segment", "no logits though somebody asked", "drawn", ("request.logprobs is not None", "False")),
]


@stopped_by_the_host
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_batch_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.install(monkeypatch)
    with pytest.raises((AssertionError, InputError, ValueError, IndexError, KeyError, RuntimeError, ZeroDivisionError)):
        CHECKS[mutant.check]()


@pytest.mark.parametrize("dtype", ROUNDED)
def test_texts_are_those_of_the_lone_decoder(dtype: str) -> None:
    device, start = all_devices()[0], draw_ids(CONFIG, 1, 20, 5)[0].tolist()
    asked = [Request([*start[:length], i], 9, Sampling(i % 2, seed=i)) for i, length in enumerate((20, 3, 20, 11, 20))]
    asked.append(Request(start[:5], 9, Sampling(1.0, repetition_penalty=1.2, seed=1)))
    batch = Batch(DeviceBackend(model(device, dtype), 90, 4), Limits(90, 3, 9, 16))
    for request in asked:
        batch.submit(Job(request))
    events = [event for _ in range(40) for event in batch.step()]
    found = gathered((event for event in events if isinstance(event, Piece)), len(asked))
    expected = [gathered(gpu.stream(model(device, dtype), [request]), 1)[0] for request in asked]
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


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, seed=5), Sampling(1.0, repetition_penalty=1.2, seed=5)])
def test_log_probabilities_change_no_text(sampling: Sampling) -> None:
    request = Request((4, 5, 6), 9, sampling, ignore_eos=True)
    texts = []
    for job in (Job(request), Job(replace(request, logprobs=2)), Job(request, 2)):
        events = alone(all_devices()[0], "float32", job)
        texts.append([event.id for event in events if isinstance(event, Piece)])
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 9


def test_a_batch_that_draws_on_the_host_gets_logits() -> None:
    """What is there for those who know no other backend than one of logits."""
    backend, held = DeviceBackend(model(all_devices()[0]), 40, 8), []
    for ids in ((3, 1, 4), (1, 5)):
        memory = backend.open(9, ids)
        assert memory is not None
        held.append((memory, ids))
    first = backend.advance([Segment(memory, ids, i + 1) for i, (memory, ids) in enumerate(held)])
    second = backend.advance([Segment(memory, [9], 1) for memory, _ in held])
    for i, (_, ids) in enumerate(held):
        assert first[i].shape == (i + 1, CONFIG.vocab_size)
        assert_close(first[i][-1], logits_after(all_devices()[0], "float32", ids), ROUNDED["float32"])
        assert_close(second[i][0], logits_after(all_devices()[0], "float32", (*ids, 9)), ROUNDED["float32"])


@pytest.mark.parametrize(("dtype", "launches"), [("float16", 3), ("float32", 10)])
def test_a_step_is_captured_once_for_each_number_of_texts(dtype: str, launches: int) -> None:
    """Beside the layers: embedding, norm, product, numbers, ids and the next positions."""
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
        assert on_a_card() or len(graph.captured.launches) == 6 + CONFIG.num_hidden_layers * launches


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
