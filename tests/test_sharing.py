"""Prompts read as a tree: the logits of prompts read one by one, and no token read twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from checks import FLOAT64
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import Mutant
from strategies import TINY, random_model, seeds

from neox.reference.errors import InputError
from neox.reference.generate import CachedDecoder, Decoder, Request, complete
from neox.reference.model import Model
from neox.reference.sampling import Sampling
from neox.reference.sharing import SharingDecoder

Prompts = list[list[int]]


def prompts_of(count: int, seed: int) -> Prompts:
    """Some begin alike, some begin others, some are the same."""
    rng = np.random.default_rng(seed)
    examples = rng.integers(0, 101, 30).tolist()
    drawn = [examples[: rng.integers(0, 30)] + rng.integers(0, 2, rng.integers(1, 5)).tolist() for _ in range(count)]
    return [*drawn, drawn[0], drawn[0][:1]]


def check_start(decoder: Decoder, model: Model, prompts: Prompts) -> None:
    """The logits of a start, of two steps, and of another without the first text, are those of plain decoding."""
    plain = CachedDecoder(model)
    for each in (decoder, plain):
        logits = [each.start(prompts, max(map(len, prompts)) + 3)]
        logits += [each.step([5] * len(prompts)), each.step([7] * len(prompts))]
        each.keep(range(len(prompts) // 2, len(prompts)))
        logits.append(each.step([9] * (len(prompts) - len(prompts) // 2)))
        if each is decoder:
            found = logits
    for own, expected in zip(found, logits, strict=True):
        assert_close(own, expected, FLOAT64)


def check(groups: Sequence[Prompts]) -> None:
    model = random_model(TINY, seed=4, dtype="float64")
    decoder = SharingDecoder(model)
    for prompts in groups:
        check_start(decoder, model, prompts)


def unsorted_starts() -> None:
    """Of the same, of shorter and of longer prompts, after one another."""
    first = prompts_of(9, 1)
    check([first, first, prompts_of(4, 1), first[:1], [first[3][:2]]])


def test_unsorted_starts():
    unsorted_starts()


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 9), seeds), min_size=1, max_size=3))
def test_drawn_starts(groups: list[tuple[int, int]]):
    check([prompts_of(count, seed % 3) for count, seed in groups])


def test_every_token_once():
    """Of prompts that come in sorted order, in starts of five."""
    read: list[int] = []
    model = random_model(TINY, seed=4, dtype="float64")
    prompts = sorted(prompts_of(40, 3))
    prompts = [prompt for i, prompt in enumerate(prompts) if prompt not in prompts[:i]]
    decoder = SharingDecoder(model, read.append)
    for first in range(0, len(prompts), 5):
        decoder.start(prompts[first : first + 5], 40)
    distinct = {tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))}
    repeated = sum(1 for i in range(5, len(prompts), 5) if prompts[i] == prompts[i - 1])
    assert sum(read) == len(distinct) + repeated
    assert sum(read) < sum(map(len, prompts)) / 2


def test_texts_are_continued_alike():
    """Sampled texts of any number and length, by the loop of generate.py."""
    model = random_model(TINY, seed=4)
    requests = [Request(prompt, 1 + i % 5, Sampling(1.0, seed=i)) for i, prompt in enumerate(prompts_of(12, 2))]
    assert complete(SharingDecoder(model), requests) == complete(CachedDecoder(model), requests)


def test_what_does_not_fit_is_refused():
    decoder = SharingDecoder(random_model(TINY, seed=4))
    with pytest.raises(InputError, match="token id 101 is outside"):
        decoder.start([[1], [101]], 3)
    with pytest.raises(InputError, match="the model's context is 64"):
        decoder.start([list(range(65))], 70)


MUTANTS = (
    Mutant("logits of the text before", "", SharingDecoder, "_shared_with", (("len(text) - 1", "len(text)"),)),
    Mutant(
        "all of a leaf copied", "", SharingDecoder, "_copy", (("length = lengths[text]", "length = len(leaf.ids)"),)
    ),
    Mutant(
        "copied to the front",
        "",
        SharingDecoder,
        "_copy",
        (("self._cache.length - length, self._cache.length", "0, length"),),
    ),
    Mutant("padding not finite", "", SharingDecoder, "_copy", ((": place.start] = 0", ": place.start] = np.nan"),)),
    Mutant(
        "keys for values", "", SharingDecoder, "_copy", (("self._cache.values, values", "self._cache.values, keys"),)
    ),
    Mutant("the path forgotten", "", SharingDecoder, "start", (("self._last, self._path =", "self._last, _ ="),)),
    Mutant(
        "rows of other prompts",
        "",
        SharingDecoder,
        "start",
        (("[part.batch.asked.row]", "[part.batch.asked.row[::-1]]"),),
    ),
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("wrong", MUTANTS, ids=lambda wrong: wrong.name)
def test_wrong_starts_fail(wrong: Mutant, monkeypatch: pytest.MonkeyPatch):
    wrong.install(monkeypatch)
    # A wrong place can also lead out of an array.
    with pytest.raises((AssertionError, IndexError, ValueError, InputError)):
        unsorted_starts()
