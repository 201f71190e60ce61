"""How devices add up: a way is taken when it gives the right bits on every rank, and all take the same."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from device_checks import CONFIG
from gpu_models import drawn

from neox.distributed import Alone, Communicator, forward, sums, virtual
from neox.distributed.comm import AgreedError, sum_in_rank_order
from neox.distributed.device import device_decoder, device_shard
from neox.distributed.sums import HostSums, choose_sums, split_way
from neox.gpu.device import Array, HostDevice
from neox.gpu.host.memory import SharedMemory
from neox.reference.errors import InputError

RANKS = 3


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "CAPACITY", 1 << 12)


def added(comm: Communicator, way: sums.Sums, device: HostDevice, size: int) -> np.ndarray:
    part = device.array(np.random.default_rng(comm.rank).standard_normal((2, size // 2), np.float32))
    way.add_up(part)
    way.check()
    return part.get()


def expected(size: int) -> np.ndarray:
    parts = [np.random.default_rng(rank).standard_normal((2, size // 2), np.float32) for rank in range(RANKS)]
    return sum_in_rank_order(parts)


@pytest.mark.parametrize("name", ["mpi", "host"])
@pytest.mark.parametrize("size", [4, 4096, 4104, 10000])
def test_a_way_adds_up_in_the_order_of_the_ranks_whatever_the_size(name: str, size: int):
    def program(comm: Communicator) -> np.ndarray:
        device = HostDevice()
        return added(comm, choose_sums(comm, device, name), device, size)

    for result in virtual(RANKS, program):
        assert np.array_equal(result, expected(size))


# NCCL, in whose place something stands that keeps to its interface.


@dataclass
class Meeting:
    """Where the members of a group leave their addresses for each other."""

    sent: dict[int, tuple[int, int]] = field(default_factory=dict)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(RANKS, timeout=20))


class Nccl(SimpleNamespace):
    """As much of cupy.cuda.nccl as is used."""

    NCCL_FLOAT32 = 7
    NcclError: ClassVar[type[Exception]] = ZeroDivisionError
    meetings: ClassVar[dict[str, Meeting]] = {}
    refuses = False

    def get_unique_id(self) -> str:
        name = f"meeting {len(Nccl.meetings)}"
        Nccl.meetings[name] = Meeting()
        return name

    def NcclCommunicator(self, ranks: int, meeting: str, rank: int) -> Any:
        if self.refuses and rank == 1:
            raise ZeroDivisionError("two ranks on one card")
        return SimpleNamespace(allGather=lambda *how: self.gather(Nccl.meetings[meeting], ranks, rank, *how))

    def gather(
        self, meeting: Meeting, ranks: int, rank: int, part: int, parts: int, size: int, dtype: int, stream: int
    ) -> None:
        assert (dtype, stream) == (self.NCCL_FLOAT32, 77)
        meeting.sent[rank] = part, size
        meeting.barrier.wait()
        for each in range(ranks):
            address, count = meeting.sent[each]
            assert count == size
            view(parts + 4 * each * size, size)[:] = view(address, size)
        meeting.barrier.wait()


def view(address: int, size: int) -> np.ndarray:
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))


class WithNccl(HostDevice):
    library = Nccl()

    @property
    def stream(self) -> int:
        return 77

    def nccl(self) -> Any:
        return self.library


def test_nccl_brings_the_parts_and_a_kernel_adds_them_up():
    def program(comm: Communicator) -> tuple[bool, np.ndarray]:
        device = WithNccl()
        way = choose_sums(comm, device, "nccl")
        return way.captured, added(comm, way, device, 10000)

    for captured, result in virtual(RANKS, program):
        assert captured
        assert np.array_equal(result, expected(10000))


def test_nccl_that_refuses_one_rank_is_no_way_for_any(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Nccl, "refuses", True)
    with pytest.raises(AgreedError, match="rank 1 of 3: NCCL refuses: two ranks on one card"):
        virtual(RANKS, lambda comm: choose_sums(comm, WithNccl(), "nccl"))


def test_nccl_that_cannot_begin_is_no_way(monkeypatch: pytest.MonkeyPatch):
    """Rank 0 alone asks for the name of the group."""
    monkeypatch.setattr(Nccl, "get_unique_id", lambda self: 1 / 0)
    with pytest.raises(AgreedError, match="rank 0 of 3: NCCL refuses: division by zero"):
        virtual(RANKS, lambda comm: choose_sums(comm, WithNccl(), "nccl"))


# MPI and the memory of cards.


class LikeACard(HostDevice):
    """Whose arrays say that they are a card's."""

    def _values(self, array: Array) -> Any:
        return SimpleNamespace(__cuda_array_interface__={}, values=super()._values(array))


