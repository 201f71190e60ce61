"""Sampling on the device: which ids are kept, which numbers draw each of them, and where numbers come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from devices import all_devices, devices
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neox.gpu import ops, sampling
from neox.gpu.device import Array, Device
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

    Five roundings, of the temperature, log2(e), their quotient, the difference of two logits and the product, each
    change a weight by up to |z| times as much; exp2f errs by 2^-22; all below 2^-44 is cut off. Once for some of the
    ids, once for all.
    """
    z = (logits[ids].astype(np.float64) - logits[ids].max()) / temperature
    with np.errstate(under="ignore"):
        weights = np.exp(z)
    changed = (weights * (5 * np.abs(z) + 4) * STEP + 2.0**-44).sum()
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
    numbers = numbers_of([*low.tolist(), *high.tolist()])
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


SIZES = st.sampled_from((1, 2, 15, 16, 17, 101, 511, 513, 1000, 4700))


@settings(max_examples=150)
@given(devices(), SIZES, samplings(), st.sampled_from((0.0, 0.1, 0.9)), st.sampled_from((0, 0, 1, 4)), seeds)
def test_every_id_has_the_references_share_of_the_numbers(device, V, s, masked, levels, seed) -> None:
    check_sample(device, V, s, masked, levels, seed)


def test_all_ids_of_a_large_vocabulary() -> None:
    check_sample(all_devices()[0], 50432, Sampling(1.0, 300, 0.95, 0.001), 0.01, at_most=2)


# Where a rounding would decide, with weights that are exact.

FEW = np.array([0, 0, -1, 0], np.float32)


def kept(device: Device, logits: Sequence[float], s: Sampling, allowed: Sequence[int] | None = None) -> list[int]:
    """Which of a few ids come, of 32 numbers from 0 to the largest."""
    row = np.array(logits, np.float32)
    mask = None if allowed is None else np.array(allowed, bool)
    numbers = numbers_of(np.linspace(0, 1, 32).tolist())
    return sorted(set(drawn(device, np.tile(row, (32, 1)), [s], numbers, allowed=mask).tolist()))


@pytest.mark.parametrize(
    ("logits", "s", "ids"),
    [
        (FEW, Sampling(1.0, top_k=1), [0]),
        (FEW, Sampling(1.0, top_k=2), [0, 1]),
        (FEW, Sampling(1.0, top_k=3), [0, 1, 3]),
        (FEW, Sampling(1.0, top_k=4), [0, 1, 2, 3]),
        (FEW, Sampling(1.0, top_k=2**40), [0, 1, 2, 3]),
        ([0] * 4, Sampling(1.0, top_p=0.25), [0]),
        ([0] * 4, Sampling(1.0, top_p=0.26), [0, 1]),
        ([0] * 4, Sampling(1.0, top_p=0.5), [0, 1]),
        ([0] * 4, Sampling(1.0, top_p=np.nextafter(1, 0)), [0, 1, 2, 3]),
        ([0] * 4, Sampling(1.0, top_p=1e-300), [0]),
        ([0] * 10, Sampling(1.0, top_p=0.3), [0, 1, 2]),
        ([0] * 5, Sampling(1.0, top_k=4, top_p=0.75), [0, 1, 2]),
        ([0, 1, 2, 3], Sampling(1.0, min_p=0.999), [3]),
        ([0, 0, 0, -1], Sampling(1.0, min_p=0.999), [0, 1, 2]),
        ([0.0, -0.0, -1], Sampling(1.0, top_k=1), [0]),
        ([-0.0, 0.0, -1], Sampling(1.0, top_k=1), [0]),
        ([-1e-40, 1e-40, -1], Sampling(1.0, top_k=1), [1]),
        ([-1e-40, -2e-40, -3e-40], Sampling(1.0, top_k=2), [0, 1]),
        ([1, 3, 2, 3], Sampling(1e-300), [1, 3]),
        ([1, 3, 2, 3], Sampling(1e-30), [1, 3]),
        ([1, 3, 2, 3], Sampling(1e300), [0, 1, 2, 3]),
        ([0, 1, 2, 3], Sampling(1e300, top_p=0.5), [2, 3]),
        ([-3e38, 3e38, 0], Sampling(1.0), [1]),
        ([7], Sampling(1.0, 3, 0.5, 0.1), [0]),
    ],
    ids=str,
)
def test_the_ids_that_are_kept(logits, s, ids) -> None:
    assert candidates(np.array(logits, np.float32), s)[0].tolist() == ids
    for device in all_devices():
        assert kept(device, logits, s) == ids


