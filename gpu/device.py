"""The seam between the model and the machine: a device, its arrays, a kernel launch, a captured graph.

Two devices run the same .cu files. `CudaDevice` compiles them with NVRTC, through CuPy, for a card. `HostDevice`
compiles them with g++ and runs each CUDA thread as a fiber on the CPU, over memory that is NaN until written and
guarded on both sides. Everything above this file is the same Python for both.

    device = open_device("host")
    x = device.array(np.arange(6, dtype=np.float32))
    device.launch(source, "scale<float>", grid=1, block=32, arguments=(x, np.float32(2)))
    x.get()

A device has one stream: what is asked of it happens in the order asked. A sequence of launches can be captured once as
a graph and replayed. While it is captured nothing runs, and what would need the result, or could disturb the capture,
is refused: allocation, copies, synchronization, the first use of a kernel that is not compiled yet.

Kernels that wait for each other, as those of several ranks do, can share a device (`at_once`): on a card they have
streams of their own, on the host processes.
"""

from __future__ import annotations

import math
import re
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from neox.gpu import cublas, cublas_lt, driver
from neox.gpu.host.build import MODES, build, compiler
from neox.gpu.host.memory import HostMemory, SharedMemory
from neox.gpu.host.module import ORDERS, HostLaunch, HostModule, Pointer, Program, Recorded, at_once
from neox.gpu.host.sanitize import require
from neox.gpu.source import Source
from neox.reference.checkpoint.load import available_memory
from neox.reference.errors import InputError

LARGEST_BLOCK = 1024
LARGEST_GRID = (2**31 - 1, 65535, 65535)
PLAIN_SHARED_BYTES = 48 * 1024  # of a block, a kernel's own arrays among them; more must be asked for
LARGEST_SHARED_BYTES = 227 * 1024  # of sm_90

T = TypeVar("T")
Size = int | tuple[int, ...]


PRODUCT_DTYPES = ("float32", "float16", "bfloat16")


class CaptureError(RuntimeError):
    """Something was asked for that a device cannot do while a graph is captured."""


