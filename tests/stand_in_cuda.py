"""CuPy's own code without a card: what it asks of CUDA's runtime, driver, cuBLAS and cublasLt is done here.

The runtime is a part of CuPy's machine code: there, the functions that are here as well become jumps to these. For the
others a library that has nothing but such jumps is loaded under the name that is asked for. Kernels go through NVRTC
and CuPy to their launch, with what CuPy packs for them; what runs is the host device's form of them.

    NEOX_TEST_DEVICE=stand-in pytest tests/test_gpu_*.py
    python tests/stand_in_cuda.py examples/benchmark.py --backend gpu --dry-run

Linux on x86-64. Needs the extra `nvrtc`, a C compiler and binutils' nm.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import re
import runpy
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from cards import DTYPES, compiled_cublas_lt
from stand_in_card import (
    CAPACITY,
    ILLEGAL_ADDRESS,
    INVALID_DEVICE,
    INVALID_HANDLE,
    INVALID_VALUE,
    NAMES,
    NOT_READY,
    Card,
    Event,
    Refused,
    Run,
    Stream,
)

from neox.gpu import cublas_lt
from neox.gpu.device import CudaDevice, HostDevice, dtype_named
from neox.gpu.driver import PROGRAMMATIC_STREAM_SERIALIZATION, Config
from neox.gpu.host.module import HostKernel
from neox.gpu.source import Source

card = Card()
functions: dict[str, Any] = {}  # those that stand in, by name
host = HostDevice()

_lock = threading.RLock()
_beside = SimpleNamespace()  # the library that computes for cublasLt


def stands_in(*types: Any, returns: Any = c_int) -> Callable[[Callable], Callable]:
    """For the function of that name. types: of its parameters. An error that is raised is returned."""

    def put(function: Callable) -> Callable:
        def run(*arguments: Any) -> Any:
            try:
                with _lock:
                    return function(*arguments) or 0
            except Refused as error:
                return error.args[0]
            except BaseException:  # nothing may be raised into CuPy's machine code
                traceback.print_exc()
                return INVALID_VALUE

        functions[function.__name__] = ctypes.CFUNCTYPE(returns, *types)(run)
        return function

    return put


def store(pointer: int, kind: Any, value: Any) -> None:
    ctypes.cast(pointer, POINTER(kind))[0] = value


# The card: an H200, as far as anyone asks.

MULTIPROCESSORS, MAJOR, MINOR, SHARED_BYTES_OPTIN = 16, 75, 76, 97  # cudaDeviceAttr
ATTRIBUTES = {MULTIPROCESSORS: 132, MAJOR: 9, MINOR: 0, SHARED_BYTES_OPTIN: 232448}
VERSION = 13000


@stands_in(c_void_p)
def cudaGetDeviceCount(count):
    store(count, c_int, 1)


@stands_in(c_void_p)
def cudaGetDevice(device):
    store(device, c_int, 0)


@stands_in(c_int)
def cudaSetDevice(device):
    return INVALID_DEVICE if device else 0


@stands_in(c_void_p, c_int, c_int)
def cudaDeviceGetAttribute(value, attribute, device):
    store(value, c_int, ATTRIBUTES.get(attribute, 0))


@stands_in(c_void_p)
def cudaDriverGetVersion(version):
    store(version, c_int, VERSION)


@stands_in(c_void_p)
def cudaRuntimeGetVersion(version):
    store(version, c_int, VERSION)


@stands_in()
def cudaGetLastError():
    return card.failed


TEXTS = {number: c_char_p(name.encode()) for number, name in {**NAMES, 0: "cudaSuccess", -1: "some error"}.items()}


def text(error: int) -> int | None:
    return ctypes.cast(TEXTS.get(error, TEXTS[-1]), c_void_p).value


@stands_in(c_int, returns=c_void_p)
def cudaGetErrorName(error):
    return text(error)


@stands_in(c_int, returns=c_void_p)
def cudaGetErrorString(error):
    return text(error)


@stands_in(c_int, c_void_p)
def cuGetErrorName(error, name):
    store(name, c_void_p, text(error))


@stands_in(c_int, c_void_p)
def cuGetErrorString(error, said):
    store(said, c_void_p, text(error))


@stands_in(c_void_p)
def cuCtxGetCurrent(context):
    store(context, c_void_p, id(card))


# Memory.


@stands_in(c_void_p, c_size_t)
def cudaMalloc(address, size):
    card.check()
    store(address, c_void_p, card.memory.allocate(size))


@stands_in(c_void_p)
def cudaFree(address):
    if address:
        card.finish(*card.streams())
        card.memory.free(address)


@stands_in(c_void_p, c_void_p)
def cudaMemGetInfo(free, total):
    store(free, c_size_t, CAPACITY - card.memory.used())
    store(total, c_size_t, CAPACITY)


@stands_in(c_void_p, c_size_t, c_uint)
def cudaHostAlloc(address, size, flags):
    store(address, c_void_p, card.memory.pin(size))


@stands_in(c_void_p)
def cudaFreeHost(address):
    card.finish(*card.streams())
    del card.memory.pinned[address]


class PointerAttributes(ctypes.Structure):
    """cudaPointerAttributes."""

    _fields_ = [("type", c_int), ("device", c_int), ("device_pointer", c_void_p), ("host_pointer", c_void_p)]


@stands_in(POINTER(PointerAttributes), c_void_p)
def cudaPointerGetAttributes(attributes, address):
    on_card, pinned = card.memory.holds(address), card.memory.is_pinned(address)
    attributes[0] = PointerAttributes(2 if on_card else int(pinned), 0, address, address if pinned else None)


class Handle(ctypes.Structure):
    """cudaIpcMemHandle_t."""

    _fields_ = [("bytes", ctypes.c_char * 64)]


@stands_in(POINTER(Handle), c_void_p)
def cudaIpcGetMemHandle(handle, address):
    handle[0] = Handle(card.memory.handle(address))


@stands_in(c_void_p, Handle, c_uint)
def cudaIpcOpenMemHandle(address, handle, flags):
    store(address, c_void_p, card.memory.open(handle.bytes))


@stands_in(c_void_p)
def cudaIpcCloseMemHandle(address):
    card.finish(*card.streams())
    card.memory.free(address)


TO_CARD, TO_HOST, ON_CARD = 1, 2, 3  # cudaMemcpyKind


def check_copy(to: int, source: int, size: int, kind: int) -> None:
    """INVALID_VALUE if what should be the card's memory is not."""
    for address, on_card in ((to, kind in (TO_CARD, ON_CARD)), (source, kind in (TO_HOST, ON_CARD))):
        if on_card and size and not card.memory.holds(address, size):
            raise Refused(INVALID_VALUE)


