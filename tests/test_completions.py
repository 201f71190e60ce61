"""OpenAI's completions without the HTTP: what is asked, what is refused, and what the answer holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Mutant
from strategies import seeds

from neox.reference import completions, shipped
from neox.reference.batching import Batch, Limits, ReferenceBackend
from neox.reference.checkpoint.load import load
from neox.reference.completions import Choice, joined, parsed, read_asked, token_name, usage_of
from neox.reference.errors import InputError
from neox.reference.generate import CachedDecoder, Piece, Request, complete
from neox.reference.model import Model, forward
from neox.reference.sampling import Sampling, log_softmax
from neox.reference.tokenizer import Tokenizer, load_tokenizer

Json = dict[str, Any]

TEXT = "Once upon a t\u00efme \u65e5\u672c \U0001f642"  # characters of one to four bytes
PROMPTS = ["Once upon a time", TEXT, "\u00e9", "x"]


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(shipped.path())


@cache
def model() -> Model:
    return load(shipped.path(), dtype="float64")


def parts_of(**body: object) -> tuple[list[list[Json]], Json]:
    """What each choice gains at each event, and the counts of tokens."""
    asked = completions.read_asked(body, tokenizer(), 20)  # which a mutant may have replaced
    batch = Batch(ReferenceBackend(model()), Limits(4000, chunk=7), tokenizer())
    choices = {batch.submit(job): Choice(i, job, asked, tokenizer()) for i, job in enumerate(asked.jobs)}
    parts: list[list[Json]] = [[] for _ in asked.jobs]
    while batch.running or batch.waiting:
        for event in batch.step():
            if (part := choices[event.index].feed(event)) is not None:
                parts[part["index"]].append(part)
    assert all(choice.ended for choice in choices.values())
    return parts, usage_of(asked, [*choices.values()])


def answer(**body: object) -> list[Json]:
    return [joined(parts) for parts in parts_of(**body)[0]]


@given(
    st.sampled_from(PROMPTS),
    st.sampled_from([0.0, 1.0, 2.0]),
    seeds,
    st.integers(1, 25),
    st.sampled_from([None, "e", ["\u00e9", " the"], [".", "ing", "q"]]),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
@settings(max_examples=25)
def test_an_answer_is_what_the_loop_gives(prompt, temperature, seed, tokens, stop, logprobs, echo) -> None:
    sampling = Sampling(temperature, seed=seed)
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    ids = tokenizer().encode(prompt)
    request = Request(ids, tokens, sampling, stops, logprobs=logprobs)
    expected = complete(CachedDecoder(model()), [request], tokenizer())[0]
    asked = {"prompt": prompt, "temperature": temperature, "seed": seed, "max_tokens": tokens}
    parts, usage = parts_of(**asked, stop=stop, logprobs=logprobs, echo=echo)
    found = joined(parts[0])
    assert found["text"] == (prompt if echo else "") + expected.text
    assert found["finish_reason"] == expected.finish_reason
    assert [part["finish_reason"] for part in parts[0][:-1]] == [None] * (len(parts[0]) - 1)
    assert usage["completion_tokens"] == len(expected.ids)
    assert usage["prompt_tokens"] == len(ids)
    if logprobs is None:
        assert found["logprobs"] is None
    else:
        assert_logprobs(found["logprobs"], ids if echo else [], ids, [*expected.ids], logprobs)


def assert_logprobs(found: Json, shown: list[int], prompt: list[int], made: list[int], count: int) -> None:
    """Against log-softmax of the whole text's logits, row by row."""
    rows = [None, *(log_softmax(row) for row in forward(model(), [prompt + made])[0])]
    texts = [*zip(shown, rows, strict=False), *zip(made, rows[len(prompt) :], strict=False)]
    assert found["tokens"] == [token_name(tokenizer(), index) for index, _ in texts]
    for (index, row), logprob, top in zip(texts, found["token_logprobs"], found["top_logprobs"], strict=True):
        if row is None:
            assert logprob is top is None
            continue
        assert abs(logprob - row[index]) < 1e-9  # float64 in another order of summation
        best = [int(i) for i in np.argsort(-row, kind="stable")[:count]]
        assert top.keys() == {token_name(tokenizer(), i) for i in [*best, index]}
        assert max(top.values()) >= logprob
        assert not best or abs(max(top.values()) - row.max()) < 1e-9


@pytest.mark.parametrize("cut", [0, 1])
def test_offsets_are_where_tokens_begin(cut: int) -> None:
    """Also after a prompt that ends within a character."""
    ids = tokenizer().encode(TEXT)
    (found,) = answer(prompt=ids[: len(ids) - cut], echo=True, logprobs=0, max_tokens=20, seed=5)
    rows = found["logprobs"]
    assert rows["text_offset"][0] == 0
    whole = 0
    for name, offset in zip(rows["tokens"], rows["text_offset"], strict=True):
        if not name.startswith("bytes:"):
            assert found["text"][offset:].startswith(name)
            whole += 1
    assert 15 < whole < len(rows["tokens"])


