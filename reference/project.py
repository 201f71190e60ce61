"""x W^T, for a matrix that may be stored in fewer bits than x has.

A checkpoint in float16 or bfloat16 can stay as it lies on disk, mapped into memory: each product widens the matrix a
few rows at a time into one small buffer, so no second copy of the weights ever exists.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from neox.reference.cores import in_shares

BLOCK_BYTES = 1 << 22  # of widened rows: still in the processor's caches when they are multiplied
FEW_ROWS = 32  # for which OpenBLAS is up to twice as fast with the matrix as the first factor
SHARE_BYTES = 1 << 22  # of a matrix: widening them takes far longer than starting a thread


def project(x: NDArray, weight: NDArray) -> NDArray:  # (...,I), (O,I) -> (...,O)
    """x W^T in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1])  # one product for the whole batch: the matrix is read once
    y = _product(rows, weight) if weight.dtype == x.dtype else _project_widened(rows, weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _product(x: NDArray, weight: NDArray) -> NDArray:  # (N,I), (O,I) -> (N,O)
    if 1 < len(x) <= FEW_ROWS:
        return np.ascontiguousarray((weight @ x.T).T)
    return x @ weight.T


def _project_widened(x: NDArray, weight: NDArray) -> NDArray:  # (N,I), (O,I) -> (N,O)
    outputs, inputs = weight.shape
    step = max(1, BLOCK_BYTES // (inputs * x.itemsize))
    y = np.empty((len(x), outputs), x.dtype)

    def multiply(first: int, last: int) -> None:
        block = np.empty((min(step, last - first), inputs), x.dtype)
        for start in range(first, last, step):
            stop = min(start + step, last)
            widened = block[: stop - start]
            widen(weight[start:stop], out=widened)
            y[:, start:stop] = (widened @ x.T).T

    in_shares(multiply, outputs, step, max(1, weight.nbytes // SHARE_BYTES))
    return y


def widen(stored: NDArray, out: NDArray) -> None:
    """Copy float16 or bfloat16 into float32 (or anything into anything wider): every finite number exactly.

    NumPy converts half precision one element at a time; moving the bits by integer operations is four times as fast.
    The bits of a half, sign kept and the rest shifted by 13, are those of a float32 that is the half times 2^-112.
    """
    if out.dtype == np.float32 and stored.dtype == np.float16:
        bits = out.view(np.int32)
        np.left_shift(stored.view(np.int16), 13, out=bits, dtype=np.int32)
        bits &= np.int32(-0x70002000)  # 0x8fffe000: clears the copies of the sign
        out *= np.float32(2.0**112)
    elif out.dtype == np.float32 and stored.dtype.name == "bfloat16":
        np.left_shift(stored.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = stored