@stands_in(c_void_p, c_void_p, c_size_t, c_int, c_void_p)
def cudaMemcpyAsync(to, source, size, kind, stream):
    """As the manual says: of pageable memory, what is to be copied is taken at once, and what was copied is there."""
    check_copy(to, source, size, kind)
    at = card.stream(stream)
    if kind == TO_CARD and not card.memory.is_pinned(source):
        taken = ctypes.string_at(source, size)
        card.put(at, lambda: ctypes.memmove(to, taken, size))
    else:
        card.put(at, lambda: ctypes.memmove(to, source, size))
        if kind == TO_HOST and not card.memory.is_pinned(to):
            card.finish(at)


@stands_in(c_void_p, c_size_t, c_void_p, c_size_t, c_size_t, c_size_t, c_int, c_void_p)
def cudaMemcpy2DAsync(to, to_pitch, source, pitch, width, height, kind, stream):
    if width > min(to_pitch, pitch) or kind != ON_CARD:
        raise Refused(INVALID_VALUE)
    rows = [(to + i * to_pitch, source + i * pitch, width) for i in range(height)]
    for row in rows:
        check_copy(*row, kind)
    card.put(card.stream(stream), lambda: [ctypes.memmove(*row) for row in rows])


# Streams, events and graphs.


@stands_in(c_void_p, c_uint, c_int)
def cudaStreamCreateWithPriority(stream, flags, priority):
    store(stream, c_void_p, card.new(Stream()))


@stands_in(c_void_p)
def cudaStreamDestroy(stream):
    card.run_out(card.handles.pop(stream))


@stands_in(c_void_p)
def cudaStreamSynchronize(stream):
    card.finish(card.stream(stream))


@stands_in(c_void_p, c_void_p)
def cudaStreamIsCapturing(stream, status):
    store(status, c_int, int(card.stream(stream).graph is not None))


@stands_in()
def cudaDeviceSynchronize():
    card.finish(*card.streams())


@stands_in(c_void_p)
def cudaEventCreate(event):
    store(event, c_void_p, card.new(Event()))


@stands_in(c_void_p, c_uint)
def cudaEventCreateWithFlags(event, flags):
    store(event, c_void_p, card.new(Event()))


@stands_in(c_void_p)
def cudaEventDestroy(event):
    del card.handles[event]


@stands_in(c_void_p, c_void_p)
def cudaEventRecord(event, stream):
    card.handles[event].mark = card.mark(card.stream(stream))


