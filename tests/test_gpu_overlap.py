"""Launches that begin before those before them have ended: steps compute the same, and wrong waits are noticed."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from devices import SCHEDULES, all_devices, devices, host
from gpu_models import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpu_decode import on_device
from test_host_device import sources
from test_kernel_mutants import Mutant, altered

import neox.gpu as gpu
from neox.gpu import driver, launches, ops
from neox.gpu.decode import CachedDecoder, SamplingDecoder
from neox.gpu.device import Argument, Array, CudaDevice, Device, HostDevice
from neox.gpu.host.build import cache_folder
from neox.gpu.host.module import HostLaunch, KernelError, _in_pairs
from neox.gpu.launches import Launches, Trial, captured
from neox.gpu.source import KERNELS, Source
from neox.reference.sampling import Sampling

F32, I32 = np.float32, np.int32


# The host device: as early as can be, and what was before as late.


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Source]:
    """Two libraries: of `scale`, and of kernels that wait for it."""
    source = sources(tmp_path_factory.mktemp("kernels"), "faulty.cu")
    return replace(source, kernels=("scale",)), replace(source, kernels=("early", "early_sum", "early_fault"))


def ones(device: Device) -> tuple[Array, Array, Array]:
    x, y, z = (device.array(np.ones(64, F32)) for _ in range(3))
    return x, y, z


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_second_launch_begins_before_the_one_before_it(kernels, schedule) -> None:
    """The first block: others come when that has been waited for. Which is the second changes with each replay."""
    device, (scale, early) = host(*schedule), kernels
    x, before, after = ones(device)

    def launch() -> None:
        device.launch(scale, "scale", 1, 64, (x, F32(2)))
        device.launch(early, "early", 2, 32, (x, before, after))

    launch()
    graph = device.capture(launch, overlapped=True)
    seen = []
    for replay in range(4):
        graph.replay()
        assert (after.get() == 4 * 2**replay).all()
        seen.append(sorted(before.get().reshape(2, 32).max(1) / 2**replay))
    assert seen == [[4, 4], [2, 4], [4, 4], [2, 4]]


def check_sum(device: Device, source: Source) -> None:
    scale, early = (replace(source, kernels=(kernel,)) for kernel in ("scale", "early_sum"))
    x, y, _ = ones(device)

    def launch() -> None:
        device.launch(scale, "scale", 1, 64, (x, F32(2)))
        device.launch(early, "early_sum", 2, 32, (x, y))

    launch()
    graph = device.capture(launch, overlapped=True)
    for replay in range(2):
        graph.replay()
        assert (y.get() == 4 * 2**replay + 1).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_threads_wait_for_those_that_wait_for_earlier_launches(tmp_path, schedule) -> None:
    check_sum(host(*schedule), sources(tmp_path, "faulty.cu"))


@given(st.lists(st.sampled_from("abc")))
def test_every_launch_that_can_is_early_in_one_of_two_replays(modules: list[str]) -> None:
    """It cannot if the one before it is of the same library. All run, in order but for that."""
    launches = [HostLaunch(SimpleNamespace(module=module), *5 * (None,), i) for i, module in enumerate(modules)]  # type: ignore[arg-type]
    early = []
    for first in range(2):
        ran = []
        for run in _in_pairs(launches, first):
            second, *before = (run.func, *run.args) if isinstance(run, partial) else (run,)
            early += [second.seed for _ in before]
            ran += [launch.seed for launch in (*before, second)]
        assert ran == list(range(len(modules)))
    assert sorted(early) == [i for i in range(1, len(modules)) if modules[i] != modules[i - 1]]


@pytest.mark.parametrize(("first", "later"), [("scale", "early_fault"), ("early_fault", "scale")])
def test_a_fault_of_either_is_told_and_the_device_goes_on(kernels, first, later) -> None:
    device = HostDevice()
    x, y, _ = ones(device)
    by = [I32(0)]

    def launch() -> None:
        for kernel in (first, later):
            source = kernels[kernel != "scale"]
            arguments: list[Argument] = [x, F32(2)] if kernel == "scale" else [x, y, by[0]]
            device.launch(source, kernel, 1, 64, arguments)

    launch()
    by[0] = I32(1000)
    graph = device.capture(launch, overlapped=True)
    for _ in range(4):
        with pytest.raises(KernelError, match=r"early_fault.*read of memory that is not the kernel's"):
            graph.replay()
    by[0] = I32(0)
    launch()


# Which of the two graphs a step has.


def scripted(device: HostDevice, overlapped: float, plain: float) -> list[float]:
    """Makes the device tell these times of replays, in turns, the first of each far from them; returns what is left."""
    times = [9.0 * plain, 9.0 * overlapped, *[overlapped, plain] * launches.TRIES]
    device.seconds = lambda start, end: times.pop(0)  # type: ignore[method-assign]
    return times


@pytest.mark.parametrize(("overlapped", "plain"), [(1.0, 1.1), (1.1, 1.0), (1.0, 1.0)])
def test_launches_overlap_if_that_is_faster_and_are_tried_once(kernels, overlapped, plain) -> None:
    device = HostDevice()
    device.may_overlap = True
    x, _, _ = ones(device)
    launch = lambda: device.launch(kernels[0], "scale", 1, 64, (x, F32(2)))  # noqa: E731
    times = scripted(device, overlapped, plain)
    step = Launches(device, launch, Trial("a test", (x,)))
    for count in range(1, 4):
        step.run()
        assert (x.get() == 2**count).all()  # what was tried is undone
        assert len(times) == (0 if count > 1 else 2 + 2 * launches.TRIES)
    assert step.graph is not None
    assert step.graph.captured.overlapped == (overlapped < plain)
    again = captured(device, launch, Trial("a test", (x,)))
    assert again.captured.overlapped == (overlapped < plain)
    with pytest.raises(IndexError):  # a step of another kind is tried anew
        captured(device, launch, Trial("another", (x,)))


def test_nothing_is_tried_where_others_wait_or_the_device_may_not(kernels) -> None:
    device = HostDevice()
    x, _, _ = ones(device)
    launch = lambda: device.launch(kernels[0], "scale", 1, 64, (x, F32(2)))  # noqa: E731
    launch()
    device.may_overlap = True
    assert not captured(device, launch, None).captured.overlapped
    device.may_overlap = False
    assert not captured(device, launch, Trial("a test", (x,))).captured.overlapped
    assert (x.get() == 2).all()


def test_a_driver_that_refuses_costs_a_warning_and_nothing_else(kernels, monkeypatch) -> None:
    device = HostDevice()
    device.may_overlap = True
    x, _, _ = ones(device)
    capture = device.capture

    def refusing(function, overlapped=False):
        if overlapped:
            raise driver.DriverError("cuLaunchKernelEx returned 801")
        return capture(function)

    monkeypatch.setattr(device, "capture", refusing)
    step = Launches(device, lambda: device.launch(kernels[0], "scale", 1, 64, (x, F32(2))), Trial("a test", (x,)))
    step.run()
    with pytest.warns(RuntimeWarning, match="launches cannot overlap on this device: cuLaunchKernelEx returned 801"):
        step.run()
    step.graph = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.run()
    assert (x.get() == 8).all()


@given(devices(), st.sampled_from(("float16", "float32")))
@settings(max_examples=4)
def test_a_decoder_tries_both_and_goes_on(device, dtype) -> None:
    """Ids, positions and the cache are as if nothing had been tried."""
    device = HostDevice(order=device.order, seed=device.seed) if isinstance(device, HostDevice) else device
    outcomes = []
    for may in (True, False):
        device.may_overlap = may
        decoder = CachedDecoder(on_device(device, SMALL, dtype))
        decoder.start([[1, 2, 3], [4]], 12)
        outcomes.append(np.array([decoder.step([5 + i, 6]) for i in range(5)]))
    assert np.array_equal(outcomes[0], outcomes[1])


# Steps of a model.

CONFIG = replace(SMALL, intermediate_size=200)  # more units of outputs than blocks

# dtype, rows, whether blocks are parallel, whether ids are sampled. Together they launch every kernel of a step.
STEPS = [
    ("float16", 2, True, False),
    ("bfloat16", 9, True, True),
    ("float32", 3, True, False),
    ("float16", 20, False, False),
]


def check_step(device: Device, dtype: str, rows: int, parallel: bool, sampled: bool) -> None:
    """Four steps: on the host, each launch begins before the one before it in two of them."""
    model = on_device(device, replace(CONFIG, use_parallel_residual=parallel), dtype)
    outcomes = []
    for overlapped in (False, True):
        samplings = [Sampling(0.9, seed=i) for i in range(rows)]
        decoder = SamplingDecoder(model, samplings) if sampled else CachedDecoder(model)
        decoder.start([[1 + i % 5, 2] for i in range(rows)], 300)
        decoder.step([3] * rows)
        decoder._launches.graph = device.capture(decoder._launches.launch, overlapped)
        outcomes.append([(decoder.step([4 + i] * rows), decoder.chosen()) for i in range(4)])
    for ours, plain in zip(*outcomes, strict=True):
        assert all(map(np.array_equal, ours, plain))


@pytest.mark.parametrize("step", STEPS, ids=lambda step: "-".join(map(str, step)))
def test_a_step_with_overlapped_launches_computes_the_same(step) -> None:
    for device in all_devices()[:3]:
        check_step(device, *step)


WAIT = "    after_earlier_launches();\n"
TAKE = "    if (threadIdx.x == 0) coming[1] = take_unit(work.taken, units);\n"
PREPARE = "    work.prepare();\n"


def removed(file: str, kernel: str, step: int) -> tuple[str, str, str, str, int]:
    """The wait of one kernel of several."""
    text = (KERNELS / file).read_text()
    begin = text.index(f"{kernel}(")
    signature = text[begin : text.index(WAIT, begin)]
    return file, file, signature + WAIT, signature, step


# Of kernels in the same file as the one before them the host device sees nothing; the machine code of all is looked
# through in test_static_performance.py. The source, the changed file, right, wrong, the step that must differ.
MUTANTS = [
    ("fused_output.cu", "stream.cuh", WAIT + TAKE, TAKE + WAIT, 0),
    ("fused_qkv.cu", "stream.cuh", WAIT + TAKE + PREPARE, PREPARE + WAIT + TAKE, 0),
    ("fused_qkv.cu", "stream.cuh", WAIT, "", 0),
    ("fused_output.cu", "stream.cuh", WAIT, "", 0),
    ("fused_mlp.cu", "stream.cuh", WAIT, "", 0),
    ("fused_mlp.cu", "fused_mlp.cu", "        after_earlier_launches();\n", "", 0),
    ("wide.cu", "wide.cu", WAIT, "", 3),
    ("argmax.cu", "argmax.cu", WAIT, "", 0),
    ("matvec.cu", "matvec.cu", WAIT, "", 2),
    ("gelu.cu", "gelu.cu", WAIT, "", 2),
    ("rotary_append.cu", "rotary_append.cu", WAIT, "", 2),
    removed("layer_norm.cu", "\nlayer_norm", 3),
    removed("layer_norm.cu", "\nlayer_norm_pair", 2),
    removed("residual.cu", "void residual", 3),
    removed("residual.cu", "void residual_pair", 2),
    removed("attention_decode.cu", "\nattention_decode_split", 2),
]  # fmt: skip


# What no launch of a step writes, by the names of the kernels' parameters: only the host does, between replays.
UNWRITTEN = {
    *("weight", "weight1", "weight2", "bias", "bias1", "bias2", "bias_m", "bias_a", "gain", "shift", "table"),
    *("up", "up_bias", "dense", "dense_bias", "down", "down_bias", "cos", "sin", "pages", "texts", "tiles"),
    *("allowed", "temperatures", "top_k", "top_p", "min_p", "seeds", "mailboxes"),
}


def taken_for_constant(text: str) -> set[str]:
    """What a compiler may read at any time, and by a cache that no wait clears."""
    return set(re.findall(r"__restrict__\s+(\w+)", text)) | set(re.findall(r"__ldg(?=\()", text))


@pytest.mark.parametrize("file", sorted(path.name for path in KERNELS.glob("*.cu*")))
def test_what_launches_write_is_not_taken_for_constant(file: str) -> None:
    text = (KERNELS / file).read_text()
    assert taken_for_constant(text) <= UNWRITTEN


def test_a_residual_stream_that_is_taken_for_constant_is_seen() -> None:
    text = (KERNELS / "fused_qkv.cu").read_text()
    wrong = text.replace("const float* x,", "const float* __restrict__ x,")
    assert taken_for_constant(wrong) - UNWRITTEN == {"x"}
    assert taken_for_constant("return __ldg(p);") - UNWRITTEN == {"__ldg"}


def survives(*step: object) -> bool:
    try:
        for schedule in SCHEDULES:
            check_step(host(*schedule), *step)  # type: ignore[arg-type]
    except (AssertionError, KernelError):
        return False
    return True


@pytest.mark.wrong_kernels
@pytest.mark.parametrize(
    ("name", "file", "right", "wrong", "step"), MUTANTS, ids=[f"{i}-{m[0]}" for i, m in enumerate(MUTANTS)]
)
def test_a_kernel_that_does_not_wait_is_noticed(name, file, right, wrong, step, tmp_path, monkeypatch) -> None:
    (tmp_path / "host").mkdir()
    for library in cache_folder().glob("*.so"):
        os.symlink(library, tmp_path / "host" / library.name)  # all others are compiled already
    monkeypatch.setenv("NEOX_CACHE", str(tmp_path))
    constant = next(key for key, value in vars(ops).items() if isinstance(value, Source) and value.file == name)
    changed = altered(getattr(ops, constant), Mutant(file, right, wrong, check_step), tmp_path)
    monkeypatch.setattr(ops, constant, changed)
    assert not survives(*STEPS[step])


# A card.


class Stream:
    ptr = 55

    def begin_capture(self) -> None: ...

    def end_capture(self) -> str:
        return "graph"

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Kernel:
    """CuPy's, with the driver's function inside."""

    kernel = SimpleNamespace(ptr=44)
    shared_size_bytes = 16

    def __init__(self, asked: list[tuple]) -> None:
        self.asked = asked

    def __call__(self, grid, block, arguments, shared_mem) -> None:
        self.asked.append(("plain", grid, block, shared_mem, arguments))


def card(compute: str = "90", version: int = driver.OLDEST, arch: str | None = None) -> CudaDevice:
    cuda = SimpleNamespace(
        Device=lambda: SimpleNamespace(compute_capability=compute),
        runtime=SimpleNamespace(driverGetVersion=lambda: version),
        Stream=lambda **_: Stream(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.device, "_import_cupy", lambda: SimpleNamespace(cuda=cuda))
        return CudaDevice(arch=arch)


@pytest.mark.parametrize(
    ("compute", "version", "arch", "can"),
    [
        ("90", 12030, None, True),
        ("100", 13000, None, True),
        ("90", 12030, "sm_90a", True),
        ("89", 13000, None, False),
        ("90", 12020, None, False),
        ("90", 13000, "sm_80", False),
    ],
)
def test_launches_overlap_on_cards_and_drivers_that_know_how(compute, version, arch, can) -> None:
    device = card(compute, version, arch)
    assert device.can_overlap == can
    if not can:
        with pytest.raises(ValueError, match="launches cannot overlap on this device"):
            device.capture(lambda: None, overlapped=True)


def test_only_launches_of_an_overlapped_capture_go_through_the_driver(monkeypatch) -> None:
    device, asked = card(), list[tuple]()
    source = Source("seam.cu", ("k",))
    monkeypatch.setattr(driver, "open_driver", lambda: "driver")
    monkeypatch.setattr(driver, "launch_early", lambda *passed: asked.append(("early", *passed)))
    monkeypatch.setattr(device, "_compile", lambda _: {"k": Kernel(asked)})

    def launch() -> None:
        device.launch(source, "k", (3, 2), 64, (F32(2), None), 128)

    plain = ("plain", (3, 2, 1), (64, 1, 1), 128, (F32(2), np.uint64(0)))
    early = ("early", "driver", 44, (3, 2, 1), (64, 1, 1), 128, 55, (F32(2), np.uint64(0)))
    launch()
    device.capture(launch, overlapped=True)
    device.capture(launch)
    with pytest.raises(IndexError):
        device.capture(lambda: asked.insert(0, asked[99]), overlapped=True)
    launch()
    assert asked == [plain, early, plain, plain]
