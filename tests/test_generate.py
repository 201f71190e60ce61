"""Generation: the loop against a naive one over `forward`, ends of texts against a slow search, and transformers'."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from program import Outcome, as_process, in_process
from strategies import TINY, random_model, seeds

from neox.reference import shipped
from neox.reference.checkpoint.load import load
from neox.reference.config import Config, read_config
from neox.reference.errors import InputError
from neox.reference.generate import (
    CachedDecoder,
    Completion,
    Request,
    StopFinder,
    complete,
    gathered,
    generate,
    one_sequence,
    stream,
)
from neox.reference.model import Array, Model, forward
from neox.reference.sampling import Sampling, log_softmax
from neox.reference.tokenizer import Tokenizer, load_tokenizer

CaptureFixture = pytest.CaptureFixture[str]

SHORT = replace(TINY, max_position_embeddings=24, eos_token_id=None)
PROMPTS = [[5, 17, 99], [3], [8, 8, 2, 60, 41, 77, 1]]


@cache
def model(config: Config = SHORT) -> Model:
    return random_model(config, seed=5, dtype="float64")


@cache
def shipped_tokenizer() -> Tokenizer:
    return load_tokenizer(shipped.path())


@cache
def shipped_model() -> Model:
    return load(shipped.path(), dtype="float64")


class Scripted:
    """A decoder that makes a text per prompt out of given ids. Held to be told what was chosen."""

    def __init__(self, scripts: Sequence[Sequence[int]], config: Config) -> None:
        self.config = config
        self.scripts = list(scripts)
        self.position = 0
        self.steps = 0

    def logits(self) -> Array:
        rows = np.zeros((len(self.scripts), self.config.vocab_size))
        for row, script in zip(rows, self.scripts, strict=True):
            row[script[self.position]] = 9
        return rows

    def start(self, prompts: Sequence[Sequence[int]], capacity: int) -> Array:
        assert len(prompts) == len(self.scripts)
        return self.logits()

    def step(self, ids: Sequence[int]) -> Array:
        assert list(ids) == [script[self.position] for script in self.scripts]
        self.position += 1
        self.steps += 1
        return self.logits()

    def keep(self, rows: Sequence[int]) -> None:
        self.scripts = [self.scripts[i] for i in rows]


SHIPPED = read_config(shipped.path())


def scripted(ids: Sequence[int], **request: Any) -> Completion:
    """The completion that comes of these ids, which are chosen one after the other."""
    asked = Request([1], request.pop("max_tokens", len(ids)), **request)
    return complete(Scripted([ids], SHIPPED), [asked], shipped_tokenizer())[0]


# The decoder.


def test_a_batch_of_unequal_prompts_is_each_prompt_alone_also_after_some_ended() -> None:
    decoder = CachedDecoder(model())
    texts = [list(prompt) for prompt in PROMPTS]

    def check(logits: Array) -> None:
        assert_close(logits, np.stack([forward(model(), [text])[0, -1] for text in texts]), rtol=1e-12)

    check(decoder.start(texts, 7 + 6))
    for ids in ([1, 2, 3], [4, 5, 6]):
        for text, i in zip(texts, ids, strict=True):
            text.append(i)
        check(decoder.step(ids))
    decoder.keep([0, 2])
    del texts[1]
    for ids in ([9, 10], [11, 12]):
        for text, i in zip(texts, ids, strict=True):
            text.append(i)
        check(decoder.step(ids))
    decoder.keep([1])
    del texts[0]
    texts[0].append(50)
    check(decoder.step([50]))


def test_progress_counts_the_positions_of_the_longest_prompt() -> None:
    read: list[int] = []
    CachedDecoder(model(), read.append).start(PROMPTS, 7)
    assert sum(read) == 7


# The loop.


def naive(prompt: Sequence[int], tokens: int, config: Config = SHORT) -> list[int]:
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(forward(model(config), [text])[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_generation_is_the_naive_loop(prompt: list[int]) -> None:
    assert list(generate(model(), prompt, max_tokens=9)) == naive(prompt, 9)
    assert list(generate(model(), np.array([prompt]), max_tokens=9)) == naive(prompt, 9)


def test_a_batch_of_unequal_prompts_and_limits_gives_what_each_gives_alone() -> None:
    requests = [Request(prompt, limit) for prompt, limit in zip(PROMPTS, [9, 2, 5], strict=True)]
    completions = complete(CachedDecoder(model()), requests)
    assert [list(c.ids) for c in completions] == [naive(p, n) for p, n in zip(PROMPTS, [9, 2, 5], strict=True)]
    assert [c.finish_reason for c in completions] == ["length"] * 3


@settings(max_examples=15)
@given(seed=seeds, order=st.permutations(range(3)))
def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(seed: int, order: list[int]) -> None:
    requests = [Request(p, 6, Sampling(1.5, top_p=0.9, seed=seed + i)) for i, p in enumerate(PROMPTS)]
    alone = [complete(CachedDecoder(model()), [request])[0].ids for request in requests]
    together = complete(CachedDecoder(model()), [requests[i] for i in order])
    assert [c.ids for c in together] == [alone[i] for i in order]


def test_seeds_repeat_a_text_and_without_one_texts_differ() -> None:
    def text(seed: int | None) -> list[int]:
        return list(generate(model(), [5, 17], max_tokens=20, temperature=3, seed=seed))

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(None) != text(None)  # equal once in about 50^20 runs


def test_each_text_of_a_batch_is_sampled_its_own_way() -> None:
    samplings = [Sampling(), Sampling(2.0, seed=3), Sampling(repetition_penalty=0.1)]  # which repeats
    requests = [Request(PROMPTS[0], 8, sampling) for sampling in samplings]
    batch = complete(CachedDecoder(model()), requests)
    assert [c.ids for c in batch] == [complete(CachedDecoder(model()), [r])[0].ids for r in requests]
    assert len({c.ids for c in batch}) == 3


def test_the_repetition_penalty_sees_the_prompt_and_what_was_generated() -> None:
    config = replace(SHORT, vocab_size=4, max_position_embeddings=99)
    flat = Scripted([[0, 0, 0]], config)
    flat.logits = lambda: np.array([[4.0, 3.0, 3.5, 2.5]])  # type: ignore[method-assign]
    flat.step = lambda ids: flat.logits()  # type: ignore[method-assign]
    penalty = Sampling(repetition_penalty=2.0)
    # 3 was in the prompt; 0 leads until it was chosen, then 2, then 1; all halved, 0 leads again.
    assert complete(flat, [Request([3], 4, penalty)])[0].ids == (0, 2, 1, 0)


def test_tokens_come_one_by_one() -> None:
    decoder = Scripted([[5, 6, 7, 8]], SHIPPED)
    pieces = stream(decoder, [Request([1], 4)])
    assert next(pieces).id == 5
    assert decoder.steps == 0
    assert next(pieces).id == 6
    assert decoder.steps == 1


def test_no_step_is_computed_whose_logits_nobody_needs() -> None:
    decoder = Scripted([[5, 6, 7, 8]], SHIPPED)
    complete(decoder, [Request([1], 3)])
    assert decoder.steps == 2


def test_no_requests_give_nothing() -> None:
    assert complete(CachedDecoder(model()), []) == []


# The context.


@pytest.mark.parametrize(("length", "tokens"), [(1, 24), (20, 5), (23, 2), (24, 1)])
def test_a_text_ends_where_the_context_does(length: int, tokens: int) -> None:
    prompt = list(range(length))
    (completion,) = complete(CachedDecoder(model()), [Request(prompt, 1000)])
    assert (len(completion.ids), completion.finish_reason) == (tokens, "length")
    assert list(completion.ids) == naive(prompt, tokens)


def test_a_long_prompt_ends_at_the_context_and_the_others_go_on() -> None:
    prompts = [[7] * 22, [4, 3], [9] * 5]
    completions = complete(CachedDecoder(model()), [Request(prompt, 1000) for prompt in prompts])
    assert [len(c.ids) for c in completions] == [3, 23, 20]
    assert [list(c.ids) for c in completions] == [naive(p, n) for p, n in zip(prompts, [3, 23, 20], strict=True)]


# Ids that end a text or cannot be part of one.


def test_the_end_of_text_token_ends_a_text_and_is_its_last_id() -> None:
    tokenizer = shipped_tokenizer()
    ids = [*tokenizer.encode("ab"), 0, *tokenizer.encode("cd")]
    ended = scripted(ids)
    assert (ended.text, ended.ids, ended.finish_reason) == ("ab", tuple(ids[: ids.index(0) + 1]), "stop")
    ignored = scripted(ids, ignore_eos=True)
    assert (ignored.text, ignored.ids, ignored.finish_reason) == ("ab<|endoftext|>cd", tuple(ids), "length")


def test_end_of_text_is_the_tokenizers_or_else_the_configs() -> None:
    config = replace(SHIPPED, eos_token_id=2)  # as in the first config.json of the 20B, where 2 is "!"
    with_tokenizer = complete(Scripted([[5, 2, 0, 7]], config), [Request([1], 4)], shipped_tokenizer())
    assert with_tokenizer[0].ids == (5, 2, 0)
    assert complete(Scripted([[5, 2, 0, 7]], config), [Request([1], 4)])[0].ids == (5, 2)
    endless = replace(config, eos_token_id=None)
    assert complete(Scripted([[5, 2, 0, 7]], endless), [Request([1], 4)])[0].ids == (5, 2, 0, 7)


def test_end_of_text_on_the_last_step_is_a_stop() -> None:
    assert scripted([5, 0]).finish_reason == "stop"


def test_generate_stops_at_end_of_text_too() -> None:
    first = naive([5, 17, 99], 6)
    config = replace(SHORT, eos_token_id=first[3])
    kept = first[: first.index(first[3]) + 1]
    assert list(generate(model(config), [5, 17, 99], max_tokens=6)) == kept
    assert list(generate(model(config), [5, 17, 99], max_tokens=6, ignore_eos=True)) == first


def test_ids_without_a_token_are_not_generated() -> None:
    config = replace(SHIPPED, vocab_size=1030)
    decoder = Scripted([[1027, 1027]], config)
    decoder.step = lambda ids: decoder.logits()  # type: ignore[method-assign]
    assert complete(decoder, [Request([1], 2)])[0].ids == (1027, 1027)
    hot = [Request([1], 2), Request([1], 2, Sampling(1.0, seed=0))]
    for request in hot:
        assert max(complete(decoder, [request], shipped_tokenizer())[0].ids) < 1024


# Log-probabilities.


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5, top_k=5, repetition_penalty=2.0, seed=1)])
def test_log_probabilities_are_those_of_forward_before_any_filter(sampling: Sampling) -> None:
    (completion,) = complete(CachedDecoder(model()), [Request(PROMPTS[2], 6, sampling, logprobs=4)])
    text = list(PROMPTS[2])
    for piece in completion.pieces:
        expected = log_softmax(forward(model(), [text])[0, -1])
        assert piece.logprob is not None
        assert math.isclose(piece.logprob, expected[piece.id], rel_tol=1e-12)
        assert [i for i, _ in piece.top] == np.argsort(-expected)[:4].tolist()
        assert_close([p for _, p in piece.top], np.sort(expected)[::-1][:4], rtol=1e-12)
        text.append(piece.id)


def test_log_probabilities_count_ids_without_a_token() -> None:
    decoder = Scripted([[1027]], replace(SHIPPED, vocab_size=1030))
    (completion,) = complete(decoder, [Request([1], 1, logprobs=1)], shipped_tokenizer())
    assert completion.pieces[0].top[0][0] == 1027
    assert math.isclose(completion.pieces[0].logprob or 0, -math.log(1029 + math.exp(9)), rel_tol=1e-12)


def test_log_probabilities_come_only_when_asked_for() -> None:
    (none,) = complete(CachedDecoder(model()), [Request([1], 1)])
    (only_chosen,) = complete(CachedDecoder(model()), [Request([1], 1, logprobs=0)])
    assert (none.pieces[0].logprob, none.pieces[0].top) == (None, ())
    assert only_chosen.pieces[0].logprob is not None
    assert only_chosen.pieces[0].top == ()


# Stop strings, against a slow search.


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """(end, start) of the stop that is complete first, the longest of them."""
    found = [
        (end, start)
        for end in range(len(text) + 1)
        for start in range(end)
        for stop in stops
        if text[start:end] == stop
    ]
    return min(found, default=None)


def undecided(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may begin a stop."""
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