@stands_in(c_void_p, c_void_p, c_uint)
def cudaStreamWaitEvent(stream, event, flags):
    if card.handles[event].mark:
        card.wait(card.stream(stream), card.handles[event].mark)


@stands_in(c_void_p)
def cudaEventSynchronize(event):
    if card.handles[event].mark:
        card.reach(card.handles[event].mark)


@stands_in(c_void_p, c_void_p, c_void_p)
def cudaEventElapsedTime(milliseconds, start, end):
    marks = [card.handles[event].mark for event in (start, end)]
    if None in marks:
        raise Refused(INVALID_HANDLE)
    if any(mark.reached is None for mark in marks):
        raise Refused(NOT_READY)
    store(milliseconds, c_float, 1000 * (marks[1].reached - marks[0].reached))


@stands_in(c_void_p, c_int)
def cudaStreamBeginCapture(stream, mode):
    card.begin_capture(card.stream(stream))


@stands_in(c_void_p, c_void_p)
def cudaStreamEndCapture(stream, graph):
    store(graph, c_void_p, card.new(card.end_capture(card.stream(stream))))


@stands_in(c_void_p, c_void_p, c_uint64)
def cudaGraphInstantiate(executable, graph, flags):
    store(executable, c_void_p, card.new(card.handles[graph]))


@stands_in(c_void_p, c_void_p)
def cudaGraphLaunch(executable, stream):
    card.replay(card.handles[executable], card.stream(stream))


@stands_in(c_void_p)
def cudaGraphExecDestroy(executable):
    del card.handles[executable]


@stands_in(c_void_p)
def cudaGraphDestroy(graph):
    del card.handles[graph]


# Kernels.

PLAIN_SHARED_BYTES = 48 << 10  # of a block, unless more is asked for
RESERVED_SHARED_BYTES = 1 << 10  # which the compiler counts to a kernel's own, and the driver does not
SHARED_SIZE_BYTES, MAX_DYNAMIC_SHARED_SIZE_BYTES = 1, 8  # CUfunction_attribute


@dataclass(frozen=True)
class Section:
    size: int
    contents: bytes  # none, if it is memory that is not filled


def sections(image: int) -> dict[str, Section]:
    """Of an ELF file in memory, by name."""
    header, not_filled = ctypes.string_at(image, 64), 8
    assert header[:4] == b"\x7fELF", "no machine code"
    start, size, count, names = *struct.unpack_from("<Q", header, 40), *struct.unpack_from("<HHH", header, 58)
    found = [struct.unpack_from("<IIQQQQ", ctypes.string_at(image + start + i * size, size)) for i in range(count)]
    made = [Section(s[5], b"" if s[1] == not_filled else ctypes.string_at(image + s[4], s[5])) for s in found]
    named = [made[names].contents[s[0] :].split(b"\0", 1)[0].decode() for s in found]
    return dict(zip(named, made, strict=True))


def most_threads(module: dict[str, Section], name: str) -> int:
    """That a block of this kernel may have: its __launch_bounds__, as the compiler notes them."""
    at, noted = 0, module[f".nv.info.{name}"].contents
    while at < len(noted):
        form, attribute, size = struct.unpack_from("<BBH", noted, at)
        if (form, attribute) == (4, 5):  # EIFMT_SVAL, EIATTR_MAX_THREADS
            return math.prod(struct.unpack_from("<3I", noted, at + 4))
        at += 4 + (size if form == 4 else 0)
    return 1024


@dataclass
class Function:
    """A kernel of a module, and its form on the host."""

    threads: int
    own_shared_bytes: int  # of arrays whose size is known to the compiler
    shared_bytes: int  # that a launch may add
    kernel: HostKernel | None = None


@stands_in(c_void_p, c_void_p)
def cuModuleLoadData(module, image):
    store(module, c_void_p, card.new(sections(image)))


@stands_in(c_void_p)
def cuModuleUnload(module):
    del card.handles[module]


@stands_in(c_void_p, c_void_p, c_char_p)
def cuModuleGetFunction(function, module, name):
    made, kernel = card.handles[module], name.decode()
    shared = made.get(f".nv.shared.{kernel}")
    own = shared.size - RESERVED_SHARED_BYTES if shared else 0
    store(function, c_void_p, card.new(Function(most_threads(made, kernel), own, PLAIN_SHARED_BYTES - own)))


@stands_in(c_void_p, c_int, c_void_p)
def cuFuncGetAttribute(value, attribute, function):
    made = card.handles[function]
    known = {SHARED_SIZE_BYTES: made.own_shared_bytes, MAX_DYNAMIC_SHARED_SIZE_BYTES: made.shared_bytes}
    store(value, c_int, known.get(attribute, 0))


