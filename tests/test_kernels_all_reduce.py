"""The sum over ranks on their devices: its bits, its protocol under drawn schedules, and that nobody waits for ever.

All ranks are threads of one launch here: a warp plays a block, so that any of them can be stopped anywhere while the
others go on. What separates the launches of one rank is that which a stream guarantees, and no more.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from devices import all_devices, devices, host
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from neox.distributed.comm import sum_in_rank_order
from neox.gpu import ops
from neox.gpu.device import Array, Device, HostDevice
from neox.gpu.host.module import KernelError, Program
from neox.gpu.host.sanitize import environment
from neox.gpu.source import KERNELS, Source

PATIENCE = 20000  # looks: more than any schedule needs

BEFORE = dedent(
    """
    struct Virtual { unsigned x, y, z; };
    static unsigned blocks_of_a_rank[1024], launched[1024];
    #undef threadIdx
    #undef blockIdx
    #undef blockDim
    #undef gridDim
    #define threadIdx (Virtual{host::running->index.x % 32u, 0u, 0u})
    #define blockIdx (Virtual{host::running->index.x / 32u % blocks_of_a_rank[host::running->index.x], 0u, 0u})
    #define blockDim (Virtual{32u, 1u, 1u})
    #define gridDim (Virtual{launched[host::running->index.x], 1u, 1u})
    #define __syncthreads() __syncwarp()
    #define __syncthreads_or(p) (__syncwarp(), __any_sync(0xffffffffu, p))
    """
)
AFTER = dedent(
    """
    // x: float (turns,RANKS,n). ended: blocks of each rank that are done; a rank's next launch begins when all are.
    template <int RANKS> __global__ void ranks(const unsigned long long* mailboxes, float* x, unsigned* ended, int n,
                                               int capacity, int turns, int blocks, int absent, unsigned patience) {
        blocks_of_a_rank[host::running->index.x] = blocks;
        const int rank = host::running->index.x / 32 / blocks;
        if (rank == absent) return;
        unsigned expected = 0;
        for (int turn = 0; turn < turns; turn++) {
            const unsigned grid = 1 + turn * 5 % blocks;
            launched[host::running->index.x] = grid;
            // A block begins when a card finds room for it.
            int late = __shfl_sync(0xffffffffu, host::next_random() % 2 ? 0 : 100, 0);
            for (; late > 0; late--) host::let_others_run();
            if (blockIdx.x < grid) {
                all_reduce<RANKS>(mailboxes, x + (static_cast<long long>(turn) * RANKS + rank) * n, n, rank, capacity,
                                  patience);
                __syncwarp();
                if (threadIdx.x == 0) atomicAdd(ended + rank, 1u);
            }
            expected += grid;
            while (__atomic_load_n(ended + rank, __ATOMIC_ACQUIRE) < expected) host::let_others_run();
        }
    }
    """
)


@dataclass(frozen=True)
class Together:
    """The kernel's own text, run by all ranks at once."""

    inner: Source
    kernels: tuple[str, ...]
    file: str = "all_reduce.cu"

    @property
    def text(self) -> str:
        return BEFORE + self.inner.text + AFTER


def wild(rng: np.random.Generator, shape: Sequence[int]) -> NDArray[np.float32]:
    """Numbers of very different sizes: a sum of them tells in which order they were added."""
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 5, shape)).astype(np.float32)


