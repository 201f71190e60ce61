"""A layer's decode step in three launches, each of them one stream over weights: the launchers of the fused kernels.

What ops.py computes in ten launches, these compute in three, for up to 16 rows in 16 bits. The kernels there stay: they
are what a reader reads first, what prompts and float32 go through, and what these are compared with.

Dimensions as in ops.py. ValueError says which argument has the wrong shape or dtype.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from neox.gpu import ops
from neox.gpu.device import Array, expect

THREADS, UNIT = 256, 16  # of a block, as in stream.cuh: threads, and outputs at a time
MOST_ROWS = ops.FUSED_ROWS[-1]
BLOCKS = 264  # that stay: two on each multiprocessor of an H200, which has 132


def fused_output(
    z: Array,
    dense: Array,
    dense_bias: Array | None,
    activated: Array,
    down: Array,
    down_bias: Array,
    x: Array,
    blocks: int = BLOCKS,
) -> None:
    """x += z dense^T + activated down^T + biases: (N,C), (C,C), (C) or None, (N,F), (C,F), (C) -> float32 (N,C).

    N up to 16, float16 or bfloat16, C and F multiples of 8.
    """
    (N, C), (_, F) = x.shape, activated.shape
    expect("x", x, (N, C), np.float32)
    for name, array, shape in (("z", z, (N, C)), ("dense", dense, (C, C)), ("activated", activated, (N, F))):
        expect(name, array, shape, down.dtype)
    expect("down", down, (C, F), down.dtype)
    for bias in (dense_bias, down_bias):
        if bias is not None:
            expect("bias", bias, (C,), down.dtype)
    _check_pieces(z, dense, activated, down)
    name = f"fused_output<{_type_of(down)}, {_rows(N)}>"
    arguments = (z, dense, dense_bias, activated, down, down_bias, x, np.int32(N), np.int32(C), np.int32(F))
    source = replace(ops.FUSED_OUTPUT, kernels=(name,))
    x.device.launch(source, name, min(blocks, -(-C // UNIT)), THREADS, arguments)


def _type_of(weight: Array) -> str:
    kind = ops.type_of(weight)
    if kind not in ops.SHORT_TYPES:
        raise ValueError(f"tensor cores multiply numbers of 16 bits, not {weight.dtype}")
    return kind


def _rows(N: int) -> int:
    """Of the kernel that takes N rows."""
    if N > MOST_ROWS:
        raise ValueError(f"a fused product takes up to {MOST_ROWS} rows, not {N}")
    return next(rows for rows in ops.FUSED_ROWS if rows >= N)


def _check_pieces(*matrices: Array) -> None:
    """That rows can be read in pieces of 16 bytes."""
    for matrix in matrices:
        if matrix.shape[1] % 8 or matrix.address % 16:
            raise ValueError(f"rows of {matrix.shape[1]} numbers are not whole pieces of 8 at multiples of 16 bytes")