def test_ids_that_are_ruled_out_count_for_nothing() -> None:
    logits = [9.0, 1, 1, 1, 9, 1]
    for device in all_devices():
        assert kept(device, logits, Sampling(1.0, top_k=2), [0, 1, 0, 1, 0, 1]) == [1, 3]
        assert kept(device, logits, Sampling(1.0, top_p=0.6), [0, 1, 0, 1, 0, 1]) == [1, 3]
        assert kept(device, logits, Sampling(1.0, min_p=0.9), [0, 1, 0, 0, 0, 1]) == [1, 5]
        assert kept(device, logits, Sampling(1.0), [0, 0, 0, 1, 0, 0]) == [3]
        assert kept(device, logits, Sampling(1.0), [0] * 6) == [-1]


@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("s", [GREEDY, Sampling(1.0), Sampling(1.0, 3, 0.5)], ids=str)
def test_a_logit_that_is_not_finite_is_told(wrong, s) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 77)).astype(np.float32)
    logits[1, 50] = logits[2, 9] = wrong
    allowed = np.ones(77, bool)
    allowed[9] = False  # of an id that is ruled out it does not matter
    for device in all_devices():
        ids = drawn(device, logits, [s], numbers_of([0.3, 0.3, 0.3]), allowed=allowed)
        assert ids[1] == -1
        assert (ids[[0, 2]] >= 0).all()


def check_greedy(device: Device, N: int, V: int, masked: float = 0.0, levels: int = 0, seed: int = 0) -> None:
    """At temperature 0, whatever the filters are."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(N, V)) if not levels else rng.integers(-levels, levels + 1, (N, V))
    allowed = rng.random(V) >= masked
    allowed[rng.integers(V)] = True
    likeliest = np.where(allowed, logits.astype(np.float32), -np.inf).argmax(axis=1)
    numbers = rng.integers(PARTS, size=N, dtype=np.uint64)
    found = drawn(device, logits.astype(np.float32), [Sampling(0.0, 5, 0.5, 0.3)], numbers, allowed=allowed)
    assert np.array_equal(found, likeliest)


@settings(max_examples=20)
@given(devices(), st.integers(1, 3), SIZES, st.sampled_from((0.0, 0.5)), st.sampled_from((0, 1)), seeds)
def test_temperature_0_takes_the_lowest_of_the_likeliest(device, N, V, masked, levels, seed) -> None:
    check_greedy(device, N, V, masked, levels, seed)


# Numbers.


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """philox4x32-10: four words of a counter of four and a key of two.  Salmon et al. 2011."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k, right % 2**32, (left >> 32) ^ d ^ m, left % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words) -> None:
    """Those of the authors' library Random123, tests/kat_vectors."""
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert philox(counter, key) == words


def check_uniform(device: Device, N: int, B: int, seed: int = 0) -> None:
    """Numbers of philox by seed and position alone; all distinct."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(PARTS, size=B, dtype=np.uint64)
    texts, positions = rng.integers(B, size=N).astype(np.int32), rng.permutation(2**20)[:N].astype(np.int32)
    numbers = device.empty(N, "uint64")
    ops.uniform(device.array(keys), device.array(texts), device.array(positions), numbers)
    words = [
        philox([int(p), 0, 0, 0], divmod(int(keys[t]), 2**32)[::-1]) for t, p in zip(texts, positions, strict=True)
    ]
    assert numbers.get().tolist() == [first + (second << 32) for first, second, *_ in words]
    assert len(np.unique(numbers.get())) == N


@settings(max_examples=20)
@given(devices(), st.sampled_from((1, 5, 255, 256, 300)), st.sampled_from((1, 3)), seeds)
def test_numbers_are_philoxs(device, N, B, seed) -> None:
    check_uniform(device, N, B, seed)


def test_draws_are_as_frequent_as_they_should_be() -> None:
    """Pearson's test of 1000 positions of one seed. The 0.9999 quantile of chi squared with 9 degrees is 33.7."""
    count, s, device = 1000, Sampling(0.9, 10, 0.98, seed=7), all_devices()[0]
    logits = np.random.default_rng(3).normal(size=40).astype(np.float32)
    on_device, numbers = sampling.on_device([s], device), device.empty(count, "uint64")
    texts, positions = device.zeros(count, "int32"), device.array(np.arange(count, dtype=np.int32))
    ops.uniform(on_device.seeds, texts, positions, numbers)
    ids, p = candidates(logits, s)
    found = drawn(device, np.tile(logits, (count, 1)), [s], numbers.get())
    times = np.bincount(found, minlength=40)
    assert times.sum() == times[ids].sum()
    assert len(ids) == 10
    assert (((times[ids] - count * p) ** 2) / (count * p)).sum() < 33.7