def dtype_named(name: DTypeLike) -> np.dtype:
    """A NumPy dtype; "bfloat16" is that of the package ml_dtypes. InputError without it."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise InputError("bfloat16 needs the package ml_dtypes: pip install ml_dtypes") from error
    return np.dtype(bfloat16)


@dataclass(frozen=True, eq=False)
class Array:
    """Contiguous memory of a device with a shape and a dtype. It computes nothing: kernels do."""

    device: Device
    memory: Any  # what the device allocated; lives as long as an array that views it
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def reshape(self, *shape: int) -> Array:
        """The same memory in another shape. ValueError if the sizes differ."""
        if math.prod(shape) != self.size:
            raise ValueError(f"{self.shape} cannot be reshaped to {shape}")
        return Array(self.device, self.memory, self.address, shape, self.dtype)

    def __getitem__(self, index: int | slice) -> Array:
        """A view of one entry, or of a range of them, along the first axis."""
        whole = range(self.shape[0])[index]
        start, inner = (whole, ()) if isinstance(whole, int) else (whole.start, (len(whole),))
        if isinstance(whole, range) and whole.step != 1:
            raise ValueError("an array is contiguous: no step")
        stride = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = inner + self.shape[1:]
        return Array(self.device, self.memory, self.address + start * stride, shape, self.dtype)

    def get(self) -> NDArray:
        """A copy in host memory, once everything before it has run. CaptureError during capture."""
        self.device._refuse("a copy to the host")
        return np.frombuffer(self.device._read(self), self.dtype).reshape(self.shape)

    def view(self) -> Any:
        """The same memory as an array of the library beneath, NumPy or CuPy: for others to read, by DLPack.

        ValueError for bfloat16, which those libraries lack. What is on its way is not waited for.
        """
        if self.dtype.name == "bfloat16":
            raise ValueError("bfloat16 is no dtype of NumPy's or CuPy's")
        return self.device._values(self)

    def set(self, values: NDArray) -> None:
        """Copy from host memory. ValueError on another shape or dtype, CaptureError during capture."""
        self.device._refuse("a copy from the host")
        if values.shape != self.shape or values.dtype != self.dtype:
            raise ValueError(f"{values.dtype} {values.shape} cannot be copied to {self.dtype} {self.shape}")
        self.device._write(self, np.ascontiguousarray(values).reshape(-1).view(np.uint8))


Argument = Array | np.generic | None  # None is a null pointer


@dataclass(frozen=True, eq=False)
class Graph:
    """Launches to be repeated. Scalars are as they were at capture; arrays are read anew."""

    device: Device
    captured: Any
    arrays: list[Array]  # kept alive: a graph knows only addresses

    def replay(self) -> None:
        self.device._refuse("a replay")
        self.device._replay(self.captured)


@dataclass(eq=False)
class Device(ABC):
    """What both devices have in common: the rules. Each supplies the methods with an underscore."""

    may_overlap: bool = field(default=True, init=False)  # whether launches of a step are tried so (launches.py)
    _capturing: list[Array] | None = field(default=None, init=False)  # arrays of the graph under capture
    _noting: list[Callable[[], None]] | None = field(default=None, init=False)  # launches of one of several programs
    _modules: dict[Source, Any] = field(default_factory=dict, init=False)
    _kept: dict[str, Any] = field(default_factory=dict, init=False)

    def empty(self, shape: Size, dtype: DTypeLike) -> Array:
        """Not to be read before it is written: on the host it is NaN."""
        self._refuse("an allocation")
        dimensions = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = dtype_named(dtype)
        memory, address = self._allocate(math.prod(dimensions) * kind.itemsize)
        return Array(self, memory, address, dimensions, kind)

    def array(self, values: NDArray) -> Array:
        """A copy of an array in host memory."""
        copy = self.empty(values.shape, values.dtype)
        copy.set(values)
        return copy

    def zeros(self, shape: Size, dtype: DTypeLike) -> Array:
        array = self.empty(shape, dtype)
        array.set(np.zeros(array.shape, array.dtype))
        return array

    def launch(
        self, source: Source, kernel: str, grid: Size, block: Size, arguments: Sequence[Argument], shared_bytes: int = 0
    ) -> None:
        """Run a kernel of a .cu file; during capture, note it down.

        Scalars are NumPy scalars of the kernel's very type: a Python number would be passed in 8 bytes.
        shared_bytes: dynamic shared memory of each block.
        """
        grid, block = _three(grid), _three(block)
        _check_sizes(kernel, grid, block, shared_bytes)
        for i, argument in enumerate(arguments):
            self._check_argument(kernel, i, argument)
        if source not in self._modules:
            if self._capturing is not None:
                self._refuse(f"compilation of {source.file}, which must be launched once before")
            self._modules[source] = self._compile(source)
        run = partial(self._launch, self._modules[source], kernel, grid, block, arguments, shared_bytes)
        if self._noting is None:
            run()
        else:
            self._noting.append(run)
        if self._capturing is not None:
            self._capturing += [a for a in arguments if isinstance(a, Array)]

    def matmul(self, x: Array, weight: Array, out: Array, bias: Array | None = None, *, add: bool = False) -> None:
        """x weight^T + bias by a library, cuBLAS or NumPy's BLAS: (N,I), (O,I) of one dtype -> float32 (N,O).

        bias: float32 (O) or None. add: to what is in out. Sums are float32 whatever the dtype.
        ValueError if shapes or dtypes do not fit, InputError if CuPy does not find cuBLAS, CaptureError during capture:
        CuPy lets no call of cuBLAS into a graph.
        """
        self._refuse("product by a library")
        _, outputs, _ = product_sizes(x, weight, out)
        if bias is not None:
            expect("bias", bias, (outputs,), np.float32)
        self._matmul(x, weight, out, bias, add)

    def matmul_gelu_fast(self, x: Array, weight: Array, bias: Array, out: Array) -> bool:
        """gelu_fast(x weight^T + bias) by a library: (N,I), (O,I), (O) -> (N,O), all of one dtype.

        Sums, bias and GELU are float32, rounded once. False, and nothing is done, if the library cannot.
        Errors as above.
        """
        self._refuse("product by a library")
        if x.dtype.name not in PRODUCT_DTYPES:
            raise ValueError(f"{x.dtype} is none of {', '.join(PRODUCT_DTYPES)}")
        (N, inputs), (outputs, _) = x.shape, weight.shape
        expect("weight", weight, (outputs, inputs), x.dtype)
        expect("bias", bias, (outputs,), x.dtype)
        expect("out", out, (N, outputs), x.dtype)
        return self._matmul_gelu_fast(x, weight, bias, out)

    def copy_positions(self, source: Array, target: Array, first: int, last: int) -> None:
        """target[:, first:last] = source[:, first:last], of keys or values (H,S,D) of texts of any capacity S.

        ValueError if shapes or dtypes do not fit, or either is shorter; CaptureError during capture.
        """
        self._refuse("copy")
        (H, S, D), (_, other, _) = target.shape, source.shape
        expect("source", source, (H, other, D), target.dtype)
        if not 0 <= first <= last <= min(S, other):
            raise ValueError(f"positions {first} to {last} of texts of {other} and {S}")
        if first < last:
            self._copy_positions(source, target, first, last)

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """Made when it is first asked for: scratch memory, which one launch at a time uses."""
        if name not in self._kept:
            self._kept[name] = make()
        kept: T = self._kept[name]
        return kept

    def share(self, size: int) -> tuple[Array, bytes]:
        """Bytes that other processes can give to their kernels, and what they must be told to `attach` them.

        InputError if the device's memory cannot be shared.
        """
        self._refuse("an allocation")
        memory, address, handle = self._share(size)
        return Array(self, memory, address, (size,), np.dtype(np.uint8)), handle

    def attach(self, handle: bytes, size: int) -> Array:
        """What another process shares. InputError if its device's memory cannot be reached from here."""
        self._refuse("an allocation")
        memory, address = self._attach(handle, size)
        return Array(self, memory, address, (size,), np.dtype(np.uint8))

    def capture(self, function: Callable[[], None], overlapped: bool = False) -> Graph:
        """The launches that a function makes, as a graph. CaptureError if it does what cannot be captured.

        overlapped: each kernel may begin before the one before it has ended. It waits by itself, before it touches what
        others write (after_earlier_launches of kernels/ptx.cuh). ValueError where `can_overlap` is false.
        """
        self._refuse("another capture")
        if overlapped and not self.can_overlap:
            raise ValueError("launches cannot overlap on this device")
        arrays: list[Array] = []
        self._capturing = arrays
        try:
            with self._capture(overlapped) as captured:
                function()
        finally:
            self._capturing = None
        return Graph(self, captured[0], arrays)

    def at_once(self, programs: Sequence[Callable[[], None]]) -> None:
        """What each function launches, in its order, while what the others launch runs: they may wait for each other.

        All that was asked for before comes first, and all that is asked for later comes last. Can be captured. Kernels
        that wait for each other must find room on the device together. CaptureError if a function does not only launch.
        """
        if self._noting is not None:
            self._refuse("several programs in one")
        self._at_once([self._noted(program) for program in programs])

    def _noted(self, program: Callable[[], None]) -> Program:
        launches: list[Callable[[], None]] = []
        self._noting = launches
        try:
            program()
        finally:
            self._noting = None
        return launches

    def synchronize(self) -> None:
        """Wait until everything asked for has run."""
        self._refuse("synchronization")
        self._synchronize()

    @property
    @abstractmethod
    def multiprocessors(self) -> int: ...

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Of shared memory, the most that a block can have."""

    @property
    @abstractmethod
    def can_overlap(self) -> bool:
        """Whether a launch in a graph can begin before the one before it has ended."""

    @property
    @abstractmethod
    def stream(self) -> int:
        """By which CUDA's libraries know the one stream. InputError if this is no card."""

    @abstractmethod
    def nccl(self) -> Any:
        """CuPy's module of NCCL. InputError if there is none, or this is no card."""

    def mark(self) -> Any:
        """The moment at which everything asked for so far has run. Nothing is waited for."""
        self._refuse("a mark")
        return self._mark()

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks, by the device's own clock. Waits for the second."""
        self._refuse("a look at the clock")
        return self._seconds(start, end)

    def wait(self, mark: Any) -> None:
        """Until everything asked for before the mark has run."""
        self._refuse("a wait")
        self._wait(mark)

    def staging(self, size: int) -> NDArray[np.uint8]:
        """Host memory of this many bytes, from which the device can copy by itself."""
        self._refuse("an allocation")
        return self._staging(size)

    def copy_later(self, target: Array, values: NDArray) -> None:
        """Copy from a part of staging memory, which must not change before a mark that follows has passed.

        ValueError on another shape or dtype, CaptureError during capture.
        """
        self._refuse("a copy from the host")
        if values.shape != target.shape or values.dtype != target.dtype:
            raise ValueError(f"{values.dtype} {values.shape} cannot be copied to {target.dtype} {target.shape}")
        self._copy_later(target, values)

    def free_memory(self) -> int:
        """Bytes that can still be allocated."""
        self._refuse("a look at the memory")
        return self._free_memory()

    def _refuse(self, what: str) -> None:
        if self._noting is not None:
            raise CaptureError(f"among launches that run at once there can be no {what}")
        if self._capturing is not None:
            raise CaptureError(f"while a graph is captured there can be no {what}")

    def _check_argument(self, kernel: str, i: int, argument: Argument) -> None:
        if isinstance(argument, Array):
            if argument.device is not self:
                raise TypeError(f"argument {i} of {kernel} is an array of another device")
        elif argument is not None and not isinstance(argument, np.generic):
            name = type(argument).__name__
            raise TypeError(f"argument {i} of {kernel} is a {name}, not a device array or a NumPy scalar")

    @abstractmethod
    def _allocate(self, size: int) -> tuple[Any, int]:
        """Memory of this many bytes and its address."""

    @abstractmethod
    def _share(self, size: int) -> tuple[Any, int, bytes]: ...

    @abstractmethod
    def _attach(self, handle: bytes, size: int) -> tuple[Any, int]: ...

    @abstractmethod
    def _free_memory(self) -> int: ...

    @abstractmethod
    def _read(self, array: Array) -> bytes | bytearray: ...

    @abstractmethod
    def _write(self, array: Array, values: NDArray[np.uint8]) -> None: ...

    @abstractmethod
    def _compile(self, source: Source) -> Any: ...

    @abstractmethod
    def _launch(
        self, module: Any, kernel: str, grid: Size, block: Size, arguments: Sequence[Argument], shared_bytes: int
    ) -> None: ...

    @abstractmethod
    def _at_once(self, programs: Sequence[Program]) -> None: ...

    @abstractmethod
    def _matmul(self, x: Array, weight: Array, out: Array, bias: Array | None, add: bool) -> None: ...

    @abstractmethod
    def _matmul_gelu_fast(self, x: Array, weight: Array, bias: Array, out: Array) -> bool: ...

    @abstractmethod
    def _copy_positions(self, source: Array, target: Array, first: int, last: int) -> None: ...

    @abstractmethod
    def _capture(self, overlapped: bool) -> Any:
        """A context in which launches are noted down; gives a list that holds the result when it ends."""

    @abstractmethod
    def _replay(self, captured: Any) -> None: ...

    @abstractmethod
    def _synchronize(self) -> None: ...

    @abstractmethod
    def _mark(self) -> Any: ...

    @abstractmethod
    def _seconds(self, start: Any, end: Any) -> float: ...

    @abstractmethod
    def _wait(self, mark: Any) -> None: ...

    @abstractmethod
    def _staging(self, size: int) -> NDArray[np.uint8]: ...

    @abstractmethod
    def _copy_later(self, target: Array, values: NDArray) -> None: ...

    @abstractmethod
    def _values(self, array: Array) -> Any: ...


