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


@needs_mpi
def test_a_dry_run_goes_all_the_way_on_devices() -> None:
    """Sums between streams and between processes, and what is projected, by its formula."""
    job = benchmark("--backend", "gpu", "--device", "host", "--dry-run")
    assert job.status == 0, job.stderr
    sums = dict(re.findall(r"^\| (\d x 48, 2 \w+[\w ]*) \| ([\d.e+]+) \| [\d.]+% \|$", job.stdout, re.MULTILINE))
    assert set(sums) == {f"{n} x 48, 2 {where}" for n in (1, 3) for where in ("streams of one card", "processes")}
    assert "2 processes: devices add up by ipc" in job.stdout
    assert "Projected, not measured: step = a shard's step + 3 x the sum of a row between streams" in job.stdout
    (found,) = re.findall(r"^\| 2 \| ([\d.]+) \| 3 \| ([\d.e+]+) \| ([\d.]+) \| ([\d.]+) \|$", job.stdout, re.MULTILINE)
    shard, each, step, rate = map(float, found)
    assert step == pytest.approx(shard + 3 * each / 1000, rel=2e-3)
    assert rate == pytest.approx(1000 / step, rel=2e-3)
    assert not job.left


@needs_mpi
@pytest.mark.parametrize(
    ("flags", "phrase"), [(["--ranks", "3"], "too few for 3 ranks"), (["--allreduce", "owl"], "not 'owl'")]
)
def test_what_devices_cannot_do_is_one_line(flags: list[str], phrase: str) -> None:
    job = benchmark("--backend", "gpu", "--device", "host", "--dry-run", *flags)
    assert (job.status, job.stdout) == (2, "")
    assert phrase in job.stderr
    assert job.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "phrase"), [(["--ranks", "0"], "at least 1"), (["--shape", "gpt-2"], "invalid choice")]
)
def test_bad_flags_end_with_one_line(flags: list[str], phrase: str) -> None:
    job = benchmark(*flags)
    assert (job.status, job.stdout) == (2, "")
    assert phrase in job.stderr
    assert job.stderr.count("\n") == 1
