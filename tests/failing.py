"""A program one rank of which goes wrong, in the middle of the others' work.

mpiexec -n N python failing.py HOW [RANK] [TIMEOUT] [FOLDER] [WAY]      WAY: how devices add up, instead of hosts
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neox.distributed import Communicator, load
from neox.distributed.comm import agreed
from neox.distributed.launch import run_ranks
from neox.distributed.sums import choose_sums
from neox.gpu.device import HostDevice
from neox.reference.errors import InputError


def go_wrong(how: str) -> None:
    if how == "raise":
        raise ZeroDivisionError("one rank divided by zero")
    if how == "bad input":
        raise InputError("one rank was given something bad")
    if how in ("sys.exit(3)", "sys.exit(0)"):
        sys.exit(int(how[9]))
    if how in ("os._exit(3)", "os._exit(0)"):
        os._exit(int(how[9]))
    if how in ("SIGKILL", "SIGSEGV", "SIGTERM", "SIGSTOP"):
        os.kill(os.getpid(), signal.Signals[how])
    if how == "hang":
        hang_here()
    if how == "hang in C":  # without ever letting go of the interpreter
        ctypes.PyDLL(None).sleep(1000)


def hang_here() -> None:
    time.sleep(1000)


def on_devices(comm: Communicator, way: str) -> Callable[[], object]:
    """A sum that goes on for ever, and stays 0."""
    device = HostDevice(mode="fast")
    sums, x = choose_sums(comm, device, way), device.zeros(6144, np.float32)

    def add_up() -> None:
        sums.add_up(x)
        assert not x.get().any()

    return add_up


def main(how: str, wrong: str = "1", timeout: str = "", folder: str = "", way: str = "") -> None:
    def program(comm: Communicator) -> None:
        x = np.zeros(6144, np.float32)
        add_up = on_devices(comm, way) if way else lambda: comm.sum(x)
        for _ in range(3):
            add_up()
        if how == "another checkpoint":
            load(Path(folder) / str(comm.rank), comm)
        if how == "agreed":
            agreed(comm, lambda: go_wrong("bad input") if comm.rank == int(wrong) else None)
        elif comm.rank == int(wrong):
            if how == "return":
                return
            go_wrong(how)
        while how != "nothing":  # until the end comes
            add_up()

    run_ranks(None, program, timeout=float(timeout) if timeout else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
