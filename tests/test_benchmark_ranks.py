"""examples/benchmark_ranks.py on a small shape, and what it refuses."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from mpirun import Job, needs_mpi, run

PROGRAM = Path(__file__).parents[1] / "examples" / "benchmark_ranks.py"


def benchmark(*flags: str) -> Job:
    return run([sys.executable, str(PROGRAM), *flags])


@needs_mpi
def test_every_setting_has_a_row() -> None:
    job = benchmark("--shape", "pythia-14m", "--ranks", "2", "--steps", "2", "--rounds", "1")
    assert job.status == 0, job.stderr
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) ms \| [\d.]+% \| [\d.]+% \|$", job.stdout, re.MULTILINE)
    assert [(ranks, threads) for ranks, threads, _ in rows] == [("1", "2"), ("2", "1")]
    assert all(float(step) > 0 for _, _, step in rows)
    assert not job.left


@needs_mpi
def test_ranks_that_fail_are_one_line() -> None:
    job = benchmark("--shape", "pythia-14m", "--ranks", "5", "--steps", "1", "--rounds", "1")
    assert (job.status, job.stdout) == (2, "")
    assert "the model has 4 attention heads, too few for 5 ranks" in job.stderr
    assert job.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "phrase"), [(["--ranks", "0"], "at least 1"), (["--shape", "gpt-2"], "invalid choice")]
)
def test_bad_flags_end_with_one_line(flags: list[str], phrase: str) -> None:
    job = benchmark(*flags)
    assert (job.status, job.stdout) == (2, "")
    assert phrase in job.stderr
    assert job.stderr.count("\n") == 1
