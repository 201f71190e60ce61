"""One row of logits to the next id.

    logits -> repetition penalty -> top-k -> temperature -> top-p -> min-p -> one draw

Filters and their order are those of transformers' LogitsProcessors (temperature comes before top-k there, which keeps
the same ids). Where two ids are equally likely and only one can stay, the lower id stays, so nothing depends on how a
sort breaks ties.

Filters work on the candidates, the ids that are still in the running: `ids` ascending, with their scores (N,).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neox.reference.errors import InputError

Ids = NDArray[np.intp]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How one text is sampled; as it stands, greedily. InputError if a value is out of its range."""

    temperature: float = 0.0  # 0 takes the most likely id; the filters then change nothing
    top_k: int = 0  # keep this many ids; 0 keeps all
    top_p: float = 1.0  # keep the most likely ids that together have this probability
    min_p: float = 0.0  # keep ids at least this fraction as likely as the most likely one
    repetition_penalty: float = 1.0  # divides the positive logits of ids that occurred, multiplies the negative ones
    seed: int | None = None  # None draws a new one for every text

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, 0 <= _number(self.temperature) < math.inf, "0 or more")
        _require("top_k", self.top_k, _is_count(self.top_k), "a whole number, 0 (off) or more")
        _require("top_p", self.top_p, 0 < _number(self.top_p) <= 1, "more than 0 and at most 1 (off)")
        _require("min_p", self.min_p, 0 <= _number(self.min_p) < 1, "at least 0 (off) and less than 1")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0 < _number(penalty) < math.inf, "more than 0; 1 is off")
        _require("seed", self.seed, self.seed is None or _is_count(self.seed), "a whole number, 0 or more")


def _number(value: object) -> float:
    """NaN, of which no comparison holds, for what is not a number."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _require(name: str, value: object, fulfilled: bool, what: str) -> None:
    if not fulfilled:
        raise InputError(f"{name} must be {what}, not {value!r}")


GREEDY = Sampling()


def new_seed() -> int:
    """A seed that nobody chose, short enough to be typed again."""
    return secrets.randbits(32)


# Filters.


def penalized(logits: Floats, previous: Sequence[int], penalty: float) -> Floats:  # (V,) -> (V,)
    """Ids that occurred, however often, made less likely (penalty > 1) or more.  Keskar et al. 2019, "CTRL"."""
    scores = logits.copy()
    if penalty != 1:
        seen = np.unique(np.asarray(previous, np.intp))
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return scores


def top_k(scores: Floats, k: int) -> Ids:
    """Which candidates are among the k best, ascending."""
    if not 0 < k < len(scores):
        return np.arange(len(scores))
    last = np.partition(scores, -k)[-k]
    better, equal = np.flatnonzero(scores > last), np.flatnonzero(scores == last)
    return np.sort(np.concatenate([better, equal[: k - len(better)]]))


def top_p(scores: Floats, p: Floats, mass: float) -> Ids:
    """The fewest of the best candidates that have this probability together, ascending.  Holtzman et al. 2019.

    Sorted by their scores, which can differ where probabilities are rounded to the same number.
    """
    if mass == 1:
        return np.arange(len(p))
    order = np.argsort(-scores, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])  # probability of all better candidates
    return np.sort(order[before < mass])


def min_p(p: Floats, fraction: float) -> Ids:
    """Which candidates are at least this fraction as likely as the best, and not impossible.  Nguyen et al. 2024."""
    return np.flatnonzero((p > 0) & (p >= fraction * p.max()))


# From logits to an id.


def not_finite() -> InputError:
    """A model whose numbers overflow has nothing to say."""
    return InputError("the model's logits are not finite: its weights are damaged, or of another architecture")


def checked_logits(logits: ArrayLike) -> Floats:  # (V,)
    """The row in float64. InputError if it is not finite."""
    row = np.asarray(logits, np.float64)
    if not np.isfinite(row).all():
        raise not_finite()
    return row


def candidates(
    logits: ArrayLike, sampling: Sampling, previous: Sequence[int] = (), allowed: NDArray[np.bool_] | None = None
) -> tuple[Ids, Floats]:
    """The ids that can be drawn, ascending, and their probabilities.

    logits: one row (V,). previous: ids of the text so far, for the repetition penalty. allowed (V,): ids that may be
    drawn at all, such as those that have a token. InputError if a logit is not finite.
    """
    scores = penalized(checked_logits(logits), previous, sampling.repetition_penalty)
    ids = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed)
    if sampling.temperature == 0:
        return ids[[np.argmax(scores[ids])]], np.ones(1)  # argmax takes the first of equals
    ids = ids[top_k(scores[ids], sampling.top_k)]
    # The best score is subtracted before the division: at a temperature near 0 the others become -inf, and none inf.
    with np.errstate(over="ignore"):
        p = np.exp((scores[ids] - scores[ids].max()) / sampling.temperature)
    kept = top_p(scores[ids], p / p.sum(), sampling.top_p)
    ids, p = ids[kept], p[kept]
    kept = min_p(p, sampling.min_p)
    return ids[kept], p[kept] / p[kept].sum()


def distribution(
    logits: ArrayLike, sampling: Sampling, previous: Sequence[int] = (), allowed: NDArray[np.bool_] | None = None
) -> Floats:  # (V,)
    """The probability of every id of the vocabulary; arguments as those of `candidates`."""
    ids, p = candidates(logits, sampling, previous, allowed)
    spread = np.zeros(len(np.asarray(logits)))
    spread[ids] = p
    return spread


def sample(
    logits: ArrayLike,
    sampling: Sampling,
    generator: np.random.Generator,
    previous: Sequence[int] = (),
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """Draw an id; arguments as those of `candidates`.

    Greedily, or by one uniform number from the text's own generator: so what a seed gives does not depend on the
    other texts of a batch.
    """
    ids, p = candidates(logits, sampling, previous, allowed)
    if sampling.temperature == 0:
        return int(ids[0])
    cumulative = np.cumsum(p)
    # The number is less than 1 and its product with the sum, rounded, less than the sum: there is always such an index.
    index = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(ids[index])


# What the model thought of it.


def log_softmax(logits: ArrayLike) -> Floats:  # (V,) -> (V,)
    """Log-probabilities, over all ids of the vocabulary and before any filter."""
    row = checked_logits(logits)
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def best(scores: Floats, n: int) -> Ids:
    """The n best ids, the best first; the lower of equals first."""
    kept = top_k(scores, n) if n else np.arange(0)
    return kept[np.argsort(-scores[kept], kind="stable")]
