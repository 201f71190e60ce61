"""Continuing texts: the loop around a model, when to stop, and text that can be shown as it comes.

    logits = decoder.start(prompts)
    until every text has ended:
        of each text:  id = sample(its row of logits);  its text grows by the id's bytes
        logits = decoder.step(ids)

A text ends with "stop" at the end-of-text token or one of its stop strings, with "length" at its own limit or the
model's context. The loop knows a model only as a `Decoder`, so it serves every implementation of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neox.reference.config import Config
from neox.reference.decode import Cache, extend, keep_rows, new_cache
from neox.reference.errors import InputError
from neox.reference.model import Array, Model, checked
from neox.reference.prefill import prefill
from neox.reference.sampling import GREEDY, Sampling, best, log_softmax, not_finite, sample
from neox.reference.tokenizer import END_OF_TEXT, Tokenizer, Utf8Stream

# What decodes.


class Decoder(Protocol):
    """A model and the texts that it is in the middle of.

    One that chooses ids itself, each with its text's sampling, returns the chosen ids (B,) wherever another returns
    logits; -1 where they were not finite. Of such texts there are no log-probabilities.
    """

    @property
    def config(self) -> Config: ...

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Array:
        """Read the prompts, of any lengths >= 1; logits after each (B,V).

        There will be at most `capacity` positions, if all prompts are padded to the longest.
        """
        ...

    def step(self, ids: Sequence[int]) -> Array:
        """Append one id to each text; logits after each (B,V)."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, ascending: the other texts have ended."""
        ...


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Array, Array]:  # (B,T), (B,)
    """The prompts as one array, padded on the left with any id, and how long each one's padding is."""
    width = max(map(len, prompts))
    padding = np.array([width - len(prompt) for prompt in prompts])
    return np.array([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]), padding


