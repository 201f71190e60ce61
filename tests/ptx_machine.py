"""A NumPy machine that runs PTX: the code that a card would run, inline assembly included, with no card.

It sees what the host device cannot: a wrong operand in an asm statement, or a compiler's surprise. It does not see
races: all threads of a block step together, those with the lowest instruction first, which brings diverged threads
together again; where an instruction takes a whole warp or block, those wait that are there first. A register is an
array with an entry for each thread of the block. Accesses are checked for bounds and alignment. Shared memory holds
NaNs until it is written, and where a cp.async writes until that has been waited for. A kernel that waits for earlier
launches may only ask for weights before it has: by loads that say that they are used once, or by copies.

Denormals are kept where a card would flush them to zero, and fused multiply-adds pass through float64.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from ptx_program import Instruction, Program

from neox.gpu.host.memory import HostMemory

TYPES = {
    "pred": np.bool_, "f16": np.float16, "bf16": bfloat16, "f32": np.float32,
    "u8": np.uint8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SPACES = ("global", "shared", "param")
ADDRESS = re.compile(r"\[([%\w$.]+)(?:\+(-?\d+))?\]")
Size = tuple[int, int, int]
Values = NDArray


class PtxError(RuntimeError):
    """An access, a barrier or an instruction that a card would not take."""


def aligned(threads: NDArray[np.int64], addresses: NDArray[np.int64], width: int) -> None:
    """PtxError unless each address is a multiple of the width."""
    off = addresses % width > 0
    if off.any():
        raise PtxError(f"thread {threads[off][0]}: access of {width} bytes at an address that is no multiple of that")


def registers(vector: str) -> list[str]:
    return re.findall(r"[%\w]+", vector)


@dataclass(frozen=True)
class Copy:
    """A cp.async that has not landed."""

    threads: NDArray[np.int64]
    groups: NDArray[np.int64]  # of each thread, the number of the group that the copy belongs to
    to: NDArray[np.int64]
    values: NDArray[np.uint8]  # (threads, bytes)

    def of(self, which: NDArray[np.bool_]) -> Copy:
        return Copy(self.threads[which], self.groups[which], self.to[which], self.values[which])


class Machine:
    """One block of a launch."""

    def __init__(
        self, program: Program, arguments: Sequence[np.generic], memories: Sequence[HostMemory],
        grid: Size, block: Size, index: Size, shared_bytes: int,
    ) -> None:  # fmt: skip
        self.program = program
        self.threads = int(np.prod(block))
        self.parameters = dict(zip(program.parameters, arguments, strict=True))
        self.memories = memories
        self.shared = np.full(-(-program.shared_bytes // 16) * 16 + shared_bytes, 0xFF, np.uint8)
        self.registers: dict[str, Values] = {}
        self.special = _special_registers(grid, block, index)
        self.active = np.ones(self.threads, bool)  # who takes part in the current instruction
        self.running = np.ones(self.threads, bool)
        self.next = np.zeros(self.threads, np.int64)
        self.copies: list[Copy] = []
        self.committed = np.zeros(self.threads, np.int64)  # groups of copies
        waits = any(i.name == "griddepcontrol" for i in program.instructions)
        self.early = np.full(self.threads, waits)  # who has not waited for the launches before this one

    def run(self, operations: dict[str, Callable[[Machine, Instruction], None]]) -> None:
        while self.running.any():
            here, instruction = self._step()
            self.next[here] += 1
            self.active = here
            if instruction.predicate:
                self.active = here & (self.read(instruction.predicate, "pred") ^ instruction.negated)
                if (self._whole(self.active, instruction) != self.active).any():
                    raise PtxError(f"only some threads take part in {instruction}")
            if instruction.name not in operations:
                raise NotImplementedError(f"PTX: {instruction}")
            if self.active.any():
                with np.errstate(all="ignore"):
                    operations[instruction.name](self, instruction)

    def _step(self) -> tuple[NDArray[np.bool_], Instruction]:
        """The threads at the lowest instruction that can be executed."""
        positions = self.next[self.running]
        lowest = positions.min()
        here = self._ready(lowest)
        if not here.any():  # a warp or the block waits there for the rest of it
            lowest = next((p for p in np.unique(positions) if self._ready(p).any()), None)
            if lowest is None:
                raise PtxError(f"only some threads are at {self.program.instructions[positions.min()]}")
            here = self._ready(lowest)
        return here, self.program.instructions[lowest]

    def _ready(self, position: int) -> NDArray[np.bool_]:
        return self._whole(self.running & (self.next == position), self.program.instructions[position])

    def _whole(self, threads: NDArray[np.bool_], instruction: Instruction) -> NDArray[np.bool_]:
        """Without the warps, or the block, of which an instruction takes all threads and only some are among these."""
        if not instruction.collective:
            return threads
        size = self.threads if instruction.of_the_block else 32
        if self.threads % size:
            raise PtxError(f"a block of {self.threads} threads, which are no whole warps, in {instruction}")
        return threads & threads.reshape(-1, size).all(1).repeat(size)

    def wait_for_earlier_launches(self) -> None:
        self.early &= ~self.active

    def touch_others_memory(self, threads: NDArray[np.int64]) -> None:
        """PtxError if earlier launches may be writing it, or reading what is to be written."""
        if self.early[threads].any():
            raise PtxError(f"thread {threads[self.early[threads]][0]} has not waited for earlier launches")

    # Operands.

    def read(self, operand: str, kind: str) -> Values:
        """The value of a register, a constant or the address of a shared variable in every thread."""
        wanted = np.dtype(TYPES[kind])
        if operand in self.special:
            return self.special[operand].astype(wanted)
        if operand in self.registers:
            value = self.registers[operand]
            return value if kind == "pred" else value.astype(BITS[wanted.itemsize]).view(wanted)
        return np.full(self.threads, self._constant(operand, wanted))

    def _constant(self, operand: str, wanted: np.dtype) -> Any:
        if operand in self.program.shared:
            return wanted.type(self.program.shared[operand])
        if operand.startswith("0f"):
            return np.float32(struct.unpack(">f", bytes.fromhex(operand[2:]))[0])
        if operand.startswith("%"):
            raise PtxError(f"{operand} is read before it is written")
        width = 8 * wanted.itemsize
        return np.array(int(operand, 0) % (1 << width), BITS[wanted.itemsize]).view(wanted)[()]

    def write(self, register: str, value: Values) -> None:
        """In the active threads. Registers hold bits."""
        bits = value if value.dtype == bool else value.view(BITS[value.dtype.itemsize])
        before = self.registers.get(register, np.zeros(self.threads, bits.dtype)).astype(bits.dtype)
        self.registers[register] = np.where(self.active, bits, before)

    # Memory.

    def address(self, operand: str) -> NDArray[np.int64]:
        """In every thread."""
        found = ADDRESS.match(operand)
        assert found, operand
        return self.read(found[1], "u64").astype(np.int64) + int(found[2] or 0)

    def load(self, space: str, threads: NDArray[np.int64], addresses: NDArray[np.int64], width: int) -> Values:
        """Bytes (threads, width): of these threads, at an address for each."""
        values = np.empty((len(addresses), width), np.uint8)
        for memory, which, offsets in self._located(space, threads, addresses, width):
            values[which] = memory[offsets]
        return values

    def store(self, space: str, threads: NDArray[np.int64], addresses: NDArray[np.int64], values: Values) -> None:
        for memory, which, offsets in self._located(space, threads, addresses, values.shape[1]):
            memory[offsets] = values[which]

    def _located(
        self, space: str, threads: NDArray[np.int64], addresses: NDArray[np.int64], width: int
    ) -> list[tuple[Values, Values, Values]]:
        """(bytes, which of the addresses, their offsets) for each piece of memory that the addresses fall into."""
        aligned(threads, addresses, width)
        shared = [(0, self.shared)]
        pieces = shared if space == "shared" else [(m.address, m.bytes) for m in self.memories]
        found = []
        outside = np.ones(len(addresses), bool)
        for base, memory in pieces:
            inside = outside & (addresses >= base) & (addresses + width <= base + memory.size)
            outside &= ~inside
            if inside.any():
                found.append((memory, inside, addresses[inside, None] - base + np.arange(width)))
        if outside.any():
            raise PtxError(f"thread {threads[outside][0]}: access of {width} bytes outside {space} memory")
        return found

    # Asynchronous copies.

    def copy_later(self, threads: NDArray[np.int64], to: NDArray[np.int64], values: NDArray[np.uint8]) -> None:
        """To shared memory, which holds NaNs until `land`."""
        self.store("shared", threads, to, np.full_like(values, 0xFF))
        self.copies.append(Copy(threads, self.committed[threads], to, values))

    def commit(self) -> None:
        self.committed[self.active] += 1

    def land(self, keep: int) -> None:
        """The copies of the active threads, but for those of the last `keep` groups and of none yet."""
        waiting, self.copies = self.copies, []
        for copy in waiting:
            landed = self.active[copy.threads] & (copy.groups < self.committed[copy.threads] - keep)
            done, rest = copy.of(landed), copy.of(~landed)
            self.store("shared", done.threads, done.to, done.values)
            if len(rest.threads):
                self.copies.append(rest)


def _special_registers(grid: Size, block: Size, index: Size) -> dict[str, Values]:
    n = int(np.prod(block))
    thread = np.arange(n)
    inside = (thread % block[0], thread // block[0] % block[1], thread // block[0] // block[1])
    named = {f"%tid.{axis}": inside[i] for i, axis in enumerate("xyz")}
    for name, size in (("ctaid", index), ("ntid", block), ("nctaid", grid)):
        named |= {f"%{name}.{axis}": np.full(n, size[i]) for i, axis in enumerate("xyz")}
    return named
