"""The seam: arrays, launches, capture, and what is said when something is missing."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from devices import all_devices, host

from neox.gpu.device import LARGEST_SHARED_BYTES, CaptureError, CudaDevice, Device, HostDevice, dtype_named, open_device
from neox.gpu.host import build
from neox.gpu.host.module import KernelError, at_once
from neox.gpu.source import KERNELS, Source
from neox.reference.errors import InputError

F32, I32 = np.float32, np.int32
TEXT = """
#include "types.cuh"
extern "C" __global__ void scale(float* x, float by, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= by;
}
extern "C" __global__ void advance(int* position) { *position += 1; }
extern "C" __global__ void append(const int* position, float* cache, float value) { cache[*position] = value; }
template <class T> __global__ void widen(const T* x, float* y) { y[threadIdx.x] = to_float(x[threadIdx.x]); }
"""
NAMES = ("scale", "advance", "append", "widen<__half>", "widen<__nv_bfloat16>")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "seam.cu").write_text(TEXT)
    (folder / "types.cuh").write_text((KERNELS / "types.cuh").read_text())
    return Source("seam.cu", NAMES, folder)


@pytest.fixture(params=range(len(all_devices())), ids=lambda i: f"device{i}")
def device(request: pytest.FixtureRequest) -> Device:
    return all_devices()[request.param]


# Arrays.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32"])
def test_an_array_gives_back_what_it_was_given(device, dtype) -> None:
    values = (np.arange(2 * 3 * 5).reshape(2, 3, 5) - 7).astype(dtype_named(dtype))
    copy = device.array(values)
    values_before, values[...] = values.copy(), 0  # the copy is its own
    back = copy.get()
    assert back.dtype == values.dtype
    assert np.array_equal(back, values_before)
    assert (device.zeros((2, 3), dtype).get() == 0).all()
    assert copy.nbytes == values.nbytes


def test_others_read_the_same_memory(device) -> None:
    array = device.array(np.arange(6, dtype=np.float32).reshape(2, 3))
    seen = array[1].view()
    assert seen.shape == (3,)
    array.set(np.arange(6, 12, dtype=np.float32).reshape(2, 3))
    device.synchronize()
    assert seen.tolist() == [9, 10, 11]
    with pytest.raises(ValueError, match="bfloat16"):
        device.zeros(3, "bfloat16").view()


def test_time_passes_between_two_marks(device, source) -> None:
    x = device.zeros(1000, F32)
    marks = [device.mark()]
    for count in (1, 50):
        for _ in range(count):
            device.launch(source, "scale", 32, 32, (x, F32(2), I32(1000)))
        marks.append(device.mark())
    first, second = (device.seconds(*pair) for pair in itertools.pairwise(marks))
    assert first > 0
    assert second > 0
    assert device.seconds(marks[0], marks[2]) == pytest.approx(first + second, rel=0.01)


def test_views_share_memory_along_the_first_axis(device) -> None:
    values = np.arange(4 * 3 * 2, dtype=F32).reshape(4, 3, 2)
    array = device.array(values)
    assert np.array_equal(array[2].get(), values[2])
    assert np.array_equal(array[-1][1].get(), values[-1, 1])
    assert np.array_equal(array[1:3].get(), values[1:3])
    assert np.array_equal(array[2:2].get(), values[2:2])
    assert np.array_equal(array.reshape(6, 4).get(), values.reshape(6, 4))
    array[1].set(np.zeros((3, 2), F32))
    values[1] = 0
    assert np.array_equal(array.get(), values)
    with pytest.raises(IndexError):
        array[4]
    with pytest.raises(ValueError, match="no step"):
        array[::2]
    with pytest.raises(ValueError, match="cannot be reshaped"):
        array.reshape(5, 5)


def test_copies_that_do_not_fit_are_refused(device) -> None:
    array = device.empty((2, 3), F32)
    for wrong in (np.zeros((3, 2), F32), np.zeros((2, 3), np.float64)):
        with pytest.raises(ValueError, match="cannot be copied"):
            array.set(wrong)


def test_a_transposed_array_is_copied_in_its_order(device) -> None:
    values = np.arange(6, dtype=F32).reshape(2, 3).T
    assert np.array_equal(device.array(values).get(), values)


# Launches.


def test_a_kernel_sees_arrays_views_and_scalars(device, source) -> None:
    x = device.array(np.arange(70, dtype=F32))
    device.launch(source, "scale", (3,), (32, 1), (x[10:], F32(3), I32(55)))
    assert np.array_equal(x.get(), np.where((np.arange(70) >= 10) & (np.arange(70) < 65), 3, 1) * np.arange(70))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_both_halves_reach_the_kernel(device, source, dtype) -> None:
    values = np.linspace(-3, 3, 32).astype(dtype_named(dtype))
    y = device.empty(32, F32)
    kernel = {"float16": "widen<__half>", "bfloat16": "widen<__nv_bfloat16>"}[dtype]
    device.launch(source, kernel, 1, 32, (device.array(values), y))
    assert np.array_equal(y.get(), values.astype(F32))


@pytest.mark.parametrize("wrong", [3, 3.0, np.zeros(3, F32), "x"])
def test_only_device_arrays_and_numpy_scalars_are_arguments(device, source, wrong) -> None:
    with pytest.raises(TypeError, match=r"argument 1 of scale is a (int|float|ndarray|str), not a device array"):
        device.launch(source, "scale", 1, 32, (device.zeros(32, F32), wrong, I32(32)))


def test_an_array_of_another_device_is_refused(source) -> None:
    with pytest.raises(TypeError, match="array of another device"):
        host().launch(source, "advance", 1, 1, (HostDevice().zeros(1, I32),))


@pytest.mark.parametrize(
    ("kernel", "arguments", "message"),
    [
        ("scale", ("float32", F32(1), np.int64(32)), "argument 2 of scale is int64, but the kernel takes int32"),
        ("scale", ("float32", np.float64(1), I32(32)), "argument 1 of scale is float64, but the kernel takes float32"),
        ("scale", ("float16", F32(1), I32(32)), r"argument 0 of scale is float16\*, but the kernel takes float32\*"),
        ("scale", (I32(1), F32(1), I32(32)), r"argument 0 of scale is int32, but the kernel takes float32\*"),
        ("scale", ("float32", None, I32(32)), "argument 1 of scale is a null pointer, but the kernel takes float32"),
        ("scale", ("float32", F32(1)), "scale takes 3 arguments, not 2"),
        ("widen<__half>", ("bfloat16", "float32"), r"is bfloat16\*, but the kernel takes const float16\*"),
    ],
)
def test_the_host_refuses_arguments_of_another_type(source, kernel, arguments, message) -> None:
    device = host()
    passed = tuple(device.zeros(32, a) if isinstance(a, str) else a for a in arguments)
    with pytest.raises(TypeError, match=message):
        device.launch(source, kernel, 1, 32, passed)


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes"),
    [(0, 32, 0), (1, 0, 0), (1, 1025, 0), (1, (32, 33), 0), (1, (1, 1, 65), 0), ((1, 65536), 1, 0), (1, 1, 1 << 20)],
)
def test_launches_that_no_card_takes_are_refused(device, source, grid, block, shared_bytes) -> None:
    assert shared_bytes == 0 or shared_bytes > LARGEST_SHARED_BYTES
    with pytest.raises(ValueError, match="at most"):
        device.launch(source, "advance", grid, block, (device.zeros(1, I32),), shared_bytes)


# Capture.


def step(device: Device, source: Source):
    """A step as the decoder has it: its position lives in device memory."""
    position, cache = device.zeros(1, I32), device.zeros(8, F32)

    def launches() -> None:
        device.launch(source, "append", 1, 1, (position, cache, F32(5)))
        device.launch(source, "advance", 1, 1, (position,))

    return position, cache, launches


def test_a_captured_step_runs_at_replay_and_only_then(device, source) -> None:
    position, cache, launches = step(device, source)
    launches()
    graph = device.capture(launches)
    assert position.get() == 1
    assert cache.get().tolist() == [5, 0, 0, 0, 0, 0, 0, 0]
    for _ in range(3):
        graph.replay()
    device.synchronize()
    assert position.get() == 4
    assert cache.get().tolist() == [5, 5, 5, 5, 0, 0, 0, 0]


def test_scalars_are_frozen_at_capture_and_arrays_are_not(device, source) -> None:
    x, by = device.array(np.ones(4, F32)), np.array([2], F32)
    launch = lambda: device.launch(source, "scale", 1, 4, (x, by[0], I32(4)))  # noqa: E731
    launch()
    graph = device.capture(launch)
    by[0] = 100
    x.set(np.full(4, 3, F32))
    graph.replay()
    assert (x.get() == 6).all()


def test_a_graph_keeps_its_arrays_alive(device, source) -> None:
    def captured():
        x = device.array(np.ones(4, F32))
        graph = device.capture(lambda: device.launch(source, "scale", 1, 4, (x, F32(2), I32(4))))
        return graph, x[:]

    device.launch(source, "scale", 1, 4, (device.zeros(4, F32), F32(2), I32(4)))
    graph, view = captured()
    graph.replay()
    assert (view.get() == 2).all()
    del view
    graph.replay()  # on the host a freed array would fault


def test_capture_refuses_what_a_card_cannot_capture(device, source) -> None:
    position, _, launches = step(device, source)
    launches()
    other = device.capture(launches)
    unseen = Source("seam.cu", NAMES[:2], source.folder)
    forbidden = {
        "an allocation": lambda: device.empty(3, F32),
        "a copy to the host": position.get,
        "a copy from the host": lambda: position.set(np.zeros(1, I32)),
        "synchronization": device.synchronize,
        "a mark": device.mark,
        "another capture": lambda: device.capture(launches),
        "a replay": other.replay,
        "compilation of seam.cu": lambda: device.launch(unseen, "advance", 1, 1, (position,)),
    }
    for what, attempt in forbidden.items():
        with pytest.raises(CaptureError, match=f"while a graph is captured there can be no {what}"):
            device.capture(attempt)
    before = position.get()
    device.capture(launches).replay()  # none of them has left the device capturing
    assert position.get() == before + 1


# Several programs at once.


def test_each_program_runs_in_its_order_and_all_before_what_follows(device, source) -> None:
    arrays = [device.array(np.full(40, value, F32)) for value in (1, 2, 3)]
    caches, positions = [device.zeros(4, F32) for _ in arrays], [device.zeros(1, I32) for _ in arrays]

    def program(i: int) -> None:
        for turn in range(i + 2):
            device.launch(source, "append", 1, 1, (positions[i], caches[i], F32(10 * i + turn)))
            device.launch(source, "advance", 1, 1, (positions[i],))
        device.launch(source, "scale", 2, 32, (arrays[i], F32(2), I32(40)))

    def launches() -> None:
        device.at_once([partial(program, i) for i in range(3)])
        for array in arrays:
            device.launch(source, "scale", 2, 32, (array, F32(5), I32(40)))

    launches()
    assert [position.get().item() for position in positions] == [2, 3, 4]
    assert [cache.get().tolist() for cache in caches] == [[0, 1, 0, 0], [10, 11, 12, 0], [20, 21, 22, 23]]
    graph = device.capture(launches)
    assert [set(array.get().tolist()) for array in arrays] == [{10}, {20}, {30}]
    for position in positions:
        position.set(np.zeros(1, I32))
    graph.replay()
    assert [position.get().item() for position in positions] == [2, 3, 4]
    assert [set(array.get().tolist()) for array in arrays] == [{100}, {200}, {300}]


def test_programs_at_once_only_launch(device, source) -> None:
    position = device.zeros(1, I32)
    forbidden = {
        "an allocation": lambda: device.empty(3, F32),
        "a copy to the host": position.get,
        "synchronization": device.synchronize,
        "several programs in one": lambda: device.at_once([]),
    }
    for what, attempt in forbidden.items():
        with pytest.raises(CaptureError, match=f"among launches that run at once there can be no {what}"):
            device.at_once([attempt])
    device.at_once([])
    device.at_once([lambda: device.launch(source, "advance", 1, 1, (position,))])  # nothing is left of them
    assert position.get() == 1


class RecordedStream:
    """Stands for CuPy's: notes down what it is asked for."""

    asked: ClassVar[list[tuple[str, int, object]]] = []
    count: ClassVar[int] = 0

    def __init__(self, non_blocking: bool) -> None:
        assert non_blocking  # or it would wait for the default stream, which nobody uses
        self.number = RecordedStream.count
        RecordedStream.count += 1

    def record(self) -> int:
        """The event is where the stream stands."""
        self.asked.append(("record", self.number, len(self.asked)))
        return len(self.asked) - 1

    def wait_event(self, event: int) -> None:
        self.asked.append(("wait", self.number, event))


