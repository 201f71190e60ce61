"""The table in gpu/README.md of what each kernel takes of a multiprocessor. `python tests/kernel_table.py` writes it.

Needs NVRTC, of the version that the extra `nvrtc` of pyproject.toml names: another may count differently.
"""

from __future__ import annotations

import re
from pathlib import Path

from nvrtc import architectures, usage

from neox.gpu import ops

PAGE = Path(__file__).resolve().parents[1] / "gpu" / "README.md"
BEGIN, END = "<!-- kernels -->\n", "<!-- /kernels -->\n"


def rows() -> dict[tuple[str, str], list[tuple[int, int]]]:
    """By file and kernel, for each architecture: the most registers and shared bytes of its dtypes and sizes."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for source in ops.SOURCES:
        for place, arch in enumerate(architectures()):
            for kernel, taken in usage(source, arch).items():
                row = found.setdefault((source.file, re.sub("<.*", "", kernel)), [])
                if len(row) == place:
                    row.append((0, 0))
                row[place] = (max(row[place][0], taken.registers), max(row[place][1], taken.shared_bytes))
    return found


def table() -> str:
    names = [f"sm_{arch}" for arch in architectures()]
    lines = [f"| file | kernel | registers on {', '.join(names)} | shared bytes |", "| --- | --- | --- | ---: |"]
    for (file, kernel), taken in rows().items():
        registers = ", ".join(str(count) for count, _ in taken)
        lines.append(f"| [{file}](kernels/{file}) | `{kernel}` | {registers} | {max(s for _, s in taken):,} |")
    return "\n".join(lines) + "\n"


def shown() -> str:
    """What the page has now."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def write() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    write()
