"""How ranks with devices add up arrays that lie there: in the order of the ranks, in float32, the same bits on each.

host        each array is copied to the host, added up as those of the reference are (comm.py), and copied back
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from neox.distributed.comm import Communicator, agreed
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
    return HostSums(comm)


def _check_name(wanted: str | None) -> None:
    if wanted is not None and wanted not in WAYS:
        raise InputError(f"sums must be one of {', '.join(WAYS)}, not {wanted!r}")