def test_of_tokens_with_the_same_text_the_best_is_told() -> None:
    class Same(Tokenizer):
        def __init__(self) -> None:
            self.eos = 0

        def token_bytes(self, index: int) -> bytes:
            return b"x"

    asked = read_asked({"prompt": [1], "logprobs": 2}, Same(), 1)
    part = Choice(0, asked.jobs[0], asked, Same()).feed(Piece(0, 5, "x", None, -3.0, ((7, -0.5), (6, -1.0))))
    assert part is not None
    assert part["logprobs"]["top_logprobs"] == [{"x": -0.5}]


def test_a_prompt_is_counted_once() -> None:
    usage = parts_of(prompt=[[1, 2, 3], [4]], n=2, max_tokens=2, ignore_eos=True)[1]
    assert usage == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}


def test_parts_never_cut_a_character() -> None:
    """At a high temperature the model writes many bytes that are no characters; those are one U+FFFD at the end."""
    for seed in range(5):
        parts, _ = parts_of(prompt=TEXT, temperature=5.0, seed=seed, max_tokens=40)
        ids = complete(
            CachedDecoder(model()),
            [Request(tokenizer().encode(TEXT), 40, Sampling(5.0, seed=seed))],
            tokenizer(),
        )[0].ids
        made = [index for index in ids if index != tokenizer().eos]
        assert "".join(part["text"] for part in parts[0]) == tokenizer().decode(made)


def test_choices_of_several_prompts_are_those_of_each_alone() -> None:
    several = answer(prompt=PROMPTS, n=2, seed=7, max_tokens=9)
    alone = [answer(prompt=prompt, seed=7 + i, max_tokens=9)[0]["text"] for prompt in PROMPTS for i in range(2)]
    assert [choice["text"] for choice in several] == alone
    assert [choice["index"] for choice in several] == [*range(8)]
    assert len(set(alone)) > 4


def test_ids_are_as_good_as_text() -> None:
    ids = [tokenizer().encode(prompt) for prompt in PROMPTS]
    assert answer(prompt=ids, seed=1) == answer(prompt=PROMPTS, seed=1)
    assert answer(prompt=ids[1], seed=1) == answer(prompt=TEXT, seed=1)


def test_no_tokens_are_a_score_alone() -> None:
    (scored,) = answer(prompt=TEXT, max_tokens=0, echo=True, logprobs=1)
    (longer,) = answer(prompt=TEXT, max_tokens=1, echo=True, logprobs=1)
    assert scored["text"] == TEXT
    assert scored["logprobs"]["token_logprobs"][0] is None
    assert scored["finish_reason"] == "length"
    assert scored["logprobs"] == {name: rows[:-1] for name, rows in longer["logprobs"].items()}
    (nothing,), usage = parts_of(prompt=TEXT, max_tokens=0)
    assert joined(nothing)["text"] == ""
    assert usage["completion_tokens"] == 0


def test_defaults_are_those_of_the_api() -> None:
    asked = read_asked({}, tokenizer(), 1)
    (job,) = asked.jobs
    assert list(job.request.prompt) == [tokenizer().eos]
    assert (job.request.max_tokens, job.request.sampling.temperature, job.request.logprobs) == (16, 1.0, None)
    assert (asked.echo, asked.stream, asked.usage, asked.model) == (False, False, False, None)
    assert read_asked({"prompt": None, "stop": None, "n": None, "best_of": None}, tokenizer(), 1) == asked


@pytest.mark.parametrize("empty", ["", [], [""], [[]]])
def test_an_empty_prompt_is_where_texts_begin(empty: object) -> None:
    assert read_asked({"prompt": empty}, tokenizer(), 1) == read_asked({"prompt": "<|endoftext|>"}, tokenizer(), 1)


def test_without_a_beginning_an_empty_prompt_is_refused() -> None:
    class Endless(Tokenizer):
        def __init__(self) -> None:
            self.eos = None

        def encode(self, text: str) -> list[int]:
            return []

    with pytest.raises(InputError, match="the prompt is empty"):
        read_asked({}, Endless(), 1)


def test_names_tell_tokens_apart() -> None:
    """But for tokens of the same text, of which the better one is kept."""
    assert token_name(tokenizer(), 10**6) == "token_id:1000000"
    names = {token_name(tokenizer(), i) for i in range(tokenizer().size)}
    assert len(names) > 0.9 * tokenizer().size
    assert any(name.startswith("bytes:\\x") for name in names)


# Mutants, each with the test that must fail.

