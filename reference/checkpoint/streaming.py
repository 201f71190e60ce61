"""Layers that are read from disk whenever they are used: a model larger than memory.

While one layer computes, a thread reads the next: for files that are mapped this brings their pages into memory, and
for those that have to be put together from several it does that. Two layers are kept, for whoever follows closely.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, overload

from neox.reference.model import Layer

KEPT = 2


class StreamedLayers(Sequence[Layer]):
    """`count` layers, each as read(index) makes it; a pass over them has the next one read ahead."""

    def __init__(self, count: int, read: Callable[[int], Layer]) -> None:
        self._count = count
        self._read = read
        self._ahead = ThreadPoolExecutor(1, "reading ahead")
        self._kept: OrderedDict[int, Future[Layer]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(self._count)[index]]
        return self._asked(range(self._count)[index]).result()

    def __iter__(self) -> Iterator[Layer]:
        for index in range(self._count):
            layer = self._asked(index)
            # After the last comes the first again: of the next token.
            self._asked((index + 1) % self._count)
            yield layer.result()

    def _asked(self, index: int) -> Future[Layer]:
        """Reading is under way from here on; one that was not used for longest is forgotten."""
        with self._lock:
            if index not in self._kept:
                self._kept[index] = self._ahead.submit(self._read, index)
            self._kept.move_to_end(index)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[index]