@stands_in(c_void_p, c_int, c_int)
def cuFuncSetAttribute(function, attribute, value):
    made = card.handles[function]
    if attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES or made.own_shared_bytes + value > ATTRIBUTES[SHARED_BYTES_OPTIN]:
        raise Refused(INVALID_VALUE)
    made.shared_bytes = value


def launch(function, grid, block, shared_bytes, stream, values) -> None:
    made = card.handles[function]
    fits = min(*grid, *block) > 0 and max(grid[1:]) < 1 << 16 and math.prod(block) <= made.threads and block[2] <= 64
    if not fits or shared_bytes > made.shared_bytes:
        raise Refused(INVALID_VALUE)
    dtypes = [np.dtype(np.uint64 if parameter.endswith("*") else parameter) for parameter in made.kernel.parameters]
    passed = [np.frombuffer(ctypes.string_at(values[i], d.itemsize), d) for i, d in enumerate(dtypes)]
    card.put(card.stream(stream), Run(made.kernel, grid, block, shared_bytes, tuple(passed), card.memory))


@stands_in(c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p)
def cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared_bytes, stream, values, extra):
    launch(function, (gx, gy, gz), (bx, by, bz), shared_bytes, stream, values)


@stands_in(POINTER(Config), c_void_p, POINTER(c_void_p), c_void_p)
def cuLaunchKernelEx(config, function, values, extra):
    """In its turn: what comes of kernels that begin early is seen on the host device."""
    asked = config[0]
    early = asked.attributes[0]
    assert (asked.count, early.id, early.value) == (1, PROGRAMMATIC_STREAM_SERIALIZATION, 1)
    launch(function, tuple(asked.grid), tuple(asked.block), asked.shared_bytes, asked.stream, values)


def with_their_equals_on_the_host(compile: Callable[[CudaDevice, Source], Any]) -> Callable[[CudaDevice, Source], Any]:
    """CudaDevice._compile, after which each function that it has found knows what to run."""

    def compiled(self: CudaDevice, source: Source) -> Any:
        module = compile(self, source)
        kernels = host._compile(source).kernels
        for name, function in module.items():
            card.handles[function.kernel.ptr].kernel = kernels[name]
        return module

    return compiled


# cuBLAS.


@dataclass
class Blas:
    stream: int | None = None


@stands_in(c_void_p)
def cublasCreate_v2(handle):
    store(handle, c_void_p, card.new(Blas()))


@stands_in(c_void_p, c_void_p)
def cublasGetVersion_v2(handle, version):
    store(version, c_int, 130100)


@stands_in(c_void_p, c_int)
def cublasSetMathMode(handle, mode):
    assert isinstance(card.handles[handle], Blas)


@stands_in(c_void_p, c_void_p)
def cublasSetStream_v2(handle, stream):
    card.handles[handle].stream = stream


@dataclass(frozen=True)
class Columns:
    """A matrix as BLAS has it: columns one after another, each `leading` elements from the last."""

    address: int
    kind: int
    leading: int

    def array(self, rows: int, columns: int) -> np.ndarray:
        dtype = dtype_named(DTYPES[self.kind])
        size = (self.leading * (columns - 1) + rows) * dtype.itemsize
        if not card.memory.holds(self.address, size):
            raise Refused(ILLEGAL_ADDRESS)
        flat = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address)).view(dtype)
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), (dtype.itemsize, self.leading * dtype.itemsize))

    def factor(self, transposed: int, rows: int, columns: int) -> np.ndarray:
        array = self.array(columns, rows).T if transposed else self.array(rows, columns)
        return array.astype(np.float32)


@stands_in(c_void_p, *[c_int] * 5, c_void_p, *[c_void_p, c_int, c_int] * 2, *[c_void_p] * 2, *[c_int] * 4)
def cublasGemmEx(handle, op_a, op_b, m, n, k, alpha, *rest):
    a, kind_a, lead_a, b, kind_b, lead_b, beta, c, kind_c, lead_c, _, _ = rest
    A, B, C = Columns(a, kind_a, lead_a), Columns(b, kind_b, lead_b), Columns(c, kind_c, lead_c)
    by, kept = (ctypes.cast(number, POINTER(c_float))[0] for number in (alpha, beta))
    stream = card.stream(card.handles[handle].stream)
    if stream.graph:
        raise Refused(INVALID_HANDLE)  # CuPy's cuBLAS has a workspace that no graph may hold

    def multiply() -> None:
        product = by * A.factor(op_a, m, k) @ B.factor(op_b, k, n)
        C.array(m, n)[...] = product + kept * C.array(m, n) if kept else product

    card.put(stream, multiply)


