"""Kernels of a compiled library: arguments checked against their parameters, faults told with thread and line."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from neox.gpu.host.memory import HostMemory, describe, stacks

ORDERS = {"forward": 0, "reverse": 1, "seeded": 2}
Size = tuple[int, int, int]

# All launches share the stacks, and those of one library its state. A launch may make the one before it run.
_one_at_a_time = threading.RLock()
RAN, FAILED, WAITS = range(3)  # launch.h


class KernelError(RuntimeError):
    """A kernel did what it may not. The text names the kernel, its launch, block, thread and source line."""


class Launch(ctypes.Structure):  # schedule.h
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("order", ctypes.c_int),
        ("early", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("stacks", ctypes.c_void_p),
        ("threads", ctypes.c_size_t),
    ]


class Failure(ctypes.Structure):  # schedule.h
    _fields_ = [("text", ctypes.c_char * 4096), ("program_counter", ctypes.c_size_t), ("address", ctypes.c_size_t)]


@dataclass(frozen=True)
class Pointer:
    """An argument that is an array."""

    memory: HostMemory
    address: int
    dtype: np.dtype


Argument = Pointer | np.generic | None


@dataclass(frozen=True)
class Packed:
    """Arguments as cuLaunchKernel takes them: pointers to values, with all that must stay alive meanwhile."""

    pointers: ctypes.Array[ctypes.c_void_p]
    values: list[np.ndarray]
    memories: list[HostMemory]


class HostModule:
    """The kernels of one library, by the names they were instantiated under."""

    def __init__(self, library: Path, kernels: tuple[str, ...]) -> None:
        self.path = library
        self.library = ctypes.CDLL(str(library))
        self.library.last_failure.restype = ctypes.POINTER(Failure)
        self.library.stack_stride.restype = ctypes.c_size_t
        self.kernels = {name: HostKernel(self, i, name) for i, name in enumerate(kernels)}

    def source_line(self, program_counter: int) -> str:
        """Of an instruction, as " at FILE:LINE", by binutils' addr2line, which comes with g++; empty if unknown."""
        base = _load_address(self.path)
        if not program_counter or program_counter < base:
            return ""
        command = ["addr2line", "-i", "-s", "-e", str(self.path), hex(program_counter - base)]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        return next((f" at {line.split(' ')[0]}" for line in lines if ".cu" in line), "")


