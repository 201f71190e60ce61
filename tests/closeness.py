"""The one rule by which two arrays are held to be close.

    max |actual - expected| <= rtol * max |expected| + atol

The error is measured against the largest expected magnitude of the whole array, not entry by entry: an entry near zero
is a sum in which large terms cancelled, and it carries the rounding error of those terms.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLOAT32_STEP = 2.0**-24  # the largest relative error of one rounding
FLOAT64_STEP = 2.0**-53


def largest(x: NDArray) -> float:
    return float(np.abs(x).max(initial=0))


def relative_error(actual: ArrayLike, expected: ArrayLike) -> float:
    """max |actual - expected| / max |expected|; NaN if either holds one."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return largest(a - e) / (largest(e) or 1.0)


def assert_close(actual: ArrayLike, expected: ArrayLike, rtol: float, atol: float = 0.0) -> None:
    """Fail unless max |actual - expected| <= rtol * max |expected| + atol.

    Shapes must be equal and both must hold the same kind of number, which may differ in precision: float32 is compared
    with float64 in float64. An infinity must stand in both at the same place with the same sign, a NaN in neither.
    """
    a, e = np.asarray(actual), np.asarray(expected)
    assert a.dtype.kind == e.dtype.kind, f"dtype {a.dtype}, expected {e.dtype}"
    assert a.shape == e.shape, f"shape {a.shape}, expected {e.shape}"
    a, e = a.astype(np.float64), e.astype(np.float64)
    for name, x in (("actual", a), ("expected", e)):
        assert not np.isnan(x).any(), (
            f"{name} is NaN at {np.argwhere(np.isnan(x))[0].tolist()}, {np.isnan(x).sum()} in all"
        )
    wrong = (np.isinf(a) | np.isinf(e)) & (a != e)
    assert not wrong.any(), f"infinite in only one of the two at {np.argwhere(wrong)[0].tolist()}"
    finite = np.isfinite(a)
    error = np.where(finite, np.abs(np.where(finite, a, 0) - np.where(finite, e, 0)), 0)
    scale = largest(e[finite])
    bound = rtol * scale + atol
    if not largest(error) <= bound:
        worst = np.unravel_index(int(np.argmax(error)), error.shape)
        index = [int(i) for i in worst]
        raise AssertionError(
            f"worst at {index}: {a[worst]!r}, expected {e[worst]!r}; error {error[worst]:.3g} exceeds {bound:.3g} "
            f"(largest expected magnitude {scale:.6g}, rtol {rtol:.3g}, atol {atol:.3g})"
        )
