"""A NumPy machine that runs PTX: the code that a card would run, inline assembly included, with no card.

It sees what the host device cannot: a wrong operand in an asm statement, or a compiler's surprise. It does not see
races: all threads of a block step together, those with the lowest instruction first, which brings diverged threads
together again. A register is an array with an entry for each thread of the block. Accesses are checked for bounds and
alignment.

Denormals are kept where a card would flush them to zero, and fused multiply-adds pass through float64.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
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


def registers(vector: str) -> list[str]:
    return re.findall(r"[%\w]+", vector)


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

    def run(self, operations: dict[str, Callable[[Machine, Instruction], None]]) -> None:
        code = self.program.instructions
        while self.running.any():
            position = self.next[self.running].min()
            here = self.running & (self.next == position)
            instruction = code[position]
            self.next[here] += 1
            self.active = here
            if instruction.predicate:
                self.active = here & (self.read(instruction.predicate, "pred") ^ instruction.negated)
            if instruction.name not in operations:
                raise NotImplementedError(f"PTX: {instruction}")
            if self.active.any():
                with np.errstate(all="ignore"):
                    operations[instruction.name](self, instruction)

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
        """Of the active threads."""
        found = ADDRESS.match(operand)
        assert found, operand
        return self.read(found[1], "u64").astype(np.int64)[self.active] + int(found[2] or 0)

    def locate(self, space: str, addresses: NDArray[np.int64], width: int) -> list[tuple[Values, Values, Values]]:
        """(bytes, which of the addresses, their offsets) for each piece of memory that the addresses fall into."""
        if (addresses % width).any():
            raise PtxError(f"access of {width} bytes at an address that is no multiple of that")
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
            thread = int(np.flatnonzero(self.active)[outside][0])
            raise PtxError(f"thread {thread}: access of {width} bytes outside {space} memory")
        return found

    def load(self, space: str, addresses: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
        """(addresses, width) bytes."""
        values = np.empty((len(addresses), width), np.uint8)
        for memory, which, offsets in self.locate(space, addresses, width):
            values[which] = memory[offsets]
        return values

    def store(self, space: str, addresses: NDArray[np.int64], values: NDArray[np.uint8]) -> None:
        for memory, which, offsets in self.locate(space, addresses, values.shape[1]):
            memory[offsets] = values[which]

    # Warps.

    def whole_warps(self, instruction: Instruction) -> None:
        """PtxError unless every warp takes part with all its lanes or with none."""
        if self.threads % 32 or (self.active.reshape(-1, 32).any(1) != self.active.reshape(-1, 32).all(1)).any():
            raise PtxError(f"a part of a warp in {instruction}")


def _special_registers(grid: Size, block: Size, index: Size) -> dict[str, Values]:
    n = int(np.prod(block))
    thread = np.arange(n)
    inside = (thread % block[0], thread // block[0] % block[1], thread // block[0] // block[1])
    named = {f"%tid.{axis}": inside[i] for i, axis in enumerate("xyz")}
    for name, size in (("ctaid", index), ("ntid", block), ("nctaid", grid)):
        named |= {f"%{name}.{axis}": np.full(n, size[i]) for i, axis in enumerate("xyz")}
    return named