letters = st.text("ab", max_size=14)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


@settings(max_examples=300)
@given(text=letters, stops=stop_lists, cuts=st.lists(st.integers(0, 14), max_size=6))
def test_stop_strings_cut_the_text_wherever_tokens_end(text: str, stops: list[str], cuts: list[int]) -> None:
    finder = StopFinder(stops)
    shown = ""
    for start, end in itertools.pairwise([0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]):
        shown += finder.feed(text[start:end])
        stop = first_stop(text[:end], stops)
        assert finder.found == (stop is not None)
        if stop is not None:
            assert shown + finder.flush() == text[: stop[1]]
            return
        assert shown == text[: end - undecided(text[:end], stops)]  # all that is decided, and nothing else
    assert shown + finder.flush() == text


@settings(max_examples=100)
@given(data=st.data(), ids=st.lists(st.integers(1, 1023), min_size=1, max_size=10))
def test_streamed_text_is_the_decoded_text_up_to_the_first_stop(data: st.DataObject, ids: list[int]) -> None:
    """Stops are pieces of the text itself, so they begin and end inside tokens and inside each other."""
    tokenizer = shipped_tokenizer()
    whole = tokenizer.decode(ids)
    stops = []
    for _ in range(data.draw(st.integers(0, 2))):
        start = data.draw(st.integers(0, max(len(whole) - 1, 0)))
        stops += [whole[start : start + data.draw(st.integers(1, 4))]]
    stops = [stop for stop in stops if stop]
    completion = scripted(ids, stop=tuple(stops))
    stop = first_stop(whole, stops)
    assert completion.text == (whole if stop is None else whole[: stop[1]])
    assert completion.finish_reason == ("length" if stop is None else "stop")
    assert completion.ids == tuple(ids[: len(completion.ids)])
    if stop is not None:  # it ended with the token that completed the stop, or with the flush after the last one
        before = list(tokenizer.stream(completion.ids[:-1]))[:-1]
        assert first_stop("".join(before), stops) is None


