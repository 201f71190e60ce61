"""A layer's decode step in three launches, each of them one stream over weights: the launchers of the fused kernels.

What ops.py computes in ten launches, these compute in three, for up to 16 rows in 16 bits. The kernels there stay: they
are what a reader reads first, what prompts and float32 go through, and what these are compared with.

Dimensions as in ops.py. ValueError says which argument has the wrong shape or dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from neox.gpu import ops
from neox.gpu.device import Argument, Array, Device, expect
from neox.gpu.source import Source

THREADS, UNIT = 256, 16  # of a block, as in stream.cuh: threads, and outputs at a time
LARGEST_HEAD_DIM = 256
MOST_ROWS = ops.FUSED_ROWS[-1]
TOGETHER = 2  # blocks on a multiprocessor, if its shared memory suffices
RESERVED = 1024  # bytes of shared memory that each block takes beside its own


def fused_qkv(
    x: Array,
    gain: Array,
    shift: Array,
    eps: float,
    weight: Array,
    bias: Array | None,
    cos: Array,
    sin: Array,
    texts: Array,
    positions: Array,
    q: Array,
    keys: Array,
    values: Array,
    pages: Array,
    taken: Array,
    *,
    blocks: int | None = None,
) -> None:
    """Norm, product with query_key_value, bias and rotation of N positions; their keys and values are appended.

    x: float32 (N,C); gain, shift: (C) of the norm; weight: (3HD,C); bias: (3HD) or None; cos, sin: float32 (P,R/2);
    texts, positions: int32 (N), which must lie in the cache and the tables; q: (N,HD); keys, values: (pages,H,S,D);
    pages: int32 (B,P), of each text; taken: uint32 (1).
    """
    (N, C), (_, H, S, D), (known, half) = x.shape, keys.shape, cos.shape
    _check_norm(x, gain, shift, weight)
    ops.check_cache(q, keys, values, pages, texts, positions)
    expect("q", q, (N, H * D), weight.dtype)
    expect("weight", weight, (3 * H * D, C), weight.dtype)
    if bias is not None:
        expect("bias", bias, (3 * H * D,), weight.dtype)
    for table in (cos, sin):
        expect("cos and sin", table, (known, half), np.float32)
    if not 0 < 2 * half <= D or D % 8:
        raise ValueError(f"{2 * half} of {D} dims cannot be rotated, or {D} is no multiple of 8")
    expect("taken", taken, (1,), np.uint32)
    name = f"fused_qkv<{_type_of(weight)}, {_rows(N)}>"
    sizes, cache = map(np.int32, (N, C, H, D, 2 * half, pages.shape[1], S)), (keys, values, pages)
    arguments = (x, gain, shift, weight, bias, cos, sin, texts, positions, q, *cache, taken, *sizes, np.float32(eps))
    _launch(replace(ops.FUSED_QKV, kernels=(name,)), N, 3 * H * D, blocks, arguments, _normed_bytes(N, C))


def fused_mlp(
    x: Array,
    gain: Array,
    shift: Array,
    eps: float,
    up: Array,
    up_bias: Array,
    activation: str,
    activated: Array,
    q: Array,
    keys: Array,
    values: Array,
    pages: Array,
    texts: Array,
    positions: Array,
    partial: Array,
    z: Array,
    arrived: Array,
    taken: Array,
    *,
    blocks: int | None = None,
) -> None:
    """The MLP up to its activation, and attention beside it.

    x: float32 (N,C); gain, shift: (C) of the norm; up: (F,C); up_bias: (F); activation: "gelu" or "gelu_fast";
    activated: (N,F). The others as ops.attention_decode has them, z being its out; arrived: uint32 (N,H); taken: (2).
    """
    (N, C), (F, _), (_, H, S, D), splits = x.shape, up.shape, keys.shape, partial.shape[2]
    _check_norm(x, gain, shift, up)
    ops.check_cache(q, keys, values, pages, texts, positions)
    for name, array, shape in (
        ("q", q, (N, H * D)),
        ("z", z, (N, H * D)),
        ("activated", activated, (N, F)),
        ("up", up, (F, C)),
    ):
        expect(name, array, shape, up.dtype)
    expect("up_bias", up_bias, (F,), up.dtype)
    expect("partial", partial, (N, H, splits, D + 2), np.float32)
    expect("arrived", arrived, (N, H), np.uint32)
    expect("taken", taken, (2,), np.uint32)
    if D % 8 or D > LARGEST_HEAD_DIM or F % 8:
        raise ValueError(f"head_dim {D} and {F} must be multiples of 8, and head_dim at most {LARGEST_HEAD_DIM}")
    name = f"fused_mlp<{_type_of(up)}, {ops.ACTIVATIONS[activation]}, {D}, {_rows(N)}>"
    arguments: list[Argument] = [x, gain, shift, up, up_bias, activated, q, keys, values, pages, texts, positions]
    arguments += [partial, z, arrived, taken, np.int32(x.device.multiprocessors), np.int32(splits)]
    arguments += [*map(np.int32, (N, C, F, H, pages.shape[1], S)), np.float32(eps)]
    shared = max(_normed_bytes(N, C), _groups_bytes(D))
    _launch(replace(ops.FUSED_MLP, kernels=(name,)), N, F, blocks, arguments, shared)


def fused_output(
    z: Array,
    dense: Array,
    dense_bias: Array | None,
    activated: Array,
    down: Array,
    down_bias: Array | None,
    before: Array | None,
    x: Array,
    taken: Array,
    *,
    blocks: int | None = None,
) -> None:
    """x = before + z dense^T + activated down^T + biases: (N,I), (C,I), (C), (N,F), (C,F), (C) -> float32 (N,C).

    before: float32 (N,C), which may be x; it and the biases may be None. N up to 16, float16 or bfloat16, C, I and F
    multiples of 8; taken: uint32 (1).
    """
    (N, C), (_, inputs), (_, F) = x.shape, z.shape, activated.shape
    for array in (x, before):
        if array is not None:
            expect("x and before", array, (N, C), np.float32)
    for name, array, shape in (("z", z, (N, inputs)), ("dense", dense, (C, inputs)), ("activated", activated, (N, F))):
        expect(name, array, shape, down.dtype)
    expect("down", down, (C, F), down.dtype)
    for bias in (dense_bias, down_bias):
        if bias is not None:
            expect("bias", bias, (C,), down.dtype)
    expect("taken", taken, (1,), np.uint32)
    _check_pieces(z, dense, activated, down)
    if C % 8:
        raise ValueError(f"{C} outputs are no multiple of 8")
    name = f"fused_output<{_type_of(down)}, {_rows(N)}>"
    sizes = map(np.int32, (N, C, inputs, F))
    arguments = (z, dense, dense_bias, activated, down, down_bias, before, x, taken, *sizes)
    _launch(replace(ops.FUSED_OUTPUT, kernels=(name,)), N, C, blocks, arguments)


def can_fuse(device: Device, dtype: np.dtype, N: int, C: int, D: int) -> bool:
    """Whether these kernels take N rows of this dtype, and heads of D dims."""
    fits = N <= MOST_ROWS and _shared(N, max(_normed_bytes(N, C), _groups_bytes(D))) <= device.shared_bytes
    return ops.TYPES[dtype.name] in ops.SHORT_TYPES and fits and D % 8 == 0 and D <= LARGEST_HEAD_DIM


def _launch(
    source: Source, N: int, outputs: int, blocks: int | None, arguments: Sequence[Argument], shared: int = 0
) -> None:
    """Of the one kernel of a source; its first argument is an array. blocks: as many as fit, unless a test says."""
    (name,), first = source.kernels, arguments[0]
    assert isinstance(first, Array)
    device = first.device
    together = min(TOGETHER, (device.shared_bytes + RESERVED) // (_shared(N, shared) + RESERVED))
    grid = min(blocks or together * device.multiprocessors, -(-outputs // UNIT))
    device.launch(source, name, grid, THREADS, arguments, shared)


def _shared(N: int, dynamic: int) -> int:
    """With what stream.cuh takes: two turns of a unit's sums by 8 warps, and less than 256 bytes."""
    return dynamic + 2 * 8 * _rows(N) * UNIT * 4 + 256


def _normed_bytes(N: int, C: int) -> int:
    """normed.cuh: N rows of C numbers of 16 bits, at every 64 k + 32."""
    return N * 2 * ((C + 31) // 64 * 64 + 32)


def _groups_bytes(D: int) -> int:
    """attention.cuh: a maximum, a weight and D sums for each group of lanes that share a key."""
    lanes = next(lanes for lanes in (1, 2, 4, 8, 16, 32) if 3 * lanes >= D // 8)
    return THREADS // lanes * 4 * (D + 2)


def _check_norm(x: Array, gain: Array, shift: Array, weight: Array) -> None:
    N, C = x.shape
    expect("x", x, (N, C), np.float32)
    for array in (gain, shift):
        expect("gain and shift", array, (C,), weight.dtype)
    _check_pieces(weight)


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
