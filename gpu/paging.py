"""The pages of a cache: who holds which, and what lies in those that nobody holds. Host memory only; no device.

A text's keys and values lie in pages of `size` positions, wherever one was free. A page that is full gets a name, the
hash of all ids from the beginning of its text to its end, and a text that begins with the same ids holds it as well
instead of filling one of its own. Only full pages have names, and nothing is ever written to a full page: what several
texts hold is never written to, and so never has to be copied.

    blank      nothing of use lies in it
    held       by one or more texts
    resting    nobody holds it, but it has a name: whoever begins with its ids takes it up again

A text that opens is promised all pages that its capacity takes, and takes each when it comes to it: blank ones first,
then the one that has rested longest. Of a text that closes, the last page counts as the longest at rest, since whoever
needs a page needs those before it too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from neox.reference.errors import InputError


@dataclass
class Holding:
    """Where the positions of a text lie."""

    promised: int  # pages that it may still take
    pages: list[int] = field(default_factory=list)
    length: int = 0  # positions that are filled
    name: bytes = b""  # of its last full page
    tail: list[int] = field(default_factory=list)  # ids of the positions after that


def name_of(before: bytes, ids: Sequence[int]) -> bytes:
    """Of a page with these ids, the page before which is named so."""
    return sha256(before + np.asarray(ids, "<i4").tobytes()).digest()


class PagePool:
    """`count` pages of `size` positions each."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._blank = list(range(count))[::-1]
        self._holders = [0] * count  # texts that hold each page
        self._promised = 0  # pages that open texts may still take
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._resting: OrderedDict[int, None] = OrderedDict()  # the longest at rest first

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._resting)

    def open(self, capacity: int, ids: Sequence[int] = ()) -> Holding | None:
        """Of a text of up to `capacity` positions that begins with these ids, and the named pages that it begins with.

        None until others have closed. InputError if it can never be.
        """
        needed = -(-capacity // self.size)
        if needed > self.count:
            raise InputError(f"{capacity} positions, but the cache holds {self.count * self.size}")
        held = sum(self._holders[page] > 0 for _, page in self._known(b"", ids))  # by others: they take no free page
        if needed - held > self.free - self._promised:
            return None
        self._promised += needed
        text = Holding(needed)
        self.recall(text, ids)
        return text

    def recall(self, text: Holding, ids: Sequence[int]) -> int:
        """Take up the named pages that a text begins with, before it is filled itself; how many positions they hold."""
        assert text.length == len(text.pages) * self.size, "a text has begun to be filled"
        for name, page in self._known(text.name, ids[text.length :]):
            self._hold(text, page)
            text.name = name
            text.length += self.size
        return text.length

    def _known(self, before: bytes, ids: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        """The named pages of these ids, after the page named so."""
        name = before
        for first in range(0, len(ids) - self.size + 1, self.size):
            name = name_of(name, ids[first : first + self.size])
            if name not in self._named:
                return
            yield name, self._named[name]

    def reserve(self, text: Holding, count: int) -> None:
        """A place for `count` more positions."""
        while len(text.pages) * self.size < text.length + count:
            assert text.promised, "a text grows beyond its capacity"
            self._hold(text, self._blank.pop() if self._blank else self._forget())

    def filled(self, text: Holding, ids: Sequence[int]) -> None:
        """The text has grown by these, and their keys and values are where they were reserved a place."""
        text.length += len(ids)
        text.tail += ids
        while len(text.tail) >= self.size:
            text.name = name_of(text.name, text.tail[: self.size])
            del text.tail[: self.size]
            page = text.pages[(text.length - len(text.tail)) // self.size - 1]
            if text.name not in self._named:  # another may have been filled with the same at the same time
                self._named[text.name], self._names[page] = page, text.name

    def close(self, text: Holding) -> None:
        self._promised -= text.promised
        for page in reversed(text.pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._names:
                self._resting[page] = None
            else:
                self._blank.append(page)
        text.pages, text.promised = [], 0

    def _hold(self, text: Holding, page: int) -> None:
        self._resting.pop(page, None)
        self._holders[page] += 1
        text.pages.append(page)
        text.promised -= 1
        self._promised -= 1

    def _forget(self) -> int:
        """The page that has rested longest, which has no name any more."""
        page, _ = self._resting.popitem(last=False)
        del self._named[self._names.pop(page)]
        return page
