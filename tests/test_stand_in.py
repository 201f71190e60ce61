"""The card that is not there: its rules, its names, and that it notices what a wrong CudaDevice would do on a card."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import stand_in_cuda
from devices import all_devices
from gpu_models import SMALL
from hypothesis import given
from hypothesis import strategies as st
from mutants import Mutant
from nvrtc import usage
from stand_in_card import (
    ALIGNMENT,
    CAPTURE_INVALIDATED,
    CAPTURE_UNJOINED,
    CAPTURE_UNSUPPORTED,
    ILLEGAL_ADDRESS,
    INVALID_HANDLE,
    INVALID_VALUE,
    NOT_READY,
    OUT_OF_MEMORY,
    Card,
    Event,
    Memory,
    Refused,
    Stream,
)
from stand_in_cuda import TO_CARD, TO_HOST
from test_driver import headers
from test_gpu_decode import on_device

from neox.gpu import ops
from neox.gpu.decode import CachedDecoder
from neox.gpu.device import CudaDevice, Device
from neox.gpu.source import KERNELS, Source
from neox.reference.errors import InputError

F32, I32 = np.float32, np.int32


def refused(error: int) -> pytest.RaisesExc[Refused]:
    return pytest.RaisesExc(Refused, match=f"^{error}$")


# Memory.


@given(st.lists(st.one_of(st.integers(0, 5 * ALIGNMENT), st.integers(0, 9).map(lambda i: -1 - i)), max_size=30))
def test_what_is_allocated_lies_apart_and_is_nan(asked: list[int]) -> None:
    """A number below zero: one of those before it is given back."""
    memory, living = _memory, list[tuple[int, int]]()
    for size in asked:
        if size < 0:
            if living:
                memory.free(living.pop(-size % len(living))[0])
            continue
        address = memory.allocate(size)
        assert address % ALIGNMENT == 0
        assert all(address >= start + length or address + size <= start for start, length in living)
        assert ctypes.string_at(address, size) == b"\xff" * size
        living.append((address, size))
        for start, length in living:
            assert memory.holds(start, length)
            assert not memory.holds(start, length + 1)
    for start, length in living:
        memory.free(start)
        assert not memory.holds(start, min(length, 1))
    assert memory.used() == 0


_memory = Memory()


def test_memory_ends_and_is_given_back_once() -> None:
    with refused(OUT_OF_MEMORY):
        _memory.allocate(1 << 40)
    address = _memory.allocate(10)
    _memory.free(address)
    with refused(INVALID_VALUE):
        _memory.free(address)


# Streams.


class Log(list[str]):
    def work(self, name: str) -> Callable[[], None]:
        return lambda: self.append(name)


@pytest.fixture
def made() -> tuple[Card, Stream, Stream, Log]:
    """A card, two streams, and what was done."""
    card = Card(_memory)
    first, second = Stream(), Stream()
    card.new(first)
    card.new(second)
    return card, first, second, Log()


def test_nothing_is_done_until_somebody_waits(made) -> None:
    card, first, second, log = made
    card.put(first, log.work("a"))
    mark = card.mark(first)
    card.put(first, log.work("b"))
    card.put(second, log.work("c"))
    assert log == []
    card.reach(mark)
    assert log == ["a"]
    card.finish(second)
    assert log == ["a", "c"]
    card.finish(first)
    assert log == ["a", "c", "b"]


def test_a_stream_that_waits_for_another_makes_it_run_so_far(made) -> None:
    card, first, second, log = made
    card.put(first, log.work("a"))
    card.wait(second, card.mark(first))
    card.put(first, log.work("later"))
    card.put(second, log.work("b"))
    card.finish(second)
    assert log == ["a", "b"]


def test_an_error_stays(made) -> None:
    card, first, second, log = made

    def wrong() -> None:
        raise Refused(ILLEGAL_ADDRESS)

    card.put(first, wrong)
    card.put(first, log.work("after"))
    for what in (partial(card.finish, first), partial(card.put, second, wrong), card.check):
        with refused(ILLEGAL_ADDRESS):
            what()
    assert log == []


def fork(card: Card, first: Stream, second: Stream, log: Log) -> None:
    card.put(first, log.work("a"))
    card.wait(second, card.mark(first))
    card.put(second, log.work("b"))


def test_what_is_captured_is_done_at_each_replay(made) -> None:
    card, first, second, log = made
    card.begin_capture(first)
    fork(*made)
    card.wait(first, card.mark(second))
    card.put(first, log.work("c"))
    graph = card.end_capture(first)
    card.finish(first, second)
    assert log == []
    card.replay(graph, second)
    card.replay(graph, second)
    assert log == []
    card.finish(second)
    assert log == ["a", "b", "c"] * 2


def test_captures_that_cuda_refuses_are_refused(made) -> None:
    card, first, second, log = made
    card.begin_capture(first)
    fork(*made)
    for what in (partial(card.finish, first), partial(card.finish, second), partial(card.reach, card.mark(first))):
        with refused(CAPTURE_UNSUPPORTED):
            what()
    with refused(CAPTURE_INVALIDATED):
        card.begin_capture(first)
    with refused(CAPTURE_INVALIDATED):
        card.end_capture(second)
    early = card.mark(second)
    card.put(second, log.work("after the mark"))
    card.wait(first, early)
    with refused(CAPTURE_UNJOINED):
        card.end_capture(first)
    card.begin_capture(first)
    fork(*made)
    card.wait(first, card.mark(second))
    card.put(second, log.work("after the join"))
    with refused(CAPTURE_UNJOINED):
        card.end_capture(first)
    card.finish(first, second)
    assert log == []


# Functions.


def test_copies_of_pinned_memory_are_late_and_others_are_not() -> None:
    card = stand_in_cuda.card
    there, pinned = card.memory.allocate(4), card.memory.pin(4)
    pageable = np.array([7], I32)
    ctypes.memset(pinned, 1, 4)
    stand_in_cuda.cudaMemcpyAsync(there, pinned, 4, TO_CARD, None)
    ctypes.memset(pinned, 2, 4)
    card.finish(card.stream(None))
    assert ctypes.string_at(there, 4) == b"\2" * 4
    stand_in_cuda.cudaMemcpyAsync(there, pageable.ctypes.data, 4, TO_CARD, None)
    pageable[0] = 8
    stand_in_cuda.cudaMemcpyAsync(pinned, there, 4, TO_HOST, None)
    assert ctypes.string_at(pinned, 4) == b"\2" * 4
    stand_in_cuda.cudaMemcpyAsync(pageable.ctypes.data, there, 4, TO_HOST, None)
    assert pageable[0] == 7
    with refused(INVALID_VALUE):
        stand_in_cuda.cudaMemcpyAsync(there, pageable.ctypes.data, 5, TO_CARD, None)


def test_times_are_not_known_before_they_have_come() -> None:
    card = stand_in_cuda.card
    events = [card.new(Event()) for _ in range(2)]
    milliseconds = ctypes.c_float()
    for event in events:
        stand_in_cuda.cudaEventRecord(event, None)
    elapsed = partial(stand_in_cuda.cudaEventElapsedTime, ctypes.addressof(milliseconds), *events)
    with refused(NOT_READY):
        elapsed()
    stand_in_cuda.cudaEventSynchronize(events[1])
    elapsed()
    assert milliseconds.value > 0


def declared(text: str, name: str) -> str:
    """The parameters of a function of a header, its comments left out."""
    found = re.search(rf"(?:CUDAAPI|CUDARTAPI) {name}\(([^)]*)\)", re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S))
    assert found, f"{name} is not in the header"
    return found[1].strip()


@pytest.mark.parametrize("name", [name for name in stand_in_cuda.functions if not name.startswith("cublas")])
def test_each_function_takes_what_the_header_says(name: str) -> None:
    header = "cuda_runtime_api.h" if name.startswith("cuda") else "cuda.h"
    parameters = declared((headers() / header).read_text(), name)
    types = stand_in_cuda.functions[name].argtypes
    wanted = [] if parameters in ("", "void") else parameters.split(",")
    assert len(types) == len(wanted)
    for parameter, kind in zip(wanted, types, strict=True):
        assert ctypes.sizeof(kind) == size_of(parameter), parameter


HANDLES = r"\*|\[|\b(cudaStream_t|cudaEvent_t|cudaGraph_t|cudaGraphExec_t|CUstream|CUmodule|CUfunction)\b"


def size_of(parameter: str) -> int:
    if re.search(HANDLES, parameter):
        return 8
    if "cudaIpcMemHandle_t" in parameter:
        return 64
    return 8 if "size_t" in parameter or "long long" in parameter else 4


# CudaDevice, whole and wrong.

needs_stand_in = pytest.mark.skipif(
    os.environ.get("NEOX_TEST_DEVICE") != "stand-in", reason="CuPy on a stand-in: NEOX_TEST_DEVICE=stand-in"
)
TEXT = """
#include "common.cuh"
extern "C" __global__ void add(float* x, const float* y, int n) {
    DYNAMIC_SHARED(float, s);
    __shared__ float own[4096];
    int i = threadIdx.x;
    own[4088 + i] = x[i];
    s[i] = y[i];
    if (i < n) x[i] = own[4088 + i] + s[i];
}
"""
SHARED = (40 << 10, 200 << 10, 40 << 10)  # bytes beside the 16 KB of the kernel: more than a block has unasked


def check_arrays(device: Device, add: Callable) -> None:
    x, y = device.array(np.arange(8, dtype=F32)), device.array(np.full((2, 8), 3, F32))
    y[1].set(np.full(8, 5, F32))
    add(x, y[1])
    add(x, y[1])
    assert x.get().tolist() == [i + 10 for i in range(8)]


def check_staging(device: Device, add: Callable) -> None:
    """As weights are loaded: by one piece of pinned memory, over and over."""
    staging, targets = device.staging(32).view(F32), [device.empty(8, F32) for _ in range(3)]
    for i, target in enumerate(targets):
        staging[:] = i
        device.copy_later(target, staging)
        device.wait(device.mark())
    staging[:] = 9
    assert [target.get().tolist() for target in targets] == [[i] * 8 for i in range(3)]


def check_graph(device: Device, add: Callable) -> None:
    x, y, z = (device.array(np.full(8, value, F32)) for value in (1, 2, 3))

    def work() -> None:
        add(x, y)
        device.at_once([lambda: add(y, x), lambda: add(z, x)])
        add(x, z)

    work()
    device.capture(work).replay()
    assert [array.get()[0] for array in (x, y, z)] == [34, 19, 20]


def check_time(device: Device, add: Callable) -> None:
    x = device.array(np.ones(8, F32))
    start = device.mark()
    add(x, x)
    assert device.seconds(start, device.mark()) > 0


def check_positions(device: Device, add: Callable) -> None:
    source, target = device.array(np.arange(24, dtype=F32).reshape(2, 4, 3)), device.zeros((2, 5, 3), F32)
    device.copy_positions(source, target, 1, 3)
    assert np.array_equal(target.get()[:, 1:3], source.get()[:, 1:3])
    assert not target.get()[:, [0, 3, 4]].any()


def check_products(device: Device, add: Callable) -> None:
    x, weight = device.array(np.ones((2, 8), np.float16)), device.array(np.full((3, 8), 2, np.float16))
    out = device.zeros((2, 3), F32)
    device.matmul(x, weight, out)
    assert (out.get() == 16).all()


def check_early(device: Device, add: Callable) -> None:
    device.may_overlap = False
    decoder = CachedDecoder(on_device(device, SMALL, "float16"))
    first = decoder.start([[1, 2], [3]], 12)
    assert np.isfinite(first).all()
    decoder.step([3, 4])
    decoder._launches.graph = device.capture(decoder._launches.launch, overlapped=True)
    plain = CachedDecoder(on_device(all_devices()[0], SMALL, "float16"))
    plain.start([[1, 2], [3]], 12)
    plain.step([3, 4])
    assert np.array_equal(decoder.step([5, 6]), plain.step([5, 6]))


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (check_arrays, check_staging, check_graph, check_time, check_positions, check_products, check_early)
}


def run_check(name: str, folder: Path) -> None:
    (folder / "add.cu").write_text(TEXT)
    (folder / "common.cuh").write_text((KERNELS / "common.cuh").read_text())
    source, device = Source("add.cu", ("add",), folder), CudaDevice()
    amounts = cycle(SHARED)
    CHECKS[name](device, lambda x, y: device.launch(source, "add", 1, 8, (x, y, I32(8)), next(amounts)))


@needs_stand_in
@pytest.mark.parametrize("name", CHECKS)
def test_a_card_computes_what_it_should(name: str, tmp_path) -> None:
    run_check(name, tmp_path)


@needs_stand_in
@pytest.mark.parametrize("threads", [8, 9])
def test_a_block_of_more_threads_than_a_kernel_is_made_for_is_refused(threads: int, tmp_path) -> None:
    (tmp_path / "few.cu").write_text('extern "C" __global__ void __launch_bounds__(8) few(int* x) { *x = 1; }')
    source, device = Source("few.cu", ("few",), tmp_path), CudaDevice()
    x = device.zeros(1, I32)
    with nullcontext() if threads == 8 else pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        device.launch(source, "few", 1, threads, (x,))
    assert x.get() == (threads == 8)


@needs_stand_in
@pytest.mark.parametrize("source", [ops.WIDE, ops.FUSED_QKV, ops.ARGMAX, ops.GELU], ids=lambda source: source.file)
def test_a_kernels_own_shared_memory_is_what_the_compiler_says(source: Source) -> None:
    found = CudaDevice()._compile(source)
    for kernel, taken in usage(source, "90").items():
        assert found[kernel].shared_size_bytes == taken.shared_bytes


@needs_stand_in
def test_memory_that_cannot_be_shared_is_one_clear_line(monkeypatch) -> None:
    device = CudaDevice()
    device.share(100)
    with pytest.raises(InputError, match="the memory of another card cannot be reached: cudaErrorInvalidValue"):
        device.attach(device.share(100)[1], 100)  # its own
    monkeypatch.setattr(Memory, "handle", lambda *_: refuse())
    used = stand_in_cuda.card.memory.used()
    with pytest.raises(InputError, match="the memory of this card cannot be shared: cudaErrorInvalidResourceHandle"):
        device.share(100)
    assert stand_in_cuda.card.memory.used() == used


def refuse() -> None:
    raise Refused(INVALID_HANDLE)


def wrong(check: str, function: str, right: str, put: str) -> Mutant:
    return Mutant(f"{function}: {right.strip()} -> {put.strip()}", check, CudaDevice, function, ((right, put),))


MUTANTS = (
    wrong("arrays", "_read", "with self._stream:", "if True:"),
    wrong("arrays", "_bytes", "array.memory + (array.address - array.memory.ptr)", "array.memory"),
    wrong("arrays", "_launch", "with self._stream:", "if True:"),
    wrong("arrays", "_launch", "np.uint64(getattr", "np.uint32(getattr"),
    wrong("arrays", "_make_room", "own + shared_bytes >", "shared_bytes >"),
    wrong("arrays", "_make_room", "self.shared_bytes - own", "shared_bytes - 1"),
    wrong("arrays", "_make_room", "self.shared_bytes - own", "self.shared_bytes"),
    wrong("arrays", "_launch", "shared_mem=shared_bytes", "shared_mem=2 * shared_bytes"),
    wrong("staging", "_wait", "mark.synchronize()", "pass"),
    wrong("staging", "_mark", "event.record(self._stream)", "event.record()"),
    wrong("staging", "_copy_later", "self._stream.ptr", "0"),
    wrong("staging", "_copy_later", "target.nbytes", "target.size"),
    wrong("graph", "_capture", "self._stream.begin_capture()", "pass"),
    wrong("graph", "_replay", "captured.launch(self._stream)", "captured.launch()"),
    wrong("graph", "_at_once", "main.wait_event(branch.record())", "branch.record()"),
    wrong("graph", "_at_once", "branch.wait_event(start)", "pass"),
    wrong("time", "_seconds", "end.synchronize()", "pass"),
    wrong("time", "_seconds", "/ 1000", "* -1000"),
    wrong("positions", "_copy_positions", "source.shape[1]", "target.shape[1]"),
    wrong("positions", "_copy_positions", "(last - first) * position, heads", "last * position, heads"),
    wrong("products", "_matmul", "with self._stream:", "if True:"),
    wrong("early", "_launch", "_three(grid), _three(block)", "_three(block), _three(grid)"),
    wrong("early", "_launch", "*sizes, self._stream.ptr", "*sizes, self._stream.ptr + 1"),
    wrong("early", "_launch", "self._stream.ptr, passed", "self._stream.ptr, passed[1:] + passed[:1]"),
)


@pytest.fixture
def as_before() -> Iterator[None]:
    """What others have on the card outlives a test that writes over it."""
    card = stand_in_cuda.card
    held = {address: ctypes.string_at(address, size) for address, size in card.memory.sizes.items()}
    yield
    for stream in card.streams():
        card.run_out(stream)
    card.failed = 0
    for address, values in held.items():
        ctypes.memmove(address, values, len(values))


@needs_stand_in
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_card_is_noticed(mutant: Mutant, as_before, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(CudaDevice, mutant.function, mutant.build())
    with pytest.raises((AssertionError, RuntimeError, ArithmeticError)):
        run_check(mutant.check, tmp_path)


# Whole programs.

TESTS = Path(__file__).resolve().parent


def output(*program: str) -> str:
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, timeout=300, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_stand_in
def test_a_text_is_that_of_the_host_device() -> None:
    asked = [str(TESTS.parent / "examples" / "generate.py"), "--backend", "gpu", "--prompt", "Once upon", "-n", "6"]
    assert output(str(TESTS / "stand_in_cuda.py"), *asked) == output(*asked, "--device", "host")


@needs_stand_in
def test_the_benchmark_goes_through_all_of_it() -> None:
    """By the command of the README."""
    readme = (TESTS.parent / "gpu" / "README.md").read_text()
    (command,) = re.findall(r"`python (tests/stand_in_cuda.py examples/[^`]*)`", readme)
    printed = output(*command.split())
    assert "left out" not in printed
    for row in ("read", "graph of 3 empty kernels", "decode, batch 1, context 5, overlapped launches", "sampling"):
        assert f"| {row}" in printed
