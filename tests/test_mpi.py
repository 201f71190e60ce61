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
from neox.distributed.comm import sum_in_rank_order
from neox.distributed.mpi import PIECE, _in_pieces, adds_up, known
from neox.reference import generate, load, shipped

PROGRAM = Path(__file__).with_name("battery.py")


@cache
def expected(ranks: int, dtype: str | None = None) -> list[dict[str, NDArray]]:
    return virtual(ranks, lambda comm: battery(comm, dtype))


def assert_same(folder: Path, results: list[dict[str, NDArray]]) -> None:
    """To the bit, what each rank has written."""
    for rank, own in enumerate(results):
        with np.load(folder / f"{rank}.npz") as file:
            assert set(file) == set(own)
            for name, array in own.items():
                assert file[name].dtype == np.float32
                assert np.array_equal(file[name], array), f"rank {rank}: {name}"


@needs_mpi
@pytest.mark.parametrize(
    ("ranks", "way"), [(1, None), (2, None), (3, None), (4, None), (5, None), (8, None), (3, "allgather")]
)
def test_ranks_of_mpi_are_virtual_ranks_to_the_bit(ranks: int, way: str | None, tmp_path: Path):
    """Prompts, batches and 30 cached steps over drawn models."""
    job = mpiexec(ranks, PROGRAM, str(tmp_path), *([way] if way else []))
    assert job.status == 0, job.stderr
    assert f"{ranks} ranks, which add up by {way or 'window'}" in job.stderr
    assert_same(tmp_path, expected(ranks))
    assert not job.left


@needs_mpi
@pytest.mark.parametrize(("ranks", "dtype"), [(2, "float32"), (3, "float16")])
def test_so_are_ranks_whose_devices_compute(ranks: int, dtype: str, tmp_path: Path):
    """The same with kernels, on the host device."""
    job = mpiexec(ranks, PROGRAM, str(tmp_path), "window", dtype)
    assert job.status == 0, job.stderr
    assert_same(tmp_path, expected(ranks, dtype))
    assert not job.left


SCRIPT = """
import neox.distributed as dist
from neox.reference import shipped

comm = dist.connect()
model = dist.load(shipped.path(), comm, backend="reference", dtype="float64")
logits = dist.forward(model, [[1, 2, 3]])
ids = list(dist.generate(model, [1, 2, 3], max_tokens=5, ignore_eos=True))
everyone = comm.gather(logits)
assert all((each == logits).all() for each in everyone)
if comm.rank == comm.ranks - 1:
    print(ids)
"""


@needs_mpi
def test_a_program_of_ones_own_needs_five_lines(tmp_path: Path):
    """Under mpiexec; the ids are those that one process finds, on the last rank too."""
    program = tmp_path / "program.py"
    program.write_text(SCRIPT)
    job = mpiexec(3, program)
    assert job.status == 0, job.stderr
    alone = list(generate(load(shipped.path(), dtype="float64"), [1, 2, 3], max_tokens=5, ignore_eos=True))
    assert job.stdout.strip() == str(alone)


# How ranks add up.


class InSomeOrder:
    """Adds up what every rank has as a library might: in a tree, from the last rank on, or in half precision."""

    def __init__(self, how: str, ranks: int) -> None:
        self.how, self.ranks = how, ranks

    def sum(self, part: NDArray) -> NDArray:
        parts = [known(rank, part.size) for rank in range(self.ranks)]
        if self.how == "tree":
            while len(parts) > 1:
                parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
            return parts[0]
        if self.how == "half":
            parts = [each.astype(np.float16) for each in parts]
        return sum_in_rank_order(parts[::-1] if self.how == "backwards" else parts)


@pytest.mark.parametrize(("how", "right"), [("in order", True), ("tree", False), ("backwards", False), ("half", False)])
def test_a_way_that_adds_up_in_another_order_is_not_taken(how: str, right: bool):
    with np.errstate(over="ignore"):
        assert adds_up(InSomeOrder(how, 4), 0, 4) is right


@pytest.mark.parametrize("size", [1, PIECE // 4 - 1, PIECE // 4, PIECE // 4 + 1, 3 * PIECE // 4])
def test_a_long_array_goes_in_pieces(size: int):
    pieces: list[int] = []

    def twice(piece: NDArray) -> NDArray:
        pieces.append(piece.nbytes)
        return piece + piece

    array = np.random.default_rng(0).standard_normal((size, 1), np.float32)
    assert np.array_equal(_in_pieces(array, twice), 2 * array)
    assert sum(pieces) == array.nbytes
    assert max(pieces) <= PIECE
    assert len(pieces) == -(-array.nbytes // PIECE)
