"""How ranks with devices add up arrays that lie there: in the order of the ranks, in float32, the same bits on each.

    ipc     a kernel of ours: each rank's device reads all others' parts by itself (kernels/all_reduce.cu); for ranks
            that are processes of one machine, whose cards reach each other's memory
    nccl    NCCL brings every rank all parts, and a kernel adds them up; any cards
    mpi     MPI brings them, if it says that it can read and write a card's memory
    host    each part is copied to the host, added up as those of the reference are (comm.py), and copied back

The first two are asked for like any kernel, and a graph can hold them. Before a way is used it has to add up known
numbers right on every rank; all ranks take the same.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np

from neox.distributed.comm import AgreedError, Communicator, agreed, sum_in_rank_order
from neox.distributed.mpi import WAYS as HOST_WAYS
from neox.distributed.mpi import known
from neox.gpu import ops
from neox.gpu.device import Array, Device
from neox.reference.errors import InputError

CAPACITY = 1 << 20  # numbers that are added up at a time
PATIENCE = 1 << 26  # looks for a rank that does not come: some seconds to a minute


class Sums(Protocol):
    """A way to add up float32 arrays of one shape over the ranks. All ranks make the same calls in the same order."""

    @property
    def captured(self) -> bool:
        """Whether a graph of the device can hold it."""
        ...

    def add_up(self, part: Array) -> None:
        """The sum of all ranks' parts, in place of each. As of a kernel, its size is a multiple of 4."""
        ...

    def check(self) -> None:
        """RuntimeError if a sum of which the device has been asked failed there. Waits for the device."""
        ...


def pieces(array: Array) -> Iterator[Array]:
    flat = array.reshape(array.size)
    return (flat[start : start + CAPACITY] for start in range(0, flat.size, CAPACITY))


# The ways.


class HostSums:
    """By way of the host: right everywhere, and nowhere the fastest."""

    captured = False

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def add_up(self, part: Array) -> None:
        part.set(self._comm.sum(part.get()))

    def check(self) -> None:
        pass


class SharedSums:
    """By memory that all ranks' devices reach. AgreedError if they do not."""

    captured = True

    def __init__(self, comm: Communicator, device: Device) -> None:
        agreed(comm, lambda: _check_processes(comm))
        size = ops.mailbox_bytes(CAPACITY)
        self._own, handle = agreed(comm, lambda: _new_mailbox(device, size))
        handles = [each.tobytes() for each in comm.gather(np.frombuffer(handle, np.uint8))]
        others = {rank: handle for rank, handle in enumerate(handles) if rank != comm.rank}
        attached = agreed(comm, lambda: {rank: device.attach(handle, size) for rank, handle in others.items()})
        self._boxes = [attached.get(rank, self._own) for rank in range(comm.ranks)]  # kept: a kernel knows addresses
        self._addresses = device.array(np.array([box.address for box in self._boxes], np.uint64))
        self._comm = comm

    def add_up(self, part: Array) -> None:
        rank = self._comm.rank
        for piece in pieces(part):  # the host device is at work, and waits for the others, until it is done
            self._comm.meet(partial(ops.all_reduce, self._addresses, rank, CAPACITY, piece, PATIENCE))

    def check(self) -> None:
        missing = int(self._own[8:12].get().view(np.uint32)[0])
        if missing:
            raise RuntimeError(f"rank {missing - 1} of {self._comm.ranks} did not come to a sum")


def _check_processes(comm: Communicator) -> None:
    """Kernels that wait for one another can only run at once if different processes ask for them."""
    here = f"{os.getpid()} {platform.node()}"
    places = [each.tobytes().decode().split(" ", 1) for each in comm.gather(np.frombuffer(here.encode(), np.uint8))]
    if comm.ranks > ops.MOST_RANKS:
        raise InputError(f"a kernel adds up the parts of {ops.MOST_RANKS} ranks, not {comm.ranks}")
    if len({machine for _, machine in places}) > 1:
        raise InputError("the ranks are on several machines")
    if len({process for process, _ in places}) < comm.ranks:
        raise InputError("the ranks are no processes of their own")


def _new_mailbox(device: Device, size: int) -> tuple[Array, bytes]:
    box, handle = device.share(size)
    box[: ops.MAILBOX_BYTES].set(np.zeros(ops.MAILBOX_BYTES, np.uint8))
    return box, handle


