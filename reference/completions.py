"""Completions as OpenAI's API writes them: from the JSON that is asked to jobs, from their events to JSON.

    asked = read_asked(body, tokenizer)        what /v1/completions was sent
    choice = Choice(i, job, asked, tokenizer)  for each of asked.jobs
    choice.feed(event)                         what that event adds to the choice, if anything
    joined(parts)                              all parts of a choice as one, for an answer that is not streamed

Nothing that is asked is silently left out: a field that is not known, or whose value is not implemented, is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neox.reference.batching import Event, Failure, Job, Scores
from neox.reference.errors import InputError
from neox.reference.generate import Request
from neox.reference.sampling import Sampling
from neox.reference.tokenizer import Tokenizer, Utf8Stream

Json = dict[str, Any]

MOST_LOGPROBS = 100  # best ids for each token: an answer is kept in memory until it is sent
MOST_STOPS = 16  # each of which is searched for at every token
LONGEST_STOP = 1000  # characters, which may be held back

# From JSON.


def parsed(body: bytes) -> Json:
    """The object that the body holds. InputError if it holds none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of thousands of digits; nested deeply
        raise InputError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError("the body must be a JSON object")
    return value


@dataclass(frozen=True)
class Kind:
    """What the value of a field may be."""

    name: str
    types: tuple[type, ...]

    def holds(self, value: object) -> bool:
        return isinstance(value, self.types) and (bool in self.types or not isinstance(value, bool))


NUMBER, WHOLE = Kind("a number", (int, float)), Kind("a whole number", (int,))
TEXT, FLAG, OBJECT = Kind("a string", (str,)), Kind("true or false", (bool,)), Kind("an object", (dict,))


class Fields:
    """The fields of an object, each to be taken once; null is as good as absent."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, kind: Kind, default: Any) -> Any:
        """InputError if it is of another kind."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not kind.holds(value):
            raise InputError(f"{name} must be {kind.name}")
        return value

    def take_between(self, name: str, least: int, most: float, default: int | None) -> int | None:
        """A whole number. InputError if it is out of range."""
        value: int | None = self.take(name, WHOLE, default)
        if value is not None and not least <= value <= most:
            raise InputError(f"{name} must be {least} or more" + (f", at most {most}" if most < math.inf else ""))
        return value

    def take_number(self, name: str, default: float) -> float:
        """Any number. InputError if no float is as large."""
        value = self.take(name, NUMBER, default)
        try:
            return float(value)
        except OverflowError as error:  # a whole number of hundreds of digits
            raise InputError(f"{name} is too large") from error

    def take_any(self, name: str) -> object:
        return self._left.pop(name, None)

    def take_only(self, name: str, value: object) -> None:
        """A field of the API of which this value alone is implemented."""
        if name in self._left and self._left.pop(name) != value:
            raise InputError(f"{name} is not implemented")

    def done(self) -> None:
        """InputError if there was something else."""
        if self._left:
            raise InputError(f"there is no field named {', '.join(map(repr, sorted(self._left)[:5]))}")


# What is asked.


@dataclass(frozen=True)
class Asked:
    """A request for completions: for each prompt `n` choices, one after the other."""

    jobs: tuple[Job, ...]
    prompt_tokens: int  # each prompt counted once
    model: str | None
    echo: bool  # a choice begins with its prompt
    silent: bool  # no token was asked for: the one that each job has is not shown
    stream: bool
    usage: bool  # counts of tokens at the end of a stream


def read_asked(body: Mapping[str, object], tokenizer: Tokenizer, most: int) -> Asked:
    """What an object of JSON asks for. InputError if it is more than `most` choices, or wrong."""
    fields = Fields(body)
    prompts = read_prompts(fields.take_any("prompt"), tokenizer)
    n = fields.take_between("n", 1, math.inf, 1) or 1
    if n * len(prompts) > most:
        raise InputError(f"{n * len(prompts)} choices are more than the {most} that may be under way together")
    fields.take_only("best_of", n)
    echo, stream = fields.take("echo", FLAG, False), fields.take("stream", FLAG, False)
    tokens = fields.take_between("max_tokens", 0, math.inf, 16)
    model, usage = fields.take("model", TEXT, None), read_usage(fields.take("stream_options", OBJECT, {}))
    request = read_request(fields, prompts[0], tokens or 1)
    fields.done()
    scored = request.logprobs if echo else None
    requests = [replace(nth(request, i), prompt=prompt) for prompt in prompts for i in range(n)]
    jobs = tuple(Job(request, scored) for request in requests)
    return Asked(jobs, sum(map(len, prompts)), model, echo, tokens == 0, stream, usage)