class HostKernel:
    def __init__(self, module: HostModule, index: int, name: str) -> None:
        signature = getattr(module.library, f"signature_{index}")
        signature.restype = ctypes.c_char_p
        self.module = module
        self.name = name
        self.parameters = [p for p in signature().decode().split(",") if p]
        self._launch = getattr(module.library, f"launch_{index}")

    def pack(self, arguments: Sequence[Argument]) -> Packed:
        """TypeError if an argument is not of the very type that the kernel takes."""
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, not {len(arguments)}")
        values = []
        for i, (argument, parameter) in enumerate(zip(arguments, self.parameters, strict=True)):
            self._check(i, argument, parameter)
            value = getattr(argument, "address", 0) if parameter.endswith("*") else argument
            values.append(np.array([value], np.uint64 if parameter.endswith("*") else None))
        pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        return Packed(pointers, values, [a.memory for a in arguments if isinstance(a, Pointer)])

    def _check(self, i: int, argument: Argument, parameter: str) -> None:
        if isinstance(argument, Pointer):
            given = f"{argument.dtype}*"
        else:
            given = "a null pointer" if argument is None else str(argument.dtype)
        wanted = parameter.removeprefix("const ")
        if given != wanted and not (argument is None and wanted.endswith("*")):
            raise TypeError(f"argument {i} of {self.name} is {given}, but the kernel takes {parameter}")

    def launch(
        self,
        grid: Size,
        block: Size,
        packed: Packed,
        shared_bytes: int,
        order: str,
        seed: int,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Run every block. KernelError says what went wrong.

        before: runs the launch before this one, as late as a card may: when a block of this one waits for it, or at the
        end if none does. It must be of another library.
        """
        sizes, threads, early = (
            ((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)),
            math.prod(block),
            bool(before),
        )
        with _one_at_a_time:
            base = stacks(threads, self.module.library.stack_stride(), early)
            request = Launch(*sizes, shared_bytes, ORDERS[order], early, seed, base, threads)
            outcome = self._launch(ctypes.byref(request), packed.pointers)
            if before and outcome != FAILED:
                before()
            if outcome == WAITS:
                outcome = self.module.library.resume()
        title = f"{self.name} <<<{grid}, {block}, {shared_bytes}>>>"
        if outcome == FAILED:
            raise KernelError(f"{title}: {self._what_failed()}")
        for memory in packed.memories:
            where = memory.trespass()
            if where:
                raise KernelError(f"{title}: some thread wrote {where}")

    def _what_failed(self) -> str:
        failure = self.module.library.last_failure().contents
        where = describe(failure.address) if failure.address else ""
        return failure.text.decode() + where + self.module.source_line(failure.program_counter)


# Several, one after another.


@dataclass(frozen=True)
class HostLaunch:
    """A kernel with all that it is run with."""

    kernel: HostKernel
    grid: Size
    block: Size
    packed: Packed
    shared_bytes: int
    order: str
    seed: int

    def __call__(self, before: Callable[[], None] | None = None) -> None:
        self.kernel.launch(self.grid, self.block, self.packed, self.shared_bytes, self.order, self.seed, before)

    def can_precede(self, other: Callable[[], None]) -> bool:
        """Whether it can begin first: a library has only one launch under way."""
        return isinstance(other, HostLaunch) and other.kernel.module is not self.kernel.module


@dataclass
class Recorded:
    """Launches to be repeated. If they overlap, the odd ones, or the even, begin before those before them."""

    launches: Sequence[Callable[[], None]]
    overlapped: bool
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        for run in _in_pairs(self.launches, self.replays % 2) if self.overlapped else self.launches:
            run()


def _in_pairs(launches: Sequence[Callable[[], None]], first: int) -> Iterator[Callable[[], None]]:
    """From the first on two as one, the second of which begins before the first, where it can.

    Where it cannot both are alone, so that over two replays each launch that can begin early does.
    """
    at = 0
    while at < len(launches):
        second = launches[at + 1] if at % 2 == first and at < len(launches) - 1 else None
        if isinstance(second, HostLaunch) and second.can_precede(launches[at]):
            yield partial(second, launches[at])
            at += 2
        else:
            yield launches[at]
            at += 1


# Several at once.

Program = Sequence[Callable[[], None]]  # launches, one after another


def at_once(programs: Sequence[Program]) -> None:
    """Run each program in a process of its own, since fibers of different launches cannot take turns.

    The processes are copies of this one but for arrays, which all of them share. KernelError of the first that fails.
    """
    context = multiprocessing.get_context("fork")
    started = []
    with _one_at_a_time, warnings.catch_warnings():
        # Python warns that another thread may hold a lock: of those that a launch needs, this one is ours.
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        for program in programs:
            result, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run_alone, args=(program, sender), daemon=True)
            process.start()
            sender.close()
            started.append((process, result))
    failures = [_outcome(result) for _, result in started]
    for process, _ in started:
        process.join()
    for failure in filter(None, failures):
        raise KernelError(failure)


def _run_alone(program: Program, result: Connection) -> None:
    _one_at_a_time.release()  # held by the thread of which this is a copy
    try:
        for launch in program:
            launch()
    except KernelError as error:
        result.send(str(error))
    else:
        result.send("")


def _outcome(result: Connection) -> str:
    """What went wrong, when a program has ended; empty if nothing did."""
    with result:
        try:
            return str(result.recv())
        except EOFError:
            return "a process that ran kernels ended before they did"


def _load_address(library: Path) -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(library)):
            return int(line.split("-")[0], 16)
    return 0
