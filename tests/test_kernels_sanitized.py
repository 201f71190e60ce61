"""A part of the kernels' own tests under ThreadSanitizer and AddressSanitizer, which must have nothing to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from neox.gpu.host.sanitize import environment

PROGRAM = """
import sys
from devices import host
from test_kernel_mutants import CASES
part = list(CASES.items())[int(sys.argv[2]) :: int(sys.argv[3])]
for order in ("forward", "reverse"):
    for check, (_, cases) in part:
        for case in cases:
            check(host(order, 0, sys.argv[1]), *case)
print("all checks pass")
"""


PARTS = 3  # ThreadSanitizer knows 8128 threads in a process, and every kernel has its own


@pytest.mark.parametrize("mode", ["thread", "address"])
@pytest.mark.parametrize("part", range(PARTS))
def test_the_kernels_run_clean(part: int, mode: str) -> None:
    command = [sys.executable, "-c", PROGRAM, mode, str(part), str(PARTS)]
    result = subprocess.run(command, env=environment(mode) | python_path(), capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "all checks pass\n"), result.stdout + result.stderr
    assert "Sanitizer" not in result.stderr, result.stderr


OVERLAPPED = """
import sys
from pathlib import Path
from devices import host
from test_gpu_overlap import check_sum
from test_host_device import sources
for order in ("forward", "reverse"):
    check_sum(host(order, 0, sys.argv[1]), sources(Path(sys.argv[2]), "faulty.cu"))
print("all checks pass")
"""


@pytest.mark.parametrize("mode", ["thread", "address"])
def test_launches_that_begin_early_run_clean(mode: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OVERLAPPED, mode, str(tmp_path)]
    result = subprocess.run(command, env=environment(mode) | python_path(), capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "all checks pass\n"), result.stdout + result.stderr


def python_path() -> dict[str, str]:
    """So that the process finds the tests' modules where this one does."""
    return {"PYTHONPATH": ":".join(path for path in sys.path if path)}
