"""Sampling: the distribution against a slow writing of it and transformers' own, draws against the distribution."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from closeness import FLOAT64_STEP, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neox.reference.errors import InputError
from neox.reference.sampling import Sampling, best, candidates, distribution, log_softmax, sample

V = 23

seeds = st.integers(0, 2**32 - 1)


# What hypothesis draws: seeds and switches. Thresholds come from the seed, so that none falls exactly on a sum of
# probabilities, where the last bit of a rounding would decide.


def drawn_logits(seed: int, ties: bool = False) -> NDArray[np.float64]:
    logits = np.random.default_rng(seed).normal(scale=3, size=V)
    return np.round(logits) if ties else logits


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    rng = np.random.default_rng(draw(seeds))
    return Sampling(
        temperature=draw(st.sampled_from([0.3, 1.0, 2.5])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 7, V, V + 5])),
        top_p=draw(st.sampled_from([1.0, float(rng.uniform(0.01, 1))])),
        min_p=draw(st.sampled_from([0.0, float(rng.uniform(0.001, 0.9))])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.7, 0.6])),
    )


def previous_and_allowed(seed: int) -> tuple[list[int], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed + 1)
    allowed = rng.random(V) < 0.8
    allowed[rng.integers(V)] = True
    return rng.integers(0, V, 9).tolist(), allowed


# The slow writing: dictionaries of Python floats, one id at a time.


def slow_distribution(
    logits: NDArray[np.float64], sampling: Sampling, previous: Collection[int], allowed: NDArray[np.bool_]
) -> NDArray[np.float64]:
    score = {i: float(x) for i, x in enumerate(logits) if allowed[i]}
    for i in score:
        if i in previous:
            score[i] *= sampling.repetition_penalty if score[i] < 0 else 1 / sampling.repetition_penalty
    ranked = sorted(score, key=lambda i: (-score[i], i))
    if sampling.temperature == 0:
        ranked = ranked[:1]
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    top = score[ranked[0]]
    weight = {i: math.exp((score[i] - top) / (sampling.temperature or 1)) for i in ranked}
    total = math.fsum(weight.values())
    mass = sampling.top_p * total if sampling.top_p < 1 else math.inf
    nucleus = [i for n, i in enumerate(ranked) if math.fsum(weight[j] for j in ranked[:n]) < mass]
    likely = [i for i in nucleus if weight[i] >= sampling.min_p * weight[ranked[0]]]
    total = math.fsum(weight[i] for i in likely)
    return np.array([weight[i] / total if i in likely else 0.0 for i in range(V)])


# Scores differ by the rounding of one reciprocal, at most 12 * 1.7 / 0.3 = 70 after the temperature, so exponentials by
# a few hundred roundings; sums of V terms and three divisions add a few V.
CLOSE = 600 * FLOAT64_STEP


@settings(max_examples=200)
@given(seed=seeds, sampling=samplings(), greedy=st.booleans(), ties=st.booleans())
def test_the_distribution_is_that_of_the_slow_writing(seed: int, sampling: Sampling, greedy: bool, ties: bool) -> None:
    if ties:  # a penalty can round scores that tie to scores that do not
        sampling = replace(sampling, repetition_penalty=1.0)
    if greedy:
        sampling = replace(sampling, temperature=0.0)
    logits = drawn_logits(seed, ties)
    previous, allowed = previous_and_allowed(seed)
    expected = slow_distribution(logits, sampling, previous, allowed)
    actual = distribution(logits, sampling, previous, allowed)
    assert np.array_equal(actual > 0, expected > 0)
    assert_close(actual, expected, rtol=CLOSE)


@pytest.mark.oracle
@settings(max_examples=100)
@given(seed=seeds, sampling=samplings())
def test_the_distribution_is_transformers(seed: int, sampling: Sampling) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    processors = pytest.importorskip("transformers.generation.logits_process", reason="transformers is not installed")
    chain: list[Any] = [
        processors.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        processors.TemperatureLogitsWarper(sampling.temperature),
        *([processors.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        *([processors.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []),
        *([processors.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []),
    ]
    logits = drawn_logits(seed)
    previous, _ = previous_and_allowed(seed)
    ids, scores = torch.tensor([previous]), torch.tensor(logits[None])
    for processor in chain:
        scores = processor(ids, scores)
    expected = scores.softmax(-1)[0].numpy()
    actual = distribution(logits, sampling, previous)
    assert np.array_equal(actual > 0, expected > 0)
    assert_close(actual, expected, rtol=CLOSE)


# Laws of the distribution.


@given(seed=seeds, sampling=samplings(), ties=st.booleans())
def test_probabilities_are_positive_and_sum_to_one(seed: int, sampling: Sampling, ties: bool) -> None:
    previous, allowed = previous_and_allowed(seed)
    ids, p = candidates(drawn_logits(seed, ties), sampling, previous, allowed)
    assert p.dtype == np.float64
    assert (p > 0).all()
    assert (np.diff(ids) > 0).all()
    assert allowed[ids].all()
    assert abs(math.fsum(p) - 1) <= V * FLOAT64_STEP


@given(seed=seeds, sampling=samplings(), ties=st.booleans())
def test_top_k_of_one_is_greedy(seed: int, sampling: Sampling, ties: bool) -> None:
    logits = drawn_logits(seed, ties)
    previous, allowed = previous_and_allowed(seed)
    one = distribution(logits, replace(sampling, top_k=1), previous, allowed)
    assert np.array_equal(one, distribution(logits, replace(sampling, temperature=0.0), previous, allowed))


@given(seed=seeds, sampling=samplings(), shift=st.integers(-1000, 1000))
def test_adding_a_constant_to_all_logits_changes_nothing(seed: int, sampling: Sampling, shift: int) -> None:
    logits = np.round(drawn_logits(seed) * 1024) / 1024  # so that the sums are exact
    sampling = replace(sampling, repetition_penalty=1.0)  # which does look at the sign
    assert np.array_equal(distribution(logits + shift, sampling), distribution(logits, sampling))


@given(seed=seeds, sampling=samplings(), extra=st.integers(1, 9))
def test_rows_that_are_not_allowed_change_nothing(seed: int, sampling: Sampling, extra: int) -> None:
    logits = drawn_logits(seed)
    padded = np.concatenate([logits, np.random.default_rng(seed).normal(scale=9, size=extra)])
    allowed = np.arange(V + extra) < V
    expected = distribution(logits, sampling)
    assert np.array_equal(distribution(padded, sampling, (), allowed), [*expected, *[0] * extra])
    draws = [sample(padded, sampling, np.random.default_rng(i), (), allowed) for i in range(3)]
    assert draws == [sample(logits, sampling, np.random.default_rng(i)) for i in range(3)]


@given(seed=seeds, sampling=samplings(), ties=st.booleans())
def test_stricter_filters_keep_fewer_ids(seed: int, sampling: Sampling, ties: bool) -> None:
    logits = drawn_logits(seed, ties)
    kept = set(candidates(logits, sampling)[0])
    stricter = [
        replace(sampling, top_p=sampling.top_p * 0.7),
        replace(sampling, min_p=0.1 + 0.9 * sampling.min_p),
        replace(sampling, top_k=sampling.top_k - 1 if sampling.top_k > 1 else 1),
    ]
    assert all(set(candidates(logits, other)[0]) <= kept for other in stricter)


@given(seed=seeds)
def test_extreme_temperatures_are_greedy_and_uniform(seed: int) -> None:
    logits = drawn_logits(seed)
    assert np.array_equal(distribution(logits, Sampling(1e-300)), distribution(logits, Sampling(0.0)))
    assert_close(distribution(logits, Sampling(1e300)), np.full(V, 1 / V), rtol=V * FLOAT64_STEP)


def test_of_equal_ids_the_lowest_stay() -> None:
    logits = np.array([1.0, 5, 1, 5, 1, 5, 1])
    assert candidates(logits, Sampling(1.0, top_k=2))[0].tolist() == [1, 3]
    assert candidates(logits, Sampling(1.0, top_k=5))[0].tolist() == [0, 1, 2, 3, 5]
    assert candidates(logits, Sampling(1.0, top_p=0.6))[0].tolist() == [1, 3]
    assert candidates(logits, Sampling(0.0))[0].tolist() == [1]
    assert candidates(np.zeros(4), Sampling(1.0, top_p=0.5))[0].tolist() == [0, 1]


def test_ids_as_likely_by_rounding_only_stand_in_the_order_of_their_logits() -> None:
    assert candidates(np.arange(4.0), Sampling(1e300, top_p=0.5))[0].tolist() == [2, 3]
    assert candidates(np.arange(4.0), Sampling(1e300, top_k=2))[0].tolist() == [2, 3]


def test_top_p_keeps_the_id_that_crosses_the_line_and_min_p_the_one_on_it() -> None:
    logits = np.log2([8.0, 4, 2, 2]) * math.log(2)  # probabilities 1/2, 1/4, 1/8, 1/8
    assert candidates(logits, Sampling(1.0, top_p=0.49))[0].tolist() == [0]
    assert candidates(logits, Sampling(1.0, top_p=0.51))[0].tolist() == [0, 1]
    assert candidates(np.array([0.0, 0, 0, -1]), Sampling(1.0, min_p=0.99))[0].tolist() == [0, 1, 2]


def test_a_penalty_counts_an_id_once_and_moves_both_signs_down() -> None:
    logits = np.array([2.0, -2.0, 2.0, -2.0])
    p = distribution(logits, Sampling(1.0, repetition_penalty=2.0), previous=[0, 0, 1, 0])
    assert_close(p, np.exp([1.0, -4, 2, -2]) / np.exp([1.0, -4, 2, -2]).sum(), rtol=CLOSE)


def test_logits_are_not_changed() -> None:
    logits = drawn_logits(0)
    before = logits.copy()
    distribution(logits, Sampling(0.7, 5, 0.9, 0.1, 1.3), [1, 2])
    assert np.array_equal(logits, before)


# Draws.


class Fixed(np.random.Generator):
    """A generator whose uniform number is given."""

    def __init__(self, number: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.number = number

    def random(self) -> float:  # type: ignore[override]
        return self.number


@given(seed=seeds, sampling=samplings(), u=st.floats(0, 1, exclude_max=True))
def test_a_uniform_number_picks_the_id_whose_share_it_falls_into(seed: int, sampling: Sampling, u: float) -> None:
    logits = drawn_logits(seed)
    chosen = sample(logits, sampling, Fixed(u))
    p = distribution(logits, sampling)
    assert p[chosen] > 0
    assert p[:chosen].sum() - V * FLOAT64_STEP <= u <= p[: chosen + 1].sum() + V * FLOAT64_STEP


def test_shares_hold_their_lower_end_and_not_their_upper() -> None:
    draws = {u: sample(np.zeros(2), Sampling(1.0), Fixed(u)) for u in (0.0, 0.5 - 2.0**-54, 0.5)}
    assert list(draws.values()) == [0, 0, 1]


def test_the_largest_uniform_number_picks_the_last_id_that_is_possible() -> None:
    for seed in range(50):
        logits = np.random.default_rng(seed).normal(size=1000)  # so many that their sum is rounded
        logits[-3:] = -1e9  # too unlikely to have a probability
        assert candidates(logits, Sampling(1.0))[0].tolist() == list(range(997))
        assert (
            sample(logits, Sampling(1.0), Fixed(1 - 2.0**-53))
            == np.flatnonzero(distribution(logits, Sampling(1.0)))[-1]
        )


@given(seed=seeds, sampling=samplings())
def test_a_draw_takes_one_uniform_number_and_greedy_none(seed: int, sampling: Sampling) -> None:
    generator, twin = np.random.default_rng(seed), np.random.default_rng(seed)
    sample(drawn_logits(seed), sampling, generator)
    twin.random()
    assert generator.bit_generator.state == twin.bit_generator.state
    sample(drawn_logits(seed), replace(sampling, temperature=0.0), generator)
    assert generator.bit_generator.state == twin.bit_generator.state


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.5, top_k=6),
        Sampling(2.0, top_p=0.8),
        Sampling(1.5, min_p=0.05),
        Sampling(1.0, repetition_penalty=2.0),
    ],
    ids=["plain", "top_k", "top_p", "min_p", "penalty"],
)
def test_frequencies_are_those_of_the_distribution(sampling: Sampling) -> None:
    """Chi-square with d degrees of freedom exceeds d + 2 sqrt(dt) + 2t with probability e^-t at most.

    Laurent & Massart 2000, lemma 1. With t = 14 a right program fails for one seed in a million; the seed is fixed.
    """
    draws, t = 10_000, 14
    logits = drawn_logits(3)[:9] / 4
    p = distribution(logits, sampling, [1, 4])
    generator = np.random.default_rng(7)
    counts = np.bincount([sample(logits, sampling, generator, [1, 4]) for _ in range(draws)], minlength=9)
    possible = p > 0
    assert counts[~possible].sum() == 0
    expected = draws * p[possible]
    assert expected.min() > 5  # or the statistic would not be a chi-square
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    degrees = int(possible.sum()) - 1
    assert statistic < degrees + 2 * math.sqrt(degrees * t) + 2 * t


# Log-probabilities.


@given(seed=seeds, scale=st.sampled_from([1.0, 1000.0]))
def test_log_softmax_is_that_of_exact_sums(seed: int, scale: float) -> None:
    logits = (drawn_logits(seed) * scale).astype(np.float32)
    top = float(logits.max())
    total = math.log(math.fsum(math.exp(float(x) - top) for x in logits))
    actual = log_softmax(logits)
    assert actual.dtype == np.float64
    assert_close(
        actual, np.array([float(x) - top - total for x in logits]), rtol=4 * FLOAT64_STEP, atol=V * FLOAT64_STEP
    )


def test_the_best_come_in_order_and_the_lower_of_equals_first() -> None:
    scores = np.array([1.0, 3, 2, 3, 0, 2])
    assert best(scores, 0).tolist() == []
    assert best(scores, 1).tolist() == [1]
    assert best(scores, 3).tolist() == [1, 3, 2]
    assert best(scores, 99).tolist() == [1, 3, 2, 5, 0, 4]


# What a user can cause.


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, "1", None, True]),
        ("top_k", [-1, 1.5, math.nan, "3", True]),
        ("top_p", [0, -0.5, 1.1, math.nan, None]),
        ("min_p", [-0.1, 1, 1.5, math.nan]),
        ("repetition_penalty", [0, -1, math.nan, math.inf]),
        ("seed", [-1, 0.5, "7", True]),
    ],
)
def test_values_out_of_range_are_refused(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InputError, match=f"^{name} must be .*, not"):
            Sampling(**{name: value})


def test_values_at_the_ends_of_their_ranges_are_taken() -> None:
    Sampling(0, 0, 1, 0, 1e-9, 0)
    Sampling(1e9, 10**9, 1e-9, 0.999, 1e9, 2**63)
    Sampling(np.float32(0.5), np.int64(3), seed=np.int64(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = drawn_logits(0)
    logits[5] = bad
    with pytest.raises(InputError, match="not finite"):
        distribution(logits, Sampling(temperature))
    with pytest.raises(InputError, match="not finite"):
        log_softmax(logits)
