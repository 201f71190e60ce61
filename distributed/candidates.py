"""What of the logits travels: the few that decide the next id, where few can.

    greedy           the best id of every rank
    top-k            the k best of every rank: the k best of all are among them
    top-p, min-p     the best of every rank, and what the others weigh together; where that turns out too few, all
    anything else    all logits

Rank 0 makes a row of logits of what it gets, in which the ids that were sent stand with their logits and the others of
a rank share their weight equally. Sampled by reference/sampling.py, such a row gives what the whole row would: only the
rounding of the sum of all weights, in float64, differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from neox.distributed.sharding import share
from neox.reference.generate import Request
from neox.reference.model import Array
from neox.reference.sampling import Sampling, best

NUCLEUS = 64  # ids that each rank sends where it is not known how many are needed
MOST = 1024  # with more from each rank, sending all is no slower
NOTHING = float(np.finfo(np.float32).min)  # the logit of an id that cannot be drawn; finite, as the sampler demands


@dataclass(frozen=True)
class Selection:
    """What each rank sends of its logits, for every text of a batch."""

    count: int  # best ids
    samplings: tuple[Sampling, ...]
    allowed: NDArray[np.bool_] | None  # (V,): ids that may be drawn at all

    def keep(self, rows: Sequence[int]) -> Selection:
        """That of these texts only."""
        return replace(self, samplings=tuple(self.samplings[row] for row in rows))


def _count(request: Request) -> int | None:
    """How many of each rank's best ids are needed; None if all."""
    sampling = request.sampling
    if sampling.repetition_penalty != 1 or request.logprobs is not None:
        return None
    if sampling.temperature == 0:
        return 1
    if sampling.top_k:
        return sampling.top_k
    return NUCLEUS if sampling.top_p < 1 or sampling.min_p > 0 else None


def selection_for(requests: Sequence[Request], allowed: NDArray[np.bool_] | None) -> Selection | None:
    """The least that is enough for all of these texts; None if that is everything."""
    counts = [_count(request) for request in requests]
    if any(count is None or count > MOST for count in counts):
        return None
    return Selection(max(filter(None, counts)), tuple(request.sampling for request in requests), allowed)


# On every rank.


def _rest(scores: Array, sent: NDArray, sampling: Sampling) -> float:
    """The logit that, given to each id that is not sent, leaves the sum of their exp(logit / temperature) as it is.

    Below that of every id that is sent, as the logits it stands for are (or equal to it, but with a higher id).
    """
    if sampling.temperature == 0 or sampling.top_k:
        return NOTHING  # none of them can be drawn
    left = np.delete(scores, sent)
    left = left[left > -np.inf]
    if not left.size:
        return NOTHING
    largest = left.max()
    with np.errstate(over="ignore"):
        mean = np.exp((left - largest) / sampling.temperature).mean()
    return float(min(largest + sampling.temperature * np.log(mean), np.nextafter(scores[sent].min(), -np.inf)))


def _message(row: Array, sampling: Sampling, count: int) -> list[float]:
    """The best logits of a row, their places in it, and the logit of the others; -inf where an id is not allowed."""
    if np.isnan(row).any():
        return [*np.full(count, np.nan), *range(count), NOTHING]
    sent = best(row, count)
    return [*row[sent], *sent, _rest(row, sent, sampling)]


def select(logits: Array, selection: Selection, held: slice) -> Array:  # (B, ids of this rank) -> (B,2K+1)
    """Of each text: the K best logits of this rank, their ids, and the logit that stands for each other one.

    held: this rank's part of the vocabulary. A rank whose logits are not finite sends NaN.
    """
    rows = np.where(np.isfinite(logits), logits, np.nan).astype(np.float64)
    if selection.allowed is not None:
        rows = np.where(selection.allowed[held] | np.isnan(rows), rows, -np.inf)
    count = min(selection.count, rows.shape[1])
    messages = np.array(
        [_message(row, sampling, count) for row, sampling in zip(rows, selection.samplings, strict=True)]
    )
    messages[:, count : 2 * count] += held.start
    return messages


# On rank 0.


def _split(message: Array) -> tuple[Array, NDArray[np.intp], Array]:  # (B,2K+1) -> (B,K), (B,K), (B,1)
    count = message.shape[1] // 2
    return message[:, :count], message[:, count : 2 * count].astype(np.intp), message[:, 2 * count :]


def spread(messages: Sequence[Array], vocab_size: int) -> Array:  # ranks x (B,2K+1) -> (B,V)
    """Rows of logits from what the ranks sent."""
    rows = np.empty((len(messages[0]), vocab_size))
    for rank, message in enumerate(messages):
        values, ids, rest = _split(message)
        rows[:, share(vocab_size, rank, len(messages))] = rest
        np.put_along_axis(rows, ids, np.maximum(values, NOTHING), axis=1)  # -inf: an id that is not allowed
    return rows


def _decides(row: Array, least: float, sampling: Sampling) -> bool:
    """Whether every id that can be drawn has a logit above `least`, up to which some were not sent."""
    if sampling.temperature == 0 or sampling.top_k or least == -np.inf:
        return True
    with np.errstate(over="ignore"):
        weights = np.exp((row - row.max()) / sampling.temperature)
    above = weights[row > least].sum()
    # Above the fraction by a margin: the sampler sums the weights in another order.
    enough = sampling.top_p < 1 and above > sampling.top_p * weights.sum() * (1 + 1e-9)
    return bool(enough or np.exp((least - row.max()) / sampling.temperature) < sampling.min_p * (1 - 1e-9))


def _bound(rank: int, messages: Sequence[Array], vocab_size: int) -> Array:  # (B,)
    """The logit up to which those lie that the rank did not send."""
    held = share(vocab_size, rank, len(messages))
    values = _split(messages[rank])[0]
    return np.full(len(values), -np.inf) if values.shape[1] == held.stop - held.start else values[:, -1]


def decided(messages: Sequence[Array], rows: Array, selection: Selection) -> bool:
    """Whether what the ranks sent is enough to sample from these rows as from the whole ones."""
    least = np.max([_bound(rank, messages, rows.shape[1]) for rank in range(len(messages))], axis=0)  # (B,)
    return all(map(_decides, rows, least, selection.samplings))
