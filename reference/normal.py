"""The tail of the normal distribution, which GELU is made of and NumPy lacks.

    Q(x) = P(Z > x) = erfc(x / sqrt(2)) / 2,   for x >= 0

Q(x) exp(x^2/2) falls smoothly from 1/2 towards 1 / (x sqrt(2 pi)). As a function of t = 3 / (3+x) it is, to within
rounding, t times a polynomial: the one through the C library's erfc at the Chebyshev points, found at import.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray

DEGREE = {np.dtype(np.float32): 6, np.dtype(np.float64): 18}  # the least whose error is lost in the dtype's rounding
LARGEST = 7.0  # the polynomial is fitted up to here; beyond, Q < 2e-12


def _fitted(t: NDArray) -> NDArray:
    """Q(x) exp(x^2/2) / t at x = 3 (1-t) / t."""
    x = (3 * (1 - t) / t).tolist()
    return np.array([math.erfc(v / math.sqrt(2)) / 2 * math.exp(v * v / 2) for v in x]) / t


def _coefficients(degree: int) -> list[float]:
    """Of the polynomial in t, the highest power first."""
    series = Chebyshev.interpolate(_fitted, degree, (3 / (3 + LARGEST), 1.0))
    return series.convert(kind=Polynomial, domain=(-1, 1)).coef[::-1].tolist()


COEFFICIENTS = {dtype: _coefficients(degree) for dtype, degree in DEGREE.items()}


def upper_tail(x: NDArray) -> NDArray:
    """Q(x) for x >= 0, in the dtype of x: float32 or float64; relative error below 3e-6 and 2e-14 where x < 6."""
    t = x + 3
    np.divide(3, t, out=t)
    first, second, *rest = COEFFICIENTS[x.dtype]
    y = first * t
    y += second
    for coefficient in rest:
        y *= t
        y += coefficient
    y *= t
    np.multiply(x, x, out=t)
    t *= -0.5
    y *= np.exp(t, out=t)
    return y
