"""A device that compiles with NVRTC, as a card's does, and runs the PTX in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from nvrtc import compiled
from ptx_instructions import OPERATIONS
from ptx_machine import Machine
from ptx_program import Program, parse

from neox.gpu.device import Argument, Array, HostDevice
from neox.gpu.host.memory import HostMemory
from neox.gpu.source import Source


@cache
def programs(source: Source) -> dict[str, Program]:
    code, mangled, _ = compiled(source, "90", "ptx")
    text = code.decode() if isinstance(code, bytes) else code
    return {name: parse(text, mangled[name]) for name in source.kernels}


class PtxDevice(HostDevice):
    """Arrays are the host device's."""

    def _compile(self, source: Source) -> dict[str, Program]:
        return programs(source)

    def _launch(
        self, module: Any, kernel: str, grid: Any, block: Any, arguments: Sequence[Argument], shared_bytes: int
    ) -> None:
        arrays = [a for a in arguments if isinstance(a, Array)]
        pointed = {address for a in arrays if a.dtype == np.uint64 for address in a.get().ravel().tolist()}
        behind = [memory for memory in HostMemory.living if memory.address in pointed]
        memories = list({id(memory): memory for memory in (*(a.memory for a in arrays), *behind)}.values())
        values = [np.uint64(getattr(a, "address", 0)) if a is None or isinstance(a, Array) else a for a in arguments]
        for number in range(int(np.prod(grid))):
            index = (number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1])
            Machine(module[kernel], values, memories, grid, block, index, shared_bytes).run(OPERATIONS)