# Texts side by side.

WAYS = [
    GREEDY,
    Sampling(0.7, seed=1),
    Sampling(1.5, top_k=5, seed=2**70 + 1),
    Sampling(1.0, top_p=0.6, seed=3),
    Sampling(1.0, min_p=0.2, seed=4),
]


@settings(max_examples=20)
@given(devices(), st.permutations(range(5)), st.integers(1, 5), seeds)
def test_a_text_is_drawn_as_if_it_were_alone(device, order, count, seed) -> None:
    rng = np.random.default_rng(seed)
    logits, numbers = rng.normal(size=(5, 101)).astype(np.float32) * 2, rng.integers(PARTS, size=5, dtype=np.uint64)
    alone = [int(drawn(device, logits[n : n + 1], [WAYS[n]], numbers[n : n + 1])[0]) for n in range(5)]
    rows = list(order)[:count]
    assert drawn(device, logits[rows], WAYS, numbers[rows], texts=rows).tolist() == [alone[n] for n in rows]


def test_settings_are_told_in_the_kernels_units() -> None:
    device = all_devices()[0]
    s = sampling.on_device([GREEDY, Sampling(0.5, 2**40, 0.5, 0.25, seed=2**64 + 5)], device)
    assert s.temperatures.get().tolist() == [0, 0.5]
    assert s.top_k.get().tolist() == [0, 2**19]
    assert s.top_p.get().tolist() == [0, 2**63]
    assert s.min_p.get().tolist() == [0, 2**62]
    assert s.seeds.get()[1] == 5
    with pytest.raises(ValueError, match="repetition penalty"):
        sampling.on_device([Sampling(1.0, repetition_penalty=1.1)], device)


def test_texts_without_a_seed_differ() -> None:
    s = sampling.on_device([Sampling(1.0)] * 3, all_devices()[0])
    assert len(set(s.seeds.get().tolist())) == 3


def wrong_ones(right: dict[str, Array]) -> Iterator[dict[str, Array]]:
    """Each array in turn of another dtype, or longer."""
    for name, array in right.items():
        *rows, last = array.shape
        for shape, dtype in ((array.shape, "float16"), ((*rows, last + 1), array.dtype)):
            yield right | {name: array.device.zeros(shape, dtype)}


def test_shapes_and_dtypes_are_checked() -> None:
    device = all_devices()[0]
    of_rows = {"texts": device.zeros(2, "int32"), "numbers": device.zeros(2, "uint64")}
    of_texts = {name: device.zeros(3, "uint64") for name in ("top_p", "min_p")} | {"top_k": device.zeros(3, "int32")}
    logits, allowed, ids = device.zeros((2, 9), "float32"), device.zeros(9, "uint8"), device.zeros(2, "int32")
    right = {"logits": logits, "allowed": allowed, "temperatures": device.zeros(3, "float32"), "ids": ids}
    right |= of_rows | of_texts
    ops.sample(**right)
    for wrong in wrong_ones(right):
        with pytest.raises(ValueError, match="must be"):
            ops.sample(**wrong)
    with pytest.raises(ValueError, match="could overflow"):
        ops.sample(**(right | {"logits": device.zeros((2, 2**19 + 1), "float32"), "allowed": None}))  # type: ignore[arg-type]
    numbers = of_rows | {"positions": device.zeros(2, "int32"), "seeds": device.zeros(3, "uint64")}
    ops.uniform(**numbers)
    for wrong in list(wrong_ones(numbers))[:-1]:  # of the last, any length is right
        with pytest.raises(ValueError, match="must be"):
            ops.uniform(**wrong)