class SentSums:
    """Whatever brings every rank all parts, (P,n); a kernel adds them up."""

    def __init__(
        self, comm: Communicator, device: Device, send: Callable[[Array, Array], None], captured: bool
    ) -> None:
        """send: a part, on its device, to where all ranks' parts are to lie there."""
        self.captured = captured
        self._send = send
        self._ranks = comm.ranks
        self._parts = device.empty(comm.ranks * CAPACITY, np.float32)

    def add_up(self, part: Array) -> None:
        for piece in pieces(part):
            parts = self._parts[: self._ranks * piece.size].reshape(self._ranks, piece.size)
            self._send(piece, parts)
            ops.sum_parts(parts, piece)

    def check(self) -> None:
        pass


def _by_nccl(comm: Communicator, device: Device) -> Sums:
    """AgreedError if there is no NCCL, or no card."""
    nccl, stream = agreed(comm, lambda: (device.nccl(), device.stream))
    meeting = comm.broadcast(agreed(comm, lambda: _asked(nccl, nccl.get_unique_id) if comm.rank == 0 else None))
    group = agreed(comm, lambda: _asked(nccl, nccl.NcclCommunicator, comm.ranks, meeting, comm.rank))

    def send(part: Array, parts: Array) -> None:
        group.allGather(part.address, parts.address, part.size, nccl.NCCL_FLOAT32, stream)

    return SentSums(comm, device, send, captured=True)


def _asked(nccl: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except nccl.NcclError as error:  # two ranks on one card, for instance
        raise InputError(f"NCCL refuses: {error}") from error


def reads_cards() -> bool:
    """Whether the MPI library says that it takes addresses of a card's memory."""
    query = getattr(ctypes.CDLL(None), "MPIX_Query_cuda_support", None)
    return query is not None and query() == 1


def _by_mpi(comm: Communicator, device: Device) -> Sums:
    """AgreedError if MPI cannot. To one that cannot, an address of a card's memory would be the end of the process."""

    def check() -> None:
        probe = device.empty(1, np.float32).view()
        if hasattr(probe, "__cuda_array_interface__") and not reads_cards():
            raise InputError("this MPI does not say that it reads the memory of cards")

    def send(part: Array, parts: Array) -> None:
        device.synchronize()  # MPI knows nothing of the stream
        comm.gather_into(part.view(), parts.view())

    agreed(comm, check)
    return SentSums(comm, device, send, captured=False)


WAYS: dict[str, Callable[[Communicator, Device], Sums]] = {  # the fastest first
    "ipc": SharedSums,
    "nccl": _by_nccl,
    "mpi": _by_mpi,
    "host": lambda comm, device: HostSums(comm),
}


# Which way.


def adds_up(sums: Sums, device: Device, rank: int, ranks: int) -> bool:
    """Whether it gives the right bits here: for four numbers, a row of the 20B, and several pieces."""

    def right(size: int) -> bool:
        part = device.array(known(rank, size))
        sums.add_up(part)
        return np.array_equal(part.get(), sum_in_rank_order([known(each, size) for each in range(ranks)]))

    found = [right(size) for size in (4, 6144, CAPACITY + 8)]  # also after a wrong one, as on the other ranks
    return all(found)


def _tried(name: str, comm: Communicator, device: Device) -> Sums:
    """AgreedError if it does not work on some rank."""
    sums = WAYS[name](comm, device)
    right = adds_up(sums, device, comm.rank, comm.ranks)
    if not all(bool(each[0]) for each in comm.gather(np.array([right]))):
        raise AgreedError("known numbers came out wrong")
    return sums


def choose_sums(comm: Communicator, device: Device, wanted: str | None = None) -> Sums:
    """The first way that adds up right on all ranks; called on all. AgreedError if none does. wanted: only this one."""
    agreed(comm, lambda: _check_name(wanted))
    reasons = []
    for name in WAYS if wanted is None else [wanted]:
        try:
            sums = _tried(name, comm, device)
        except AgreedError as error:
            reasons.append(f"by {name}: {error}")
            continue
        if comm.rank == 0:
            print("; not ".join([f"devices add up by {name}", *reasons]), file=sys.stderr)
        return sums
    raise AgreedError(f"devices cannot add up {'; '.join(reasons)}")


def _check_name(wanted: str | None) -> None:
    if wanted is not None and wanted not in WAYS:
        raise InputError(f"sums must be one of {', '.join(WAYS)}, not {wanted!r}")


def split_way(wanted: str | None, backend: str | None = None) -> tuple[str | None, str | None]:
    """--allreduce as what run_ranks and what load take: how hosts add up (mpi.py), and how devices do.

    Devices for which a way of the hosts is asked add up there. InputError if there is no such way for the backend.
    """
    if wanted is None:
        return None, None
    known_ways = [*HOST_WAYS, *([] if backend == "reference" else WAYS)]
    if wanted not in known_ways:
        raise InputError(f"--allreduce must be one of {', '.join(known_ways)}, not {wanted!r}")
    return (wanted, "host") if wanted in HOST_WAYS else (None, wanted)
