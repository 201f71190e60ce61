"""Many texts at once, each coming and going when it will: what a server needs of a model.

    handle = batch.submit(job)                 it waits
    until nothing is left to do:
        events = batch.step()                  texts join; every one of them advances; those that end leave
    batch.cancel(handle)                       it leaves at once

A step passes the new positions of all texts through the model end to end, as if they were one text: one id of each text
that is being continued, and a share of the prompts that are still being read, so a long prompt does not hold up the
others. Everything but attention looks at single positions, so the weights are read once for all of them; attention
looks into the cache of each text by itself. What a text becomes thus depends on the others only by the rounding of
sums: its ids are those that it gets alone, unless two ids are as likely as each other up to rounding.

A backend that computes elsewhere can choose the ids itself. Then only they come back from it, but for the logits that
somebody asked for, or that a repetition penalty needs, which looks at the whole text.

Memory is bounded: a text joins when the positions that it may come to have are free, in the order of submission. Where
others have read its first ids, and a backend lets it use their memory, these are neither read nor counted again.

Dimensions as in model.py; N is the number of positions of a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate, count, pairwise
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from neox.reference.config import Config
from neox.reference.cores import one_blas_thread
from neox.reference.decode import Cache, mix_over, new_cache, query_blocks
from neox.reference.errors import InputError
from neox.reference.generate import Continuation, Piece, Request
from neox.reference.model import Array, Mix, Model, Tap, embed, layer, rotary_tables, unembed
from neox.reference.sampling import Sampling, best, log_softmax, new_seed
from neox.reference.tokenizer import Tokenizer

# What computes.

Memory = TypeVar("Memory")  # of one text, in a backend

# Multiplications of a product. The other cores of a server have more to do than this program, and a smaller product is
# over before they have come to it: shared, it takes half its time when they are idle, and a hundred times when not.
WORTH_THREADS = 1 << 21


@dataclass(frozen=True)
class Segment(Generic[Memory]):
    """What a step appends to one text."""

    memory: Memory
    ids: Sequence[int]
    wanted: int  # the logits after so many of the ids, the last ones, are of interest
    sampling: Sampling | None = None  # how a backend that can is to choose the id that follows, if it is


class Backend(Protocol[Memory]):
    """A model with room for texts of different lengths."""

    @property
    def config(self) -> Config: ...

    def open(self, capacity: int, ids: Sequence[int]) -> Memory | None:
        """Room for a text of up to `capacity` positions, the first of which may be these ids as others have read them.

        None until others have closed. InputError if there is none.
        """
        ...

    def recall(self, memory: Memory, ids: Sequence[int]) -> int:
        """How many of these first ids a text need not read, since others have. It has read none."""
        ...

    def close(self, memory: Memory) -> None:
        """The text is over."""
        ...

    def advance(self, segments: Sequence[Segment[Memory]]) -> list[Array]:
        """Append to each text; the logits that are wanted of each, (wanted,V)."""
        ...


Chosen = tuple[Array, int | None]  # logits that are wanted of a text, (wanted,V), and the id that follows


@runtime_checkable
class Choosing(Backend[Memory], Protocol[Memory]):
    """A backend that can choose the next ids where it computes, so that no logits need to come back from there."""

    def choose(self, segments: Sequence[Segment[Memory]], allowed: Array) -> list[Chosen]:
        """As advance, and an id for each segment that says how: -1 if its logits are not finite.

        allowed: bool (V,), false for ids that must not be chosen. What a text's seed gives depends on no other text,
        but it may be something else than on another backend.
        """
        ...


def choosable(sampling: Sampling) -> Sampling | None:
    """How a backend may choose, by a seed that stays the text's; None if it would have to know the whole text."""
    if sampling.repetition_penalty != 1:
        return None
    return replace(sampling, seed=new_seed()) if sampling.seed is None else sampling