@stands_in(*cublas_lt.FUNCTIONS["cublasLtMatmul"])
def cublasLtMatmul(*arguments):
    """At once, since its descriptors may be others a moment later."""
    card.finish(card.stream(arguments[-1]))
    return _beside.library.cublasLtMatmul(*arguments)


# Putting all that in its place.

RETURN_0 = bytes.fromhex("31c0c3")  # xor eax, eax; ret
WRITABLE_CODE = 7  # PROT_READ | PROT_WRITE | PROT_EXEC
PAGE = 4096


def jump(function: Any) -> bytes:
    """mov rax, address; jmp rax"""
    return b"\x48\xb8" + struct.pack("<Q", ctypes.cast(function, c_void_p).value) + b"\xff\xe0"


def symbols(path: str, *flags: str) -> list[list[str]]:
    """What nm says of a library, line by line."""
    said = subprocess.run(["nm", *flags, path], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in said.splitlines()]


def overwrite(path: str) -> None:
    """Functions of a loaded library become jumps to those of the same name here; at the end of Python, to nothing."""
    with open("/proc/self/maps") as maps:
        base = min(int(line.split("-")[0], 16) for line in maps if os.path.realpath(path) in line)
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [c_void_p, c_size_t, c_int]
    for symbol in symbols(path):
        if len(symbol) == 3 and symbol[1] == "t" and symbol[2] in functions:
            address, code = base + int(symbol[0], 16), jump(functions[symbol[2]])
            libc.mprotect(address & -PAGE, 2 * PAGE, WRITABLE_CODE)
            ctypes.memmove(address, code, len(code))
            atexit.register(ctypes.memmove, address, RETURN_0, len(RETURN_0))  # CuPy's last words come after ours


def library(soname: str, present: dict[str, Any], absent: Iterable[str] = ()) -> None:
    """Loads one whose functions jump to those that are present, and say of the others that nobody supports them."""
    slots = list(present)
    jumps = [f'__asm__(".globl {n}\\n{n}: jmp *slots+{8 * i}(%rip)");' for i, n in enumerate(slots)]
    unsupported = [f"int {name}(void) {{ return 15; }}" for name in absent]
    table = f'__attribute__((visibility("hidden"))) void *slots[{len(slots)}];'
    own = "void **the_slots(void) { return slots; } int nothing(void) { return 0; }"
    with tempfile.TemporaryDirectory() as folder:
        code, versions, made = (str(Path(folder, name)) for name in ("jumps.c", "versions", soname))
        Path(code).write_text("\n".join([table, own, *jumps, *unsupported]))
        Path(versions).write_text(f"{soname} {{ global: *; }};")
        named = f"-Wl,-soname,{soname},--version-script={versions}"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", named, "-o", made, code], check=True)
        loaded = ctypes.CDLL(made, ctypes.RTLD_GLOBAL)
    loaded.the_slots.restype = POINTER(c_void_p)
    table_of = loaded.the_slots()
    for i, function in enumerate(present.values()):
        table_of[i] = ctypes.cast(function, c_void_p)
        atexit.register(table_of.__setitem__, i, ctypes.cast(loaded.nothing, c_void_p))


def install() -> None:
    """Once, before CuPy is asked for anything."""
    import cupy_backends.cuda.api.runtime as runtime

    overwrite(runtime.__file__)
    library("libcuda.so.1", {name: function for name, function in functions.items() if re.match("cu[A-Z]", name)})
    with tempfile.TemporaryDirectory() as folder:
        _beside.library = compiled_cublas_lt(Path(folder, "cublas_lt.so"))
    lt = {name: functions.get(name, getattr(_beside.library, name)) for name in cublas_lt.FUNCTIONS}
    library("libcublasLt.so.13", lt)
    blas = {name: f for name, f in functions.items() if name.startswith("cublas") and name not in lt}
    (bindings,) = Path(runtime.__file__).parents[1].glob("libs/cublas.*.so")
    asked = {symbol[-1].split("@")[0] for symbol in symbols(str(bindings), "-D", "--undefined-only")}
    library("libcublas.so.13", blas, sorted({name for name in asked if name.startswith("cublas")} - set(blas)))
    CudaDevice._compile = with_their_equals_on_the_host(CudaDevice._compile)  # type: ignore[assignment,method-assign]


def main() -> None:
    """Runs a program, given with its arguments, on the stand-in."""
    install()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