def mailboxes(device: Device, ranks: int, capacity: int, sums: int = 0) -> tuple[list[Array], Array]:
    """One for each rank, and the array of their addresses. Only what must be zero is; slots are NaN.

    sums: that are taken to have been, by blocks of which none takes part now.
    """
    boxes = [device.empty(ops.mailbox_bytes(capacity) // 4, np.uint32) for _ in range(ranks)]
    for box in boxes:
        words = ops.MAILBOX_BYTES // 4
        box[:words].set(np.array([sums, *[0] * (words - 1)], np.uint32))
    return boxes, device.array(np.array([box.address for box in boxes], np.uint64))


def run_together(
    device: HostDevice,
    ranks: int,
    n: int,
    turns: int,
    blocks: int,
    seed: int,
    absent: int = -1,
    patience: int = PATIENCE,
    sums: int = 0,
) -> tuple[NDArray, NDArray, list[Array]]:
    """What each rank gave and got in each turn, (turns,P,n), and the mailboxes."""
    given_parts = wild(np.random.default_rng(seed), (turns, ranks, n))
    capacity = n + 4 * (seed % 3)
    boxes, addresses = mailboxes(device, ranks, capacity, sums)
    x, ended = device.array(given_parts), device.zeros(ranks, np.uint32)
    name = f"ranks<{ranks}>"
    sizes = (n, capacity, turns, blocks, absent)
    arguments = (addresses, x, ended, *map(np.int32, sizes), np.uint32(patience))
    device.launch(Together(ops.ALL_REDUCE, (name,)), name, 1, 32 * ranks * blocks, arguments)  # type: ignore[arg-type]
    return given_parts, x.get(), boxes


def check_all_reduce(
    device: HostDevice, ranks: int, n: int, turns: int, blocks: int, seed: int = 0, before: int = 0
) -> None:
    parts, sums, boxes = run_together(device, ranks, n, turns, blocks, seed, sums=before)
    for turn in range(turns):
        expected = sum_in_rank_order(list(parts[turn]))
        for rank in range(ranks):
            assert np.array_equal(sums[turn, rank], expected), f"turn {turn}, rank {rank}"
    for box in boxes:
        assert box[:3].get().tolist() == [(before + turns) % 2**32, 0, 0]


def check_impatient(device: HostDevice, ranks: int, patience: int, seed: int = 0) -> None:
    """Where ranks give up too early, each number is right or NaN, and who got NaN can say for whom it waited."""
    parts, sums, boxes = run_together(device, ranks, 132, 8, 2, seed, patience=patience)
    expected = np.stack([sum_in_rank_order(list(turn)) for turn in parts])[:, None]
    assert ((sums == expected) | np.isnan(sums)).all()
    for rank, box in enumerate(boxes):
        assert np.isnan(sums[:, rank]).any() == (box[2].get() != 0)
        given_up = np.isnan(sums[:, rank]).any(axis=-1)
        assert given_up[given_up.argmax() :].all() or not given_up.any()


def check_absent(device: HostDevice, ranks: int, absent: int, seed: int = 0) -> None:
    """A rank that does not come leaves NaN, its name, and no further waiting."""
    turns = 3
    _, sums, boxes = run_together(device, ranks, 40, turns, 2, seed, absent, patience=300)
    for rank in set(range(ranks)) - {absent}:
        assert np.isnan(sums[:, rank]).all()
        assert boxes[rank][:3].get().tolist() == [turns, 0, 1 + absent]


SHAPES = st.sampled_from([(1, 4, 3), (2, 132, 2), (2, 500, 4), (3, 364, 3), (3, 68, 3), (5, 256, 2), (8, 300, 4)])


@settings(max_examples=40)
@given(shape=SHAPES, schedule=st.integers(0, 10**6), seed=st.integers(0, 10**6))
def test_all_ranks_get_the_bits_of_the_sum_in_their_order(shape, schedule, seed) -> None:
    ranks, n, blocks = shape
    check_all_reduce(host("seeded", schedule), ranks, n, 12, blocks, seed)


@pytest.mark.parametrize("order", ["forward", "reverse", "seeded"])
def test_hundreds_of_sums_follow_one_another(order) -> None:
    check_all_reduce(host(order), 3, 204, 250, 2)


@pytest.mark.parametrize(("ranks", "absent"), [(2, 0), (2, 1), (3, 1), (8, 7)])
@pytest.mark.parametrize("order", ["forward", "seeded"])
def test_a_rank_that_does_not_come_is_named_and_nobody_waits_for_ever(order, ranks, absent) -> None:
    check_absent(host(order), ranks, absent)


@settings(max_examples=100)
@given(ranks=st.sampled_from([2, 3, 5]), schedule=st.integers(0, 10**6), patience=st.integers(0, 80))
def test_whoever_gives_up_spoils_no_sum_of_the_patient(ranks, schedule, patience) -> None:
    check_impatient(host("seeded", schedule), ranks, patience, schedule)


@pytest.mark.parametrize("before", [2**31 - 3, 2**31 + 5, 2**32 - 3 * 2, 2**32 - 12])
def test_flags_of_long_ago_are_not_taken_for_new_ones(before) -> None:
    for seed in range(4):
        check_all_reduce(host("seeded", seed), 3, 364, 3, 3, seed, before)


def test_counts_wrap_around() -> None:
    """After 2^32 sums the flags begin again; here they begin shortly before."""
    device, parts = host(), [np.full(8, value, np.float32) for value in range(6)]
    (box,), addresses = mailboxes(device, 1, 8)
    box[:1].set(np.array([2**32 - 3], np.uint32))
    box[4 : ops.MAILBOX_BYTES // 4].set(np.full(ops.MAILBOX_BYTES // 4 - 4, 2**32 - 3, np.uint32))
    for part in parts:
        x = device.array(part)
        ops.all_reduce(addresses, 0, 8, x, 10)
        assert np.array_equal(x.get(), part)
    assert box[:3].get().tolist() == [3, 0, 0]


def check_alone(device: Device, n: int, blocks: int) -> None:
    """The launcher and the kernel as they are, with one rank."""
    parts = wild(np.random.default_rng(n), (3, n))
    (box,), addresses = mailboxes(device, 1, n)
    for turn, part in enumerate(parts, start=1):
        x = device.array(part)
        ops.all_reduce(addresses, 0, n, x, PATIENCE, blocks=blocks)
        assert np.array_equal(x.get(), part)
        assert box[:3].get().tolist() == [turn, 0, 0]


@given(devices(), st.integers(1, 700), st.sampled_from([1, 3, 64]))
def test_one_rank_gets_what_it_gave(device, pieces, blocks) -> None:
    check_alone(device, 4 * pieces, blocks)


def test_a_captured_sum_goes_on_counting() -> None:
    device = all_devices()[0]
    (box,), addresses = mailboxes(device, 1, 8)
    x = device.array(np.arange(8, dtype=np.float32))

    def add_up() -> None:
        ops.all_reduce(addresses, 0, 8, x, 10)

    add_up()
    graph = device.capture(add_up)
    for _ in range(3):
        graph.replay()
    assert box[:1].get() == 4


# Ranks that share one device: programs at once. The launcher and the kernel as they are.

LONG = 1 << 24  # looks: ranks begin when there is a processor for them


@dataclass(frozen=True)
class Ranks:
    """Each adds up two arrays, one after the other."""

    parts: list[tuple[Array, Array]]
    addresses: Array
    boxes: list[Array]

    @property
    def device(self) -> Device:
        return self.addresses.device

    def add_up(self, patience: int, absent: int = -1) -> None:
        present = [rank for rank in range(len(self.parts)) if rank != absent]
        self.device.at_once([partial(self._rank, rank, patience) for rank in present])

    def _rank(self, rank: int, patience: int) -> None:
        for part in self.parts[rank]:
            ops.all_reduce(self.addresses, rank, 3000, part, patience)

    def set(self, seed: int) -> list[NDArray]:
        """New numbers, and what their sums must be."""
        rng, sums = np.random.default_rng(seed), []
        for i in range(2):
            numbers = [wild(rng, part[i].shape) for part in self.parts]
            for part, values in zip(self.parts, numbers, strict=True):
                part[i].set(values)
            sums.append(sum_in_rank_order(numbers))
        return sums

    def check(self, seed: int, run: Callable[[], None]) -> None:
        expected = self.set(seed)
        run()
        for part in self.parts:
            assert all(np.array_equal(a.get(), b) for a, b in zip(part, expected, strict=True))


def ranks_of(device: Device, ranks: int) -> Ranks:
    boxes, addresses = mailboxes(device, ranks, 3000)
    parts = [(device.empty(2508, np.float32), device.empty(96, np.float32)) for _ in range(ranks)]
    return Ranks(parts, addresses, boxes)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_on_one_device_add_up_and_so_does_a_graph(ranks) -> None:
    for device in all_devices()[-2:]:
        group = ranks_of(device, ranks)
        for seed in range(2):
            group.check(seed, partial(group.add_up, LONG))
        graph = device.capture(partial(group.add_up, LONG))
        for seed in range(2, 6):
            group.check(seed, graph.replay)
        assert [box[:3].get().tolist() for box in group.boxes] == [[12, 0, 0]] * ranks


def test_ranks_one_after_another_are_noticed(monkeypatch) -> None:
    def in_turn(programs: Sequence[Program]) -> None:
        for launch in chain(*programs):
            launch()

    monkeypatch.setattr("neox.gpu.device.at_once", in_turn)
    group = ranks_of(host(), 2)
    with pytest.raises(AssertionError):
        group.check(0, partial(group.add_up, 1000))


def test_a_rank_that_is_missing_on_the_device_is_named() -> None:
    group = ranks_of(all_devices()[0], 3)
    group.set(1)
    group.add_up(1 << 19, absent=1)  # long enough for the others to begin
    assert [box[2].get() for box in group.boxes] == [2, 0, 2]
    assert all(np.isnan(part.get()).all() for rank in (0, 2) for part in group.parts[rank])


def test_what_cannot_be_added_up_is_refused() -> None:
    device = all_devices()[0]
    _, addresses = mailboxes(device, 2, 8)
    x = device.empty(8, "float32")
    for rank, capacity, array, said in [
        (2, 8, x, "rank 2 of 2"),
        (0, 4, x, "up to 4"),
        (0, 8, x[:6], "whole pieces"),
        (0, 8, device.empty(9, "float32")[1:], "multiple of 16 bytes"),
        (0, 8, device.empty(8, "float16"), "must be"),
    ]:
        with pytest.raises(ValueError, match=said):
            ops.all_reduce(addresses, rank, capacity, array, 1)
    with pytest.raises(ValueError, match="there can be 8"):
        ops.all_reduce(mailboxes(device, 9, 8)[1], 0, 8, x, 1)


# What all ranks have sent.


def check_sum_parts(device: Device, ranks: int, n: int) -> None:
    parts = wild(np.random.default_rng(n), (ranks, n))
    x = device.empty(n, "float32")
    ops.sum_parts(device.array(parts), x)
    assert np.array_equal(x.get(), sum_in_rank_order(list(parts)))


@given(devices(), st.integers(1, 9), st.integers(1, 600))
def test_parts_are_added_up_in_their_order(device, ranks, n) -> None:
    check_sum_parts(device, ranks, n)


# Wrong protocols.

SCHEDULES = [("forward", 0), ("reverse", 0), *(("seeded", seed) for seed in range(12))]
MUTANTS = [
    ("turn % 2", "0"),  # one slot
    ("turn % 2", "turn % 3 % 2"),
    ("threadIdx.x < RANKS", "threadIdx.x < RANKS - 1"),
    ("gridDim.x * blockDim.x,", "blockDim.x,"),  # one block adds up what another has not announced
    ("capacity / 4)", "capacity / 8)"),
    ("float4 sum = parts[0];", "float4 sum = parts[rank];"),
    ("sum = add(sum, parts[r]);", "sum = add(sum, parts[RANKS - r]);"),
    ("sum = add(sum, parts[r]);", "sum = add(parts[r], sum), sum.x = r == 1 ? parts[0].x : sum.x;"),
    ("__syncthreads();  // the whole", "// the whole"),
    ("__syncthreads_or(missed);", "missed;"),
    ("&peer->flags[blockIdx.x][rank], turn", "&peer->flags[blockIdx.x][rank], turn + 1"),
    ("&peer->flags[blockIdx.x][rank], turn", "&peer->flags[0][rank], turn"),
    ("&own->flags[blockIdx.x][threadIdx.x]", "&own->flags[0][threadIdx.x]"),
    ("&own->flags[blockIdx.x][threadIdx.x]", "&own->flags[blockIdx.x][rank]"),
    ("load_acquire_system(flag) - turn > 1", "load_acquire_system(flag) - turn + 1 > 2"),
    ("load_acquire_system(flag) - turn > 1", "load_acquire_system(flag) - turn > 0"),  # another may be ahead
    ("load_acquire_system(flag) - turn > 1", "static_cast<int>(load_acquire_system(flag) - turn) < 0"),
    ("own->sums = turn", "own->sums = 1"),
    ("atomicInc(&own->arrived, gridDim.x - 1)", "atomicInc(&own->arrived, gridDim.x)"),
    ("i < n / 4; i += stride) slot_of", "i < n / 4 - 1; i += stride) slot_of"),
    ("if (looks == patience) return false;", "if (looks == patience) return true;"),
    ("(1 + threadIdx.x)", "(1 + rank)"),
    ("missing >> 32 != turn;", "missing >> 32 == turn;"),
    ("if (!gone)\n", ""),
    ("if (!gone) store", "store"),
]


def altered(folder: Path, file: str, right: str, wrong: str) -> Source:
    for path in (*KERNELS.glob("*.cuh"), KERNELS / "all_reduce.cu"):
        shutil.copy(path, folder)
    text = (folder / file).read_text()
    assert right in text, "the mutant no longer fits the kernel"
    (folder / file).write_text(text.replace(right, wrong, 1))
    return replace(ops.ALL_REDUCE, folder=folder)


def check_under_every_schedule() -> None:
    for schedule in SCHEDULES:
        check_all_reduce(host(*schedule), 3, 364, 12, 3)  # numbers for every block
        check_absent(host(*schedule), 3, 1)
        for patience in (3, 60):
            check_impatient(host(*schedule), 3, patience, schedule[1])
    check_all_reduce(host(), 3, 364, 3, 3, before=2**31 + 5)


@pytest.mark.wrong_kernels
@pytest.mark.parametrize(("right", "wrong"), MUTANTS)
def test_a_wrong_protocol_is_noticed(right, wrong, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NEOX_CACHE", str(tmp_path))
    monkeypatch.setattr(ops, "ALL_REDUCE", altered(tmp_path, "all_reduce.cu", right, wrong))
    with pytest.raises((AssertionError, KernelError)):
        check_under_every_schedule()


# What orders memory, which no schedule of fibers shows: ThreadSanitizer does.

PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
from devices import host
from neox.gpu import ops
from test_kernels_all_reduce import check_absent, check_all_reduce, check_impatient
if len(sys.argv) > 1:
    ops.ALL_REDUCE = replace(ops.ALL_REDUCE, folder=Path(sys.argv[1]))
for seed in range(4):
    check_all_reduce(host("seeded", seed, "thread"), 3, 204, 4, 2)
    check_impatient(host("seeded", seed, "thread"), 3, 40, seed)
    check_absent(host("seeded", seed, "thread"), 3, 1)
print("all checks pass")
"""


def under_thread_sanitizer(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = environment("thread") | {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], env=env, capture_output=True, text=True)


def test_thread_sanitizer_has_nothing_to_say() -> None:
    done = under_thread_sanitizer()
    assert (done.returncode, done.stdout) == (0, "all checks pass\n"), done.stdout + done.stderr
    assert "Sanitizer" not in done.stderr


@pytest.mark.wrong_kernels
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("ptx.cuh", "value, __ATOMIC_RELEASE", "value, __ATOMIC_RELAXED"),
        ("ptx.cuh", "p, __ATOMIC_ACQUIRE", "p, __ATOMIC_RELAXED"),
        ("all_reduce.cu", "turn % 2", "0"),
        ("all_reduce.cu", "missing = load_system(&own->missing)", "missing = own->missing"),
    ],
)
def test_a_wrong_order_is_a_race(file, right, wrong, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NEOX_CACHE", str(tmp_path))
    altered(tmp_path, file, right, wrong)
    assert "data race" in under_thread_sanitizer(str(tmp_path)).stderr
