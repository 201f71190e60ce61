"""The fused kernels of a decode step, each against float64: rows, shapes about slices and units, blocks, schedules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from devices import ROUNDING, all_devices, devices
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from paged import paged
from test_kernels_attention_decode import PAGES
from test_kernels_attention_decode import floor as attention_floor

from neox.gpu import fused, ops
from neox.gpu.device import Array, Device, dtype_named

EPS = 1e-5
STEP = 2.0**-24  # largest relative error of one rounding in float32
SHORT = st.sampled_from(("float16", "bfloat16"))
ROWS = st.sampled_from((1, 2, 7, 8, 9, 16))
seeds = st.integers(0, 2**32 - 1)


def numbers(rng: np.random.Generator, dtype: str, *shape: int, scale: float = 1) -> NDArray:
    return (scale * rng.normal(size=shape)).astype(dtype_named(dtype))


def wide(*arrays: NDArray) -> list[NDArray]:
    return [array.astype(np.float64) for array in arrays]


def roundings(*inputs: int) -> int:
    """Of the longest chain of additions to a sum over these inputs.

    A warp takes every 8th slice of 32 numbers, in two products of 16 and a sum each. Tensor cores cut digits off
    instead of rounding: twice the error. Then 8 warps and, at most, three terms more.
    """
    slices = sum(-(-count // 32) for count in inputs)
    return 2 * 2 * 17 * -(-slices // 8) + 8 + 3


def check_output(
    device: Device,
    N: int,
    C: int,
    F: int,
    dtype: str,
    blocks: int = 3,
    biased: bool = True,
    seed: int = 0,
    inputs: int = 0,
    whole: bool = True,
) -> None:
    """inputs: of heads, 0 for C. A part of a whole has no residual, and no biases."""
    rng, inputs = np.random.default_rng(seed), inputs or C
    z, activated = numbers(rng, dtype, N, inputs), numbers(rng, dtype, N, F)
    dense, down = numbers(rng, dtype, C, inputs, scale=inputs**-0.5), numbers(rng, dtype, C, F, scale=F**-0.5)
    dense_bias, down_bias = numbers(rng, dtype, C, scale=0.3), numbers(rng, dtype, C, scale=0.3)
    x = rng.normal(size=(N, C)).astype(np.float32)
    stream = device.array(x if whole else np.full((N, C), np.nan, np.float32))
    a, w, b, c, v, d = (device.array(array) for array in (z, dense, dense_bias, activated, down, down_bias))
    ends = (b if biased else None, d, stream) if whole else (None, None, None)
    taken = device.zeros(1, "uint32")
    fused.fused_output(a, w, ends[0], c, v, ends[1], ends[2], stream, taken, blocks=blocks)

    factors = wide(z, dense, activated, down)
    terms = wide(*((x, down_bias, dense_bias * biased) if whole else [np.zeros(C)]))
    exact = factors[0] @ factors[1].T + factors[2] @ factors[3].T + sum(terms)
    magnitudes = np.abs(factors[0]) @ np.abs(factors[1]).T + np.abs(factors[2]) @ np.abs(factors[3]).T
    error = np.abs(stream.get() - exact)
    assert (error <= roundings(inputs, F) * STEP * (magnitudes + sum(map(np.abs, terms)))).all()
    assert taken.get() == 0


COLUMNS = st.sampled_from((8, 24, 40, 120, 264))
INNER = st.sampled_from((8, 32, 136, 320, 1544))  # the last: a round of slices, and one more


@settings(max_examples=40)
@given(devices(), ROWS, COLUMNS, INNER, SHORT, st.sampled_from((1, 2, 5, 264)), st.booleans(), seeds)
def test_the_outputs_of_both_branches_are_added(device, N, C, F, dtype, blocks, biased, seed) -> None:
    check_output(device, N, C, F, dtype, blocks, biased, seed)


@settings(max_examples=30)
@given(devices(), ROWS, COLUMNS, COLUMNS, INNER, SHORT, st.sampled_from((1, 5)), st.booleans(), st.booleans(), seeds)
def test_some_heads_and_neurons_add_their_part(device, N, C, inputs, F, dtype, blocks, biased, whole, seed) -> None:
    check_output(device, N, C, F, dtype, blocks, biased, seed, inputs, whole)


# Against the kernels that they are made of.


def normed(rng: np.random.Generator, dtype: str, N: int, C: int) -> tuple[NDArray, NDArray, NDArray]:
    """x, and weight and bias of its norm."""
    x = (rng.normal(size=(N, C)) + 3).astype(np.float32)
    return x, (1 + numbers(rng, "float32", C, scale=0.3)).astype(dtype_named(dtype)), numbers(rng, dtype, C, scale=0.3)


def assert_near(fused: NDArray, plain: NDArray, dtype: str, floor: float) -> None:
    """Both round the same number, which errs by up to `floor` in either: to neighbours at most, where it is larger."""
    fused, plain = fused.astype(np.float64), plain.astype(np.float64)
    assert np.isnan(fused).tolist() == np.isnan(plain).tolist()
    error = np.nan_to_num(np.abs(fused - plain))
    assert (error <= 2 * (ROUNDING[dtype] * np.nan_to_num(np.abs(plain)) + floor)).all()


def sum_floor(C: int, largest: float) -> float:
    """What the order of additions can change in a product with C numbers of a normed row, up to `largest`, each."""
    return roundings(C) * STEP * C**0.5 * largest


def check_qkv(
    device: Device,
    N: int,
    H: int,
    D: int,
    R: int,
    dtype: str,
    blocks: int = 3,
    biased: bool = True,
    S: int = 9,
    seed: int = 0,
    P: int = 1,
    C: int = 0,
) -> None:
    """3 texts of P pages of S positions each. C: of the stream, 0 for H D, which it is where no rank has some heads."""
    rng, C = np.random.default_rng(seed), C or H * D
    x, gain, shift = map(device.array, normed(rng, dtype, N, C))
    weight = device.array(numbers(rng, dtype, 3 * H * D, C, scale=C**-0.5))
    bias = device.array(numbers(rng, dtype, 3 * H * D))
    slots = rng.choice(3 * P * S, N, replace=False)
    texts, positions = (device.array(a.astype(np.int32)) for a in (slots // (P * S), slots % (P * S)))
    pages = device.array(rng.permutation(3 * P).reshape(3, P).astype(np.int32))
    angles = rng.normal(size=(P * S, R // 2))
    cos, sin = (device.array(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    given, taken = bias if biased else None, device.zeros(1, "uint32")
    results = []
    for fuse in (True, False):
        q = device.empty((N, H * D), dtype)
        keys, values = (empty_cache(device, dtype, 3 * P, H, S, D) for _ in range(2))
        rest = (cos, sin, texts, positions, q, keys, values, pages)
        if fuse:
            fused.fused_qkv(x, gain, shift, EPS, weight, given, *rest, taken, blocks=blocks)
        else:
            row, qkv = device.empty((N, C), dtype), device.empty((N, 3 * H * D), "float32")
            ops.layer_norm(x, gain, shift, EPS, row)
            ops.product_naive(row, weight, qkv)
            ops.rotary_append(qkv, given, *rest)
        results.append([array.get() for array in (q, keys, values)])
    floor = sum_floor(C, np.abs(row.get().astype(np.float64)).max())
    for ours, plain in zip(*results, strict=True):
        assert_near(ours, plain, dtype, floor)
    assert taken.get() == 0


def empty_cache(device: Device, dtype: str, *shape: int) -> Array:
    return device.array(np.full(shape, np.nan, dtype_named(dtype)))


TABLES = st.sampled_from(((9, 1), (4, 3), (1, 7)))  # positions of a page, and pages of a text
HEADS = st.sampled_from(((24, 6), (96, 24), (16, 4), (80, 20), (64, 64), (8, 2)))  # head_dim and rotary_ndims


@settings(max_examples=30)
@given(devices(), ROWS, st.integers(1, 3), HEADS, SHORT, st.sampled_from((1, 2, 5, 264)), st.booleans(), TABLES, seeds)
def test_queries_keys_and_values_are_those_of_the_plain_kernels(
    device, N, H, head, dtype, blocks, biased, table, seed
) -> None:
    check_qkv(device, N, H, head[0], head[1], dtype, blocks, biased, table[0], seed, table[1])


@settings(max_examples=15)
@given(devices(), ROWS, st.integers(1, 3), HEADS, SHORT, st.sampled_from((40, 120, 264)), seeds)
def test_some_heads_of_a_model_are_those_of_the_plain_kernels(device, N, H, head, dtype, C, seed) -> None:
    check_qkv(device, N, H, head[0], head[1], dtype, seed=seed, C=C)
    check_mlp(device, [7, 40][:N], H, max(24, head[0]), 40, dtype, seed=seed, C=C)


def test_positions_over_1000() -> None:
    for device in all_devices():
        check_qkv(device, 5, 2, 24, 6, "float16", 2, True, 1500)
        check_qkv(device, 5, 2, 24, 6, "float16", 2, True, 64, P=20)


def check_mlp(
    device: Device,
    lengths: list[int],
    H: int,
    D: int,
    F: int,
    dtype: str,
    blocks: int = 3,
    splits: int = 2,
    activation: str = "gelu_fast",
    seed: int = 0,
    size: int = 0,
    C: int = 0,
) -> None:
    """Query n belongs to text N - n of N + 1; the cache is NaN beyond each text. size: of pages, 0 for one each.

    C: as of check_qkv.
    """
    rng, C, N, S = np.random.default_rng(seed), C or H * D, len(lengths), max(lengths) + 2
    x, gain, shift = map(device.array, normed(rng, dtype, N, C))
    up, bias = device.array(numbers(rng, dtype, F, C, scale=C**-0.5)), device.array(numbers(rng, dtype, F, scale=0.3))
    q, keys, values = numbers(rng, dtype, N, H * D), *(numbers(rng, dtype, N + 1, H, S, D) for _ in range(2))
    texts, positions = np.arange(N, 0, -1, dtype=np.int32), np.array(lengths, np.int32) - 1
    for t, p in zip(texts, positions, strict=True):
        keys[t, :, p + 1 :] = values[t, :, p + 1 :] = np.nan
    cut, pages = paged(size, keys, values, seed=seed)
    queries, k, v = (device.array(a) for a in (q, *cut))
    over = queries, k, v, device.array(pages), device.array(texts), device.array(positions)
    partial = device.empty((N, H, splits, D + 2), "float32")
    activated, plain_activated = (device.empty((N, F), dtype) for _ in range(2))
    row, z, plain_z = device.empty((N, C), dtype), *(device.empty((N, H * D), dtype) for _ in range(2))
    hidden = device.empty((N, F), "float32")
    arrived, taken = device.zeros((N, H), "uint32"), device.zeros(2, "uint32")
    streams = (x, gain, shift, EPS, up, bias, activation, activated)
    fused.fused_mlp(*streams, *over, partial, z, arrived, taken, blocks=blocks)
    ops.layer_norm(x, gain, shift, EPS, row)
    ops.product_naive(row, up, hidden)
    ops.bias_gelu(hidden, bias, activation, plain_activated)
    ops.attention_decode_naive(*over, plain_z)
    # The slope of both activations is below 1.2.
    floor = 1.2 * sum_floor(C, np.abs(row.get().astype(np.float64)).max())
    assert_near(activated.get(), plain_activated.get(), dtype, floor)
    wide_q, wide_keys, wide_values = (a.astype(np.float32).reshape(len(a), H, -1, D) for a in (q, keys, values))
    attended = attention_floor(wide_q[:, :, 0], wide_keys, wide_values, D, max(lengths))
    assert_near(z.get(), plain_z.get(), dtype, attended)
    assert not taken.get().any()
    assert not arrived.get().any()


LENGTHS = st.lists(st.one_of(st.integers(1, 40), st.sampled_from((63, 64, 65, 129))), min_size=1, max_size=3)


@settings(max_examples=30)
@given(
    devices(), LENGTHS, st.integers(1, 3), st.sampled_from((24, 64, 96)), st.sampled_from((8, 40, 320)), SHORT,
    st.sampled_from((1, 2, 5, 264)), st.integers(1, 5), st.sampled_from(("gelu", "gelu_fast")), seeds, PAGES,
)  # fmt: skip
def test_attention_and_mlp_are_those_of_the_plain_kernels(
    device, lengths, H, D, F, dtype, blocks, splits, activation, seed, size
) -> None:
    check_mlp(device, lengths, H, D, F, dtype, blocks, splits, activation, seed, size)


def test_sixteen_texts() -> None:
    for device in all_devices()[:3]:
        check_mlp(device, [*range(1, 16), 70], 1, 24, 40, "bfloat16", 7, 3)


def test_shapes_and_dtypes_of_the_output_are_checked() -> None:
    device = all_devices()[0]
    empty = device.empty
    right: dict[str, Array] = {
        "z": empty((3, 24), "float16"), "dense": empty((24, 24), "float16"), "dense_bias": empty(24, "float16"),
        "activated": empty((3, 40), "float16"), "down": empty((24, 40), "float16"), "down_bias": empty(24, "float16"),
        "before": device.zeros((3, 24), "float32"), "x": device.zeros((3, 24), "float32"),
        "taken": device.zeros(1, "uint32"),
    }  # fmt: skip
    fused.fused_output(*right.values())
    for name, wrong in [
        ("z", empty((3, 16), "float16")), ("dense", empty((24, 16), "float16")), ("x", empty((3, 24), "float16")),
        ("before", empty((2, 24), "float32")),
        ("dense_bias", empty(24, "float32")), ("activated", empty((2, 40), "float16")),
        ("x", empty((3, 25), "float32")), ("down", empty((24, 40), "bfloat16")), ("down_bias", empty(25, "float16")),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            fused.fused_output(*(right | {name: wrong}).values())


def arrays(device: Device, shapes: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, Any]:
    return {name: device.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}


HALF, WHOLE, NUMBER = "float16", "float32", "int32"
CACHED = {  # of 3 texts of 9 positions and 2 heads of 24 dims; 3 rows
    "texts": ((3,), NUMBER), "positions": ((3,), NUMBER), "q": ((3, 48), HALF), "keys": ((3, 2, 9, 24), HALF),
    "values": ((3, 2, 9, 24), HALF), "pages": ((3, 1), NUMBER),
}  # fmt: skip
NORMED = {"x": ((3, 48), WHOLE), "gain": ((48,), HALF), "shift": ((48,), HALF)}
QKV = NORMED | CACHED | {
    "weight": ((144, 48), HALF), "bias": ((144,), HALF), "cos": ((9, 3), WHOLE), "sin": ((9, 3), WHOLE),
    "taken": ((1,), "uint32"),
}  # fmt: skip
MLP = NORMED | CACHED | {
    "up": ((40, 48), HALF), "up_bias": ((40,), HALF), "activated": ((3, 40), HALF), "partial": ((3, 2, 2, 26), WHOLE),
    "z": ((3, 48), HALF), "arrived": ((3, 2), "uint32"), "taken": ((2,), "uint32"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("launch", "shapes", "fixed"),
    [(fused.fused_qkv, QKV, {"eps": EPS}), (fused.fused_mlp, MLP, {"eps": EPS, "activation": "gelu"})],
    ids=["qkv", "mlp"],
)
def test_a_wrong_shape_or_dtype_is_refused(
    launch: Any, shapes: dict[str, tuple[tuple[int, ...], str]], fixed: dict[str, Any]
) -> None:
    """Each array by itself: one row more, and another dtype."""
    device = all_devices()[0]
    launch(**arrays(device, shapes), **fixed)
    for name, (shape, dtype) in shapes.items():
        longer, other = (shape[0] + 1, *shape[1:]), "float64" if dtype == WHOLE else WHOLE
        for wrong in ((longer, dtype), (shape, other)):
            if name in ("keys", "values", "pages") and wrong[0] == longer:
                continue  # of one page, or text, more; that both have as many pages is seen by their own check
            with pytest.raises(ValueError, match=r"must be|16 bits|texts|not "):
                launch(**arrays(device, shapes | {name: wrong}), **fixed)


def output_arrays(device: Device, N: int, C: int, F: int, dtype: str) -> list[Array]:
    shapes = (N, C), (C, C), (C,), (N, F), (C, F), (C,)
    return [
        *(device.empty(shape, dtype) for shape in shapes),
        device.empty((N, C), "float32"),
        device.empty((N, C), "float32"),
        device.zeros(1, "uint32"),
    ]


def test_what_tensor_cores_cannot_take_is_refused() -> None:
    device = all_devices()[0]
    for sizes, message in [
        ((17, 24, 40, "float16"), "up to 16 rows, not 17"),
        ((3, 24, 40, "float32"), "16 bits, not float32"),
        ((3, 24, 36, "float16"), "rows of 36 numbers are not whole pieces of 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            fused.fused_output(*output_arrays(device, *sizes))
