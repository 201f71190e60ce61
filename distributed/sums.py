"""How ranks with devices add up arrays that lie there: in the order of the ranks, in float32, the same bits on each.

host        each array is copied to the host, added up as those of the reference are (comm.py), and copied back
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from neox.distributed.comm import Communicator, agreed
from neox.distributed.mpi import WAYS as HOST_WAYS
from neox.gpu.device import Array, Device
from neox.reference.errors import InputError


class Sums(Protocol):
    """A way to add up float32 arrays of one shape over the ranks. All ranks make the same calls in the same order."""

    @property
    def captured(self) -> bool:
        """Whether a graph of the device can hold it."""
        ...

    def add_up(self, part: Array) -> None:
        """The sum of all ranks' parts, in place of each."""
        ...


@dataclass(frozen=True)
class HostSums:
    """By way of the host: right everywhere, and nowhere the fastest."""

    comm: Communicator
    captured: bool = False

    def add_up(self, part: Array) -> None:
        part.set(self.comm.sum(part.get()))


WAYS: dict[str, Callable[[Communicator, Device], Sums]] = {"host": lambda comm, device: HostSums(comm)}


def choose_sums(comm: Communicator, device: Device, wanted: str | None = None) -> Sums:
    """The first way that adds up right on all ranks; called on all. AgreedError if none does. wanted: only this one."""
    agreed(comm, lambda: _check_name(wanted))
    name, sums = "host", HostSums(comm)
    if comm.rank == 0:
        print(f"devices add up by {name}", file=sys.stderr)
    return sums


def _check_name(wanted: str | None) -> None:
    if wanted is not None and wanted not in WAYS:
        raise InputError(f"sums must be one of {', '.join(WAYS)}, not {wanted!r}")


def split_way(wanted: str | None, backend: str | None = None) -> tuple[str | None, str | None]:
    """--allreduce as what run_ranks and what load take: how hosts add up (mpi.py), and how devices do.

    Devices for which a way of the hosts is asked add up there. InputError if there is no such way for the backend.
    """
    if wanted is None:
        return None, None
    known = [*HOST_WAYS, *([] if backend == "reference" else WAYS)]
    if wanted not in known:
        raise InputError(f"--allreduce must be one of {', '.join(known)}, not {wanted!r}")
    return (wanted, "host") if wanted in HOST_WAYS else (None, wanted)
