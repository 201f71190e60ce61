"""x W^T by cuBLAS, through CuPy's bindings of the C functions: sums in float32, whatever the dtype.

Neither `cupy.matmul` nor a handle of CuPy's is used: the first rounds the result to the dtype of its factors, and the
second may have been set to compute otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from neox.reference.errors import InputError

# Of cublas_api.h and library_types.h.
NONE, TRANSPOSED = 0, 1
TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF
COMPUTE_32F = 68  # factors as they are, so of float32 no TF32; sums in float32
ALL_IN_32F = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: parts of a split sum are not added in 16 bits
DEFAULT_ALGORITHM = -1

ONE, ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


@dataclass(frozen=True)
class Matrix:
    """Rows one after another."""

    address: int
    shape: tuple[int, int]
    dtype: str


def import_cublas() -> Any:
    """CuPy's bindings. InputError if it does not find the library."""
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError as error:
        install = "pip install 'cupy-cuda13x[ctk]' (or cupy-cuda12x[ctk]), or NVIDIA's CUDA toolkit"
        raise InputError(f"the products of long prompts need cuBLAS, which CuPy does not find: {install}") from error
    return cublas


def open_handle(cublas: Any) -> int:
    handle: int = cublas.create()
    cublas.setMathMode(handle, ALL_IN_32F)
    return handle


def major_version(cublas: Any, handle: int) -> int:
    version: int = cublas.getVersion(handle)
    return version // 10000


def multiply(cublas: Any, handle: int, x: Matrix, weight: Matrix, out: Matrix, add: bool = False) -> None:
    """(N,I), (O,I) -> (N,O), or that added to it, on CuPy's current stream.

    cuBLAS counts by columns: to it our rows are columns, and it is asked for out^T = weight x^T, (O,I) (I,N) -> (O,N).
    """
    (N, inputs), (outputs, _) = x.shape, weight.shape
    cublas.gemmEx(
        *(handle, TRANSPOSED, NONE, outputs, N, inputs, ONE.ctypes.data),
        *(weight.address, TYPES[weight.dtype], inputs),
        *(x.address, TYPES[x.dtype], inputs),
        *((ONE if add else ZERO).ctypes.data, out.address, TYPES[out.dtype], outputs),
        *(COMPUTE_32F, DEFAULT_ALGORITHM),
    )
