"""The checks that the tests of scoring and the table of its mutants share: plain functions that raise AssertionError.

They reach every function through its module, so that they see what a mutant has put there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from checks import FLOAT64
from closeness import assert_close
from numpy.typing import NDArray
from strategies import TINY, random_model

from neox.reference import scoring
from neox.reference.config import Config
from neox.reference.errors import InputError
from neox.reference.model import Model, forward

# Two correct programs of a few layers in float32 differ by 1e-5 of the largest logit (test_transformers.py), and a
# log-probability by at most twice as much as the logits it is made of.
TOLERANCE = {"float32": 2e-5, "float64": 2 * FLOAT64}


@dataclass(frozen=True)
class Drawn:
    """How the requests of an evaluation are drawn: some begin alike, some are the same, some are too long."""

    count: int = 40
    vocabulary: int = 3  # of what differs: with few ids, many texts begin alike
    longest: int = 5  # continuation
    seed: int = 0

    def pairs(self, config: Config) -> list[tuple[list[int], list[int]]]:
        rng = np.random.default_rng(self.seed)
        examples = rng.integers(0, config.vocab_size, 23).tolist()
        # Ids that a single byte does not tell apart.
        few = (rng.integers(0, config.vocab_size) + 256 * np.arange(self.vocabulary)) % config.vocab_size
        drawn = []
        for _ in range(self.count):
            shared = examples[: rng.integers(0, len(examples) + 1)]
            own = rng.choice(few, rng.integers(1, 6)).tolist()
            if rng.random() < 0.1:
                shared = rng.integers(0, config.vocab_size, config.max_position_embeddings + 9).tolist()
            continuation = rng.choice(few, rng.integers(1, self.longest + 1)).tolist()
            drawn.append((shared + own, continuation))
        whole = rng.integers(0, config.vocab_size, config.max_position_embeddings).tolist()
        return [*drawn, *drawn[:3], ([0], whole), (whole, whole)]  # twice the same; continuations as long as a context


def alone(model: Model, pair: tuple[Sequence[int], Sequence[int]]) -> tuple[NDArray, bool]:
    """Log-probabilities and greedy flag of one pair by itself, by a plain forward pass."""
    context, continuation = pair
    whole = [*context, *continuation]
    read = whole[:-1][-model.config.max_position_embeddings :]
    rows = forward(model, [read])[0, -len(continuation) :].astype(np.float64)
    shifted = rows - rows.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    own = logprobs[np.arange(len(continuation)), continuation]
    return own, bool((rows.argmax(-1) == continuation).all())


def same_as_alone(model: Model, pairs: Sequence[tuple[list[int], list[int]]], size: int) -> None:
    found = dict(scoring.scores(scoring.TreeReader(model, scoring.Limits(size)), pairs))
    assert sorted(found) == list(range(len(pairs)))
    for index, pair in enumerate(pairs):
        logprobs, greedy = alone(model, pair)
        assert_close(np.array(found[index].logprobs), logprobs, TOLERANCE[model.dtype.name])
        assert found[index].greedy == greedy
        assert found[index].total == math.fsum(found[index].logprobs)


def scores_are_those_of_forward() -> None:
    """However the requests fall into batches."""
    model = random_model(TINY, seed=3, dtype="float64")
    pairs = Drawn(25).pairs(model.config)
    likeliest = [int(forward(model, [context[-50:]])[0, -1].argmax()) for context, _ in pairs[:5]]
    pairs += [(context[-50:], [index]) for (context, _), index in zip(pairs, likeliest, strict=False)]
    for size in (60, 512):
        same_as_alone(model, pairs, size)


def scores_of_long_texts() -> None:
    """Texts of several blocks of queries, cut among the cores in the middle of a branch."""
    model = random_model(replace(TINY, max_position_embeddings=400), seed=4, dtype="float64")
    rng = np.random.default_rng(7)
    start = rng.integers(0, 101, 150).tolist()
    pairs = [(start + rng.integers(0, 101, n).tolist(), rng.integers(0, 101, n).tolist()) for n in (3, 140, 9, 1)]
    same_as_alone(model, pairs, 512)


# The tree, by a reader that computes nothing but remembers which tokens it was told stand before which.


class Remembering:
    """A reader whose log-probability of a target is a number that only this target after this text has.

    Memory holds of every position the whole text up to it, which is put together by the paths of the batch; the
    position of a token must be the length of the text before it.
    """

    def __init__(self, config: Config, tokens: int = 60, positions: float = math.inf) -> None:
        self.config = config
        self.limits = scoring.Limits(tokens, positions)
        self.memory: list[tuple[int, ...]] = []
        self.read_tokens = 0
        self.rows = 0

    def _at(self, path: scoring.Path) -> list[tuple[int, ...]]:
        return [text for part in path for text in self.memory[part]]

    def read(self, batch: scoring.Batch) -> scoring.Judgement:
        self.memory = self._at(batch.kept)
        for branch in batch.branches:
            before = self._at(branch.before)
            assert len(before) == branch.start
            assert branch.tokens.start < branch.tokens.stop
            assert all(len(text) == place + 1 for place, text in enumerate(before))
            text = before[-1] if before else ()
            for token in range(branch.tokens.start, branch.tokens.stop):
                assert batch.positions[token] == len(text)
                text = (*text, int(batch.ids[token]))
                self.memory.append(text)
        self.read_tokens += len(batch.ids)
        self.rows += len(batch.asked.rows)
        own = self.memory[batch.kept_length :]
        asked = batch.asked
        numbers = [number(own[asked.rows[r]], t) for r, t in zip(asked.row, asked.targets, strict=True)]
        return np.array(numbers), np.array([value % 2 == 0 for value in numbers], bool)


def number(text: tuple[int, ...], target: int) -> int:
    return hash((text, int(target))) % 2**40


def expected_of(config: Config, pair: tuple[Sequence[int], Sequence[int]]) -> tuple[int, ...]:
    context, continuation = pair
    read = (*context, *continuation)[:-1][-config.max_position_embeddings :]
    first = len(read) - len(continuation) + 1
    return tuple(number(read[: first + i], target) for i, target in enumerate(continuation))


def every_token_once(drawn: Drawn = Drawn(), tokens: int = 60, positions: float = math.inf) -> None:
    """Every token is read once, after the right text, and every prediction made once that is wanted."""
    config = replace(TINY, vocab_size=50432)
    pairs = drawn.pairs(config)
    reader = Remembering(config, tokens, positions)
    told: list[tuple[int, int]] = []
    found = dict(scoring.scores(reader, pairs, lambda read, total: told.append((read, total))))
    assert len(found) == len(pairs)
    for index, pair in enumerate(pairs):
        assert found[index].logprobs == expected_of(config, pair)
        assert found[index].greedy == all(value % 2 == 0 for value in found[index].logprobs)
    read = [(*context, *continuation)[:-1][-TINY.max_position_embeddings :] for context, continuation in pairs]
    distinct = {text[: end + 1] for text in read for end in range(len(text))}
    assert reader.read_tokens == len(distinct)
    assert told[-1] == (len(distinct), len(distinct))
    rows = {
        text[: len(text) - i]
        for text, (_, continuation) in zip(read, pairs, strict=True)
        for i in range(len(continuation))
    }
    assert reader.rows == len(rows)


def one_forward_for_answers_of_one_token() -> None:
    """The answers of a question are predicted after the same token: one row of logits serves all."""
    reader = Remembering(TINY)
    list(scoring.scores(reader, [([5, 6, 7], [answer]) for answer in range(20)]))
    assert (reader.read_tokens, reader.rows) == (3, 1)


def batches_are_of_the_size_asked_for() -> None:
    """No batch but the last has fewer tokens, and none goes on after it has enough."""
    sizes: list[int] = []

    class Counting(Remembering):
        def read(self, batch: scoring.Batch) -> scoring.Judgement:
            sizes.append(len(batch.ids))
            assert len(batch.ids) - (batch.branches[-1].tokens.stop - batch.branches[-1].tokens.start) < 60
            return super().read(batch)

    list(scoring.scores(Counting(TINY), Drawn().pairs(TINY)))
    assert len(sizes) > 3
    assert min(sizes[:-1]) >= 60
    positions: list[int] = []

    class Narrow(Remembering):
        def read(self, batch: scoring.Batch) -> scoring.Judgement:
            lengths = [branch.start + branch.tokens.stop - branch.tokens.start for branch in batch.branches]
            positions.append(len(lengths) * max(lengths))
            assert (len(lengths) - 1) * max(lengths[:-1], default=0) < 200
            return super().read(batch)

    list(scoring.scores(Narrow(TINY, 10**6, 200), Drawn().pairs(TINY)))
    assert len(positions) > 3
    assert min(positions[:-1]) >= 200


# What is read for a request.


def beginnings() -> None:
    """An empty context is the end-of-text token, unless that is how the continuation begins."""
    assert scoring.begun([4], [0, 5], 0) == ([4], [0, 5])
    assert scoring.begun([], [3, 5], 0) == ([0], [3, 5])
    assert scoring.begun([], [0, 5], 0) == ([0], [5])


def cut_on_the_left() -> None:
    config = replace(TINY, max_position_embeddings=4)
    assert scoring.text_of(config, ([1, 2, 3, 4, 5], [6, 7])).tolist() == [3, 4, 5, 6, 7]
    assert scoring.text_of(config, ([1], [6, 7])).tolist() == [1, 6, 7]
    assert scoring.text_of(config, ([1], [2, 3, 4, 5])).tolist() == [1, 2, 3, 4, 5]
    for pair in (([1], [2, 3, 4, 5, 6]), ([], [1]), ([1], [101]), ([-1], [1])):
        try:
            scoring.text_of(config, pair)
        except InputError:
            continue
        raise AssertionError(f"{pair} was taken")


def rolling() -> None:
    """All tokens in order, each after as much of the text before it as fits."""
    for length in (1, 2, 5):
        for count in range(13):
            ids = list(range(1, count + 1))
            windows = scoring.rolling_windows(ids, 0, length)
            assert [i for _, continuation in windows for i in continuation] == ids
            assert [len(continuation) for _, continuation in windows[:-1]] == [length] * (len(windows) - 1)
            for number_, (context, continuation) in enumerate(windows):
                assert context
                whole = [*context, *continuation]
                assert whole == list(range(whole[0], whole[0] + len(whole)))
                assert len(whole) == length + 1 or number_ == 0
    assert scoring.rolling_windows([1, 2, 3, 4, 5], 0, 3) == [([0], [1, 2, 3]), ([2, 3], [4, 5])]


def judgement_of_huge_logits() -> None:
    """exp of 1000 is infinite in float32; the log-probabilities are not. Of equals the first is the likeliest."""
    logits = np.array([[1000, 1000, -1000], [0, math.log(3), -math.inf]], np.float32)
    logits[1, 2] = -1e4
    asked = scoring.Asked(np.array([3, 8]), np.array([0, 0, 1]), np.array([0, 1, 0]))
    logprobs, greedy = scoring.judged(logits, asked)
    assert_close(logprobs, -np.log(np.array([2, 2, 4.0])), 1e-6)
    assert greedy.tolist() == [True, False, False]
    for wrong in (np.nan, np.inf, -np.inf):
        try:
            scoring.judged(np.array([[1.0, wrong, 2]]), scoring.Asked(np.zeros(1), np.zeros(1, int), np.zeros(1, int)))
        except InputError:
            continue
        raise AssertionError(f"{wrong} was taken for a logit")


CHECKS = {
    check.__name__: check
    for check in (
        scores_are_those_of_forward,
        scores_of_long_texts,
        every_token_once,
        one_forward_for_answers_of_one_token,
        batches_are_of_the_size_asked_for,
        beginnings,
        cut_on_the_left,
        rolling,
        judgement_of_huge_logits,
    )
}