def test_a_stop_may_begin_inside_a_token_and_span_several() -> None:
    tokenizer = shipped_tokenizer()
    ids = tokenizer.encode("they were in the forest and")
    ends = list(itertools.accumulate(len(tokenizer.decode([i])) for i in ids))
    text, start, stop = "they were in the forest and", 2, "ey were in t"
    assert text.startswith(stop, start)
    assert start not in ends
    assert start + len(stop) not in ends
    completion = scripted(ids, stop=(stop,))
    assert (completion.text, completion.finish_reason) == ("th", "stop")
    assert len(completion.ids) == sum(end < start + len(stop) for end in ends) + 1


def test_text_held_back_for_a_stop_that_does_not_come_is_given_at_the_end() -> None:
    tokenizer = shipped_tokenizer()
    ids = tokenizer.encode("the en")
    assert scripted(ids, stop=("the end",)).text == "the en"
    assert scripted([*ids, 0], stop=("the end",)).text == "the en"


def test_a_stop_on_the_last_step_is_a_stop() -> None:
    ids = shipped_tokenizer().encode("abcd")
    assert scripted(ids, stop=("d",)).finish_reason == "stop"


def token_of(some: bytes) -> int:
    return next(i for i in range(1024) if shipped_tokenizer().token_bytes(i) == some)