class CachedDecoder:
    """The reference model over the cache of decode.py."""

    def __init__(self, model: Model, progress: Callable[[int], object] = lambda positions: None) -> None:
        """progress is called while prompts are read, with the number of positions that were."""
        self._model = model
        self._progress = progress
        self._cache: Cache

    @property
    def config(self) -> Config:
        return self._model.config

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Array:
        ids, padding = padded(prompts)
        self._cache = new_cache(self._model, len(prompts), capacity, padding)
        return prefill(self._model, self._cache, ids, self._progress)

    def step(self, ids: Sequence[int]) -> Array:
        return extend(self._model, self._cache, np.array(ids)[:, None])[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        self._cache = keep_rows(self._cache, rows)


# What is asked, and what comes back.


@dataclass(frozen=True)
class Request:
    """One text to continue. InputError if a value is out of its range."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()  # strings before which the text ends
    ignore_eos: bool = False  # go on after the end-of-text token
    logprobs: int | None = None  # report log-probabilities: of the chosen id and of this many best ones

    def __post_init__(self) -> None:
        if len(self.prompt) == 0:
            raise InputError(f"the prompt is empty; to begin a text from nothing, prompt with {END_OF_TEXT}")
        _require_count("max_tokens", self.max_tokens, 1)
        if self.logprobs is not None:
            _require_count("logprobs", self.logprobs, 0)
        if "" in self.stop:
            raise InputError("a stop string is empty: it would end every text before its first token")


def _require_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise InputError(f"{name} must be a whole number, {least} or more, not {value!r}")


@dataclass(frozen=True)
class Piece:
    """What one step adds to one text."""

    index: int  # of the request
    id: int
    text: str  # that is now certain to be part of the continuation: often the token's, but it may lag behind
    finish_reason: str | None = None  # "stop" or "length" with the last piece of a text
    logprob: float | None = None  # of the id: log_softmax of the logits over the whole vocabulary, before any filter
    top: tuple[tuple[int, float], ...] = ()  # the best ids and their log-probabilities, the best first


@dataclass(frozen=True)
class Completion:
    """A whole continuation. The ids include those of an end-of-text token or a stop string; the text does not."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    pieces: tuple[Piece, ...]


# Where a text ends.


class StopFinder:
    """Lets text through up to the first stop string, and holds back an end that may be the beginning of one.

    The first is the one that is complete first; of several complete at the same character, the longest. So it does
    not depend on how the text is cut into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The part of the text so far that is now certain to come before any stop string."""
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        certain = len(text) - self._possible_beginning(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class Continuation:
    """One text in the making."""

    def __init__(self, index: int, request: Request, config: Config, tokenizer: Tokenizer | None) -> None:
        context = config.max_position_embeddings
        if len(request.prompt) > context:
            raise InputError(f"the prompt has {len(request.prompt)} tokens, but the model's context is {context}")
        if request.stop and tokenizer is None:
            raise InputError("stop strings are found in text, for which a tokenizer is needed")
        self.request = request
        self.ids: list[int] = checked(config, [request.prompt])[0].tolist()
        self.finish_reason: str | None = None
        # The last id follows from a full context; it need not fit in itself.
        self.limit = min(len(self.ids) + request.max_tokens, context + 1)
        self._index = index
        self._tokenizer = tokenizer
        self._eos = config.eos_token_id if tokenizer is None or tokenizer.eos is None else tokenizer.eos
        self._allowed = None if tokenizer is None else tokenizer.has_token(config.vocab_size)
        self._generator = np.random.default_rng(request.sampling.seed)
        self._utf8 = Utf8Stream()
        self._stops = StopFinder(request.stop)

    def take(self, logits: Array) -> Piece:  # (V,)
        """Choose the next id from the logits after the last one."""
        return self.append(sample(logits, self.request.sampling, self._generator, self.ids, self._allowed), logits)

    def append(self, chosen: int, logits: Array | None) -> Piece:  # (V,)
        """Go on with an id that was chosen elsewhere, -1 where the logits were not finite: then, an InputError.

        The logits are needed if log-probabilities are asked for.
        """
        if chosen < 0:
            raise not_finite()
        self.ids.append(chosen)
        text = self._grow(chosen)
        return Piece(self._index, chosen, text, self.finish_reason, *self._logprobs(logits, chosen))

    def _grow(self, chosen: int) -> str:
        """The text that has become certain. Sets finish_reason where this is the end."""
        if chosen == self._eos and not self.request.ignore_eos:
            self.finish_reason = "stop"
            return self._rest()
        text = self._stops.feed(self._utf8.feed(self._tokenizer.token_bytes(chosen))) if self._tokenizer else ""
        if not self._stops.found and len(self.ids) == self.limit:
            self.finish_reason = "length"
            text += self._rest()
        if self._stops.found:
            self.finish_reason = "stop"
        return text

    def _rest(self) -> str:
        """All that was held back, now that nothing follows; unless its last character completes a stop string."""
        text = self._stops.feed(self._utf8.flush())
        return text + self._stops.flush()

    def _logprobs(self, logits: Array | None, chosen: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        if self.request.logprobs is None:
            return None, ()
        assert logits is not None
        logprobs = log_softmax(logits)
        top = best(logprobs, self.request.logprobs)
        return float(logprobs[chosen]), tuple((int(i), float(logprobs[i])) for i in top)


# The loop.


def stream(decoder: Decoder, requests: Sequence[Request], tokenizer: Tokenizer | None = None) -> Iterator[Piece]:
    """Continue all texts side by side; at every step, one piece for each that has not ended, in their order.

    Without a tokenizer there is no text, no stop string and no id that is ruled out. InputError, before the first
    step, if a prompt does not fit the model.
    """
    texts = [Continuation(i, request, decoder.config, tokenizer) for i, request in enumerate(requests)]
    return _loop(decoder, texts)


def _loop(decoder: Decoder, texts: list[Continuation]) -> Iterator[Piece]:
    if not texts:
        return
    longest = max(len(text.ids) for text in texts)
    steps = max(text.limit - len(text.ids) for text in texts)
    logits = decoder.start([text.ids for text in texts], longest + steps - 1)
    while True:
        for text, row in zip(texts, logits, strict=True):
            yield text.take(row) if row.ndim else text.append(int(row), None)
        going = [i for i, text in enumerate(texts) if text.finish_reason is None]
        if not going:
            return
        if len(going) < len(texts):
            decoder.keep(going)
            texts = [texts[i] for i in going]
        logits = decoder.step([text.ids[-1] for text in texts])


def complete(decoder: Decoder, requests: Sequence[Request], tokenizer: Tokenizer | None = None) -> list[Completion]:
    """Continue all texts to their ends; as stream."""
    return gathered(stream(decoder, requests, tokenizer), len(requests))


def gathered(pieces: Iterable[Piece], count: int) -> list[Completion]:
    """The pieces of `count` texts, each put together."""
    of_text: list[list[Piece]] = [[] for _ in range(count)]
    for piece in pieces:
        of_text[piece.index].append(piece)
    return [_joined(tuple(parts)) for parts in of_text]


def _joined(pieces: tuple[Piece, ...]) -> Completion:
    text = "".join(piece.text for piece in pieces)
    return Completion(text, tuple(piece.id for piece in pieces), pieces[-1].finish_reason or "", pieces)


def one_sequence(ids: ArrayLike) -> NDArray[np.integer]:  # (T,) or (1,T) -> (T,)
    """InputError if there is not exactly one."""
    array = np.asarray(ids)
    if array.size == 0:
        array = array.astype(np.int64)  # an empty list is float64; that it is empty, Request says
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"ids must be the integers of one text, not {array.dtype} of shape {array.shape}")
    return array


def generate(
    model: Model,
    ids: ArrayLike,
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    tokenizer: Tokenizer | None = None,
    ignore_eos: bool = False,
) -> Iterator[int]:
    """The ids that continue one text, each as soon as it is chosen; the end-of-text id is the last if it is reached.

    ids: integers (T,) or [1, T]. A tokenizer rules out ids that have no token. InputError, before the first step, if
    an argument is out of range or the ids do not fit the model.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    request = Request(one_sequence(ids).tolist(), max_tokens, sampling, ignore_eos=ignore_eos)
    pieces = stream(CachedDecoder(model), [request], tokenizer)
    return (piece.id for piece in pieces)
