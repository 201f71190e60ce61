"""x W^T by cublasLt, which does in passing what would read and write the sums once more: bias, GELU, addition.

CuPy has no bindings for it: it is reached by ctypes, under the names of cublasLt.h, whose versions 12 and 13 agree in
all that is used here. As in cublas.py, our rows are its columns.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from dataclasses import dataclass, field
from typing import Any

from neox.gpu.cublas import COMPUTE_32F, ONE, TRANSPOSED, TYPES, ZERO, Matrix

# Of cublasLt.h.
TRANSA, EPILOGUE, BIAS_POINTER = 3, 7, 8  # CUBLASLT_MATMUL_DESC_
BIAS, GELU_BIAS = 4, 36  # CUBLASLT_EPILOGUE_, GELU by tanh
MAX_WORKSPACE_BYTES, REDUCTION_SCHEME_MASK, MIN_ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # CUBLASLT_MATMUL_PREF_, of A to D
IN_COMPUTE_TYPE = 2  # CUBLASLT_REDUCTION_SCHEME_: parts of a split sum are not added in the type of the result

ALIGNMENT = 16  # bytes of every address and row
WORKSPACE_BYTES = 32 << 20


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = (("data", c_uint64 * 8),)


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        *(("algo", Algorithm), ("workspaceSize", c_size_t), ("state", c_int)),
        *(("wavesCount", c_float), ("reserved", c_int * 4)),
    )


# Handles, descriptors and addresses are pointers; types and attributes are enums.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (c_void_p,),
    "cublasLtMatmulDescCreate": (c_void_p, c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatrixLayoutCreate": (c_void_p, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatmulPreferenceCreate": (c_void_p,),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulAlgoGetHeuristic": (*[c_void_p] * 7, c_int, c_void_p, c_void_p),
    "cublasLtMatmul": (*[c_void_p] * 14, c_size_t, c_void_p),
}


@dataclass(frozen=True)
class Plan:
    """How products of some sizes and types are computed."""

    product: c_void_p  # cublasLtMatmulDesc_t
    layouts: tuple[c_void_p, c_void_p, c_void_p]  # cublasLtMatrixLayout_t of weight, x and out
    algorithm: Algorithm


@dataclass(frozen=True)
class Library:
    functions: Any
    handle: c_void_p
    workspace: int  # address of WORKSPACE_BYTES
    plans: dict[tuple[object, ...], Plan | None] = field(default_factory=dict)  # None where there is no kernel


def load(major: int) -> Any | None:
    """The library beside cuBLAS of this version; None if there is none.

    cuBLAS needs it and has loaded it, from wherever that is: a loader finds again by name what is loaded already.
    """
    name = f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}"
    try:
        functions = ctypes.CDLL(name)
    except OSError:
        return None
    for function, types in FUNCTIONS.items():
        getattr(functions, function).argtypes = types
    return functions


def open_library(functions: Any, workspace: int) -> Library:
    """With a handle of its own. workspace: address of WORKSPACE_BYTES, a multiple of 256."""
    return Library(functions, _create(functions, "cublasLtCreate"), workspace)


def _call(functions: Any, name: str, *arguments: object) -> None:
    status = getattr(functions, name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed with status {status}")


def _create(functions: Any, name: str, *arguments: object) -> c_void_p:
    made = c_void_p()
    _call(functions, name, byref(made), *arguments)
    return made


def _set(functions: Any, name: str, descriptor: c_void_p, attribute: int, value: Any) -> None:
    _call(functions, f"{name}SetAttribute", descriptor, attribute, byref(value), sizeof(value))


def multiply(
    library: Library,
    stream: int,
    x: Matrix,
    weight: Matrix,
    bias: int,
    out: Matrix,
    *,
    gelu: bool = False,
    add: bool = False,
) -> bool:
    """x weight^T + bias, or its GELU by tanh, or that sum added to out: (N,I), (O,I), (O) -> (N,O).

    bias: address, in the dtype of out. Sums and bias are float32 up to the one rounding at the end. False, and nothing
    is done, if an address or a row is no whole pieces of 16 bytes, or cublasLt has no kernel for it.
    """
    rows = (_row_bytes(matrix) for matrix in (x, weight, out))
    if any(number % ALIGNMENT for number in (x.address, weight.address, bias, out.address, *rows)):
        return False
    key = x.shape, weight.shape, x.dtype, out.dtype, gelu
    if key not in library.plans:
        library.plans[key] = _plan(library, x, weight, out, GELU_BIAS if gelu else BIAS)
    plan = library.plans[key]
    if plan is None:
        return False
    A, B, D = plan.layouts
    _set(library.functions, "cublasLtMatmulDesc", plan.product, BIAS_POINTER, c_void_p(bias))
    _call(
        *(library.functions, "cublasLtMatmul", library.handle, plan.product),
        *(ONE.ctypes.data, weight.address, A, x.address, B),
        *((ONE if add else ZERO).ctypes.data, out.address, D, out.address, D),
        *(byref(plan.algorithm), library.workspace, WORKSPACE_BYTES, stream),
    )
    return True


def _row_bytes(matrix: Matrix) -> int:
    return matrix.shape[1] * (4 if matrix.dtype == "float32" else 2)


def _plan(library: Library, x: Matrix, weight: Matrix, out: Matrix, epilogue: int) -> Plan | None:
    """out^T = weight x^T, (O,I) (I,N) -> (O,N), in the way that cublasLt takes for the fastest."""
    functions = library.functions
    product = _product(functions, epilogue)
    layouts = (_layout(functions, weight), _layout(functions, x), _layout(functions, out))
    A, B, D = layouts
    found, count = Heuristic(), c_int()
    status = functions.cublasLtMatmulAlgoGetHeuristic(
        *(library.handle, product, A, B, D, D, _preference(functions), 1, byref(found), byref(count))
    )
    return None if status or not count or found.state else Plan(product, layouts, found.algo)


def _product(functions: Any, epilogue: int) -> c_void_p:
    product = _create(functions, "cublasLtMatmulDescCreate", COMPUTE_32F, TYPES["float32"])
    for attribute, value in (
        (TRANSA, c_int32(TRANSPOSED)),
        (EPILOGUE, c_uint32(epilogue)),
        # Not read before there is a bias. A kernel is chosen by how well the address is aligned: as this one is.
        (BIAS_POINTER, c_void_p(ALIGNMENT)),
    ):
        _set(functions, "cublasLtMatmulDesc", product, attribute, value)
    return product


def _layout(functions: Any, matrix: Matrix) -> c_void_p:
    rows, columns = matrix.shape
    return _create(functions, "cublasLtMatrixLayoutCreate", TYPES[matrix.dtype], columns, rows, columns)


def _preference(functions: Any) -> c_void_p:
    preference = _create(functions, "cublasLtMatmulPreferenceCreate")
    for attribute, value in (
        (MAX_WORKSPACE_BYTES, c_uint64(WORKSPACE_BYTES)),
        (REDUCTION_SCHEME_MASK, c_uint32(IN_COMPUTE_TYPE)),
        *((alignment, c_uint32(ALIGNMENT)) for alignment in MIN_ALIGNMENTS),
    ):
        _set(functions, "cublasLtMatmulPreference", preference, attribute, value)
    return preference
