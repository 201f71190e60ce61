"""Run a Python program under a sanitizer, whose library must be loaded before all others.

    python -m neox.gpu.host.sanitize thread program.py [ARGUMENT ...]

The modes are `thread` (data races) and `address` (accesses out of bounds), of g++'s libtsan and libasan. The program
opens its device with `HostDevice(mode=...)` of the same name. A race is reported on stderr and makes the exit status
66.
"""

from __future__ import annotations

import os
import subprocess
import sys

from neox.gpu.host.build import compiler
from neox.reference.errors import InputError, run

LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python itself frees next to nothing at exit.
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},
    "thread": {"TSAN_OPTIONS": "exitcode=66"},
}


def environment(mode: str) -> dict[str, str]:
    """Of a process in which kernels compiled in this mode can be loaded."""
    name = LIBRARIES[mode]
    found = subprocess.run([compiler()[0], f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if found == name:
        raise InputError(f"{name} is not installed, which g++ -fsanitize={mode} needs")
    # Threads of OpenBLAS only spin under the sanitizer.
    return {**os.environ, **OPTIONS[mode], "LD_PRELOAD": os.path.realpath(found), "OPENBLAS_NUM_THREADS": "1"}


def require(mode: str) -> None:
    """InputError if kernels of this mode cannot be loaded into this process."""
    if mode in LIBRARIES and LIBRARIES[mode] not in os.environ.get("LD_PRELOAD", ""):
        raise InputError(f"mode {mode!r} must be started by: python -m neox.gpu.host.sanitize {mode} PROGRAM")


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in LIBRARIES:
        raise InputError("usage: python -m neox.gpu.host.sanitize thread|address PROGRAM [ARGUMENT ...]")
    os.execve(sys.executable, [sys.executable, *sys.argv[2:]], environment(sys.argv[1]))


if __name__ == "__main__":
    run(main)