class ReferenceBackend:
    """The reference model, a cache for each text."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @property
    def config(self) -> Config:
        return self._model.config

    def open(self, capacity: int, ids: Sequence[int]) -> Cache:
        """A cache of its own."""
        try:
            return new_cache(self._model, 1, capacity)
        except MemoryError as error:
            raise InputError(f"not enough memory for the keys and values of {capacity} tokens") from error

    def recall(self, memory: Cache, ids: Sequence[int]) -> int:
        return 0  # no text knows of another

    def close(self, memory: Cache) -> None:
        pass  # it is freed with the last reference to it

    def advance(self, segments: Sequence[Segment[Cache]]) -> list[Array]:
        """One pass through the model for all; logits (wanted,V) of each."""
        bounds = cuts(len(segment.ids) for segment in segments)
        wanted = [np.arange(cut.stop - s.wanted, cut.stop) for s, cut in zip(segments, bounds, strict=True)]
        rows, config = np.concatenate(wanted), self.config
        with threads_for(bounds[-1].stop * config.hidden_size * config.intermediate_size):
            x = through_layers(self._model, segments)
        with threads_for(len(rows) * config.hidden_size * config.vocab_size):
            logits = unembed(self._model, x[:, rows])[0]
        return [logits[cut] for cut in cuts(map(len, wanted))]


def threads_for(multiplications: int) -> AbstractContextManager[None]:
    """Products of this size on one core where that is better."""
    return one_blas_thread() if multiplications <= WORTH_THREADS else nullcontext()


def cuts(lengths: Iterable[int]) -> list[slice]:
    """Where parts of these lengths lie, one after the other."""
    return [slice(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]


def through_layers(model: Model, segments: Sequence[Segment[Cache]]) -> Array:  # (1,N,C)
    """What the last layer makes of the segments' ids, end to end; their caches are filled."""
    lengths = [len(s.ids) for s in segments]
    positions = [np.arange(length) + s.memory.length for s, length in zip(segments, lengths, strict=True)]
    rotary = rotary_tables(model.config, np.concatenate(positions)[None])
    blocks = [query_blocks(s.memory, s.memory.length, length) for s, length in zip(segments, lengths, strict=True)]
    x = embed(model, np.concatenate([np.asarray(s.ids, np.int64) for s in segments])[None])  # (1,N,C)
    for i, p in enumerate(model.params.layers):
        mixes = [mix_over(s.memory, i, s.memory.length, b) for s, b in zip(segments, blocks, strict=True)]
        x = layer(p, model.config, x, rotary, mix_each(mixes, cuts(lengths)))
    for s, length in zip(segments, lengths, strict=True):
        s.memory.length += length
    return x


def mix_each(mixes: Sequence[Mix], bounds: Sequence[slice]) -> Mix:
    """Attention in which each part of the positions has its own: that over the cache of its text."""

    def mix(q: Array, k: Array, v: Array, tap: Tap) -> Array:  # (1,H,N,D) x 3 -> (1,H,N,D)
        z = np.empty_like(q)
        for own, cut in zip(mixes, bounds, strict=True):
            z[:, :, cut] = own(q[:, :, cut], k[:, :, cut], v[:, :, cut], tap)
        return z

    return mix


# What is asked, and what comes back.


@dataclass(frozen=True)
class Job:
    """A text to continue, and perhaps what the model thinks of its beginning."""

    request: Request
    prompt_logprobs: int | None = None  # report log-probabilities of the prompt's ids, and of this many best ones


