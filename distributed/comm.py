"""What ranks exchange: three collectives, and the ranks of one process that stand in for MPI's.

    sum         every rank's array, added up in the order of the ranks: every rank gets the same bits
    gather      every rank's array, on every rank; gather_into, where there is a place for them
    broadcast   rank 0's object, on every rank

Floating-point addition is not associative. MPI leaves the order of its sums to the library; here it is part of the
result, so ranks never drift apart and virtual ranks compute exactly what processes on many machines do.

mpi.py has the ranks of MPI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier, BrokenBarrierError
from typing import Any, Protocol, TypeVar

import numpy as np

from neox.reference.cores import one_blas_thread
from neox.reference.errors import InputError
from neox.reference.model import Array

T = TypeVar("T")


class Communicator(Protocol):
    """The ranks that share a model, as one of them sees them. All make the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def sum(self, part: Array) -> Array:
        """The sum of all ranks' arrays of one shape: a new array, of at least float32."""
        ...

    def gather(self, part: Array) -> list[Array]:
        """All ranks' arrays, of any shapes, in the order of the ranks."""
        ...

    def gather_into(self, part: Any, parts: Any) -> None:
        """All ranks' arrays of one shape and dtype, into an array (ranks, ...): of NumPy, or of what MPI can reach."""
        ...

    def broadcast(self, value: Any) -> Any:
        """The value that rank 0 gave; the others' are ignored."""
        ...

    def meet(self, action: Callable[[], T]) -> T:
        """What action returns, which waits for other ranks in a way of its own: no collective either."""
        ...

    def alive(self) -> None:
        """This rank makes progress: no collective, and nothing to most; to a watcher it tells that the rank lives."""
        ...


def sum_in_rank_order(parts: Sequence[Array]) -> Array:
    """((part 0 + part 1) + part 2) + ..., in float32 or what is wider."""
    total = parts[0].astype(np.promote_types(parts[0].dtype, np.float32))  # a copy
    for part in parts[1:]:
        total += part
    return total


# Agreeing.


class AgreedError(InputError):
    """What went wrong on some rank, known to all: they end together, and rank 0 reports it."""


def agreed(comm: Communicator, action: Callable[[], T]) -> T:
    """What action returns here, where it succeeds on every rank; AgreedError, on every rank, where it does not.

    For what can go wrong on one rank only and takes no time, such as finding files: all wait until all have done it.
    """
    result: list[T] = []
    message = ""
    try:
        result.append(action())
    except (InputError, OSError) as error:
        message = str(error) or type(error).__name__
    messages = [each.tobytes().decode() for each in comm.gather(np.frombuffer(message.encode(), np.uint8))]
    if not any(messages):
        return result[0]
    rank = next(rank for rank, each in enumerate(messages) if each)
    everywhere = all(each == messages[rank] for each in messages)
    raise AgreedError(messages[rank] if everywhere else f"rank {rank} of {comm.ranks}: {messages[rank]}")


# One rank, and several in one process.


class Alone:
    """The serial twin: one rank, to which nothing needs to be sent."""

    rank, ranks = 0, 1

    def sum(self, part: Array) -> Array:
        return sum_in_rank_order([part])

    def gather(self, part: Array) -> list[Array]:
        return [part]

    def gather_into(self, part: Any, parts: Any) -> None:
        parts[0] = part

    def broadcast(self, value: Any) -> Any:
        return value

    def meet(self, action: Callable[[], T]) -> T:
        return action()

    def alive(self) -> None:
        pass


PATIENCE = 60  # seconds after which a virtual rank no longer waits for one that makes other calls than the rest


@dataclass
class _Meeting:
    """Where virtual ranks leave values for each other."""

    ranks: int
    values: list[Any] = field(init=False)
    barrier: Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.values = [None] * self.ranks
        self.barrier = Barrier(self.ranks, timeout=PATIENCE)


class VirtualRank:
    """One of several ranks in this process, each with a thread of its own; made by `virtual`."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank, self.ranks = rank, meeting.ranks
        self._meeting = meeting

    def sum(self, part: Array) -> Array:
        return self._meet(part, sum_in_rank_order)

    def gather(self, part: Array) -> list[Array]:
        return self._meet(part, lambda parts: [each.copy() for each in parts])

    def gather_into(self, part: Any, parts: Any) -> None:
        for rank, each in enumerate(self.gather(part)):
            parts[rank] = each

    def broadcast(self, value: Any) -> Any:
        return self._meet(value, lambda values: values[0])

    def meet(self, action: Callable[[], T]) -> T:
        return action()

    def alive(self) -> None:
        pass

    def _meet(self, value: Any, take: Callable[[list[Any]], T]) -> T:
        meeting = self._meeting
        meeting.values[self.rank] = value
        meeting.barrier.wait()  # everyone's value is there
        taken = take(meeting.values)
        meeting.barrier.wait()  # everyone has taken: values, and the arrays among them, may now be overwritten
        return taken


def virtual(ranks: int, program: Callable[[Communicator], T]) -> list[T]:
    """Run program on this many virtual ranks in lockstep, each with one thread of BLAS; what it returned on each.

    If it raises on one rank, that ends all of them and is raised here.
    """
    meeting = _Meeting(ranks)

    def run(rank: int) -> T:
        try:
            return program(VirtualRank(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with one_blas_thread(), ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    causes = [error for error in errors if not isinstance(error, BrokenBarrierError)]
    for error in (*causes, *errors):
        raise error
    return [future.result() for future in futures]