def test_nothing_follows_a_stop_not_even_what_waits_for_its_last_byte() -> None:
    half = token_of(b"\xe2")  # the second one shows that the first will never be whole, and waits itself
    completion = scripted([token_of(b"a"), half, half], stop=("a\ufffd",))
    assert (completion.text, completion.finish_reason) == ("", "stop")


def test_each_text_of_a_batch_has_its_own_stops() -> None:
    ids = shipped_tokenizer().encode("one two three")
    requests = [Request([1], len(ids), stop=stop) for stop in (("two",), (), ("three", "ne"))]
    completions = complete(Scripted([ids] * 3, SHIPPED), requests, shipped_tokenizer())
    assert [c.text for c in completions] == ["one ", "one two three", "o"]


def test_a_character_cut_off_by_the_limit_is_marked() -> None:
    ids = [token_of(bytes([byte])) for byte in "é".encode()]
    assert scripted(ids).text == "é"
    assert scripted(ids[:1]).text == "\ufffd"
    assert [p.text for p in scripted(ids).pieces] == ["", "é"]


def test_pieces_of_several_texts_are_gathered_by_their_index() -> None:
    pieces = list(stream(CachedDecoder(model()), [Request(p, 4) for p in PROMPTS]))
    assert [p.index for p in pieces] == [0, 1, 2] * 4
    assert [p.finish_reason for p in pieces] == [None] * 9 + ["length"] * 3
    assert [list(c.ids) for c in gathered(pieces, 3)] == [naive(p, 4) for p in PROMPTS]