def test_mpi_is_not_given_the_address_of_a_cards_memory_unless_it_says_that_it_reads_it():
    with pytest.raises(AgreedError, match="this MPI does not say that it reads the memory of cards"):
        choose_sums(Alone(), LikeACard(), "mpi")


# The choice.


def test_the_best_that_works_is_taken_and_the_others_are_explained(capsys: pytest.CaptureFixture[str]):
    """Threads are no processes, and the host device no card."""
    ways = virtual(RANKS, lambda comm: choose_sums(comm, HostDevice()))
    assert {type(way) for way in ways} == {sums.SentSums}
    said = capsys.readouterr().err
    assert said.count("devices add up by mpi") == 1
    assert "not by ipc: the ranks are no processes of their own" in said
    assert "not by nccl: NCCL connects cards, not the host device" in said


class Wrong(HostSums):
    """On rank 1, in another order."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm)
        self.comm = comm

    def add_up(self, part: Array) -> None:
        parts = self.comm.gather(part.get())
        part.set(sum_in_rank_order(parts[::-1] if self.comm.rank == 1 else parts))


def test_a_way_that_is_wrong_on_one_rank_is_taken_by_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sums.WAYS, "ipc", lambda comm, device: Wrong(comm))
    assert not [way for way in virtual(RANKS, lambda comm: choose_sums(comm, HostDevice())) if isinstance(way, Wrong)]
    with pytest.raises(AgreedError, match="devices cannot add up by ipc: known numbers came out wrong"):
        virtual(RANKS, lambda comm: choose_sums(comm, HostDevice(), "ipc"))


def test_more_ranks_than_a_kernel_takes_find_another_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("neox.gpu.ops.MOST_RANKS", 2)
    with pytest.raises(AgreedError, match="a kernel adds up the parts of 2 ranks, not 3"):
        virtual(RANKS, lambda comm: choose_sums(comm, HostDevice(), "ipc"))


def test_names_are_those_of_hosts_and_devices():
    assert split_way(None) == (None, None)
    assert split_way("allgather", "reference") == ("allgather", "host")
    assert split_way("window") == ("window", "host")
    assert split_way("ipc", "gpu") == (None, "ipc")
    for name, backend in (("ipc", "reference"), ("pigeon", None)):
        with pytest.raises(InputError, match=f"not '{name}'"):
            split_way(name, backend)


def test_a_sum_that_failed_on_the_device_ends_the_pass():
    """As when a rank does not come: what is there is NaN, and nobody takes it for logits."""

    class Failed(HostSums):
        def check(self) -> None:
            raise RuntimeError("rank 1 of 2 did not come to a sum")

    alone = Alone()
    shard = device_shard(drawn(CONFIG, 1, "float32"), alone, Failed(alone), HostDevice(), "float32")
    with pytest.raises(RuntimeError, match="did not come"):
        forward(shard, [[1, 2, 3]])
    with pytest.raises(RuntimeError, match="did not come"):
        device_decoder(shard).start([[1, 2, 3]], 5)


# Memory of other processes.


def test_memory_that_is_shared_is_zero_and_the_same_under_both_addresses():
    device = HostDevice()
    own, handle = device.share(64)
    other = device.attach(handle, 64)
    assert own.address != other.address
    assert not own.get().any()
    other[8:16].set(np.arange(8, dtype=np.uint8))
    assert own.get()[8:16].tolist() == list(range(8))


def test_what_is_no_memory_of_ours_is_not_opened(tmp_path):
    other = tmp_path / "other"
    other.symlink_to(__file__)
    for name in (str(other), "/proc/self/fd/999999"):
        with pytest.raises(InputError, match="memory of another process cannot be opened"):
            HostDevice().attach(name.encode(), 64)
    assert SharedMemory(8).size == 8
