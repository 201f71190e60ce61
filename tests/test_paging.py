"""Pages of a cache: every text finds in its pages what it has read, no page is lost, and memory is bounded."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from mutants import Mutant

from neox.gpu import paging
from neox.gpu.paging import Holding, PagePool
from neox.reference.errors import InputError


class Kept:
    """A pool, and pages in which each position holds all ids of its text up to it: what keys and values depend on."""

    def __init__(self, count: int, size: int) -> None:
        self.pool = PagePool(count, size)
        self.cells: list[list[tuple[int, ...]]] = [[()] * size for _ in range(count)]
        self.open: list[tuple[Holding, list[int], int]] = []  # with the ids so far, and the capacity

    def begin(self, ids: list[int], more: int, at_once: bool) -> None:
        """A text that begins with these ids, as far as others' pages hold them, and may come to have `more` besides."""
        size, capacity = self.pool.size, len(ids) + more
        spare = self.pool.free - sum(-(-room // size) - len(text.pages) for text, _, room in self.open)
        holders = self.holders()
        text = self.pool.open(capacity, ids if at_once else ())
        if text is None:
            assert -(-capacity // size) > spare
            return
        shared = sum(page in holders for page in text.pages)
        assert -(-capacity // size) - shared <= spare  # what is promised is there
        known = self.pool.recall(text, ids)
        assert known == text.length <= len(ids)
        assert known % size == 0
        self.open.append((text, ids[:known], capacity))

    def grow(self, index: int, new: list[int]) -> None:
        text, ids, capacity = self.open[index % len(self.open)]
        new = new[: capacity - len(ids)]
        self.pool.reserve(text, len(new))
        holders = self.holders()
        for i, _ in enumerate(new):
            page, row = divmod(len(ids) + i, self.pool.size)
            assert holders[text.pages[page]] == 1  # nothing is written where another text reads,
            assert text.pages[page] not in self.pool._names  # nor where one could come to read
            self.cells[text.pages[page]][row] = (*ids, *new[: i + 1])
        self.pool.filled(text, new)
        ids += new

    def end(self, index: int) -> None:
        self.pool.close(self.open.pop(index % len(self.open))[0])

    def holders(self) -> Counter[int]:
        return Counter(page for text, _, _ in self.open for page in text.pages)

    def check(self) -> None:
        size = self.pool.size
        assert self.pool.free + len(self.holders()) == self.pool.count  # none is lost
        for text, ids, capacity in self.open:
            assert text.length == len(ids)
            assert len(text.pages) == -(-len(ids) // size) <= -(-capacity // size)
            for i in range(len(ids)):
                assert self.cells[text.pages[i // size]][i % size] == tuple(ids[: i + 1])


IDS = st.lists(st.integers(0, 1), max_size=12)


class AnyTexts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept(7, 3)

    @rule(ids=IDS, more=st.integers(1, 9), at_once=st.booleans())
    def begin(self, ids: list[int], more: int, at_once: bool) -> None:
        self.kept.begin(ids, more, at_once)

    @rule(index=st.integers(0, 9), ids=IDS)
    def grow(self, index: int, ids: list[int]) -> None:
        if self.kept.open:
            self.kept.grow(index, ids)

    @rule(index=st.integers(0, 9))
    def end(self, index: int) -> None:
        if self.kept.open:
            self.kept.end(index)

    @invariant()
    def holds(self) -> None:
        self.kept.check()

    def teardown(self) -> None:
        while self.kept.open:
            self.kept.end(0)
        assert self.kept.pool.free == self.kept.pool.count
        assert self.kept.pool.open(self.kept.pool.count * self.kept.pool.size) is not None  # all of it can be had again


AnyTexts.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_texts = AnyTexts.TestCase


# The same by fixed draws, on which mutants are tried; and what is kept when not all can be.


def walk() -> int:
    """How often a page was found to be held once more."""
    rng, shared = np.random.default_rng(4), 0
    for _ in range(20):
        kept = Kept(7, 3)
        for _ in range(60):
            ids, what = (rng.random(rng.integers(0, 12)) < 0.05).astype(int).tolist(), rng.integers(3)
            if what == 0:
                kept.begin(ids, int(rng.integers(1, 9)), bool(rng.integers(2)))
                shared += sum(count - 1 for count in kept.holders().values())
            elif kept.open and what == 1:
                kept.grow(int(rng.integers(9)), ids)
            elif kept.open:
                kept.end(int(rng.integers(9)))
            kept.check()
        while kept.open:
            kept.end(0)
        assert kept.pool.open(7 * 3) is not None
    return shared


def read(pool: PagePool, ids: list[int]) -> tuple[Holding, int]:
    """A text with these ids and room for one more, and how many of them others' pages held."""
    text = pool.open(len(ids) + 1)
    assert text is not None
    known = pool.recall(text, ids)
    pool.reserve(text, len(ids) - known)
    pool.filled(text, ids[known:])
    return text, known


def check_sharing() -> None:
    pool = PagePool(9, 2)
    first, _ = read(pool, [1, 2, 3, 4, 5])
    second, known = read(pool, [1, 2, 3, 4, 6])
    assert known == 4
    assert first.pages[:2] == second.pages[:2]
    assert first.pages[2] != second.pages[2]  # that page is not full
    third, known = read(pool, [9, 2, 3, 4])
    assert known == 0
    assert pool.free == 9 - 4 - 2
    pool.close(first)
    assert read(pool, [1, 2, 3])[1] == 2  # the second holds it still
    pool.close(second)
    pool.close(third)
    assert read(pool, [9, 2, 3, 4])[1] == 4  # it rests
    pool = PagePool(12, 2)
    read(pool, [1, 2, 3, 4])
    read(pool, [5, 6])
    assert read(pool, [5, 6, 3, 4])[1] == 2  # the same ids after others are not the same
    assert read(pool, [5, 6, 3, 4])[1] == 4


def check_what_is_forgotten() -> None:
    pool = PagePool(6, 2)
    for ids in ([1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 1]):  # two pages each, the first text's used again last
        pool.close(read(pool, ids)[0])
    pool.close(read(pool, [3] * 6)[0])  # takes the two that are blank and one more: the last of the second text
    assert read(pool, [1, 1, 1, 1])[1] == 4
    assert read(pool, [2, 2, 2])[1] == 2


def check_opening() -> None:
    pool = PagePool(4, 3)
    with pytest.raises(InputError, match="13 positions, but the cache holds 12"):
        pool.open(13)
    first = pool.open(7)
    assert first is not None
    assert pool.open(4) is None  # three pages are promised, though none is taken
    assert pool.open(3) is not None
    pool.close(first)
    assert pool.open(9) is not None
    pool = PagePool(5, 2)
    read(pool, [1, 2, 3, 4])  # two pages, and one promised
    assert pool.open(6) is None
    text = pool.open(8, [1, 2, 3, 4, 5])  # two pages of its own are free
    assert text is not None
    assert text.length == 4
    assert pool.recall(text, [1, 2, 3, 4, 5]) == 4
    assert pool.open(1) is None
    pool = PagePool(5, 2)
    read(pool, [1, 2, 1, 2])
    text = pool.open(4, [1, 2, 3])
    assert text is not None
    assert pool.recall(text, [1, 2, 3]) == 2


CHECKS = {
    "walks": walk,
    "sharing": check_sharing,
    "forgotten": check_what_is_forgotten,
    "opening": check_opening,
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_pool(name: str) -> None:
    CHECKS[name]()


def test_walks_share_pages() -> None:
    assert walk() > 30


def of(function: str, name: str, check: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, check, PagePool if hasattr(PagePool, function) else paging, function, edits)


MUTANTS = [
    of("name_of", "a page known by its own ids only", "sharing", ("before + ", "")),
    of("name_of", "a page known by its first id", "walks", ("ids, ", "ids[:1], ")),
    of("open", "promises forgotten", "opening", ("self.free - self._promised", "self.free")),
    of("open", "a page too few", "walks", ("-(-capacity // self.size)", "capacity // self.size")),
    of("open", "room kept back", "walks", ("needed - held >", "needed - held + 1 >")),
    of("open", "no less for what is shared", "opening", ("needed - held", "needed")),
    of("open", "resting pages counted twice", "walks", ("self._holders[page] > 0", "True")),
    of("open", "nothing taken up", "opening", ("self.recall(text, ids)", "pass")),
    of("open", "what can never be waits", "opening", ("needed > self.count", "False")),
    of("_known", "nothing known", "sharing", ("if name not in self._named", "if True")),
    of("_known", "the last page not looked for", "sharing", ("- self.size + 1", "- 2 * self.size + 1")),
    of("_known", "the first page only", "sharing", ("name = name_of(name, ", "name = name_of(before, ")),
    of("recall", "from the beginning again", "opening", ("ids[text.length :]", "ids")),
    of("recall", "length forgotten", "walks", ("text.length += self.size", "pass")),
    of("recall", "name forgotten", "sharing", ("text.name = name", "pass")),
    of("reserve", "one page whatever is needed", "walks", ("while ", "if ")),
    of("reserve", "a page too many", "walks", ("< text.length + count", "<= text.length + count")),
    of("filled", "the page after it named", "walks", ("self.size - 1]", "self.size - 2]")),
    of("filled", "ids of the page kept", "walks", ("del text.tail[: self.size]", "del text.tail[1:]")),
    of("filled", "two pages with one name", "walks", ("if text.name not in self._named", "if True")),
    of("close", "promises kept", "walks", ("self._promised -= text.promised", "pass")),
    of("close", "pages of others freed", "walks", ("continue", "pass")),
    of("close", "a named page called blank", "walks", ("if page in self._names", "if False")),
    of("close", "pages lost", "walks", ("self._blank.append(page)", "pass")),
    of("close", "nothing rests", "walks", ("self._resting[page] = None", "self._blank.append(page)")),
    of("close", "beginnings forgotten first", "forgotten", ("reversed(text.pages)", "text.pages")),
    of("_hold", "holders not counted", "walks", ("+= 1", "= 1")),
    of("_hold", "held and resting", "walks", ("self._resting.pop(page, None)", "pass")),
    of("_hold", "a promise kept twice", "walks", ("text.promised -= 1", "pass")),
    of("_hold", "promises only grow", "walks", ("self._promised -= 1", "pass")),
    of("_forget", "the last at rest forgotten", "forgotten", ("last=False", "last=True")),
    of("_forget", "a page of another text still found", "walks", ("del self._named[self._names.pop(page)]", "pass")),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_pool_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.install(monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError, pytest.fail.Exception)):
        CHECKS[mutant.check]()
