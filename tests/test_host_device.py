"""The host device finds what it promises to find: each fault, in a small kernel made for it, by thread and line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from devices import SCHEDULES, host
from hypothesis import given
from hypothesis import strategies as st

from neox.gpu.device import Array, HostDevice
from neox.gpu.host.build import build
from neox.gpu.host.module import KernelError
from neox.gpu.host.sanitize import environment
from neox.gpu.source import KERNELS, Source
from neox.reference.errors import InputError

TESTS = Path(__file__).resolve().parent
F32, I32 = np.float32, np.int32


def sources(folder: Path, file: str) -> Source:
    """A .cu file of the tests, which may include the kernels' headers, with all its kernels."""
    for path in (*KERNELS.glob("*.cuh"), TESTS / file):
        (folder / path.name).write_text(path.read_text())
    text = (TESTS / file).read_text()
    plain = re.findall(r'extern "C" __global__ void (\w+)\(', text)
    flags = re.findall(r"template <bool \w+> __global__ void (\w+)\(", text)
    types = re.findall(r"template <class T> __global__ void (\w+)\(", text)
    both = re.findall(r"template <class T, bool \w+> __global__ void (\w+)\(", text)
    truths, halves = ("true", "false"), ("__half", "__nv_bfloat16")
    flagged = [f"{name}<{flag}>" for name in flags for flag in truths]
    typed = [f"{name}<{T}>" for name in types for T in halves]
    doubly = [f"{name}<{T}, {flag}>" for name in both for T in halves for flag in truths]
    return Source(file, (*plain, *flagged, *typed, *doubly), folder)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return sources(tmp_path_factory.mktemp("kernels"), "faulty.cu")


def numbers(device: HostDevice, n: int = 64) -> Array:
    return device.array(np.arange(1, n + 1, dtype=F32))


def line_of(kernel: str) -> int:
    lines = (TESTS / "faulty.cu").read_text().splitlines()
    return next(i for i, line in enumerate(lines, start=1) if line.endswith(f"// AT {kernel}"))


def refused(faulty: Source, kernel: str, arguments: tuple, block: int = 32, shared: int = 0, **options: str) -> str:
    """Launches a kernel that must fail; what it said."""
    device = host(**options)
    arrays = tuple(numbers(device, a) if isinstance(a, int) else a for a in arguments)  # a plain int asks for an array
    with pytest.raises(KernelError) as caught:
        device.launch(faulty, kernel, 2, block, arrays, shared)
    return str(caught.value)


# Each: kernel, arguments (an int is an array of so many floats), what the message says, the thread it names.
FAULTS = [
    ("read_past_the_end", (32, 32, I32(1)), "read of memory that is not the kernel's, 0 byte(s) after the end of", 31),
    ("write_past_the_end", (32, I32(3)), "write to memory that is not the kernel's, 0 byte(s) after the end of", 29),
    ("null_pointer", (None, 32), "null pointer", 0),
    ("past_static_shared", (32,), "index 32 is outside the array of type 'float [32]'", 31),
    ("past_local", (32, I32(1)), "index 8 is outside the array of type 'float [8]'", 7),
    ("misaligned", (32, I32(1)), "misaligned access to 'struct float4', whose address must be a multiple of 16", 0),
    ("deep_recursion", (32, I32(1)), "stack overflow", 0),
    ("divergent_barrier", (), "divergent __syncthreads", 16),
    ("early_end", (I32(16),), "ended while 16 others wait in __syncthreads", 16),
    ("endless_spin", (np.zeros(1, F32),), "spins for ever", None),
    ("mask_without_caller", (32,), "the calling lane 16 is not in the mask 0000ffff", 16),
    ("mask_of_divergent_lanes", (32,), "ended while lanes 0000ffff wait for it in __shfl_xor_sync", 16),
    ("overlapping_masks", (32,), "mask ffff0000 overlaps mask 0001ffff", 16),
    ("two_collectives", (32,), "divergent warp: this lane is in __any_sync", 16),
    ("failed_assert", (I32(20),), "assert(threadIdx.x < n) failed", 20),
]


