"""Texts that come and go in a batch: each is what it would be alone, and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from closeness import FLOAT32_STEP, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Mutant
from strategies import TINY, draw_ids, random_model, seeds

from neox.reference import batching, shipped
from neox.reference.batching import Batch, Event, Failure, Full, Job, Limits, ReferenceBackend, Scores, Segment
from neox.reference.checkpoint.load import load
from neox.reference.decode import Cache
from neox.reference.errors import InputError
from neox.reference.generate import CachedDecoder, Completion, Piece, Request, complete, gathered
from neox.reference.model import Array, Model, forward
from neox.reference.sampling import Sampling, log_softmax
from neox.reference.tokenizer import Tokenizer, load_tokenizer

# Log-probabilities of order ten, computed in float64 by sums of a few hundred terms in different orders.
FLOAT64 = 1e-12

SHORT = replace(TINY, max_position_embeddings=24, eos_token_id=7)


@cache
def model() -> Model:
    return random_model(SHORT, seed=5, dtype="float64")


@cache
def shipped_tokenizer() -> Tokenizer:
    return load_tokenizer(shipped.path())


@cache
def alone(request: Request) -> Completion:
    return complete(CachedDecoder(model()), [request])[0]


class Watched(ReferenceBackend):
    """Knows which memories are open, and what each step was given."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.open_memories: list[Cache] = []
        self.steps: list[list[int]] = []

    def open(self, capacity: int, ids: Sequence[int]) -> Cache:
        memory = super().open(capacity, ids)
        memory.keys[...], memory.values[...] = np.nan, np.nan
        self.open_memories.append(memory)
        return memory

    def close(self, memory: Cache) -> None:
        self.open_memories = [other for other in self.open_memories if other is not memory]

    def advance(self, segments: Sequence[Segment[Cache]]) -> list[Array]:
        assert all(any(s.memory is memory for memory in self.open_memories) for s in segments)
        self.steps.append([len(s.ids) for s in segments])
        return super().advance(segments)


@dataclass(frozen=True)
class Visit:
    """One text, when it comes, and when whoever asked for it goes away."""

    job: Job
    arrival: int  # step
    patience: int | None = None  # steps


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    length = draw(st.integers(1, SHORT.max_position_embeddings))
    prompt = draw_ids(SHORT, 1, length, draw(seeds))[0].tolist()
    sampling = Sampling(draw(st.sampled_from([0.0, 1.0, 3.0])), draw(st.sampled_from([0, 40])), seed=draw(seeds))
    logprobs = draw(st.sampled_from([None, 0, 3]))
    request = Request(tuple(prompt), draw(st.integers(1, 9)), sampling, (), draw(st.booleans()), logprobs)
    return Job(request, draw(st.sampled_from([None, 0, 2])))


VISITS = st.lists(st.builds(Visit, jobs(), st.integers(0, 12), st.none() | st.integers(0, 9)), max_size=9, unique=True)
LIMITS = st.builds(Limits, st.integers(24, 70), st.integers(1, 5), st.just(9), st.integers(1, 30))


def run(backend: Watched, visits: Sequence[Visit], limits: Limits) -> dict[Visit, list[Event]]:
    """Everything that was heard of each visit, whose rules are checked at each step."""
    batch = Batch(backend, limits)
    handles: dict[int, Visit] = {}
    heard: dict[Visit, list[Event]] = {}
    gone: set[int] = set()
    spoke: list[int] = []  # handles, as they were first heard of
    for step in range(600):  # nine texts of at most 24 positions and 9 steps each, one position at a time
        for visit in (visit for visit in visits if visit.arrival == step):
            handles[batch.submit(visit.job)] = visit
            heard[visit] = []
        for handle, visit in handles.items():
            if visit.patience is not None and step == visit.arrival + visit.patience:
                batch.cancel(handle)
                gone.add(handle)
        events = batch.step()
        for event in events:
            assert event.index not in gone
            if not heard[handles[event.index]]:
                spoke.append(event.index)
            heard[handles[event.index]].append(event)
        assert_within_limits(batch, backend, limits)
        if step > 12 and not events and batch.running == batch.waiting == 0:
            break
    assert (batch.running, batch.waiting, batch.positions, backend.open_memories) == (0, 0, 0, [])
    assert spoke == sorted(spoke)  # first come, first served
    return heard


