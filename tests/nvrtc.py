"""Compile kernels for a card, with no card at hand: what CuPy's RawModule does, but for the loading."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from neox.gpu.source import Source


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a multiprocessor."""

    registers: int  # of each thread
    spilled_bytes: int  # registers that did not fit, kept in memory
    shared_bytes: int  # static, of each block
    stack_bytes: int  # arrays of each thread that the compiler could not keep in registers


def require_nvrtc() -> None:
    """Skips the test where CuPy or NVRTC is not installed."""
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    try:
        nvrtc.getVersion()
    except Exception as error:  # a RuntimeError of CuPy's, or DynamicLibNotFoundError of cuda-pathfinder
        pytest.skip(f"NVRTC is not installed ({type(error).__name__})")


def architectures() -> list[str]:
    """The A100's, the H100's and H200's with and without its own instructions, and the newest that NVRTC knows."""
    from cupy_backends.cuda.libs import nvrtc

    return ["80", "90", "90a", str(max(nvrtc.getSupportedArchs()))]


def compiled(source: Source, arch: str, method: str = "cubin") -> tuple[Any, dict[str, str], str]:
    """Machine code or PTX, the name of each kernel within, and what ptxas reported."""
    from cupy._core import core
    from cupy.cuda import compiler

    kind = "sm" if method == "cubin" else "compute"
    options = core.assemble_cupy_compiler_options(("-std=c++17", "--ptxas-options=-v"))
    options += (f"-arch={kind}_{arch}", "--device-as-default-execution-space", "-ftz=true")  # the last two are CuPy's
    program = compiler._NVRTCProgram(source.text, source.file, name_expressions=source.kernels, method=method)
    log = io.StringIO()
    code, mangled = program.compile(options, log)
    return code, {name: _text(mangled[name]) for name in source.kernels}, log.getvalue()


@cache
def usage(source: Source, arch: str) -> dict[str, Usage]:
    """By the kernels' names. Not to be written to: whoever asks again is given the same."""
    _, mangled, log = compiled(source, arch)
    names = {value: name for name, value in mangled.items()}
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        patterns = r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes stack frame"
        numbers = [re.search(pattern, part) for pattern in patterns]
        shared = re.search(r"(\d+) bytes smem", part)
        registers, spilled, stack = (int(n[1]) for n in numbers if n)
        found[names[part.split("'")[0]]] = Usage(registers, spilled, int(shared[1]) if shared else 0, stack)
    return found


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