@pytest.mark.parametrize(("kernel", "arguments", "message", "thread"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_fault_is_told_with_its_thread_and_line(faulty, kernel, arguments, message, thread) -> None:
    arguments = tuple(host().array(a) if isinstance(a, np.ndarray) else a for a in arguments)
    said = refused(faulty, kernel, arguments)
    assert message in said
    assert said.startswith(f"{kernel} <<<(2, 1, 1), (32, 1, 1), 0>>>: block (0,0,0) thread (")
    assert thread is None or f"thread ({thread},0,0)" in said
    assert f"faulty.cu:{line_of(kernel)}" in said


def test_division_by_zero_is_told(faulty) -> None:
    device = host()
    with pytest.raises(KernelError, match=f"division by zero .* at faulty.cu:{line_of('divide')}"):
        device.launch(faulty, "divide", 1, 32, (device.empty(32, I32), I32(0)))


def test_mask_of_lanes_that_do_not_exist_is_told(faulty) -> None:
    said = refused(faulty, "mask_of_absent_lanes", (64,), block=40)
    assert "thread (32,0,0)" in said
    assert "lanes that do not exist; the warp has 000000ff" in said


def test_mask_of_lanes_that_have_ended_is_told(faulty) -> None:
    said = refused(faulty, "mask_of_ended_lanes", (64,), order="reverse")
    assert "names lanes that have ended: ffff0000" in said


def test_deadlock_says_who_waits_where(faulty) -> None:
    said = refused(faulty, "deadlock", ())
    line = line_of("deadlock")
    assert f"31 thread(s), the first (0,0,0), wait in __shfl_sync at faulty.cu:{line + 1}" in said
    assert f"1 thread(s), the first (5,0,0), wait in __syncthreads at faulty.cu:{line}" in said


def test_access_past_dynamic_shared_memory_is_told(faulty) -> None:
    said = refused(faulty, "past_dynamic_shared", (32,), shared=128)
    place = f"faulty.cu:{line_of('past_dynamic_shared')}"
    assert f"thread (31,0,0): access beyond the end of the dynamic shared memory at {place}" in said


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_every_mode_sees_misaligned_and_out_of_bounds(faulty, mode) -> None:
    assert "misaligned" in refused(faulty, "misaligned", (32, I32(1)), mode=mode)
    assert "after the end of an array" in refused(faulty, "read_past_the_end", (32, 32, I32(1)), mode=mode)


@pytest.mark.parametrize(("n", "by"), [(33, 2), (35, 4)])
def test_a_write_into_the_rounding_after_an_array_is_told(faulty, n, by) -> None:
    said = refused(faulty, "write_past_the_end", (n, I32(by)))
    assert f"some thread wrote 1 byte(s) after an array of {4 * n} bytes" in said


def test_a_write_before_an_array_is_told(faulty) -> None:
    said = refused(faulty, "write_before_the_start", (32,))
    assert "some thread wrote 1 byte(s) before an array of 128 bytes" in said


def test_the_device_works_on_after_a_fault(faulty) -> None:
    device = host()
    refused(faulty, "misaligned", (32, I32(1)))
    refused(faulty, "deadlock", ())
    x = numbers(device, 32)
    device.launch(faulty, "scale", 1, 32, (x, F32(2)))
    assert (x.get() == 2 * np.arange(1, 33)).all()


def test_what_was_never_written_is_nan(faulty) -> None:
    device = host()
    assert np.isnan(device.empty((3, 5), F32).get()).all()
    of_a_template = "uninitialized_shared_of_a_template<__half>"
    for kernel, shared_bytes in (
        ("uninitialized_shared", 0),
        (of_a_template, 0),
        ("uninitialized_dynamic_shared", 128),
    ):
        y = device.zeros(32, F32)
        for _ in range(2):  # the second launch must not find what the first left behind
            device.launch(faulty, kernel, 2, 32, (y,), shared_bytes)
            assert np.isnan(y.get()).tolist() == [i == 3 for i in range(32)]


def outcomes(faulty: Source, kernel: str, x: np.ndarray, expected: np.ndarray, threads: int = 64) -> list[bool]:
    """Whether each schedule gives the expected result."""
    results = []
    for order, seed in SCHEDULES:
        device = host(order, seed)
        y = device.empty(expected.shape, F32)
        device.launch(faulty, kernel, 1, threads, (device.array(x), y))
        results.append(np.array_equal(y.get(), expected))
    return results


BARRIERS = [
    ("reversed", np.arange(64, dtype=F32), lambda x: x[::-1], 64),
    ("warp_reversed", np.arange(64, dtype=F32), lambda x: x.reshape(2, 32)[:, ::-1].reshape(-1), 64),
    ("two_sums", np.arange(128, dtype=F32), lambda x: np.repeat(x.reshape(2, 64).sum(1), 64), 64),
    ("async_copy", np.arange(128, dtype=F32), lambda x: x[::-1], 32),
    ("async_overwrite", np.arange(256, dtype=F32), lambda x: x[:128], 32),
    ("async_refill", np.arange(768, dtype=F32), lambda x: x.reshape(3, 256)[:, ::-1].reshape(-1), 64),
]


@pytest.mark.parametrize(("kernel", "x", "compute", "threads"), BARRIERS, ids=[b[0] for b in BARRIERS])
def test_a_missing_barrier_is_seen_by_forward_or_reverse_order(faulty, kernel, x, compute, threads) -> None:
    assert all(outcomes(faulty, f"{kernel}<true>", x, compute(x), threads))
    missing = outcomes(faulty, f"{kernel}<false>", x, compute(x), threads)
    assert not all(missing[:2])


# What runs under a sanitizer, in a process of its own; the status says how it ended.
PROGRAM = """
import sys
import numpy as np
from pathlib import Path
from neox.gpu.device import HostDevice
from neox.gpu.source import Source
mode, folder, kernel, size, shared, threads = sys.argv[1:]
device = HostDevice(mode=mode)
source = Source("faulty.cu", tuple(Path(folder, "kernels").read_text().split("|")), Path(folder))
arrays = [device.array(np.zeros(768, np.float32)) for _ in range(int(size))]
device.launch(source, kernel, 2, int(threads), arrays, int(shared))
print("survived")
"""


def sanitized(
    faulty: Source, mode: str, kernel: str, arrays: int, shared: int = 0, threads: int = 64
) -> tuple[int, str]:
    """Exit status and output of a process that launches one kernel."""
    (faulty.folder / "kernels").write_text("|".join(faulty.kernels))
    arguments = [mode, str(faulty.folder), kernel, str(arrays), str(shared), str(threads)]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    result = subprocess.run(command, env=environment(mode), capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("kernel", ["reversed", "two_sums", "async_refill", "warp_reversed"])
def test_a_missing_barrier_is_a_race_to_thread_sanitizer(faulty, kernel) -> None:
    status, text = sanitized(faulty, "thread", f"{kernel}<true>", 2)
    assert (status, "ThreadSanitizer" in text) == (0, False), text
    status, text = sanitized(faulty, "thread", f"{kernel}<false>", 2)
    assert status == 66, text
    assert all(part in text for part in ("data race", f"{kernel}<false>", "faulty.cu:")), text


@pytest.mark.parametrize(("kernel", "shared"), [("past_static_shared", 0), ("past_dynamic_shared", 128)])
def test_address_sanitizer_sees_an_overrun_of_shared_memory(faulty, kernel, shared) -> None:
    status, text = sanitized(faulty, "address", "reversed<true>", 2)
    assert (status, "survived" in text) == (0, True), text
    status, text = sanitized(faulty, "address", kernel, 1, shared, threads=32)
    assert status != 0, text
    assert all(part in text for part in ("AddressSanitizer", f"faulty.cu:{line_of(kernel)}")), text


def test_a_sanitizer_that_is_not_loaded_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"python -m neox.gpu.host.sanitize thread PROGRAM"):
        HostDevice(mode="thread")


# What it must compute, in every schedule.


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_each_thread_of_each_block_runs_once(faulty, order, seed) -> None:
    device = host(order, seed)
    grid, block = (3, 2, 5), (4, 3, 2)
    y = device.zeros((30, 24), I32)
    device.launch(faulty, "where_am_i", grid, block, (y,))
    assert np.array_equal(y.get(), 1 + 1000 * np.arange(30)[:, None] + np.arange(24))


def test_schedules_are_forward_reverse_and_drawn(faulty) -> None:
    orders = []
    for order, seed in (*SCHEDULES, SCHEDULES[-1]):
        device = host(order, seed)
        y = device.empty(5 * 64, I32)
        device.launch(faulty, "arrivals", 5, 64, (device.zeros(1, I32), y))
        orders.append(y.get().tolist())
    assert orders[0] == list(range(320))
    assert orders[1] == orders[0][::-1]
    assert len({tuple(order) for order in orders}) == len(SCHEDULES)
    assert orders[-1] == orders[-2]


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_votes(faulty, order, seed) -> None:
    device = host(order, seed)
    for x in (np.arange(64) % 3 == 1, np.ones(64, bool), np.zeros(64, bool)):
        y = device.empty((6, 2, 32), np.int32)
        device.launch(faulty, "votes", 1, 64, (device.array(x.astype(I32)), y))
        warps = x.reshape(2, 32)
        ballots = (warps * 2 ** np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32).view(I32)
        block_wide = [np.full((2, 32), v) for v in (x.sum(), x.all(), x.any())]
        by_warp = [np.repeat(v, 32).reshape(2, 32) for v in (ballots, warps.any(1), warps.all(1))]
        assert np.array_equal(y.get(), [*block_wide, *by_warp])


def check_shuffles(faulty: Source, by: int, schedule: tuple[str, int]) -> None:
    device = host(*schedule)
    x = np.arange(100, 164, dtype=I32)
    y = device.empty((4, 4, 16), I32)
    device.launch(faulty, "shuffles", 1, 64, (device.array(x), y, I32(by)))
    lane = np.arange(16)
    up, down = np.where(lane >= by, lane - by, lane), np.where(lane + by < 16, lane + by, lane)
    segments = x.reshape(4, 16)
    assert np.array_equal(y.get(), [segments[:, source] for source in (np.full(16, by), up, down, lane ^ by)])


@given(st.integers(0, 15), st.sampled_from(SCHEDULES))
def test_shuffles(faulty, by, schedule) -> None:
    check_shuffles(faulty, by, schedule)


def test_a_shuffle_from_a_lane_outside_the_mask_gives_nan(faulty) -> None:
    device = host()
    y = device.zeros(32, F32)
    device.launch(faulty, "shuffle_from_outside", 1, 32, (y,))
    assert np.isnan(y.get()[:16]).all()


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_a_spin_loop_sees_what_a_later_thread_writes(faulty, order, seed) -> None:
    device = host(order, seed)
    y = device.empty(32, I32)
    device.launch(faulty, "spin_until_set", 1, 32, (device.zeros(1, I32), y))
    assert y.get()[0] == y.get()[31] == 7


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_the_last_block_sees_what_all_blocks_wrote(faulty, order, seed) -> None:
    device = host(order, seed)
    x = np.arange(160, dtype=F32)
    y = device.empty(1, F32)
    partial, finished = device.empty(5, F32), device.zeros(1, np.uint32)
    device.launch(faulty, "last_block_sum", 5, 32, (device.array(x), partial, finished, y))
    assert y.get() == x.sum()


def test_launches_leak_no_mappings(faulty) -> None:
    device = host()
    x = numbers(device, 32)
    device.launch(faulty, "uninitialized_dynamic_shared", 1, 32, (x,), 128)
    before = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(300):
        device.launch(faulty, "uninitialized_dynamic_shared", 1, 32, (numbers(device, 32),), 128)
    assert len(Path("/proc/self/maps").read_text().splitlines()) < before + 20


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_round_as_numpy_does(faulty, dtype) -> None:
    device = host()
    T = {"float16": "__half", "bfloat16": "__nv_bfloat16"}[dtype]
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    kind = device.empty(1, dtype).dtype
    values = every.view(kind).astype(F32)
    rng = np.random.default_rng(0)
    near = (values.view(np.uint32) + rng.integers(-(2**13), 2**13, 2**16).astype(np.uint32)).view(F32)
    ties = (values.view(np.uint32) + np.uint32(0x1000 if dtype == "float16" else 0x8000)).view(F32)
    for x in (values, near, ties):
        y, z = device.empty(x.size, dtype), device.empty(x.size, F32)
        device.launch(faulty, f"round_trip<{T}>", 256, 256, (device.array(x), y, z))
        with np.errstate(over="ignore", invalid="ignore"):
            expected = x.astype(kind)
        nan = np.isnan(expected.astype(F32))
        assert np.array_equal(np.isnan(z.get()), nan)
        assert np.array_equal(y.get().view(np.uint16)[~nan], expected.view(np.uint16)[~nan])
        assert np.array_equal(z.get()[~nan], expected.astype(F32)[~nan])


def test_fused_multiply_add_rounds_once(faulty) -> None:
    device = host()
    rng = np.random.default_rng(1)
    a, b, c = ((size * rng.normal(size=2**16)).astype(np.float16) for size in (1, 1, 64))
    y = device.empty(2**16, np.float16)
    device.launch(faulty, "fused<__half>", 256, 256, [device.array(v) for v in (a, b, c)] + [y])
    wide = a.astype(np.float64) * b + c  # exact: 22 bits, and 11 that are not too far from them
    assert np.array_equal(y.get(), wide.astype(np.float16))


# Building.


def test_the_cache_knows_every_text_it_was_made_from(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NEOX_CACHE", str(tmp_path))
    text = 'extern "C" __global__ void one(int* y) { *y = 1; }'
    first = build(text, ("one",), "k", "fast")
    assert build(text, ("one",), "k", "fast") == first
    others = {build(text.replace("= 1", "= 2"), ("one",), "k", "fast"), build(text, ("one",), "k", "debug")}
    assert len(others | {first}) == 3
    assert sorted(p.suffix for p in (tmp_path / "host").iterdir()) == [".so"] * 3  # nothing half-made is left


def test_a_kernel_that_does_not_compile_says_so_with_its_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NEOX_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"k.cu:3.*error"):
        build('#line 1 "k.cu"\n\n\nextern "C" __global__ void one(int* y) { *y = undeclared; }', ("one",), "k", "fast")
    assert list((tmp_path / "host").iterdir()) == []


def test_the_portable_switch_works_too(faulty) -> None:
    device = HostDevice(defines=("HOST_UCONTEXT",))
    x = np.arange(64, dtype=F32)
    y = device.empty(64, F32)
    device.launch(faulty, "reversed<true>", 3, 64, (device.array(x), y))
    assert np.array_equal(y.get(), x[::-1])