class RecordedDevice(CudaDevice):
    """A card whose launches are names, noted down with their stream."""

    def __post_init__(self) -> None:
        RecordedStream.asked.clear()
        RecordedStream.count = 0
        self._cupy = SimpleNamespace(cuda=SimpleNamespace(Stream=RecordedStream))
        self._stream = RecordedStream(non_blocking=True)

    def _launch(self, module, kernel, grid, block, arguments, shared_bytes) -> None:
        if kernel == "fails":
            raise ValueError
        RecordedStream.asked.append(("launch", self._stream.number, kernel))

    def _compile(self, source: Source) -> None:
        pass


def recorded_programs(*programs: str) -> list[tuple[str, int, object]]:
    """What a card's streams are asked for by programs of launches, and by one launch before and one after."""
    device, source = RecordedDevice(), Source("seam.cu", ())

    def launch(names: str) -> None:
        for name in names.split():
            device.launch(source, name, 1, 1, ())

    launch("before")
    with suppress(ValueError):
        device.at_once([partial(launch, program) for program in programs])
    launch("after")
    return list(RecordedStream.asked)


def test_on_a_card_programs_have_streams_that_begin_and_end_in_the_devices_own() -> None:
    assert recorded_programs("a b", "c", "d e") == [
        ("launch", 0, "before"),
        ("record", 0, 1),
        ("wait", 1, 1),
        ("wait", 2, 1),
        *(("launch", number, name) for number, name in ((0, "a"), (1, "c"), (2, "d"), (0, "b"), (2, "e"))),
        ("record", 1, 9),
        ("wait", 0, 9),
        ("record", 2, 11),
        ("wait", 0, 11),
        ("launch", 0, "after"),
    ]


