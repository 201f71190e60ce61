"""Every rank has a watcher: a small process that says what became of the rank where the rank itself cannot.

A rank that is killed says nothing, one that hangs neither, and one that ends without a word (os._exit, a crash in a
library) leaves the others waiting for ever. So each process that mpiexec started divides in two before it does anything
else: the child is the rank, the parent waits for it. When the rank ends in any way but a good one, the watcher prints
one line that names the rank and the cause, and ends with a status that makes mpiexec end all other ranks.

The two share a page of memory, the pulse. A rank that neither waits for the others nor makes any progress is the one
that hangs; its watcher has it print where it is, and ends it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from neox.distributed.comm import Communicator
from neox.reference.model import Array

T = TypeVar("T")

INTERVAL = 0.05  # seconds between two looks at the rank
GRACE = 0.3  # seconds in which mpiexec, when it ends all ranks, gets to the watcher too
FAILED = 1  # exit status for what the rank itself gave no other


class Pulse:
    """What a rank lets its watcher know."""

    def __init__(self) -> None:
        self._page = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)  # shared with the children of a fork

    @property
    def beats(self) -> int:
        """How often it made progress."""
        return int(self._page[0])

    @property
    def waiting(self) -> bool:
        """Whether it waits for other ranks."""
        return bool(self._page[1])

    @property
    def settled(self) -> bool:
        """Whether its end is accounted for: its work is done, or it has said itself what went wrong."""
        return bool(self._page[2])

    def beat(self) -> None:
        self._page[0] += 1

    def wait(self, waiting: bool) -> None:
        self._page[1] = waiting

    def settle(self) -> None:
        self._page[2] = 1


@dataclass(frozen=True)
class Watched:
    """A communicator whose calls are seen by the watcher."""

    inner: Communicator
    pulse: Pulse

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def ranks(self) -> int:
        return self.inner.ranks

    def sum(self, part: Array) -> Array:
        return self._call(self.inner.sum, part)

    def gather(self, part: Array) -> list[Array]:
        return self._call(self.inner.gather, part)

    def gather_into(self, part: Any, parts: Any) -> None:
        return self._call(lambda part: self.inner.gather_into(part, parts), part)

    def broadcast(self, value: Any) -> Any:
        return self._call(self.inner.broadcast, value)

    def meet(self, action: Callable[[], T]) -> T:
        return self._call(lambda _: self.inner.meet(action), None)

    def alive(self) -> None:
        self.pulse.beat()

    def _call(self, collective: Callable[[Any], T], value: Any) -> T:
        self.pulse.wait(True)
        result = collective(value)
        self.pulse.wait(False)
        self.pulse.beat()
        return result


# The rank's side.


def end_with_parent(how: signal.Signals) -> None:
    """Have this process get a signal when its parent ends, however that ends. Only Linux can do so."""
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, how)


def divide(name: str, timeout: float | None) -> Pulse:
    """Returns in the rank; its watcher ends here. name: how messages call the rank.

    timeout: seconds without progress after which the rank counts as hanging; None: never.
    """
    pulse = Pulse()
    sys.stdout.flush()
    sys.stderr.flush()
    rank = os.fork()
    if rank == 0:
        end_with_parent(signal.SIGKILL)  # mpiexec knows, and ends, only the watcher
        if timeout is not None:
            faulthandler.register(signal.SIGUSR1, all_threads=False)
        return pulse
    # What is open stays so: once the rank has closed its connection to mpiexec, this one must not be closed before the
    # watcher has spoken, since mpiexec then kills whatever it has started.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to both; the rank decides
    os._exit(_Watcher(name, rank, pulse, timeout).watch())


# The watcher's side.


@dataclass
class _Watcher:
    name: str
    rank: int  # its process
    pulse: Pulse
    timeout: float | None

    def watch(self) -> int:
        """The exit status, when the rank has ended."""
        seen, since = -1, time.monotonic()
        while True:
            ended, status = os.waitpid(self.rank, os.WNOHANG)
            if ended:
                return self._account(os.waitstatus_to_exitcode(status))
            if self.pulse.beats != seen:
                seen, since = self.pulse.beats, time.monotonic()
            elif self.timeout is not None and time.monotonic() - since > self._patience(self.timeout):
                return self._give_up(time.monotonic() - since)
            time.sleep(INTERVAL)

    def _patience(self, timeout: float) -> float:
        """Who waits for another rank leaves it to that one's watcher to say so, if that one can still be seen."""
        return 2 * timeout if self.pulse.waiting else timeout

    def _account(self, code: int) -> int:
        if self.pulse.settled:
            return code if code >= 0 else 128 - code
        if code < 0:
            time.sleep(GRACE)  # if it was mpiexec that killed the rank, it now kills this process too
            self._say(f"was killed by {signal.Signals(-code).name}")
            return 128 - code
        self._say(f"ended before its work was done, with status {code}")
        return code or FAILED

    def _give_up(self, seconds: float) -> int:
        what = "waited for the others" if self.pulse.waiting else "made no progress"
        os.kill(self.rank, signal.SIGUSR1)  # it prints its stack
        time.sleep(GRACE)
        os.kill(self.rank, signal.SIGKILL)
        os.waitpid(self.rank, 0)
        self._say(f"{what} for {seconds:.0f} s (--timeout); above, where it was")
        return FAILED

    def _say(self, what: str) -> None:
        os.write(2, f"error: {self.name} {what}\n".encode())
