"""gpu/README.md is true: its commands, its links, its counts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_gpu_overlap import MUTANTS as OF_WAITS
from test_host_mutants import MUTANTS as OF_THE_HOST
from test_kernel_mutants import MUTANTS as OF_KERNELS
from test_kernels_all_reduce import MUTANTS as OF_THE_PROTOCOL
from test_kernels_ptx_interpreted import MUTANTS as OF_ASSEMBLY
from test_static_performance import TOO_EARLY

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "gpu" / "README.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="there is no gpu/ beside tests/")
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
COMMANDS = re.findall(r"^```sh\n([^\n]*)\n```$", TEXT, re.MULTILINE)


def run(command: str) -> subprocess.CompletedProcess[str]:
    python = command.replace("python ", f"{sys.executable} ", 1)
    return subprocess.run(python, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_host_device_writes_what_the_reference_writes() -> None:
    (command,) = (command for command in COMMANDS if "--device host" in command)
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(command.replace("--backend gpu --device host", "")).stdout


def test_without_a_card_the_other_command_says_what_to_do() -> None:
    (command,) = (command for command in COMMANDS if "--device cuda" in command)
    shipped = command.replace("--model pythia-1.4b", "--max-tokens 2")
    done = run(shipped)
    assert done.returncode == 0 or (done.returncode == 2 and 'with device "host"' in done.stderr)


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert len(links) > 20
    assert not [link for link in links if not (PAGE.parent / link).exists()]


def test_every_kernel_is_in_the_table() -> None:
    files = {path.name for path in (ROOT / "gpu" / "kernels").glob("*.cu")}
    assert files == set(
        re.findall(r"^\| \[\w+\]\(kernels/(\w+\.cu)\)", TEXT.partition("<!-- kernels -->")[0], re.MULTILINE)
    )


def test_the_mutants_are_counted() -> None:
    on_the_cpu = len(OF_KERNELS) + len(OF_THE_HOST) + len(OF_THE_PROTOCOL) + len(OF_WAITS)
    count = on_the_cpu + len(OF_ASSEMBLY) + len(TOO_EARLY)
    assert re.findall(r"\[(\d+) mutants\]", TEXT) == [str(count)]