def expect(name: str, array: Array, shape: tuple[int, ...], dtype: object) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} of shape {shape}, not {array.dtype} of shape {array.shape}")


def product_sizes(x: Array, weight: Array, out: Array) -> tuple[int, int, int]:
    """N, O and I of a product. ValueError if it cannot be."""
    (N, inputs), (outputs, _) = x.shape, weight.shape
    if x.dtype.name not in PRODUCT_DTYPES:
        raise ValueError(f"{x.dtype} is none of {', '.join(PRODUCT_DTYPES)}")
    expect("weight", weight, (outputs, inputs), x.dtype)
    expect("out", out, (N, outputs), np.float32)
    return N, outputs, inputs


def _matrix(array: Array) -> cublas.Matrix:
    rows, columns = array.shape
    return cublas.Matrix(array.address, (rows, columns), array.dtype.name)


def _three(size: Size) -> tuple[int, int, int]:
    x, y, z, *_ = (*((size,) if isinstance(size, int) else size), 1, 1, 1)
    return x, y, z


def _check_sizes(kernel: str, grid: Size, block: Size, shared_bytes: int) -> None:
    grid, block = _three(grid), _three(block)
    if min(block) < 1 or math.prod(block) > LARGEST_BLOCK or block[2] > 64:
        raise ValueError(f"{kernel}: a block of {block} threads; at most {LARGEST_BLOCK}, in z 64")
    if min(grid) < 1 or any(n > most for n, most in zip(grid, LARGEST_GRID, strict=True)):
        raise ValueError(f"{kernel}: a grid of {grid} blocks; at most {LARGEST_GRID}")
    if not 0 <= shared_bytes <= LARGEST_SHARED_BYTES:
        raise ValueError(f"{kernel}: {shared_bytes} bytes of shared memory; at most {LARGEST_SHARED_BYTES}")