def assert_within_limits(batch: Batch[Cache], backend: Watched, limits: Limits) -> None:
    assert len(backend.open_memories) == batch.running <= limits.running
    assert sum(memory.capacity for memory in backend.open_memories) == batch.positions <= limits.positions
    if backend.steps:
        assert sum(length for length in backend.steps[-1] if length > 1) <= limits.chunk  # prompts


def assert_as_alone(visit: Visit, events: Sequence[Event]) -> None:
    pieces = [replace(event, index=0) for event in events if isinstance(event, Piece)]
    expected = alone(visit.job.request).pieces
    ended = bool(pieces) and pieces[-1].finish_reason is not None
    assert ended or visit.patience is not None
    assert len(pieces) == len(expected) if ended else len(pieces) <= len(expected)
    for piece, other in zip(pieces, expected, strict=False):
        assert (piece.id, piece.text, piece.finish_reason) == (other.id, other.text, other.finish_reason)
        assert [index for index, _ in piece.top] == [index for index, _ in other.top]
        assert (piece.logprob is None) == (other.logprob is None)
        if piece.logprob is not None and other.logprob is not None:
            assert_close(
                [piece.logprob, *(x for _, x in piece.top)], [other.logprob, *(x for _, x in other.top)], FLOAT64
            )
    if pieces and visit.job.prompt_logprobs is not None:
        assert isinstance(events[0], Scores)
        assert_scores(visit.job, events[0])
    else:
        assert not any(isinstance(event, Scores) for event in events)


def assert_scores(job: Job, scores: Scores) -> None:
    prompt = list(job.request.prompt)
    rows = [log_softmax(row) for row in forward(model(), [prompt])[0, :-1]]
    assert_close(scores.logprobs, [row[index] for row, index in zip(rows, prompt[1:], strict=True)] or (), FLOAT64)
    for row, top in zip(rows, scores.top, strict=True):
        order = np.argsort(-row, kind="stable")[: job.prompt_logprobs]
        assert [index for index, _ in top] == order.tolist()
        assert_close([logprob for _, logprob in top], row[order], FLOAT64)


@given(VISITS, LIMITS)
@settings(max_examples=30, deadline=None)
def test_every_text_is_what_it_is_alone_and_leaves_nothing_behind(visits: list[Visit], limits: Limits) -> None:
    for visit, events in run(Watched(model()), visits, limits).items():
        assert_as_alone(visit, events)


# One of each kind, on which mutants are tried: long and short prompts, scored or not, drawn and greedy, leaving early.
def kinds() -> list[Visit]:
    rng = np.random.default_rng(3)
    visits = []
    for i, (length, arrival, patience) in enumerate(
        [(9, 0, None), (1, 0, None), (24, 1, 5), (17, 1, None), (3, 1, None), (3, 1, 2)]
    ):
        prompt = tuple(rng.integers(0, SHORT.vocab_size, length).tolist())
        request = Request(prompt, 9, Sampling(1.0 * (i % 2), seed=i), (), True, 2)
        visits.append(Visit(Job(request, 1 if i % 2 == 0 else None), arrival, patience))
    return visits


def check_kinds() -> None:
    for limits in (Limits(70, 5, 9, 7), Limits(200, 2, 9, 100)):
        heard = run(Watched(model()), kinds(), limits)
        assert len(heard) == 6
        for visit, events in heard.items():
            assert_as_alone(visit, events)


def of(function: str, name: str, *edits: tuple[str, str], module: Any = Batch) -> Mutant:
    return Mutant(name, "kinds", module, function, edits)


