"""The rule by which everything else is judged must itself refuse what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from closeness import assert_close, relative_error

EXPECTED = np.array([[1.0, -4.0, 0.0], [2.0, 3.0, 0.5]])


def changed(index: tuple[int, int], value: float) -> np.ndarray:
    actual = EXPECTED.copy()
    actual[index] = value
    return actual


def test_equal_arrays_are_close_with_no_tolerance_at_all():
    assert_close(EXPECTED, EXPECTED.copy(), rtol=0)


def test_error_is_measured_against_the_largest_expected_magnitude():
    actual = changed((0, 2), 3.9e-3)  # the expected entry is 0; the largest magnitude is 4
    assert_close(actual, EXPECTED, rtol=1e-3)
    with pytest.raises(AssertionError):
        assert_close(actual, EXPECTED, rtol=0.97e-3)


def test_atol_counts_where_everything_expected_is_zero():
    zeros = np.zeros(3)
    assert_close(zeros + 1e-9, zeros, rtol=1.0, atol=1e-9)
    with pytest.raises(AssertionError):
        assert_close(zeros + 1e-9, zeros, rtol=1.0)


def test_message_names_the_worst_entry_and_both_values():
    actual = changed((1, 1), 3.5)
    actual[0, 0] = 1.25
    with pytest.raises(AssertionError, match=r"worst at \[1, 1\]: .*3\.5.*expected .*3\.0.*error 0\.5"):
        assert_close(actual, EXPECTED, rtol=1e-3)


@pytest.mark.parametrize("both", [False, True])
def test_nan_is_never_close(both: bool):
    actual = changed((1, 2), np.nan)
    expected = actual if both else EXPECTED
    with pytest.raises(AssertionError, match="NaN"):
        assert_close(actual, expected, rtol=1e9)
    with pytest.raises(AssertionError, match="NaN"):
        assert_close(EXPECTED, actual, rtol=1e9)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinity_is_close_only_to_itself(value: float):
    infinite = changed((0, 1), value)
    assert_close(infinite, infinite.copy(), rtol=0)
    for actual, expected in [(infinite, EXPECTED), (EXPECTED, infinite), (infinite, -infinite)]:
        with pytest.raises(AssertionError, match="infinite"):
            assert_close(actual, expected, rtol=1e9)


def test_an_infinity_does_not_widen_the_bound_of_the_finite_entries():
    expected = changed((0, 1), np.inf)
    actual = expected.copy()
    actual[1, 1] += 0.1
    with pytest.raises(AssertionError, match="worst at"):
        assert_close(actual, expected, rtol=1e-3)


def test_shapes_are_not_broadcast():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(EXPECTED, EXPECTED[:1], rtol=1e9)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(EXPECTED[0, 0], EXPECTED[:1, :1], rtol=1e9)


def test_kinds_of_number_are_not_mixed_but_precisions_are():
    assert_close(EXPECTED.astype(np.float32), EXPECTED, rtol=0)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(EXPECTED.astype(np.int64), EXPECTED, rtol=1e9)


def test_float32_is_compared_without_rounding_the_expected_values():
    """A third rounded to float32 is 1e-8 away from a third: an error that a comparison in float32 would not see."""
    third = np.array([1 / 3])
    assert relative_error(third.astype(np.float32), third) > 1e-9
    with pytest.raises(AssertionError):
        assert_close(third.astype(np.float32), third, rtol=1e-9)


def test_empty_arrays_are_close():
    assert_close(np.empty((0, 3)), np.empty((0, 3)), rtol=0)


def test_relative_error_reports_nan_as_nan():
    assert np.isnan(relative_error([1.0, np.nan], [1.0, 2.0]))