def read_prompts(value: object, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A text, its ids, or a list of either."""
    if isinstance(value, list) and value and all(isinstance(part, (str, list)) for part in value):
        return [read_prompt(part, tokenizer) for part in value]
    return [read_prompt("" if value is None else value, tokenizer)]


def read_prompt(value: object, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids; of an empty prompt that of the end-of-text token, after which texts begin."""
    if isinstance(value, list) and all(WHOLE.holds(part) for part in value):
        ids = value
    elif isinstance(value, str):
        ids = tokenizer.encode(value)
    else:
        raise InputError("prompt must be a string, a list of token ids, or a list of such prompts")
    return tuple(ids) if ids or tokenizer.eos is None else (tokenizer.eos,)


def read_usage(options: Mapping[str, object]) -> bool:
    """Whether counts of tokens are asked for, in stream_options."""
    fields = Fields(options)
    usage: bool = fields.take("include_usage", FLAG, False)
    fields.done()
    return usage


def read_request(fields: Fields, prompt: tuple[int, ...], max_tokens: int) -> Request:
    """What all prompts have in common, as a request for the first."""
    sampling = Sampling(
        temperature=fields.take_number("temperature", 1.0),
        top_k=fields.take("top_k", WHOLE, 0),
        top_p=fields.take_number("top_p", 1.0),
        min_p=fields.take_number("min_p", 0.0),
        repetition_penalty=fields.take_number("repetition_penalty", 1.0),
        seed=fields.take("seed", WHOLE, None),
    )
    fields.take_any("user")  # who asks changes nothing
    for name, value in (("suffix", ""), ("logit_bias", {}), ("presence_penalty", 0), ("frequency_penalty", 0)):
        fields.take_only(name, value)
    logprobs = fields.take_between("logprobs", 0, MOST_LOGPROBS, None)
    stop, ignore_eos = read_stop(fields.take_any("stop")), fields.take("ignore_eos", FLAG, False)
    return Request(prompt, max_tokens, sampling, stop, ignore_eos, logprobs)


def read_stop(value: object) -> tuple[str, ...]:
    """A string or a list of them, few and short enough to be looked for at every token."""
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InputError("stop must be a string or a list of strings")
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        raise InputError(f"stop may hold {MOST_STOPS} strings of up to {LONGEST_STOP} characters")
    return tuple(stops)


def nth(request: Request, index: int) -> Request:
    """The request as the choice of this number of a prompt makes it: seeds that follow each other."""
    seed = request.sampling.seed
    return request if seed is None else replace(request, sampling=replace(request.sampling, seed=seed + index))


# What is answered.


def token_name(tokenizer: Tokenizer, index: int) -> str:
    """The token's text; if it is no whole characters, its bytes as OpenAI writes them; without any, its id."""
    content = tokenizer.token_bytes(index)
    try:
        return content.decode("utf-8") if content else f"token_id:{index}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Choice:
    """One choice in the making: what each event adds to it."""

    def __init__(self, index: int, job: Job, asked: Asked, tokenizer: Tokenizer) -> None:
        self.tokens = 0  # that were generated
        self.ended = False
        self._index = index
        self._prompt = job.request.prompt
        self._logprobs = job.request.logprobs is not None
        self._silent = asked.silent
        self._tokenizer = tokenizer
        self._before = tokenizer.decode(self._prompt) if asked.echo else ""  # what is yet to come of the prompt
        self._utf8 = Utf8Stream()
        self._offset = 0  # characters of the text that the tokens so far spell

    def feed(self, event: Event) -> Json | None:
        """What the event adds; None if nothing. The error of a Failure is raised."""
        if isinstance(event, Failure):
            raise event.error
        if isinstance(event, Scores):
            return self._part("", self._of_prompt(event), None)
        self.ended = self._silent or event.finish_reason is not None
        if self._silent:
            return self._part("", logprobs_of([]) if self._logprobs else None, "length")
        self.tokens += 1
        token = [self._token(event.id, event.logprob, event.top)] if self._logprobs else None
        if not (event.text or self._before or token or self.ended):
            return None
        return self._part(event.text, logprobs_of(token) if token else None, event.finish_reason)

    def _part(self, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        text, self._before = self._before + text, ""
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _of_prompt(self, scores: Scores) -> Json:
        rows = zip(self._prompt, (None, *scores.logprobs), (None, *scores.top), strict=True)  # the first has none
        tokens = [self._token(*row) for row in rows]
        self._offset += len(self._utf8.flush())
        return logprobs_of(tokens)

    def _token(self, index: int, logprob: float | None, top: Top | None) -> Token:
        """The token's name, log-probability, best ids by name with theirs, and place in the text."""
        name, offset = token_name(self._tokenizer, index), self._offset
        self._offset += len(self._utf8.feed(self._tokenizer.token_bytes(index)))
        if logprob is None or top is None:
            return name, None, None, offset
        best: dict[str, float] = {}
        for other, value in (*top, (index, logprob)):
            best.setdefault(token_name(self._tokenizer, other), value)  # of two tokens of one text, the better one
        return name, logprob, best, offset


Top = tuple[tuple[int, float], ...]
Token = tuple[str, float | None, dict[str, float] | None, int]
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def logprobs_of(tokens: Sequence[Token]) -> Json:
    return {name: [token[i] for token in tokens] for i, name in enumerate(COLUMNS)}


def joined(parts: Sequence[Json]) -> Json:
    """All parts of a choice as one."""
    logprobs = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    together = {name: [row for part in logprobs for row in part[name]] for name in COLUMNS} if logprobs else None
    return {**parts[-1], "text": "".join(part["text"] for part in parts), "logprobs": together}


def usage_of(asked: Asked, choices: Sequence[Choice]) -> Json:
    """Counts of tokens: of the prompts, each once, and of what was generated."""
    made = sum(choice.tokens for choice in choices)
    total = asked.prompt_tokens + made
    return {"prompt_tokens": asked.prompt_tokens, "completion_tokens": made, "total_tokens": total}
