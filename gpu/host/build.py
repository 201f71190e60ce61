"""A .cu text into a shared library, by g++, kept in a cache under the hash of all that it was made from."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import threading
from functools import cache
from pathlib import Path

from neox.reference.errors import InputError

HERE = Path(__file__).resolve().parent
OLDEST_COMPILER = 12  # the first g++ whose C++ knows _Float16

FLAGS = [
    *("-x", "c++", "-std=c++17", "-fPIC", "-g", "-Wno-attributes", "-Wno-unknown-pragmas"),
    # A kernel may read floats as float4: the aliasing rules of C++ are not CUDA's.
    "-fno-strict-aliasing",
    # Modules loaded into one process must not share their state.
    *("-fvisibility=hidden", "-fno-gnu-unique"),
    # A frame larger than a page touches each of its pages, so that it cannot skip the one that guards the stack.
    "-fstack-clash-protection",
    "-ffp-contract=fast",  # as NVRTC does
    "-fdata-sections",  # see shared.ld
]
MACHINE_FLAGS = {"x86_64": ["-mf16c", "-mfma", "-mavx2"]}

# g++ checks these and calls undefined.h: no library is needed.
CHECKS = "alignment,bounds,shift,integer-divide-by-zero,null,bool,signed-integer-overflow"
MODES = {
    "fast": ["-O2"],
    "check": ["-O2", f"-fsanitize={CHECKS}", f"-fno-sanitize-recover={CHECKS}"],
    "address": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address", "-fsanitize-sections=host_shared"],
    "thread": ["-O1", "-fsanitize=thread"],
    "debug": ["-O0"],
}

EXPORT = 'extern "C" __attribute__((visibility("default")))'


def cache_folder() -> Path:
    """Where compiled kernels are kept: $NEOX_CACHE, or the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NEOX_CACHE") or Path(root) / "neox") / "host"


@cache
def compiler() -> tuple[str, str]:
    """Path and version of g++. InputError if there is none, or one too old."""
    path = shutil.which("g++")
    if path is None:
        raise InputError("the host device compiles kernels with g++, which is not installed: apt install g++")
    version = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    if int(version.split(".")[0]) < OLDEST_COMPILER:
        raise InputError(f"the host device needs g++ {OLDEST_COMPILER} or newer, and {path} is {version}")
    return path, version


def translation_unit(text: str, kernels: tuple[str, ...]) -> str:
    """The whole C++ file: our header, the kernels' text, two exported functions for each kernel and three for all."""
    entries = "".join(
        f"{EXPORT} int launch_{i}(const host::Launch* launch, void** arguments)"
        f" {{ return host::launch_typed(&{name}, launch, arguments); }}\n"
        f"{EXPORT} const char* signature_{i}() {{ return host::signature(&{name}); }}\n"
        for i, name in enumerate(kernels)
    )
    failure = f"{EXPORT} const host::Failure* last_failure() {{ return &host::failure; }}\n"
    stride = f"{EXPORT} size_t stack_stride() {{ return host::Stacks::STRIDE; }}\n"
    resume = f"{EXPORT} int resume() {{ return host::go_on(); }}\n"
    return f'#include "device_code.h"\nnamespace {{\n{text}\n}}\n#line 1 "entries"\n{entries}{failure}{stride}{resume}'


def build(text: str, kernels: tuple[str, ...], name: str, mode: str, defines: tuple[str, ...] = ()) -> Path:
    """The library of these kernels, compiled unless the cache has it. RuntimeError with what g++ said if it refuses."""
    unit = translation_unit(text, kernels)
    flags = [*FLAGS, *MACHINE_FLAGS.get(platform.machine(), []), *MODES[mode], *(f"-D{d}" for d in defines)]
    key = hashlib.sha256("\0".join([unit, *flags, platform.machine(), compiler()[1], _headers()]).encode())
    library = cache_folder() / f"{name}-{mode}-{key.hexdigest()[:20]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        _compile(unit, flags, library)
    return library


@cache
def _headers() -> str:
    return "".join(path.read_text() for path in (*sorted(HERE.glob("*.h")), HERE / "shared.ld"))


def _compile(unit: str, flags: list[str], library: Path) -> None:
    temporary = library.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    source, object_file = (temporary.with_suffix(f"{temporary.suffix}.{kind}") for kind in ("cpp", "o"))
    source.write_text(unit)
    sanitizer = [f for f in flags if f in ("-fsanitize=address", "-fsanitize=thread")]
    try:
        _run([*flags, f"-I{HERE}", "-c", str(source), "-o", str(object_file)])
        # Linked apart, without the flag of the checks, which would ask for their library.
        _run(["-shared", *sanitizer, f"-Wl,-T,{HERE / 'shared.ld'}", str(object_file), "-o", str(temporary)])
        os.replace(temporary, library)
    finally:
        source.unlink()
        object_file.unlink(missing_ok=True)


def _run(arguments: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # else g++ runs under the sanitizer too
    result = subprocess.run([compiler()[0], *arguments], capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(f"g++ does not compile a kernel:\n{result.stderr}")
