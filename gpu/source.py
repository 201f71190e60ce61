"""The text of a .cu file with its local headers pasted in, as both compilers are given it.

CuPy keeps compiled kernels under a hash of the text alone: were the headers found by the compiler, an edited one would
go unnoticed and the old kernel would run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).resolve().parent / "kernels"
LOCAL_INCLUDE = re.compile(r'#include "(\S+)"')


@dataclass(frozen=True)
class Source:
    """One .cu file and the kernels that are compiled from it: template instances, or plain names."""

    file: str
    kernels: tuple[str, ...]
    folder: Path = KERNELS

    @property
    def text(self) -> str:
        return _inlined(self.folder, self.file)


@cache
def _inlined(folder: Path, file: str) -> str:
    return "".join(_lines(folder, file, set()))


def _lines(folder: Path, file: str, included: set[str]) -> list[str]:
    """Each header once. #line directives keep every message at the file and line where the text stands."""
    lines = [f'#line 1 "{file}"\n']
    path = folder / file if (folder / file).is_file() else KERNELS / file  # kernels elsewhere may use these headers
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        header = LOCAL_INCLUDE.match(line)
        if header is None:
            lines.append("\n" if line.startswith("#pragma once") else line)
        elif header[1] not in included:
            included.add(header[1])
            lines += [*_lines(folder, header[1], included), f'\n#line {number + 1} "{file}"\n']
        else:
            lines.append("\n")
    return lines