def test_on_a_card_streams_are_joined_after_an_error() -> None:
    asked = recorded_programs("a", "b fails", "c")
    assert [each for each in asked[-5:] if each[0] == "wait"] == [("wait", 0, 7), ("wait", 0, 9)]
    assert asked[-1] == ("launch", 0, "after")


def test_the_host_says_which_of_several_programs_failed(source) -> None:
    device = host()
    position, cache = device.array(np.array([5], I32)), device.zeros(4, F32)

    def fails() -> None:
        device.launch(source, "append", 1, 1, (position, cache, F32(1)))

    with pytest.raises(KernelError, match=r"append <<<.*block \(0,0,0\) thread \(0,0,0\).*seam.cu"):
        device.at_once([lambda: None, fails])
    with pytest.raises(TypeError, match="append takes 3 arguments, not 1"):
        device.at_once([lambda: device.launch(source, "append", 1, 1, (position,))])
    device.launch(source, "advance", 1, 1, (position,))
    assert position.get() == 6


def test_the_host_says_that_a_process_of_kernels_was_killed() -> None:
    with pytest.raises(KernelError, match="a process that ran kernels ended before they did"):
        at_once([[lambda: os.kill(os.getpid(), signal.SIGKILL)], []])


# Sources.


def test_headers_are_pasted_in_once_with_their_lines(tmp_path) -> None:
    (tmp_path / "a.cuh").write_text("#pragma once\nint a;\n")
    (tmp_path / "b.cuh").write_text('#pragma once\n#include "a.cuh"\nint b;\n')
    (tmp_path / "k.cu").write_text('#include "b.cuh"\n#include "a.cuh"\nint k;\n')
    text = Source("k.cu", (), tmp_path).text
    assert "#include" not in text
    assert "pragma" not in text
    assert text.count("int a;") == 1
    places = {}
    for line in text.splitlines():
        if found := re.match(r'#line (\d+) "(.*)"', line):
            number, file = int(found[1]), found[2]
        else:
            places[line] = (file, number)
            number += 1
    assert [places[f"int {x};"] for x in "abk"] == [("a.cuh", 2), ("b.cuh", 3), ("k.cu", 3)]