MUTANTS = [
    (
        test_choices_of_several_prompts_are_those_of_each_alone,
        Mutant("one seed for all choices", "", completions, "nth", (("seed + index", "seed"),)),
    ),
    (
        test_a_prompt_is_counted_once,
        Mutant("a prompt counted for each choice", "", completions, "read_asked", (("sum(map", "n * sum(map"),)),
    ),
    (
        test_no_tokens_are_a_score_alone,
        Mutant("the token shown that nobody asked for", "", completions, "read_asked", (("tokens == 0", "False"),)),
    ),
    (
        lambda: test_offsets_are_where_tokens_begin(1),
        Mutant(
            "offsets by names", "", Choice, "_token", (("self._utf8.feed(self._tokenizer.token_bytes(index))", "name"),)
        ),
    ),
    (
        lambda: test_offsets_are_where_tokens_begin(1),
        Mutant(
            "no end of a half character", "", Choice, "_of_prompt", (("+= len(self._utf8", "+= 0 * len(self._utf8"),)
        ),
    ),
    (
        test_of_tokens_with_the_same_text_the_best_is_told,
        Mutant("the last of the same name", "", Choice, "_token", (("best.setdefault(", "best.__setitem__("),)),
    ),
    (
        test_of_tokens_with_the_same_text_the_best_is_told,
        Mutant("only the best", "", Choice, "_token", (("(*top, (index, logprob))", "top[:0]"),)),
    ),
]


@pytest.mark.parametrize(("check", "mutant"), MUTANTS, ids=lambda value: getattr(value, "name", ""))
def test_a_wrong_answer_is_found(check: Callable[[], None], mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.install(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check()


WRONG = [
    ({"prompt": 3}, "prompt must be a string, a list of token ids, or a list of such prompts"),
    ({"prompt": {"a": 1}}, "prompt must be"),
    ({"prompt": False}, "prompt must be"),
    ({"prompt": 0}, "prompt must be"),
    ({"prompt": [1, "a"]}, "prompt must be"),
    ({"prompt": [True]}, "prompt must be"),
    ({"prompt": [1.0]}, "prompt must be"),
    ({"prompt": [["a"]]}, "prompt must be"),
    ({"prompt": "\ud800"}, "half of a surrogate pair"),
    ({"n": 0}, "n must be 1 or more"),
    ({"n": 6}, "6 choices are more than the 5 that may be under way together"),
    ({"prompt": ["a", "b"], "n": 3}, "6 choices"),
    ({"n": 2, "best_of": 3}, "best_of is not implemented"),
    ({"max_tokens": -1}, "max_tokens must be 0 or more"),
    ({"max_tokens": 1.5}, "max_tokens must be a whole number"),
    ({"max_tokens": True}, "max_tokens must be a whole number"),
    ({"temperature": "hot"}, "temperature must be a number"),
    ({"temperature": -1}, "temperature must be 0 or more"),
    ({"temperature": float("inf")}, "temperature must be"),
    ({"temperature": 10**400}, "temperature is too large"),
    ({"top_p": 0}, "top_p must be"),
    ({"top_k": -1}, "top_k must be"),
    ({"min_p": 1}, "min_p must be"),
    ({"seed": -1}, "seed must be"),
    ({"logprobs": 101}, "logprobs must be 0 or more, at most 100"),
    ({"logprobs": True}, "logprobs must be a whole number"),
    ({"stop": 1}, "stop must be a string or a list of strings"),
    ({"stop": ["a", 1]}, "stop must be"),
    ({"stop": ""}, "a stop string is empty"),
    ({"stop": ["a"] * 17}, "stop may hold 16 strings of up to 1000 characters"),
    ({"stop": "a" * 1001}, "stop may hold"),
    ({"stream": 1}, "stream must be true or false"),
    ({"echo": "yes"}, "echo must be true or false"),
    ({"stream_options": {"usage": True}}, "there is no field named 'usage'"),
    ({"suffix": "x"}, "suffix is not implemented"),
    ({"logit_bias": {"1": 2}}, "logit_bias is not implemented"),
    ({"presence_penalty": 1}, "presence_penalty is not implemented"),
    ({"frequency_penalty": 0.1}, "frequency_penalty is not implemented"),
    ({"messages": [], "functions": 1}, "there is no field named 'functions', 'messages'"),
]


@pytest.mark.parametrize(("body", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_answered_is_refused(body: Json, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_asked(body, tokenizer(), 5)
    assert message in str(error.value)


def test_what_changes_nothing_is_taken() -> None:
    read_asked({"user": "me", "suffix": "", "logit_bias": {}, "presence_penalty": 0.0, "best_of": 1}, tokenizer(), 5)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b'"x"', b"\xff", b"[" * 10**5, b'{"n": ' + b"1" * 5000 + b"}", b"null"]
)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InputError, match="the body"):
        parsed(body)


@given(
    st.dictionaries(
        st.sampled_from(["prompt", "n", "stop", "seed", "logprobs", "top_p", "max_tokens", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=2),
            max_leaves=5,
        ),
    )
)
@settings(max_examples=100)
def test_whatever_is_asked_is_read_or_refused(body: Json) -> None:
    try:
        asked = read_asked(parsed(json.dumps(body).encode()), tokenizer(), 5)
    except InputError:
        return
    assert 1 <= len(asked.jobs) <= 5
