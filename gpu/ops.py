"""One checked launcher for each kernel. All work on arrays that exist: nothing is allocated here.

Dimensions: N rows (batch times positions), C hidden_size, F intermediate_size, V vocab_size. Weights and activations
are of one dtype, float32, float16 or bfloat16; the residual stream and whatever a product accumulated are float32.
ValueError says which argument has the wrong shape or dtype.
"""

from __future__ import annotations

import numpy as np

from neox.gpu.device import Array
from neox.gpu.source import Source

TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
ACTIVATIONS = {"gelu": "Gelu", "gelu_fast": "GeluFast"}

EMBEDDING = Source("embedding.cu", tuple(f"embedding<{T}>" for T in TYPES.values()))
LAYER_NORM = Source(
    "layer_norm.cu",
    tuple(f"{name}<{T}>" for name in ("layer_norm_naive", "layer_norm", "layer_norm_pair") for T in TYPES.values()),
)
GELU = Source("gelu.cu", tuple(f"bias_gelu<{T}, {a}>" for T in TYPES.values() for a in ACTIVATIONS.values()))
SOURCES = (EMBEDDING, LAYER_NORM, GELU)

THREADS = 256  # of a block whose work any number of threads can share


def type_of(array: Array) -> str:
    """The CUDA type of an array's elements. ValueError unless kernels exist for it."""
    if array.dtype.name not in TYPES:
        raise ValueError(f"{array.dtype} is none of {', '.join(TYPES)}")
    return TYPES[array.dtype.name]


def expect(name: str, array: Array, shape: tuple[int, ...], dtype: object) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} of shape {shape}, not {array.dtype} of shape {array.shape}")


def embedding(ids: Array, table: Array, out: Array) -> None:
    """out[n] = table[ids[n]]: int32 (N), (V,C) -> float32 (N,C). The ids must lie in the table."""
    (N,), (_, C) = ids.shape, table.shape
    expect("ids", ids, (N,), np.int32)
    expect("out", out, (N, C), np.float32)
    out.device.launch(EMBEDDING, f"embedding<{type_of(table)}>", N, THREADS, (ids, table, out, np.int32(C)))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float, out: Array) -> None:
    """LayerNorm of each row: float32 (N,C), 2 x (C) -> (N,C) in the dtype of the weight."""
    N, C = _check_norm(x, (weight, bias), (out,))
    arguments = (x, weight, bias, out, np.int32(C), np.float32(eps))
    out.device.launch(LAYER_NORM, f"layer_norm<{type_of(weight)}>", N, _row_threads(C), arguments)


def layer_norm_naive(x: Array, weight: Array, bias: Array, eps: float, out: Array) -> None:
    """The same, one thread to a row."""
    N, C = _check_norm(x, (weight, bias), (out,))
    arguments = (x, weight, bias, out, np.int32(N), np.int32(C), np.float32(eps))
    out.device.launch(LAYER_NORM, f"layer_norm_naive<{type_of(weight)}>", -(-N // 32), 32, arguments)


def layer_norm_pair(
    x: Array, weight1: Array, bias1: Array, weight2: Array, bias2: Array, eps: float, out1: Array, out2: Array
) -> None:
    """The two norms of a parallel block: float32 (N,C), 4 x (C) -> 2 x (N,C) in the dtype of the weights."""
    N, C = _check_norm(x, (weight1, bias1, weight2, bias2), (out1, out2))
    arguments = (x, weight1, bias1, weight2, bias2, out1, out2, np.int32(C), np.float32(eps))
    out1.device.launch(LAYER_NORM, f"layer_norm_pair<{type_of(weight1)}>", N, _row_threads(C), arguments)


def bias_gelu(x: Array, bias: Array, activation: str, out: Array) -> None:
    """gelu(x + bias): float32 (N,F), (F) -> (N,F) in the dtype of the bias. activation: "gelu" or "gelu_fast"."""
    N, F = x.shape
    expect("x", x, (N, F), np.float32)
    expect("bias", bias, (F,), bias.dtype)
    expect("out", out, (N, F), bias.dtype)
    kernel = f"bias_gelu<{type_of(bias)}, {ACTIVATIONS[activation]}>"
    out.device.launch(GELU, kernel, (-(-F // THREADS), N), THREADS, (x, bias, out, np.int32(F)))


def _check_norm(x: Array, weights: tuple[Array, ...], outs: tuple[Array, ...]) -> tuple[int, int]:
    N, C = x.shape
    expect("x", x, (N, C), np.float32)
    for weight in weights:
        expect("weight and bias", weight, (C,), weights[0].dtype)
    for out in outs:
        expect("out", out, (N, C), weights[0].dtype)
    return N, C


def _row_threads(C: int) -> int:
    """Whole warps, enough for a row of C columns, up to the largest block."""
    return min(-(-C // 32) * 32, 1024)
