"""Sampling on the device: which ids are kept, each one's share of all numbers to its ends, and where numbers come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from devices import all_devices, devices
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neox.gpu import ops, sampling
from neox.gpu.device import Device
from neox.reference.sampling import GREEDY, Sampling, candidates

PARTS = 2**64
STEP = 2.0**-24  # largest relative error of one rounding in float32
seeds = st.integers(0, 2**32 - 1)


def drawn(
    device: Device,
    logits: NDArray[np.float32],  # (N,V)
    samplings: Sequence[Sampling],
    numbers: NDArray[np.uint64],
    texts: Sequence[int] | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> NDArray[np.int32]:
    """The ids of all rows; by default all are rows of the first text."""
    ids = device.empty(len(logits), "int32")
    mask = None if allowed is None else device.array(allowed.astype(np.uint8))
    rows = device.array(np.array([0] * len(logits) if texts is None else texts, np.int32))
    on_device = sampling.on_device(samplings, device)
    sampling.sample(device.array(logits), mask, on_device, rows, device.array(numbers), ids)
    return ids.get()


def numbers_of(shares: Sequence[float]) -> NDArray[np.uint64]:
    """1 is the largest number."""
    return np.array([min(int(share * PARTS), PARTS - 1) for share in shares], np.uint64)


# Against the reference.


def margin(logits: NDArray, temperature: float, ids: NDArray) -> float:
    """By how much the sum of some of these ids' weights, as a share of all, can differ from that of exact ones.

    A weight is rounded with the temperature, the difference of the logits and their quotient z, each of which changes it
    by up to |z| roundings, and in expf, which errs by two last digits; then cut off to 2^-44. Once for the sum, once for
    the sum of all.
    """
    z = (logits[ids].astype(np.float64) - logits[ids].max()) / temperature
    with np.errstate(under="ignore"):
        weights = np.exp(z)
    changed = (weights * (3 * np.abs(z) + 4) * STEP + 2.0**-44).sum()
    return 2.1 * float(changed / weights.sum())


def is_clear(logits: NDArray, s: Sampling, allowed: NDArray[np.bool_]) -> bool:
    """Whether the filters keep the same ids if every probability is a little off."""
    kept, _ = candidates(logits, replace(s, top_p=1.0, min_p=0.0), allowed=allowed)
    off = margin(logits, s.temperature, kept)
    near = [
        replace(
            s, top_p=min(max(s.top_p + a, 1e-9), 1.0) if s.top_p < 1 else 1.0, min_p=min(s.min_p * (1 + b), 0.9999999)
        )
        for a in (-off, off)
        for b in (-1e-5, 1e-5)
    ]
    found = [candidates(logits, n, allowed=allowed)[0].tolist() for n in near]
    return all(ids == found[0] for ids in found)


def check_sample(
    device: Device,
    V: int,
    s: Sampling,
    masked: float = 0.0,
    levels: int = 0,
    seed: int = 0,
    at_most: int = 6,
) -> None:
    """Each id that is kept, of up to `at_most`, is drawn by the first and the last numbers that are its own.

    masked: the part of the ids that is ruled out. levels: of how many values the logits are, 0 for all distinct.
    """
    rng = np.random.default_rng(seed)
    row = rng.normal(size=V) * 3 if not levels else rng.integers(-levels, levels + 1, V)
    logits = (row - 5).astype(np.float32)
    allowed = rng.random(V) >= masked
    allowed[rng.integers(V)] = True
    if not is_clear(logits, s, allowed):
        assume(False)
    ids, p = candidates(logits, s, allowed=allowed)
    off = margin(logits, s.temperature, ids)
    ends = np.concatenate([[0], np.cumsum(p)])
    wide = np.flatnonzero(p > 2 * off)
    if len(wide) > at_most:
        inner = rng.choice(wide[1:-1], at_most - 2, replace=False)
        wide = np.concatenate([wide[:1], inner, wide[-1:]])
    low, high = ends[wide] + off, ends[wide + 1] - off
    low[wide == 0], high[wide == len(ids) - 1] = 0, 1  # all numbers are somebody's
    numbers = numbers_of(np.concatenate([low, high]))
    texts = [1] * len(numbers)
    found = drawn(device, np.tile(logits, (len(numbers), 1)), [GREEDY, s], numbers, texts, allowed if masked else None)
    assert np.array_equal(found, np.tile(ids[wide], 2))


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    return Sampling(
        temperature=draw(st.sampled_from((0.3, 0.8, 1.0, 2.5))),
        top_k=draw(st.sampled_from((0, 0, 1, 2, 7, 40, 5000))),
        top_p=draw(st.sampled_from((1.0, 1.0, 0.05, 0.5, 0.9, 0.999))),
        min_p=draw(st.sampled_from((0.0, 0.0, 0.02, 0.3))),
    )


SIZES = st.sampled_from((1, 2, 15, 16, 17, 101, 511, 513, 1000, 3000))


@settings(max_examples=60)
@given(devices(), SIZES, samplings(), st.sampled_from((0.0, 0.1, 0.9)), st.sampled_from((0, 0, 1, 4)), seeds)
def test_every_id_has_the_references_share_of_the_numbers(device, V, s, masked, levels, seed) -> None:
    check_sample(device, V, s, masked, levels, seed)


def test_all_ids_of_a_large_vocabulary() -> None:
    check_sample(all_devices()[0], 50432, Sampling(1.0, 300, 0.95, 0.001), 0.01, at_most=2)
