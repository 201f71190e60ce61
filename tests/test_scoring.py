"""Log-probabilities of many continuations at once: those of one plain forward pass each, and no token read twice."""

from __future__ import annotations

from threading import BrokenBarrierError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import Mutant
from scoring_checks import CHECKS, Drawn, alone, every_token_once, same_as_alone
from scoring_mutants import MUTANTS
from strategies import TINY, configs, random_model, seeds

from neox.reference import cores, scoring
from neox.reference.config import Config

drawn = st.builds(Drawn, st.integers(0, 30), st.sampled_from([1, 2, 9, 61]), st.integers(1, 9), seeds)


@pytest.mark.parametrize("check", CHECKS)
def test_the_right_scores_pass(check: str):
    CHECKS[check]()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_wrong_scores_fail(mutant: Mutant, monkeypatch: pytest.MonkeyPatch):
    mutant.install(monkeypatch)
    # A wrong path can also lead out of an array.
    with np.errstate(all="ignore"), pytest.raises((AssertionError, IndexError, ValueError, BrokenBarrierError)):
        CHECKS[mutant.check]()


def test_every_check_has_a_mutant_and_every_name_is_used_once():
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@given(drawn, st.integers(1, 200), st.sampled_from([np.inf, 1, 150]))
def test_every_token_of_drawn_requests_is_read_once(requests: Drawn, tokens: int, positions: float):
    every_token_once(requests, tokens, positions)


@given(configs(), drawn, st.sampled_from(["float32", "float64"]), st.sampled_from([1, 50, 512]))
def test_drawn_models_and_requests(config: Config, requests: Drawn, dtype: str, size: int):
    same_as_alone(random_model(config, requests.seed, dtype), requests.pairs(config)[::4], size)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_cores(count: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring, "cores", lambda: count)
    model = random_model(TINY, seed=5, dtype="float64")
    same_as_alone(model, Drawn(seed=2).pairs(TINY), 512)


def test_a_share_that_fails_ends_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring, "cores", lambda: 2)
    monkeypatch.setattr(scoring, "mix_tree", None)
    threads = cores.cores()
    with pytest.raises(TypeError):
        scoring.log_likelihoods(random_model(TINY, 1), [(list(range(60)), list(range(50)))] * 2)
    assert cores.cores() == threads


def test_in_their_order_and_nothing_for_nothing():
    model = random_model(TINY, seed=5, dtype="float64")
    pairs = [([9, 8], [7]), ([1, 2], [3, 4]), ([9], [8, 7])]
    for score, pair in zip(scoring.log_likelihoods(model, pairs), pairs, strict=True):
        np.testing.assert_allclose(score.logprobs, alone(model, pair)[0], rtol=1e-12)
    assert scoring.log_likelihoods(model, []) == []