@dataclass(eq=False)
class HostDevice(Device):
    """The .cu files on the CPU.

    mode: "check" (bounds, alignment and other undefined behaviour, the default), "fast", "debug" for gdb, "address" and
    "thread" for AddressSanitizer and ThreadSanitizer (see host/sanitize.py).
    order: of threads woken together and of blocks: "forward", "reverse", or "seeded", drawn from `seed`.
    defines: preprocessor names given to every kernel.
    One Python thread at a time may launch: fibers know nothing of threads.
    InputError if there is no g++, or it is too old.
    """

    mode: str = "check"
    order: str = "forward"
    seed: int = 0
    defines: tuple[str, ...] = ()
    _recording: list[Callable[[], None]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for given, known in ((self.order, ORDERS), (self.mode, MODES)):
            if given not in known:
                raise ValueError(f"{given!r} is none of {', '.join(known)}")
        compiler()
        require(self.mode)
        self.may_overlap = False  # it takes as long either way: only to see what comes out

    @property
    def multiprocessors(self) -> int:
        """Blocks run one after another: few are enough to show what more than one does."""
        return 2

    @property
    def shared_bytes(self) -> int:
        return LARGEST_SHARED_BYTES

    @property
    def can_overlap(self) -> bool:
        return True

    @property
    def stream(self) -> int:
        raise InputError("the host device is no card")

    def nccl(self) -> Any:
        raise InputError("NCCL connects cards, not the host device")

    def _allocate(self, size: int) -> tuple[Any, int]:
        memory = HostMemory(size)
        return memory, memory.address

    def _share(self, size: int) -> tuple[Any, int, bytes]:
        memory = SharedMemory(size)
        return memory, memory.address, memory.name.encode()

    def _attach(self, handle: bytes, size: int) -> tuple[Any, int]:
        try:
            memory = SharedMemory(size, handle.decode())
        except OSError as error:
            raise InputError(f"memory of another process cannot be opened: {error}") from error
        return memory, memory.address

    def _free_memory(self) -> int:
        return available_memory()

    def _bytes(self, array: Array) -> NDArray[np.uint8]:
        start = array.address - array.memory.address
        return array.memory.bytes[start : start + array.nbytes]

    def _read(self, array: Array) -> bytearray:
        return bytearray(self._bytes(array))

    def _write(self, array: Array, values: NDArray[np.uint8]) -> None:
        self._bytes(array)[:] = values

    def _compile(self, source: Source) -> Any:
        name = source.file.removesuffix(".cu")
        return HostModule(build(source.text, source.kernels, name, self.mode, self.defines), source.kernels)

    def _launch(
        self, module: Any, kernel: str, grid: Size, block: Size, arguments: Sequence[Argument], shared_bytes: int
    ) -> None:
        function = module.kernels[kernel]
        packed = function.pack(
            [Pointer(a.memory, a.address, a.dtype) if isinstance(a, Array) else a for a in arguments]
        )

        run = HostLaunch(function, _three(grid), _three(block), packed, shared_bytes, self.order, self.seed)
        if self._recording is None:
            run()
        else:
            self._recording.append(run)

    def _at_once(self, programs: Sequence[Program]) -> None:
        """In processes of their own (host/module.py)."""
        run = partial(at_once, [self._packed(program) for program in programs])
        if self._recording is None:
            run()
        else:
            self._recording.append(run)

    def _packed(self, program: Program) -> Program:
        """Launches whose arguments have been checked."""
        before, packed = self._recording, list[Callable[[], None]]()
        self._recording = packed
        try:
            for launch in program:
                launch()
        finally:
            self._recording = before
        return packed

    def _values(self, array: Array) -> NDArray:
        return self._bytes(array).view(array.dtype).reshape(array.shape)

    def _sums(self, x: Array, weight: Array, bias: Array | None) -> NDArray[np.float32]:
        wide_x, wide_weight = (self._values(a).astype(np.float32, copy=False) for a in (x, weight))
        sums: NDArray[np.float32] = wide_x @ wide_weight.T
        return sums if bias is None else sums + self._values(bias).astype(np.float32)

    def _matmul(self, x: Array, weight: Array, out: Array, bias: Array | None, add: bool) -> None:
        sums = self._sums(x, weight, bias)
        self._values(out)[...] = self._values(out) + sums if add else sums

    def _matmul_gelu_fast(self, x: Array, weight: Array, bias: Array, out: Array) -> bool:
        """In the form of kernels/activation.cuh, in which nothing cancels."""
        sums = self._sums(x, weight, bias)
        with np.errstate(over="ignore"):
            self._values(out)[...] = sums / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (sums + 0.044715 * sums**3)))
        return True

    def _copy_positions(self, source: Array, target: Array, first: int, last: int) -> None:
        self._values(target)[:, first:last] = self._values(source)[:, first:last]

    @contextmanager
    def _capture(self, overlapped: bool) -> Iterator[list[Any]]:
        launches: list[Callable[[], None]] = []
        self._recording = launches
        try:
            yield [Recorded(launches, overlapped)]
        finally:
            self._recording = None

    def _replay(self, captured: Recorded) -> None:
        captured.replay()

    def _synchronize(self) -> None:
        """Every launch has run when it returns."""

    def _mark(self) -> float:
        return time.perf_counter()

    def _seconds(self, start: float, end: float) -> float:
        return end - start

    def _wait(self, mark: float) -> None:
        """Everything has run by then."""

    def _staging(self, size: int) -> NDArray[np.uint8]:
        return np.empty(size, np.uint8)

    def _copy_later(self, target: Array, values: NDArray) -> None:
        self._values(target)[...] = values