MUTANTS = [
    of("through_layers", "positions from 0", ("s.memory.length for s, l", "0 for s, l"), module=batching),
    of("through_layers", "the cache's length forgotten", ("length += length", "length += 0"), module=batching),
    of(
        "through_layers",
        "one layer's keys for all",
        ("mix_over(s.memory, i,", "mix_over(s.memory, 0,"),
        module=batching,
    ),
    of(
        "through_layers",
        "all by the first text's cache",
        ("mix_over(s.memory, i", "mix_over(segments[0].memory, i"),
        module=batching,
    ),
    of(
        "mix_each",
        "queries of the first text",
        ("own(q[:, :, cut]", "own(q[:, :, : cut.stop - cut.start]"),
        module=batching,
    ),
    of(
        "advance",
        "logits after the first ids",
        ("cut.stop - s.wanted, cut.stop", "cut.start, cut.start + s.wanted"),
        module=ReferenceBackend,
    ),
    of(
        "advance",
        "logits in reverse",
        ("cuts(map(len, wanted))", "cuts(map(len, wanted))[::-1]"),
        module=ReferenceBackend,
    ),
    of("_join", "no limit of texts", ("and self.running < self.limits.running", "")),
    of("_join", "no limit of positions", ("> self.limits.positions", "> 10**9")),
    of("_join", "the last to come first", ("self._waiting[0]", "self._waiting[-1]"), ("popleft", "pop")),
    of("_leave", "memory kept", ("self._backend.close(text.memory)", "pass")),
    of("_leave", "the first in place of the one", (".remove(handle)", ".pop()")),
    of("cancel", "nobody may leave", ("if handle in", "if False and handle in")),
    of("_next_to_advance", "no limit of a step", ("min(left, text.unread)", "text.unread")),
    of("_next_to_advance", "a share for every prompt", ("left -= lengths[handle]", "pass")),
    of("_segment", "from the beginning again", ("ids[text.read : text.read + length]", "ids[:length]")),
    of("_take", "continued in the middle of the prompt", ("if text.unread:", "if text.unread and not len(logits):")),
    of("_take", "ended texts stay", ("piece.finish_reason is not None", "False")),
    of("_score", "of the ids themselves", ("text.read - length + 1 : text.read + 1", "text.read - length : text.read")),
]


def test_the_kinds_are_as_alone() -> None:
    check_kinds()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_batch_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.install(monkeypatch)
    with pytest.raises((AssertionError, InputError, ValueError, IndexError, KeyError)):
        check_kinds()


