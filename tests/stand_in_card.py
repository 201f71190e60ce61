"""A card that is not there: its memory, and streams whose work is put off until somebody waits for it.

What is read too early is what was there before, NaN at first; what is overwritten too early is lost. stand_in_cuda.py
gives all this the names that CUDA has for it.
"""

from __future__ import annotations

import ctypes
import itertools
import time
import traceback
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from neox.gpu.host.memory import NAN, SharedMemory
from neox.gpu.host.module import HostKernel, KernelError, Packed, Size, at_once

# cudaError_t, of which CUresult is a part.
INVALID_VALUE, OUT_OF_MEMORY, INVALID_DEVICE, INVALID_HANDLE, NOT_READY = 1, 2, 101, 400, 600
ILLEGAL_ADDRESS, LAUNCH_FAILURE = 700, 719
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_UNJOINED = 900, 901, 904
NAMES = {
    INVALID_VALUE: "cudaErrorInvalidValue",
    OUT_OF_MEMORY: "cudaErrorMemoryAllocation",
    INVALID_DEVICE: "cudaErrorInvalidDevice",
    INVALID_HANDLE: "cudaErrorInvalidResourceHandle",
    NOT_READY: "cudaErrorNotReady",
    ILLEGAL_ADDRESS: "cudaErrorIllegalAddress",
    LAUNCH_FAILURE: "cudaErrorLaunchFailure",
    CAPTURE_UNSUPPORTED: "cudaErrorStreamCaptureUnsupported",
    CAPTURE_INVALIDATED: "cudaErrorStreamCaptureInvalidated",
    CAPTURE_UNJOINED: "cudaErrorStreamCaptureUnjoined",
}


class Refused(Exception):
    """With the number of an error."""


# Memory.

ALIGNMENT = 512  # of cudaMalloc
CAPACITY = 16 << 30  # bytes, of which those that nobody has written take none


def _room(size: int) -> int:
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT


@dataclass
class Memory:
    """One file that other processes can map as well."""

    whole: SharedMemory = field(default_factory=lambda: SharedMemory(CAPACITY))
    sizes: dict[int, int] = field(default_factory=dict)  # by the addresses of what is allocated
    starts: list[int] = field(default_factory=list)  # those addresses, in order
    opened: dict[int, SharedMemory] = field(default_factory=dict)  # of other processes
    pinned: dict[int, np.ndarray] = field(default_factory=dict)  # of the host

    def allocate(self, size: int) -> int:
        at = self.whole.address
        for start in self.starts:
            if start in self.opened:
                continue
            if at + _room(size) <= start:
                break
            at = start + _room(self.sizes[start])
        if at + _room(size) > self.whole.address + CAPACITY:
            raise Refused(OUT_OF_MEMORY)
        ctypes.memset(at, NAN, size)
        return self._add(at, size)

    def _add(self, address: int, size: int) -> int:
        self.sizes[address] = size
        insort(self.starts, address)
        return address

    def free(self, address: int) -> None:
        if address not in self.sizes:
            raise Refused(INVALID_VALUE)
        del self.sizes[address]
        self.starts.remove(address)
        self.opened.pop(address, None)

    def used(self) -> int:
        return sum(map(_room, self.sizes.values()))

    def holds(self, address: int, size: int = 1) -> bool:
        at = bisect_right(self.starts, address) - 1
        return at >= 0 and address + size <= self.starts[at] + self.sizes[self.starts[at]]

    def pin(self, size: int) -> int:
        memory = np.full(size, NAN, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return memory.ctypes.data

    def is_pinned(self, address: int) -> bool:
        return any(start <= address < start + memory.size for start, memory in self.pinned.items())

    def handle(self, address: int) -> bytes:
        """By which another process opens it."""
        if address not in self.sizes:
            raise Refused(INVALID_VALUE)
        return f"{self.whole.name} {address - self.whole.address} {self.sizes[address]}".encode()

    def open(self, handle: bytes) -> int:
        name, offset, size = handle.decode().split()
        if name == self.whole.name:  # CUDA opens no handles of the process itself
            raise Refused(INVALID_VALUE)
        whole = SharedMemory(CAPACITY, name)
        address = whole.address + int(offset)
        self.opened[address] = whole
        return self._add(address, int(size))


# Streams, and what stands in their queues: marks, waits, kernels, and functions that do anything else.


@dataclass(eq=False)
class Stream:
    pending: deque[Any] = field(default_factory=deque)
    graph: Graph | None = None  # of the capture that it takes part in
    joined: bool = True  # whether the stream that began that capture waits for all that was asked of this one


@dataclass(eq=False)
class Graph:
    origin: Stream
    work: list[tuple[Stream, Any]] = field(default_factory=list)


@dataclass(eq=False)
class Mark:
    """A place in a stream, and when it was reached."""

    stream: Stream
    reached: float | None = None


@dataclass(frozen=True)
class Wait:
    mark: Mark

    @property
    def over(self) -> bool:
        return self.mark.reached is not None


@dataclass(eq=False)
class Event:
    mark: Mark | None = None


@dataclass(frozen=True)
class Run:
    """A kernel with its arguments, which stood wherever the caller had them only while it was launched."""

    kernel: HostKernel
    grid: Size
    block: Size
    shared_bytes: int
    values: tuple[np.ndarray, ...]
    memory: Memory

    def __call__(self) -> None:
        for value, parameter in zip(self.values, self.kernel.parameters, strict=True):
            if parameter.endswith("*") and value[0] and not self.memory.holds(int(value[0])):
                raise Refused(ILLEGAL_ADDRESS)
        pointers = (ctypes.c_void_p * len(self.values))(*(value.ctypes.data for value in self.values))
        packed = Packed(pointers, list(self.values), [])
        self.kernel.launch(self.grid, self.block, packed, self.shared_bytes, "forward", 0)


@dataclass
class Card:
    memory: Memory = field(default_factory=Memory)
    handles: dict[int, Any] = field(default_factory=lambda: {0: Stream()})  # 0: the stream of those who name none
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(0x1000, 16))
    failed: int = 0  # the error of a kernel, after which nothing else runs

    def new(self, thing: Any) -> int:
        number = next(self.numbers)
        self.handles[number] = thing
        return number

    def stream(self, number: int | None) -> Stream:
        found = self.handles.get(number or 0)
        if not isinstance(found, Stream):
            raise Refused(INVALID_HANDLE)
        return found

    def streams(self) -> list[Stream]:
        return [thing for thing in self.handles.values() if isinstance(thing, Stream)]

    def put(self, stream: Stream, work: Any) -> None:
        self.check()
        if stream.graph:
            stream.graph.work.append((stream, work))
            stream.joined = stream is stream.graph.origin
        else:
            stream.pending.append(work)

    def check(self) -> None:
        if self.failed:
            raise Refused(self.failed)

    # Until something is done.

    def finish(self, *streams: Stream) -> None:
        """Until nothing is pending. Not while they are captured."""
        if any(stream.graph for stream in streams):
            raise Refused(CAPTURE_UNSUPPORTED)
        for stream in streams:
            self.run_out(stream)
        self.check()

    def run_out(self, stream: Stream) -> None:
        while stream.pending:
            self._step(stream)

    def reach(self, mark: Mark) -> None:
        if mark.stream.graph:
            raise Refused(CAPTURE_UNSUPPORTED)
        while mark.reached is None:
            self._step(mark.stream)
        self.check()

    def _step(self, stream: Stream) -> None:
        head = stream.pending[0]
        if isinstance(head, Wait) and not head.over:
            self._step(head.mark.stream)
        elif isinstance(head, Run):
            self._run([stream, *filter(self._is_at_kernel, self._waited_for(stream))])
        else:
            stream.pending.popleft()
            if isinstance(head, Mark):
                head.reached = time.perf_counter()
            elif not isinstance(head, Wait):
                self._guarded(head)

    def _waited_for(self, stream: Stream) -> list[Stream]:
        """Kernels there may wait for each other with those of this stream: they run beside them."""
        return list({work.mark.stream: None for work in stream.pending if isinstance(work, Wait) and not work.over})

    def _is_at_kernel(self, stream: Stream) -> bool:
        while stream.pending:
            head = stream.pending[0]
            if isinstance(head, Run):
                return True
            if not isinstance(head, Mark) and not (isinstance(head, Wait) and head.over):
                return False
            self._step(stream)
        return False

    def _run(self, streams: list[Stream]) -> None:
        if len(streams) == 1:
            self._guarded(streams[0].pending.popleft())
        else:
            self._guarded(partial(at_once, [_kernels_ahead(stream) for stream in streams]))

    def _guarded(self, work: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            work()
        except KernelError:
            traceback.print_exc()
            self.failed = LAUNCH_FAILURE
        except Refused as error:
            self.failed = error.args[0]

    # Events, and capture.

    def mark(self, stream: Stream) -> Mark:
        mark = Mark(stream)
        self.put(stream, mark)
        return mark

    def wait(self, stream: Stream, mark: Mark) -> None:
        """A stream that waits for one under capture takes part in it."""
        if mark.stream.graph and not stream.graph:
            stream.graph, stream.joined = mark.stream.graph, False
        elif stream.graph and stream is stream.graph.origin:
            mark.stream.joined = [work for of, work in stream.graph.work if of is mark.stream][-1:] == [mark]
        self.put(stream, Wait(mark))

    def begin_capture(self, stream: Stream) -> None:
        if stream.graph:
            raise Refused(CAPTURE_INVALIDATED)
        stream.graph = Graph(stream)

    def end_capture(self, stream: Stream) -> Graph:
        graph = stream.graph
        if graph is None or graph.origin is not stream:
            raise Refused(CAPTURE_INVALIDATED)
        parts = [part for part in self.streams() if part.graph is graph]
        unjoined = any(not part.joined for part in parts)
        for part in parts:
            part.graph, part.joined = None, True
        if unjoined:
            raise Refused(CAPTURE_UNJOINED)
        return graph

    def replay(self, graph: Graph, stream: Stream) -> None:
        """Each stream of the capture becomes one of this replay."""
        streams, marks = {graph.origin: stream}, dict[Mark, Mark]()
        for captured, work in graph.work:
            to = streams.setdefault(captured, Stream())
            if isinstance(work, Mark):
                self.put(to, marks.setdefault(work, Mark(to)))
            elif not isinstance(work, Wait):
                self.put(to, work)
            elif work.mark in marks:  # and not of before the capture
                self.put(to, Wait(marks[work.mark]))


def _kernels_ahead(stream: Stream) -> list[Run]:
    kernels = []
    while stream.pending and isinstance(stream.pending[0], Run):
        kernels.append(stream.pending.popleft())
    return kernels
