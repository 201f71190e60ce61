"""Would the tests notice? Every wrong model of the table must fail the check it names, which the right model passes."""

from __future__ import annotations

import numpy as np
import pytest
from checks import CHECKS
from mutants import MUTANTS, Mutant

# A mutant may divide by zero or overflow on its way to a wrong answer.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("check", CHECKS)
def test_the_right_model_passes(check: str):
    CHECKS[check]()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_wrong_model_fails(mutant: Mutant, monkeypatch: pytest.MonkeyPatch):
    mutant.install(monkeypatch)
    with np.errstate(all="ignore"), pytest.raises(AssertionError):
        CHECKS[mutant.check]()


def test_every_check_has_a_mutant_and_every_name_is_used_once():
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_whose_text_is_gone_says_so():
    gone = Mutant("gone", "parity", MUTANTS[0].module, "attention", (("no such text", ""),))
    with pytest.raises(AssertionError, match="no longer contains 'no such text'"):
        gone.source()
