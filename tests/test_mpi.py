"""Ranks of MPI compute what virtual ranks do, to the bit, however they add up."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from battery import battery
from mpirun import mpiexec, needs_mpi
from numpy.typing import NDArray

from neox.distributed import virtual

PROGRAM = Path(__file__).with_name("battery.py")


@cache
def expected(ranks: int) -> list[dict[str, NDArray]]:
    return virtual(ranks, battery)


@needs_mpi
@pytest.mark.parametrize(
    ("ranks", "way"), [(1, None), (2, None), (3, None), (4, None), (5, None), (8, None), (3, "allgather")]
)
def test_ranks_of_mpi_are_virtual_ranks_to_the_bit(ranks: int, way: str | None, tmp_path: Path):
    """Prompts, batches and 30 cached steps over drawn models."""
    job = mpiexec(ranks, PROGRAM, str(tmp_path), *([way] if way else []))
    assert job.status == 0, job.stderr
    assert f"{ranks} ranks, which add up by {way or 'window'}" in job.stderr
    for rank, results in enumerate(expected(ranks)):
        with np.load(tmp_path / f"{rank}.npz") as file:
            assert set(file) == set(results)
            for name, array in results.items():
                assert file[name].dtype == np.float32
                assert np.array_equal(file[name], array), f"rank {rank}: {name}"
    assert not job.left