def beginning(job: Job) -> Sequence[int]:
    """Ids that need not be read if others have: all of the prompt but the last, if no logits after them are wanted."""
    return job.request.prompt[:-1] if job.prompt_logprobs is None else ()


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of a prompt, before the first piece of its continuation: of every id but the first."""

    index: int  # the handle
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]  # for each, the best ids and theirs, the best first


@dataclass(frozen=True)
class Failure:
    """A text that could not be continued. Nothing of it follows."""

    index: int  # the handle
    error: InputError


Event = Piece | Scores | Failure  # of a piece, too, the index is the handle


@dataclass(frozen=True)
class Limits:
    """What bounds memory and waiting. InputError if a value is less than 1, or waiting less than 0."""

    positions: int  # of all texts that are being continued, together
    running: int = 16  # texts that are continued side by side
    waiting: int = 64  # texts that wait for a place
    chunk: int = 256  # positions of prompts that are read in one step

    def __post_init__(self) -> None:
        for name, least in (("positions", 1), ("running", 1), ("waiting", 0), ("chunk", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be {least} or more, not {getattr(self, name)}")


class Full(Exception):
    """As many texts as may wait are waiting already."""


# The batch.


@dataclass
class Text(Generic[Memory]):
    """One of the batch."""

    continuation: Continuation
    job: Job
    capacity: int
    sampling: Sampling | None  # how the backend chooses, if it does
    memory: Memory | None = None  # once it has joined
    read: int = 0  # ids that the model has seen
    recalled: int = 0  # of them, by way of other texts
    logprobs: list[float] = field(default_factory=list)  # of the prompt, as far as it was read
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)

    @property
    def unread(self) -> int:
        return len(self.continuation.ids) - self.read


class Batch(Generic[Memory]):
    """Texts that wait, texts that are being continued, and the loop that moves both on. For use by one thread."""

    def __init__(self, backend: Backend[Memory], limits: Limits, tokenizer: Tokenizer | None = None) -> None:
        self.limits = limits
        self._backend = backend
        self._choosing = backend if isinstance(backend, Choosing) else None
        vocab_size = backend.config.vocab_size
        self._allowed = np.ones(vocab_size, bool) if tokenizer is None else tokenizer.has_token(vocab_size)
        self._tokenizer = tokenizer
        self._numbers = count()
        self._waiting: deque[int] = deque()
        self._running: list[int] = []
        self._texts: dict[int, Text[Memory]] = {}

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def positions(self) -> int:
        """That are set aside for the texts that are being continued."""
        return sum(self._texts[handle].capacity - self._texts[handle].recalled for handle in self._running)

    def submit(self, job: Job) -> int:
        """A handle, by which its events are known. It joins in a later step.

        InputError if the model cannot continue it, or if it would not fit even alone; Full if too many wait.
        """
        handle = next(self._numbers)
        continuation = Continuation(handle, job.request, self._backend.config, self._tokenizer)
        capacity = continuation.limit - 1  # the last id is not fed to the model
        if capacity > self.limits.positions:
            raise InputError(
                f"{capacity} positions are more than the {self.limits.positions} there are: ask for fewer tokens"
            )
        if len(self._texts) >= self.limits.running + self.limits.waiting:
            raise Full
        sampling = choosable(job.request.sampling) if self._choosing else None
        self._texts[handle] = Text(continuation, job, capacity, sampling)
        self._waiting.append(handle)
        return handle

    def cancel(self, handle: int) -> None:
        """It leaves, wherever it is; nothing more is heard of it. Nothing happens if it is over."""
        if handle in self._texts:
            self._leave(handle)

    def step(self) -> list[Event]:
        """Texts join, all of them advance, and those that end leave.

        One piece for each text whose prompt is read. If the backend fails, all that were running leave, since nobody
        knows how far they are, and its exception is raised.
        """
        events = self._join()
        handles = self._next_to_advance()
        if not handles:
            return events
        segments = [self._segment(handle, length) for handle, length in handles.items()]
        try:
            found = self._advance(segments)
        except BaseException:
            for handle in [*self._running]:
                self._leave(handle)
            raise
        for (handle, length), chosen in zip(handles.items(), found, strict=True):
            events += self._take(handle, length, *chosen)
        return events

    def _advance(self, segments: Sequence[Segment[Memory]]) -> list[Chosen]:
        if self._choosing:
            return self._choosing.choose(segments, self._allowed)
        return [(logits, None) for logits in self._backend.advance(segments)]

    def _join(self) -> list[Event]:
        """Those that have waited longest, while there is room; failures of those for which memory is lacking."""
        failures: list[Event] = []
        while self._waiting and self.running < self.limits.running:
            handle = self._waiting[0]
            text = self._texts[handle]
            if self.positions + text.capacity > self.limits.positions:
                break  # those behind it could fit, but would then keep it waiting for ever
            try:
                text.memory = self._backend.open(text.capacity, beginning(text.job))
            except InputError as error:
                self._leave(handle)
                failures.append(Failure(handle, error))
                continue
            if text.memory is None:
                break
            self._running.append(self._waiting.popleft())
        return failures

    def _leave(self, handle: int) -> None:
        text = self._texts.pop(handle)
        (self._waiting if text.memory is None else self._running).remove(handle)
        if text.memory is not None:
            self._backend.close(text.memory)

    def _next_to_advance(self) -> dict[int, int]:
        """How many ids of each text are passed through the model."""
        left = self.limits.chunk  # for prompts, of which those that joined first are read first
        lengths: dict[int, int] = {}
        for handle in self._running:
            text = self._texts[handle]
            if text.read >= len(text.job.request.prompt):
                lengths[handle] = 1
            elif left:
                if text.read == 0:
                    assert text.memory is not None
                    text.read = text.recalled = self._backend.recall(text.memory, beginning(text.job))
                lengths[handle] = min(left, text.unread)
                left -= lengths[handle]
        return lengths

    def _segment(self, handle: int, length: int) -> Segment[Memory]:
        text = self._texts[handle]
        assert text.memory is not None
        reading = text.read < len(text.job.request.prompt)
        every = reading and text.job.prompt_logprobs is not None
        sampling, request = text.sampling, text.job.request
        last = length == text.unread  # an id is to follow
        wanted = length if every else int(last and (sampling is None or request.logprobs is not None))
        ids = text.continuation.ids[text.read : text.read + length]
        return Segment(text.memory, ids, wanted, sampling if last else None)

    def _take(self, handle: int, length: int, logits: Array, chosen: int | None) -> list[Event]:  # (wanted,V)
        """What becomes of the logits after the ids that a text was extended by, or of the id that was chosen."""
        text = self._texts[handle]
        reading = text.read < len(text.job.request.prompt)
        text.read += length
        try:
            if reading and text.job.prompt_logprobs is not None:
                self._score(text, length, logits, text.job.prompt_logprobs)
            if text.unread:
                return []
            piece = self._grow(text, logits[-1] if len(logits) else None, chosen)
        except InputError as error:  # its numbers are not finite: no concern of the other texts
            self._leave(handle)
            return [Failure(handle, error)]
        if piece.finish_reason is not None:
            self._leave(handle)
        if reading and text.job.prompt_logprobs is not None:
            return [Scores(handle, tuple(text.logprobs), tuple(text.top)), piece]
        return [piece]

    def _grow(self, text: Text[Memory], logits: Array | None, chosen: int | None) -> Piece:
        if chosen is not None:
            return text.continuation.append(chosen, logits)
        assert logits is not None
        return text.continuation.take(logits)

    def _score(self, text: Text[Memory], length: int, logits: Array, count: int) -> None:
        """Keep what the logits say of the ids that follow in the prompt."""
        following = text.job.request.prompt[text.read - length + 1 : text.read + 1]
        for index, row in zip(following, logits, strict=False):  # nothing follows the last of the prompt
            logprobs = log_softmax(row)
            text.logprobs.append(float(logprobs[index]))
            text.top.append(tuple((int(i), float(logprobs[i])) for i in best(logprobs, count)))