# What is missing is said in one line.


def test_no_compiler_is_one_clear_line(monkeypatch) -> None:
    build.compiler.cache_clear()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"g\+\+, which is not installed: apt install g\+\+"):
        open_device("host")
    build.compiler.cache_clear()


def test_an_old_compiler_is_one_clear_line(monkeypatch, tmp_path) -> None:
    (tmp_path / "g++").write_text("#!/bin/sh\necho 11.4.0\n")
    (tmp_path / "g++").chmod(0o755)
    build.compiler.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(InputError, match=r"needs g\+\+ 12 or newer, and .* is 11.4.0"):
        open_device("host")
    build.compiler.cache_clear()


def test_no_cupy_is_one_clear_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(InputError, match=r"pip install 'neox20b\[cuda13\]' .*device \"host\""):
        open_device("cuda")


def test_no_driver_is_one_clear_line() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if cupy.cuda.is_available():
        pytest.skip("there is a driver and a card")
    with pytest.raises(InputError, match=r"CUDA d(river|evice)") as caught:
        open_device("cuda")
    assert "\n" not in str(caught.value)


def test_no_ml_dtypes_is_one_clear_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(InputError, match="pip install ml_dtypes"):
        host().empty(3, "bfloat16")


@pytest.mark.parametrize("options", [{"mode": "quick"}, {"order": "random"}])
def test_an_unknown_mode_or_order_is_refused(options) -> None:
    with pytest.raises(ValueError, match=r"is none of (forward|fast)"):
        HostDevice(**options)


def test_an_unknown_device_is_one_clear_line() -> None:
    with pytest.raises(InputError, match="no device 'gpu': there are cuda and host"):
        open_device("gpu")


def test_importing_the_device_imports_no_cupy() -> None:
    program = "import sys, neox.gpu.device; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
