"""The call of CUDA's driver: what it is passed, and that the structures are those of cuda.h."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neox.gpu import driver
from neox.gpu.host.build import compiler

# A driver that keeps to its header, and says what it was passed.
STAND_IN = """
#include <cuda.h>
#include <stdio.h>
static char said[1000];
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** arguments, void** extra) {
    snprintf(said, sizeof said,
             "%u %u %u, %u %u %u, %u, stream %zu, function %zu, %u attribute: %d = %d, %d, %g, %zx, %s",
             c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes,
             (size_t)c->hStream, (size_t)f, c->numAttrs,
             c->attrs[0].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
             c->attrs[0].value.programmaticStreamSerializationAllowed,
             *(int*)arguments[0], *(float*)arguments[1], (size_t)*(void**)arguments[2], extra ? "extra" : "no extra");
    return c->gridDimX == 7 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
const char* what_was_said(void) { return said; }
size_t sizes(int i) { return i == 0 ? sizeof(CUlaunchConfig) : sizeof(CUlaunchAttribute); }
"""
SAID = "3 2 1, 64 4 2, 1024, stream 77, function 88, 1 attribute: 1 = 1, -5, 2.5, 123456789abcdef0, no extra"


def headers() -> Path:
    """The folder of cuda.h, of the package nvidia-cuda-runtime."""
    found = [
        folder for path in sys.path if (folder := Path(path, "nvidia", "cu13", "include")).joinpath("cuda.h").is_file()
    ]
    if not found:
        pytest.skip("cuda.h is not installed")
    return found[0]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("driver")
    source, library = folder / "driver.c", folder / "driver.so"
    source.write_text(STAND_IN)
    command = [compiler()[0], "-x", "c++", "-shared", "-fPIC", f"-I{headers()}", str(source), "-o", str(library)]
    source.write_text(STAND_IN.replace("#include <cuda.h>", '#include <cuda.h>\nextern "C" {', 1) + "}\n")
    subprocess.run(command, check=True)
    opened = ctypes.CDLL(str(library))
    opened.what_was_said.restype = ctypes.c_char_p
    opened.sizes.restype = ctypes.c_size_t
    return opened


def launch(opened: Any, grid: tuple[int, int, int]) -> None:
    arguments = (np.int32(-5), np.float32(2.5), np.uint64(0x123456789ABCDEF0))
    driver.launch_early(opened, 88, grid, (64, 4, 2), 1024, 77, arguments)


def test_the_driver_gets_what_its_header_asks_for(stand_in, monkeypatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: stand_in if name == driver.LIBRARY else None)
    opened = driver.open_driver()
    launch(opened, (3, 2, 1))
    assert stand_in.what_was_said().decode() == SAID
    assert [stand_in.sizes(0), stand_in.sizes(1)] == [ctypes.sizeof(driver.Config), ctypes.sizeof(driver.Attribute)]
    with pytest.raises(driver.DriverError, match="cuLaunchKernelEx returned 1"):
        launch(opened, (7, 2, 1))