# What a user can cause.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"max_tokens": 0}, "max_tokens must be a whole number, 1 or more, not 0"),
        ({"max_tokens": -5}, "max_tokens must be"),
        ({"max_tokens": 2.5}, "max_tokens must be"),
        ({"max_tokens": True}, "max_tokens must be"),
        ({"logprobs": -1}, "logprobs must be"),
        ({"stop": ("a", "")}, "stop string is empty"),
    ],
)
def test_requests_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request(**{"prompt": [1], "max_tokens": 3, **arguments})


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1] * 25, 1), "prompt has 25 tokens, but the model's context is 24"),
        (Request([1, 101], 1), "token id 101 is outside the vocabulary of 101"),
        (Request([-1], 1), "token id -1"),
        (Request([1], 1, stop=("a",)), "tokenizer is needed"),
    ],
)
def test_requests_that_do_not_fit_the_model_are_refused(request_: Request, message: str) -> None:
    with pytest.raises(InputError, match=message):
        next(stream(CachedDecoder(model()), [Request([1], 1), request_]))


@pytest.mark.parametrize("ids", [[[1], [2]], [1.5], "text", 3, [[[1]]], [True]])
def test_ids_that_are_not_one_sequence_of_integers_are_refused(ids: Any) -> None:
    with pytest.raises(InputError, match="integers of one text"):
        one_sequence(ids)


@pytest.mark.parametrize("arguments", [{"temperature": -1}, {"max_tokens": 0}, {"ids": []}, {"ids": [[]]}])
def test_generate_refuses_bad_arguments_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        generate(model(), **{"ids": [1], **arguments})


# The program: examples/generate.py.


