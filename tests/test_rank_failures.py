"""One rank goes wrong: all end soon, one line says which rank and why, the status says so, and nothing is left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mpirun import Job, mpiexec, needs_mpi
from strategies import TINY
from test_checkpoint import random_tensors, write_single

PROGRAM = Path(__file__).with_name("failing.py")
STARTING = 3.0  # seconds that starting three ranks may take on a busy machine; it is 0.5 on an idle one
COMPILING = 20.0  # the first time; all ranks at once
ENDING = 3.0  # seconds that ending them may take

FAILURES = {
    # how: what must be said, the exit status where it can be chosen
    "raise": ("error: rank 1 of 3: ZeroDivisionError: one rank divided by zero", 1),
    "bad input": ("error: rank 1 of 3: one rank was given something bad", 2),
    "agreed": ("error: rank 1 of 3: one rank was given something bad", 2),
    "sys.exit(3)": ("error: rank 1 of 3 called sys.exit(3) before its work was done", 3),
    "sys.exit(0)": ("error: rank 1 of 3 ended while others were still at work", 1),
    "return": ("error: rank 1 of 3 ended while others were still at work", 1),
    "os._exit(3)": ("error: rank 1 of 3 ended before its work was done, with status 3", None),
    "os._exit(0)": ("error: rank 1 of 3 ended before its work was done, with status 0", None),
    "SIGKILL": ("error: rank 1 of 3 was killed by SIGKILL", None),
    "SIGSEGV": ("error: rank 1 of 3 was killed by SIGSEGV", None),
    "SIGTERM": ("error: rank 1 of 3 was killed by SIGTERM", None),
}


def lines_of_errors(job: Job) -> list[str]:
    return [line for line in job.stderr.splitlines() if line.startswith("error:")]


def assert_nothing_left(job: Job) -> None:
    assert not job.left
    assert not job.leaked


@needs_mpi
@pytest.mark.parametrize("how", FAILURES)
def test_all_ranks_end_and_one_line_says_why(how: str):
    said, status = FAILURES[how]
    job = mpiexec(3, PROGRAM, how)
    assert lines_of_errors(job) == [said], job.stderr
    assert job.status != 0
    assert status in (None, job.status)
    assert job.seconds < STARTING + ENDING
    assert_nothing_left(job)


@needs_mpi
@pytest.mark.parametrize("way", ["ipc", "mpi"])
@pytest.mark.parametrize("how", ["raise", "os._exit(0)", "SIGKILL"])
def test_kernels_that_wait_for_a_rank_end_too(how: str, way: str):
    job = mpiexec(3, PROGRAM, how, "1", "", "", way)
    assert lines_of_errors(job) == [FAILURES[how][0]], job.stderr
    assert job.status != 0
    assert job.seconds < COMPILING + ENDING
    assert_nothing_left(job)


@needs_mpi
def test_a_rank_that_hangs_while_kernels_wait_for_it_is_the_one_that_is_named():
    job = mpiexec(3, PROGRAM, "hang", "2", "4", "", "ipc")
    (said,) = lines_of_errors(job)
    assert re.fullmatch(r"error: rank 2 of 3 made no progress for \d s \(--timeout\); above, where it was", said)
    assert "in hang_here" in job.stderr
    assert_nothing_left(job)


@needs_mpi
def test_a_rank_that_sees_another_checkpoint_ends_all(tmp_path: Path):
    for rank in range(3):
        write_single(tmp_path / str(rank), TINY, random_tensors(TINY, seed=int(rank == 1)))
    job = mpiexec(3, PROGRAM, "another checkpoint", "1", "", str(tmp_path))
    assert lines_of_errors(job) == ["error: rank 1 of 3 sees another checkpoint, or config, than rank 0"]
    assert job.status == 2
    assert job.seconds < STARTING + ENDING
    assert_nothing_left(job)


@needs_mpi
def test_rank_0_is_no_exception():
    job = mpiexec(2, PROGRAM, "SIGKILL", "0")
    assert lines_of_errors(job) == ["error: rank 0 of 2 was killed by SIGKILL"]
    assert job.status != 0
    assert_nothing_left(job)


@needs_mpi
@pytest.mark.parametrize(("how", "place"), [("hang", "hang_here"), ("hang in C", "go_wrong"), ("SIGSTOP", None)])
def test_a_rank_that_hangs_is_ended_and_shows_where_it_was(how: str, place: str | None):
    """Only the one that hangs; the others wait for it and are ended with it."""
    timeout = 2.0
    job = mpiexec(3, PROGRAM, how, "2", str(timeout))
    (said,) = lines_of_errors(job)
    assert re.fullmatch(r"error: rank 2 of 3 made no progress for \d s \(--timeout\); above, where it was", said)
    assert job.status != 0
    assert job.seconds < STARTING + timeout + ENDING
    if place is not None:  # a process that is stopped cannot show anything
        assert re.search(rf'failing.py", line \d+ in {place}', job.stderr)
        assert job.stderr.count("most recent call first") == 1
    assert_nothing_left(job)


@needs_mpi
def test_a_timeout_disturbs_no_rank_that_makes_progress():
    job = mpiexec(3, PROGRAM, "nothing", "1", "5")
    assert job.status == 0, job.stderr
    assert not lines_of_errors(job)
    assert_nothing_left(job)
