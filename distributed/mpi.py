"""Ranks of MPI: the collectives of comm.py between processes, and between machines.

Two ways to add up, which give the same bits as virtual ranks do, whatever the MPI library:

    window      ranks of one machine write their parts into memory that all of them see, and each adds up all parts
    allgather   every rank gets all parts by MPI.Allgather, and each adds them up; also between machines

Neither leaves the order of a sum to the library, as MPI.Allreduce would. Each rank adds up everything: for the few
kilobytes of a decoding step that is faster than sending partial results around. Longer arrays go in pieces.

Before a way is used it has to add up known numbers right on every rank. mpi4py is imported when this is first needed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from neox.distributed.comm import sum_in_rank_order
from neox.reference.errors import InputError
from neox.reference.model import Array

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

PIECE = 1 << 18  # bytes that are added up at a time: all parts of a piece stay in the cache of a processor


class Summation(Protocol):
    """A way to add up arrays of one shape and dtype over the ranks."""

    def sum(self, part: Array) -> Array: ...


def _in_pieces(part: Array, add: Callable[[Array], Array]) -> Array:
    """The sum of an array, from those of its pieces."""
    flat = np.ascontiguousarray(part).reshape(-1)
    length = PIECE // flat.itemsize
    sums = [add(flat[start : start + length]) for start in range(0, flat.size, length)]
    return np.concatenate(sums).reshape(part.shape)


class Window:
    """Memory of one machine that all ranks see: two slots for each."""

    def __init__(self, world: MPI.Intracomm) -> None:
        from mpi4py import MPI

        self._world = world
        self._window = MPI.Win.Allocate_shared(2 * PIECE, 1, comm=world)
        self._window.Lock_all(MPI.MODE_NOCHECK)
        memory: list[Any] = [self._window.Shared_query(rank)[0] for rank in range(world.size)]
        self._slots = [np.frombuffer(each, np.uint8).reshape(2, PIECE) for each in memory]
        self._turn = 0

    def sum(self, part: Array) -> Array:
        return _in_pieces(part, self._add)

    def _add(self, piece: Array) -> Array:
        """One barrier: a rank fills a slot again two sums later, when it has met all others after they read it."""
        slots = [slot[self._turn, : piece.nbytes].view(piece.dtype) for slot in self._slots]
        self._turn = 1 - self._turn
        slots[self._world.rank][:] = piece
        self._window.Sync()  # what this rank wrote is there for the others
        self._world.Barrier()
        self._window.Sync()  # what the others wrote is there for this one
        return sum_in_rank_order(slots)


class Allgather:
    """Every rank's part, sent to every other one."""

    def __init__(self, world: MPI.Intracomm) -> None:
        self._world = world

    def sum(self, part: Array) -> Array:
        return _in_pieces(part, self._add)

    def _add(self, piece: Array) -> Array:
        parts = np.empty((self._world.size, piece.size), piece.dtype)
        self._world.Allgather(piece, parts)
        return sum_in_rank_order(list(parts))


WAYS: dict[str, Callable[[MPI.Intracomm], Summation]] = {"window": Window, "allgather": Allgather}  # the fastest first


class MpiRank:
    """One of the ranks that mpiexec started."""

    def __init__(self, world: MPI.Intracomm, summation: Summation) -> None:
        self.rank, self.ranks = world.rank, world.size
        self._world = world
        self._summation = summation

    def sum(self, part: Array) -> Array:
        return self._summation.sum(part)

    def gather(self, part: Array) -> list[Array]:
        return self._world.allgather(part)

    def broadcast(self, value: Any) -> Any:
        return self._world.bcast(value)

    def gather_into(self, part: Any, parts: Any) -> None:
        self._world.Allgather(part, parts)

    def meet(self, action: Callable[[], T]) -> T:
        return action()

    def alive(self) -> None:
        pass

    def part(self, seconds: float) -> bool:
        """Whether all other ranks also call this, within that time: the last call of all."""
        request, end = self._world.Ibarrier(), time.monotonic() + seconds
        while not request.Test():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True


# Which way.


def known(rank: int, size: int) -> Array:
    """Numbers of very different sizes: a sum of them tells in which order they were added."""
    generator = np.random.default_rng([rank, size])
    sizes = np.float32(10) ** generator.integers(-4, 5, size).astype(np.float32)
    return generator.standard_normal(size, np.float32) * sizes


def adds_up(summation: Summation, rank: int, ranks: int) -> bool:
    """Whether it gives the right bits here: for one number, a row of the 20B, and several pieces."""

    def right(size: int) -> bool:
        expected = sum_in_rank_order([known(each, size) for each in range(ranks)])
        return np.array_equal(summation.sum(known(rank, size)), expected)

    found = [right(size) for size in (1, 6144, 2 * PIECE // 4 + 3)]  # also after a wrong one, as on the other ranks
    return all(found)


def ranks_here(world: MPI.Intracomm) -> int:
    """How many of the ranks are on this machine."""
    from mpi4py import MPI

    near = world.Split_type(MPI.COMM_TYPE_SHARED)
    count: int = near.size
    near.Free()
    return count


def choose(world: MPI.Intracomm, wanted: str | None = None) -> tuple[str, Summation]:
    """The first way that adds up right on all ranks, all of which get the same answer; InputError if there is none.

    wanted: only this one.
    """
    from mpi4py import MPI

    possible = [name for name in WAYS if name != "window" or ranks_here(world) == world.size]
    for name in possible if wanted is None else [wanted]:
        if name not in possible:
            raise InputError("the ranks are on several machines, which share no memory: leave out --allreduce window")
        summation = WAYS[name](world)
        if world.allreduce(adds_up(summation, world.rank, world.size), MPI.LAND):
            return name, summation
    raise InputError(f"MPI does not add up right by {wanted or 'any of ' + ', '.join(possible)}")


# The world.


def import_mpi() -> Any:
    """mpi4py.MPI, by which the ranks meet: MPI is initialized when it is imported. InputError if there is none."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # no mpi4py, or no MPI library that it could load
        reason = " ".join(str(error).split())
        raise InputError(f'tensor parallelism needs MPI ({reason}): pip install "neox20b[distributed]"') from error
    return MPI


def _forget_segments() -> None:
    """Remove the names of MPICH's shared memory, which the ranks have mapped by now.

    The memory stays until the last rank ends. MPICH itself removes the names in MPI_Finalize, which a job that is
    aborted or killed never reaches: some megabytes would be lost for good each time.
    """
    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        names = {line.split(maxsplit=5)[5].strip() for line in file if "/dev/shm/mpich_shm_" in line}
    for name in names:
        with suppress(FileNotFoundError):  # another rank was first
            os.unlink(name)


def open_world() -> MPI.Intracomm:
    """All ranks that mpiexec started; called on all of them, before anything can go wrong on one."""
    world: MPI.Intracomm = import_mpi().COMM_WORLD.Dup()
    world.Barrier()  # all have mapped their memory
    _forget_segments()
    return world


def join(world: MPI.Intracomm, wanted: str | None = None) -> tuple[MpiRank, str]:
    """This process as one of the ranks, and the way they add up; called on all of them."""
    name, summation = choose(world, wanted)
    return MpiRank(world, summation), name


def connect(wanted: str | None = None) -> MpiRank:
    """The same for a program that does not run in launch.run_ranks, and so looks after its failures itself."""
    return join(open_world(), wanted)[0]