def lines_of(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.status == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def test_the_program_prints_prompt_and_continuation_and_nothing_else_on_stdout(capsys: CaptureFixture) -> None:
    prompt = "The king’s daughter"  # noqa: RUF001  its bytes are what is tested
    request = Request(shipped_tokenizer().encode(prompt), 25)
    (expected,) = complete(CachedDecoder(load(shipped.path())), [request], shipped_tokenizer())
    for how in ([], ["--no-stream"]):
        outcome = in_process(["--prompt", prompt, "-n", "25", *how], b"", capsys)
        assert (outcome.status, outcome.stdout) == (0, f"{prompt}{expected.text}\n")
    for word in ("model: ", "load ", "prompt ", "generation 25 tokens", "tok/s", "peak memory", "finish: length"):
        assert word in outcome.stderr
    assert "seed" not in outcome.stderr  # greedy


def test_the_program_as_a_process_reads_stdin_and_writes_utf8() -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    outcome = as_process(["--prompt", "-", "-n", "3", "--model", str(shipped.path())], "日本é\n".encode(), ascii_only)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.startswith("日本é\n")


def test_the_program_has_a_prompt_of_its_own(capsys: CaptureFixture) -> None:
    assert in_process(["-n", "3"], b"", capsys).stdout.startswith("Once upon a time")


def test_the_program_prints_the_seed_that_repeats_a_run(capsys: CaptureFixture) -> None:
    argv = ["--prompt", "She", "--temperature", "1.5", "-n", "20"]
    first = in_process(argv, b"", capsys)
    seed = first.stderr.split("repeat with --seed ")[1].strip()
    assert in_process([*argv, "--seed", seed], b"", capsys).stdout == first.stdout
    assert in_process(argv, b"", capsys).stdout != first.stdout


def test_the_program_continues_several_prompts_each_with_its_own_seed(capsys: CaptureFixture) -> None:
    flags = ["--temperature", "1", "-n", "8", "--dtype", "float64"]
    argv = ["--prompt", "She went", "--prompt", "She went", "--prompt", "A", "--seed", "40", *flags]
    lines = lines_of(in_process([*argv, "--json"], b"", capsys))
    assert [line["seed"] for line in lines] == [40, 41, 42]
    assert lines[0]["text"] != lines[1]["text"]
    (alone,) = lines_of(in_process(["--prompt", "She went", "--seed", "41", *flags, "--json"], b"", capsys))
    assert alone["ids"] == lines[1]["ids"]
    texts = [line["prompt"] + line["text"] for line in lines]
    assert in_process(argv, b"", capsys).stdout == "\n\n".join(texts) + "\n"


def test_the_programs_json(capsys: CaptureFixture) -> None:
    (line,) = lines_of(in_process(["--prompt", "The", "-n", "4", "--json", "--logprobs", "2"], b"", capsys))
    assert set(line) == {"model", "prompt", "text", "ids", "finish_reason", "seed", "logprobs", "timing"}
    assert (line["model"], line["prompt"], line["finish_reason"], line["seed"]) == ("shipped", "The", "length", None)
    assert shipped_tokenizer().decode(line["ids"]) == line["text"]
    assert [entry["id"] for entry in line["logprobs"]] == line["ids"]
    for entry in line["logprobs"]:
        assert len(entry["top"]) == 2
        assert {key: entry[key] for key in ("id", "token", "logprob")} == entry["top"][0]  # greedy
        assert entry["token"] == shipped_tokenizer().decode([entry["id"]])
    timing = line["timing"]
    assert (timing["prompt_tokens"], timing["generated_tokens"]) == (len(shipped_tokenizer().encode("The")), 4)
    assert all(timing[key] > 0 for key in ("load_s", "prompt_tokens_per_s", "generated_tokens_per_s"))
    assert 1e7 < timing["peak_memory_bytes"] < 1e11


def test_the_programs_stop_strings(capsys: CaptureFixture) -> None:
    (line,) = lines_of(in_process(["--prompt", "Once upon a time", "-n", "40", "--json"], b"", capsys))
    stop = line["text"][20:23]
    before = line["text"][: line["text"].index(stop)]
    argv = ["--prompt", "Once upon a time", "-n", "40", "--stop", "nowhere", "--stop", stop]
    stopped = in_process(argv, b"", capsys)
    assert stopped.stdout == f"Once upon a time{before}\n"
    assert "finish: stop" in stopped.stderr


def test_the_program_overrides_the_config_and_converts_as_told(capsys: CaptureFixture) -> None:
    base = ["--prompt", "The wolf", "-n", "3", "--json", "--logprobs", "0"]

    def logprobs(*flags: str) -> list[float]:
        (line,) = lines_of(in_process([*base, *flags], b"", capsys))
        return [entry["logprob"] for entry in line["logprobs"]]

    plain = logprobs()
    assert_close(logprobs("--weights", "stored"), plain, rtol=1e-5)
    assert_close(logprobs("--dtype", "float64"), plain, rtol=1e-5)
    assert logprobs("--dtype", "float64") != plain
    sequential = logprobs("--set", "use_parallel_residual=false")
    assert abs(np.array(sequential) - np.array(plain)).max() > 0.01
    assert logprobs("--set", "hidden_act=gelu") != plain


def test_the_program_says_when_config_and_tokenizer_disagree(tmp_path: Path, capsys: CaptureFixture) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shipped.path(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    outcome = in_process(["--model", str(folder), "-n", "3"], b"", capsys)
    assert "the config's end-of-text id is 2; the tokenizer's, 0, is used" in outcome.stderr


# Against transformers.


@cache
def theirs() -> tuple[Any, Any]:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(shipped.path(), dtype=torch.float64)
    return torch, model.eval()


TEXTS = ["Once upon a time", "The", "“I am the king,” said he, and", "In the forest there lived a wolf, who"]


def generated_by_transformers(prompts: list[list[int]], tokens: int) -> list[list[int]]:
    torch, model = theirs()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return [row[width:] for row in out.tolist()]


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(0) + 1] if 0 in ids else ids


@pytest.mark.oracle
@pytest.mark.parametrize("text", TEXTS)
def test_greedy_text_of_the_shipped_model_is_transformers(text: str) -> None:
    prompt = shipped_tokenizer().encode(text)
    (expected,) = generated_by_transformers([prompt], 30)
    ours = list(generate(shipped_model(), prompt, max_tokens=30, tokenizer=shipped_tokenizer()))
    assert ours == until_end(expected)
    assert len(set(ours)) > 5


@pytest.mark.oracle
def test_greedy_texts_of_a_padded_batch_are_transformers() -> None:
    prompts = [shipped_tokenizer().encode(text) for text in TEXTS]
    completions = complete(CachedDecoder(shipped_model()), [Request(p, 30) for p in prompts], shipped_tokenizer())
    expected = generated_by_transformers(prompts, 30)
    assert [list(c.ids) for c in completions] == [until_end(ids) for ids in expected]