class Owner:
    """Lives as long as memory that CuPy has borrowed."""


@dataclass(eq=False)
class CudaDevice(Device):
    """A card, through CuPy.

    arch: what NVRTC compiles for, like "sm_90a"; by default the card's own, of which CuPy leaves out the "a".
    number: of the card, for this process; of fewer cards, it starts again at the first. By default CuPy's current one.
    InputError if there is no CuPy, no driver or no card.
    """

    arch: str | None = None
    number: int | None = None
    _cupy: Any = field(default=None, init=False)
    _stream: Any = field(default=None, init=False)
    _branches: list[Any] = field(default_factory=list, init=False)  # streams of all but one of the programs at once
    _overlapping: bool = field(default=False, init=False)  # whether the next launch may begin before the last has ended

    def __post_init__(self) -> None:
        self._cupy = _import_cupy()
        if self.number is not None:
            self._cupy.cuda.Device(self.number % self._cupy.cuda.runtime.getDeviceCount()).use()
        self._stream = self._cupy.cuda.Stream(non_blocking=True)

    @property
    def multiprocessors(self) -> int:
        return int(self._cupy.cuda.Device().attributes["MultiProcessorCount"])

    @property
    def shared_bytes(self) -> int:
        return int(self._cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"])

    @property
    def can_overlap(self) -> bool:
        """Kernels of older cards, or compiled for them, do not wait."""
        cuda = self._cupy.cuda
        card, compiled = int(cuda.Device().compute_capability), re.search(r"\d+", self.arch or "sm_90")
        assert compiled
        return min(card, int(compiled[0])) >= 90 and cuda.runtime.driverGetVersion() >= driver.OLDEST

    @property
    def stream(self) -> int:
        return int(self._stream.ptr)

    def nccl(self) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # CuPy's, of where to get it: what comes instead is as good
                from cupy.cuda import nccl
        except ImportError as error:
            raise InputError("there is no NCCL that CuPy can load") from error
        if not nccl.available:
            raise InputError("there is no NCCL that CuPy can load")
        return nccl

    def _allocate(self, size: int) -> tuple[Any, int]:
        with self._stream:
            memory = self._cupy.cuda.alloc(size)
        return memory, memory.ptr

    def _share(self, size: int) -> tuple[Any, int, bytes]:
        """Not of CuPy's pool: a handle means a whole allocation."""
        runtime = self._cupy.cuda.runtime
        address = runtime.malloc(size)
        memory = self._borrowed(address, size, runtime.free)
        try:
            return memory, address, runtime.ipcGetMemHandle(address)
        except runtime.CUDARuntimeError as error:  # some systems know no such handles
            raise InputError(f"the memory of this card cannot be shared: {error}") from error

    def _attach(self, handle: bytes, size: int) -> tuple[Any, int]:
        runtime = self._cupy.cuda.runtime
        try:
            address = runtime.ipcOpenMemHandle(handle)
        except runtime.CUDARuntimeError as error:
            raise InputError(f"the memory of another card cannot be reached: {error}") from error
        return self._borrowed(address, size, runtime.ipcCloseMemHandle), address

    def _borrowed(self, address: int, size: int, give_back: Callable[[int], object]) -> Any:
        """Memory that CuPy did not allocate, as its own look like."""
        owner = Owner()
        weakref.finalize(owner, give_back, address)
        return self._cupy.cuda.MemoryPointer(self._cupy.cuda.UnownedMemory(address, size, owner), 0)

    def _free_memory(self) -> int:
        unused = self._cupy.get_default_memory_pool().free_bytes()  # given back to CuPy, but not to the card
        return int(self._cupy.cuda.runtime.memGetInfo()[0] + unused)

    def _bytes(self, array: Array) -> Any:
        cupy = self._cupy
        return cupy.ndarray((array.nbytes,), cupy.uint8, array.memory + (array.address - array.memory.ptr))

    def _read(self, array: Array) -> bytearray:
        with self._stream:
            return bytearray(self._bytes(array).get())

    def _write(self, array: Array, values: NDArray[np.uint8]) -> None:
        with self._stream:
            self._bytes(array).set(values)
        self._stream.synchronize()  # `values` may change once this returns

    def _compile(self, source: Source) -> Any:
        options = ("-std=c++17", *((f"-arch={self.arch}",) if self.arch else ()))
        module = self._cupy.RawModule(code=source.text, options=options, name_expressions=source.kernels)
        return {name: module.get_function(name) for name in source.kernels}

    def _launch(
        self, module: Any, kernel: str, grid: Size, block: Size, arguments: Sequence[Argument], shared_bytes: int
    ) -> None:
        function = module[kernel]
        if shared_bytes:
            self._make_room(function, shared_bytes)
        passed = tuple(
            np.uint64(getattr(a, "address", 0)) if a is None or isinstance(a, Array) else a for a in arguments
        )
        if self._overlapping:
            sizes = _three(grid), _three(block), shared_bytes
            driver.launch_early(self._driver, function.kernel.ptr, *sizes, self._stream.ptr, passed)
        else:
            with self._stream:
                function(grid, block, passed, shared_mem=shared_bytes)

    def _make_room(self, function: Any, shared_bytes: int) -> None:
        """All that there is, rather than what this launch needs: graphs may hold launches that need more."""
        own = function.shared_size_bytes
        if own + shared_bytes > PLAIN_SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = self.shared_bytes - own

    @property
    def _driver(self) -> Any:
        return self.kept("driver", driver.open_driver)

    def _at_once(self, programs: Sequence[Program]) -> None:
        """One stream each. Launches are asked for in turns, since streams may share one of the card's eight queues."""
        main, count = self._stream, max(len(programs) - 1, 0)
        overlapping, self._overlapping = self._overlapping, False
        while len(self._branches) < count:
            self._branches.append(self._cupy.cuda.Stream(non_blocking=True))
        branches, start = self._branches[:count], main.record()
        for branch in branches:
            branch.wait_event(start)
        try:
            for launches in zip_longest(*programs):
                for stream, launch in zip((main, *branches), launches, strict=True):
                    if launch is not None:
                        self._stream = stream
                        launch()
        finally:  # also on an error: a capture could not end before its branches are joined
            self._stream, self._overlapping = main, overlapping
            for branch in branches:
                main.wait_event(branch.record())

    def _matmul(self, x: Array, weight: Array, out: Array, bias: Array | None, add: bool) -> None:
        if bias is not None and self._with_epilogue(x, weight, bias, out, add=add):
            return
        with self._stream:
            cublas.multiply(*self.kept("cuBLAS", _open_cublas), _matrix(x), _matrix(weight), _matrix(out), add)
        if bias is not None:  # a column of ones times the bias is a product too: no kernel is needed for it
            self._matmul(self._ones(x.shape[0]), bias.reshape(bias.size, 1), out, None, True)

    def _matmul_gelu_fast(self, x: Array, weight: Array, bias: Array, out: Array) -> bool:
        return self._with_epilogue(x, weight, bias, out, gelu=True)

    def _with_epilogue(
        self, x: Array, weight: Array, bias: Array, out: Array, gelu: bool = False, add: bool = False
    ) -> bool:
        library = self.kept("cublasLt", self._open_cublas_lt)
        matrices = _matrix(x), _matrix(weight), bias.address, _matrix(out)
        return library is not None and cublas_lt.multiply(library, self.stream, *matrices, gelu=gelu, add=add)

    def _open_cublas_lt(self) -> cublas_lt.Library | None:
        functions = cublas_lt.load(cublas.major_version(*self.kept("cuBLAS", _open_cublas)))
        if functions is None:
            return None
        workspace = self.kept("cublasLt's workspace", lambda: self.empty(cublas_lt.WORKSPACE_BYTES, np.uint8))
        return cublas_lt.open_library(functions, workspace.address)

    def _ones(self, count: int) -> Array:  # float32 (N,1)
        size = 1 << (count - 1).bit_length()
        return self.kept(f"ones {size}", lambda: self.array(np.ones((size, 1), np.float32)))[:count]

    def _copy_positions(self, source: Array, target: Array, first: int, last: int) -> None:
        runtime = self._cupy.cuda.runtime
        heads, capacity, width = target.shape
        position = width * target.dtype.itemsize  # bytes of one
        to, start = (array.address + first * position for array in (target, source))
        size = (last - first) * position, heads  # of a rectangle, whose rows stand apart by a head's whole memory
        pitches = capacity * position, source.shape[1] * position
        runtime.memcpy2DAsync(to, pitches[0], start, pitches[1], *size, runtime.memcpyDeviceToDevice, self._stream.ptr)

    @contextmanager
    def _capture(self, overlapped: bool) -> Iterator[list[Any]]:
        captured: list[Any] = []
        with self._stream:
            self._stream.begin_capture()
            self._overlapping = overlapped
            try:
                yield captured
            finally:
                self._overlapping = False
                captured.append(self._stream.end_capture())  # also on an error: the stream is useless until it ends

    def _replay(self, captured: Any) -> None:
        captured.launch(self._stream)

    def _synchronize(self) -> None:
        self._stream.synchronize()

    def _mark(self) -> Any:
        event = self._cupy.cuda.Event()
        event.record(self._stream)
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(start, end)) / 1000

    def _wait(self, mark: Any) -> None:
        mark.synchronize()

    def _staging(self, size: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(size), np.uint8, size)

    def _copy_later(self, target: Array, values: NDArray) -> None:
        runtime = self._cupy.cuda.runtime
        source, kind = values.ctypes.data, runtime.memcpyHostToDevice
        runtime.memcpyAsync(target.address, source, target.nbytes, kind, self._stream.ptr)

    def _values(self, array: Array) -> Any:
        return self._bytes(array).view(array.dtype).reshape(array.shape)


def _open_cublas() -> tuple[Any, int]:
    library = cublas.import_cublas()
    return library, cublas.open_handle(library)


def _import_cupy() -> Any:
    elsewhere = 'or run the kernels on the CPU with device "host"'
    try:
        import cupy
    except ImportError as error:
        raise InputError(f"device cuda needs CuPy: pip install 'neox20b[cuda13]' (or cuda12), {elsewhere}") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise InputError(f"no CUDA driver that CuPy can use ({error}): install NVIDIA's driver, {elsewhere}") from error
    if count == 0:
        raise InputError(f"no CUDA device was found, {elsewhere}")
    return cupy


def open_device(name: str, **options: Any) -> Device:
    """The device "cuda" or "host", with the options of its class. InputError says what is missing."""
    devices: dict[str, Callable[..., Device]] = {"cuda": CudaDevice, "host": HostDevice}
    if name not in devices:
        raise InputError(f"no device {name!r}: there are cuda and host")
    return devices[name](**options)