class Lending:
    """A backend of two texts at most, in which a text has what others have read of its first ids: multiples of four."""

    def __init__(self) -> None:
        self.inner, self.config = Watched(model()), SHORT
        self.known: list[tuple[Cache, list[int]]] = []
        self.lent = 0

    def open(self, capacity: int, ids: Sequence[int]) -> Cache | None:
        if len(self.inner.open_memories) == 2:
            return None
        self.known.append((self.inner.open(capacity, ids), []))
        return self.known[-1][0]

    def recall(self, memory: Cache, ids: Sequence[int]) -> int:
        length, lender = max(
            ((common(read, ids) // 4 * 4, other) for other, read in self.known), key=lambda found: found[0]
        )
        memory.keys[:, :, :, :length] = lender.keys[:, :, :, :length]
        memory.values[:, :, :, :length] = lender.values[:, :, :, :length]
        memory.length = length
        self.read_by(memory).extend(ids[:length])
        self.lent += length
        return length

    def close(self, memory: Cache) -> None:
        self.inner.close(memory)

    def advance(self, segments: Sequence[Segment[Cache]]) -> list[Array]:
        for s in segments:
            self.read_by(s.memory).extend(s.ids)
        return self.inner.advance(segments)

    def read_by(self, memory: Cache) -> list[int]:
        return next(read for other, read in self.known if other is memory)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_what_others_have_read_is_passed_over_and_a_text_waits_for_room() -> None:
    start = draw_ids(SHORT, 1, 15, 8)[0].tolist()
    jobs = [Job(Request((*start[:length], 5 + length), 6, ignore_eos=True)) for length in (15, 15, 9, 2, 15)]
    jobs.append(replace(jobs[0], prompt_logprobs=0))  # needs the logits after each id
    backend = Lending()
    batch = Batch(backend, Limits(200, 6, 9, 8))
    for job in jobs:
        batch.submit(job)
    heard: list[Event] = []
    while batch.waiting + batch.running:
        heard += batch.step()
        assert batch.running <= 2
        lent = sum(text.recalled for text in batch._texts.values())
        assert batch.positions == sum(memory.capacity for memory in backend.inner.open_memories) - lent
    texts = gathered((event for event in heard if isinstance(event, Piece)), len(jobs))
    assert [text.ids for text in texts] == [alone(job.request).ids for job in jobs]
    assert [len(event.logprobs) for event in heard if isinstance(event, Scores)] == [15]
    assert backend.lent == 12 + 8 + 0 + 12  # the second begins when the first is read; two ids are too few
    assert sum(map(sum, backend.inner.steps)) == sum(len(job.request.prompt) + 5 for job in jobs) - backend.lent


def test_float32_is_as_alone_up_to_its_rounding() -> None:
    """Log-probabilities of prompts, which do not depend on what is drawn."""
    single = random_model(SHORT, seed=5)
    visits = [replace(visit, patience=None, job=replace(visit.job, prompt_logprobs=1)) for visit in kinds()]
    for visit, events in run(Watched(single), visits, Limits(200, 5, 9, 11)).items():
        scores = events[0]
        assert isinstance(scores, Scores)
        prompt = list(visit.job.request.prompt)
        rows = forward(single, [prompt])[0, :-1]
        expected = [float(log_softmax(row)[index]) for row, index in zip(rows, prompt[1:], strict=True)]
        # Sums of up to 120 products in another order, over 3 layers of order-one values.
        assert_close(scores.logprobs, expected or (), 120 * 3 * FLOAT32_STEP)


def test_positions_beyond_a_thousand_and_wide_heads() -> None:
    config = replace(TINY, hidden_size=192, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=1200)
    wide = random_model(config, seed=2, dtype="float64")
    long = draw_ids(config, 1, 1100, 1)[0].tolist()
    asked = [Request(long, 4), Request(long[:5], 9), Request(long[7:30], 6, Sampling(1.0, seed=1))]
    batch = Batch(ReferenceBackend(wide), Limits(2000, chunk=300))
    for request in asked:
        batch.submit(Job(request))
    events = [event for _ in range(14) for event in batch.step()]
    found = gathered((event for event in events if isinstance(event, Piece)), 3)
    assert [text.ids for text in found] == [complete(CachedDecoder(wide), [request])[0].ids for request in asked]


def test_text_stops_and_lags_as_alone() -> None:
    tokenizer, shipped_model = shipped_tokenizer(), load(shipped.path(), dtype="float64")
    asked = [
        Request(tokenizer.encode(text), 20, Sampling(1.0, seed=seed), stop)
        for seed, (text, stop) in enumerate(
            [("Once upon", ()), ("Said", ("e", "zz")), ("One", ("the ", ".")), ("é", ())]
        )
    ]
    batch = Batch(ReferenceBackend(shipped_model), Limits(400), tokenizer)
    for request in asked:
        batch.submit(Job(request))
    events = [event for _ in range(24) for event in batch.step()]
    found = gathered((event for event in events if isinstance(event, Piece)), len(asked))
    expected = [complete(CachedDecoder(shipped_model), [request], tokenizer)[0] for request in asked]
    assert [(text.text, text.ids, text.finish_reason) for text in found] == [
        (text.text, text.ids, text.finish_reason) for text in expected
    ]


# What does not fit, and what goes wrong.


def job(length: int = 3, max_tokens: int = 4) -> Job:
    return Job(Request([1] * length, max_tokens, ignore_eos=True))


def test_what_could_never_run_is_refused_at_once() -> None:
    batch = Batch(ReferenceBackend(model()), Limits(9))
    batch.submit(job(3, 7))  # the last id takes no position
    with pytest.raises(InputError, match="10 positions are more than the 9 there are: ask for fewer tokens"):
        batch.submit(job(3, 8))
    with pytest.raises(InputError, match="the prompt has 25 tokens, but the model's context is 24"):
        batch.submit(job(25))
    with pytest.raises(InputError, match="token id 101 is outside the vocabulary"):
        batch.submit(Job(Request([101], 1)))
    assert batch.waiting == 1


def test_a_full_queue_says_so_until_a_text_leaves() -> None:
    batch = Batch(ReferenceBackend(model()), Limits(24, running=1, waiting=2))
    first, second, third = (batch.submit(job()) for _ in range(3))
    for _ in range(2):
        with pytest.raises(Full):
            batch.submit(job())
        batch.step()
    batch.cancel(second)
    batch.cancel(second)
    fourth = batch.submit(job())
    heard = [event.index for _ in range(20) for event in batch.step()]
    assert heard == [first] * 2 + [third] * 4 + [fourth] * 4


@pytest.mark.parametrize("limit", ["positions", "running", "chunk", "waiting"])
def test_limits_that_admit_nothing_are_refused(limit: str) -> None:
    least = 0 if limit == "waiting" else 1
    assert getattr(replace(Limits(1), **{limit: least}), limit) == least
    with pytest.raises(InputError, match=f"{limit} must be {least} or more, not {least - 1}"):
        replace(Limits(1), **{limit: least - 1})


class Failing(Watched):
    """A backend in which something breaks on demand."""

    broken: BaseException | None = None
    spoiled: int | None = None  # row of the step whose logits become NaN
    full = False

    def open(self, capacity: int, ids: Sequence[int]) -> Cache:
        if self.full:
            raise InputError("no memory")
        return super().open(capacity, ids)

    def advance(self, segments: Sequence[Segment[Cache]]) -> list[Array]:
        logits = super().advance(segments)
        if self.broken:
            raise self.broken
        if self.spoiled is not None:
            logits[self.spoiled][...] = np.nan
        return logits


def test_numbers_that_overflow_end_one_text_only() -> None:
    backend = Failing(model())
    batch = Batch(backend, Limits(48))
    first, second = batch.submit(job()), batch.submit(job())
    batch.step()
    backend.spoiled = 0
    failure, piece = batch.step()
    assert isinstance(failure, Failure)
    assert failure.index == first
    assert "not finite" in str(failure.error)
    assert isinstance(piece, Piece)
    assert piece.index == second
    backend.spoiled = None
    assert [event.index for _ in range(9) for event in batch.step()] == [second] * 2
    assert backend.open_memories == []


def test_a_broken_backend_keeps_nobody_in_the_batch() -> None:
    backend = Failing(model())
    batch = Batch(backend, Limits(48, running=2))
    for _ in range(3):
        batch.submit(job())
    backend.broken = RuntimeError("lost")
    with pytest.raises(RuntimeError, match="lost"):
        batch.step()
    assert (batch.running, batch.waiting, batch.positions, backend.open_memories) == (0, 1, 0, [])
    backend.broken = None
    assert [event.index for _ in range(9) for event in batch.step()] == [2] * 4


def test_lack_of_memory_ends_the_text_that_it_was_for() -> None:
    backend = Failing(model())
    batch = Batch(backend, Limits(48))
    first = batch.submit(job())
    backend.full = True
    assert [(event.index, type(event)) for event in batch.step()] == [(first, Failure)]
    assert batch.waiting == 0


def test_memory_that_the_system_does_not_have_is_one_line() -> None:
    with pytest.raises(InputError, match="not enough memory for the keys and values of 1000000000000 tokens"):
        ReferenceBackend(model()).open(10**12, ())
