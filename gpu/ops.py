"""One checked launcher for each kernel. All work on arrays that exist: nothing is allocated here.

Dimensions: N rows (batch times positions), C hidden_size, F intermediate_size, V vocab_size. Weights and activations
are of one dtype, float32, float16 or bfloat16; the residual stream and whatever a product accumulated are float32.
ValueError says which argument has the wrong shape or dtype.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from neox.gpu.device import Array, Device, expect, product_sizes
from neox.gpu.source import Source

TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
ACTIVATIONS = {"gelu": "Gelu", "gelu_fast": "GeluFast"}

EMBEDDING = Source(
    "embedding.cu", tuple(f"{name}<{T}>" for name in ("embedding", "embedding_share") for T in TYPES.values())
)
LAYER_NORM = Source(
    "layer_norm.cu",
    tuple(f"{name}<{T}>" for name in ("layer_norm_naive", "layer_norm", "layer_norm_pair") for T in TYPES.values()),
)
GELU = Source("gelu.cu", tuple(f"bias_gelu<{T}, {a}>" for T in TYPES.values() for a in ACTIVATIONS.values()))
ROTARY_APPEND = Source("rotary_append.cu", tuple(f"rotary_append<{T}>" for T in TYPES.values()))
HEAD_DIMS = (32, 64, 80, 96, 128, 256)  # of the published models
SHORT_TYPES = ("__half", "__nv_bfloat16")  # that tensor cores multiply
ATTENTION_DECODE = Source(
    "attention_decode.cu",
    tuple(
        name
        for T in TYPES.values()
        for name in (
            f"attention_decode_naive<{T}>",
            f"attention_decode_combine<{T}>",
            *(f"attention_decode_split<{T}, {D}>" for D in HEAD_DIMS),
        )
    ),
)
ATTENTION_PREFILL = Source(
    "attention_prefill.cu", tuple(f"attention_prefill<{T}, {D}>" for T in SHORT_TYPES for D in (24, *HEAD_DIMS))
)
RESIDUAL = Source(
    "residual.cu", tuple(f"{name}<{T}>" for name in ("residual", "residual_pair") for T in TYPES.values())
)
ARGMAX = Source("argmax.cu", ("argmax",))
SAMPLE = Source("sample.cu", ("uniform", "sample"))
ADVANCE = Source("advance.cu", ("advance",))
PRODUCT = Source("product_naive.cu", tuple(f"product_naive<{T}>" for T in TYPES.values()))
ROWS = (1, 2, 4, 8)  # that a warp of matvec can take
MATVEC = Source("matvec.cu", tuple(f"matvec<{T}, {rows}>" for T in TYPES.values() for rows in ROWS))
GEMM = Source("gemm.cu", tuple(f"gemm<{T}>" for T in SHORT_TYPES))
WIDE_ROWS = (32, 64)  # that the product of a batch can take
WIDE = Source("wide.cu", tuple(f"wide<{T}, {rows}>" for T in SHORT_TYPES for rows in WIDE_ROWS))
FUSED_ROWS = (8, 16)  # that a fused product of a decode step can take (fused.py)
FUSED_QKV, FUSED_OUTPUT = (
    Source(f"{name}.cu", tuple(f"{name}<{T}, {rows}>" for T in SHORT_TYPES for rows in FUSED_ROWS))
    for name in ("fused_qkv", "fused_output")
)
FUSED_MLP = Source(  # of all that are launched, those of the 20B
    "fused_mlp.cu", tuple(f"fused_mlp<{T}, GeluFast, 96, {rows}>" for T in SHORT_TYPES for rows in FUSED_ROWS)
)
MOST_RANKS, MOST_BLOCKS, MAILBOX_BYTES = 8, 64, 16 + 64 * 8 * 4  # as in all_reduce.cu; of a mailbox without its slots
ALL_REDUCE = Source("all_reduce.cu", tuple(f"all_reduce<{ranks}>" for ranks in range(1, MOST_RANKS + 1)))
SUM_PARTS = Source("sum_parts.cu", ("sum_parts",))
SOURCES = (
    *(EMBEDDING, LAYER_NORM, GELU, ROTARY_APPEND, ATTENTION_DECODE, ATTENTION_PREFILL, RESIDUAL, ARGMAX, SAMPLE),
    *(ADVANCE, PRODUCT, MATVEC, GEMM, WIDE, FUSED_QKV, FUSED_MLP, FUSED_OUTPUT, ALL_REDUCE, SUM_PARTS),
)

THREADS = 256  # of a block whose work any number of threads can share
ATTENTION_THREADS = 128  # as in attention_decode.cu
PREFILL_THREADS, TILE_QUERIES = 128, 64  # as in attention_prefill.cu
LARGEST_PREFILL_HEAD_DIM = 256
MATVEC_THREADS, MATVEC_OUTPUTS = 256, 16  # of a block, as in matvec.cu
GEMM_THREADS, GEMM_TILE = 128, 64  # as in gemm.cu
WIDE_THREADS, WIDE_OUTPUTS, WIDE_SLICE, WIDE_STAGES = 128, 128, 64, 4  # as in wide.cu
WIDE_TOGETHER = 2  # blocks on a multiprocessor
MOST_TILES = 1 << 13  # of wide.cu: a million outputs
SAMPLE_THREADS, SAMPLE_PARTS, LARGEST_SAMPLED_VOCAB = 512, 16, 2**19  # as in sample.cu


def type_of(array: Array) -> str:
    """The CUDA type of an array's elements. ValueError unless kernels exist for it."""
    if array.dtype.name not in TYPES:
        raise ValueError(f"{array.dtype} is none of {', '.join(TYPES)}")
    return TYPES[array.dtype.name]


def embedding(ids: Array, table: Array, out: Array) -> None:
    """out[n] = table[ids[n]]: int32 (N), (V,C) -> float32 (N,C). The ids must lie in the table."""
    (N,), (_, C) = ids.shape, table.shape
    expect("ids", ids, (N,), np.int32)
    expect("out", out, (N, C), np.float32)
    out.device.launch(EMBEDDING, f"embedding<{type_of(table)}>", N, THREADS, (ids, table, out, np.int32(C)))


def embedding_share(ids: Array, table: Array, first: int, out: Array) -> None:
    """The same from rows first, first + 1, ... of a table, zeros for other ids: int32 (N), (V,C) -> float32 (N,C)."""
    (N,), (V, C) = ids.shape, table.shape
    expect("ids", ids, (N,), np.int32)
    expect("out", out, (N, C), np.float32)
    arguments = (ids, table, out, np.int32(first), np.int32(V), np.int32(C))
    out.device.launch(EMBEDDING, f"embedding_share<{type_of(table)}>", N, THREADS, arguments)


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


def product_naive(x: Array, weight: Array, out: Array) -> None:
    """x weight^T: (N,I), (O,I) -> float32 (N,O)."""
    N, outputs, inputs = product_sizes(x, weight, out)
    arguments = (x, weight, out, np.int32(N), np.int32(outputs), np.int32(inputs))
    out.device.launch(PRODUCT, f"product_naive<{type_of(x)}>", -(-N * outputs // THREADS), THREADS, arguments)


def matvec(x: Array, weight: Array, out: Array) -> None:
    """The same for a few rows: the weights are read once for 8 of them. I must be a multiple of 8."""
    N, outputs, inputs = _check_pieces(x, weight, out)
    rows = next((rows for rows in ROWS if rows >= N), ROWS[-1])
    grid = -(-outputs // MATVEC_OUTPUTS), -(-N // rows)
    arguments = (x, weight, out, np.int32(N), np.int32(outputs), np.int32(inputs))
    name = f"matvec<{type_of(x)}, {rows}>"
    out.device.launch(replace(MATVEC, kernels=(name,)), name, grid, MATVEC_THREADS, arguments)


def gemm(x: Array, weight: Array, out: Array) -> None:
    """The same on tensor cores, float16 or bfloat16 only, for more rows. I must be a multiple of 8."""
    N, outputs, inputs = _check_pieces(x, weight, out)
    name = f"gemm<{type_of(x)}>"
    if name not in GEMM.kernels:
        raise ValueError(f"tensor cores multiply numbers of 16 bits, not {x.dtype}")
    grid = -(-outputs // GEMM_TILE), -(-N // GEMM_TILE)
    arguments = (x, weight, out, np.int32(N), np.int32(outputs), np.int32(inputs))
    out.device.launch(GEMM, name, grid, GEMM_THREADS, arguments)


def wide(x: Array, weight: Array, out: Array, *, blocks: int | None = None) -> None:
    """The same for up to 64 rows, float16 or bfloat16, as fast as weights are read. I must be a multiple of 8.

    Sums that blocks share lie in memory that the device keeps for it. blocks: as many as fit, unless a test says.
    """
    N, outputs, inputs = _check_pieces(x, weight, out)
    rows = next((rows for rows in WIDE_ROWS if rows >= N), None)
    if type_of(x) not in SHORT_TYPES or rows is None:
        raise ValueError(f"up to {WIDE_ROWS[-1]} rows of 16 bits are multiplied so, not {N} of {x.dtype}")
    tiles, device = -(-outputs // WIDE_OUTPUTS), x.device
    grid = min(blocks or WIDE_TOGETHER * device.multiprocessors, tiles * -(-inputs // WIDE_SLICE))
    partial, arrived = device.kept(f"wide {grid}", lambda: _scratch(device, grid))
    if tiles > MOST_TILES:
        raise ValueError(f"{outputs} outputs are more than {MOST_TILES * WIDE_OUTPUTS}")
    name = f"wide<{type_of(x)}, {rows}>"
    arguments = (x, weight, out, partial, arrived, np.int32(N), np.int32(outputs), np.int32(inputs))
    device.launch(replace(WIDE, kernels=(name,)), name, grid, WIDE_THREADS, arguments, wide_shared_bytes(rows))


def wide_shared_bytes(rows: int) -> int:
    return WIDE_STAGES * (rows + WIDE_OUTPUTS) * (WIDE_SLICE + 8) * 2


def can_wide(device: Device, dtype: np.dtype, N: int) -> bool:
    """Whether `wide` takes N rows of this dtype."""
    rows = next((rows for rows in WIDE_ROWS if rows >= N), None)
    short = TYPES[dtype.name] in SHORT_TYPES
    return short and rows is not None and wide_shared_bytes(rows) <= device.shared_bytes


def _scratch(device: Device, grid: int) -> tuple[Array, Array]:
    partial = device.empty((grid, 2, WIDE_ROWS[-1], WIDE_OUTPUTS), np.float32)
    return partial, device.zeros(MOST_TILES, np.uint32)


def rotary_append(
    qkv: Array,
    bias: Array | None,
    cos: Array,
    sin: Array,
    texts: Array,
    positions: Array,
    q: Array,
    keys: Array,
    values: Array,
    pages: Array,
) -> None:
    """Bias and rotation of N positions, each of a text of the cache, to which their keys and values are appended.

    qkv: float32 (N,3C) of the product; bias: (3C) or None; cos, sin: float32 (P,R/2); texts, positions: int32 (N),
    which must lie in the cache and the tables; q: (N,C); keys, values: (pages,H,S,D); pages: int32 (B,P), of each text.
    """
    (N, C), (_, H, S, D), (known, half) = q.shape, keys.shape, cos.shape
    check_cache(q, keys, values, pages, texts, positions)
    expect("qkv", qkv, (N, 3 * C), np.float32)
    if bias is not None:
        expect("bias", bias, (3 * C,), q.dtype)
    for table in (cos, sin):
        expect("cos and sin", table, (known, half), np.float32)
    if not 0 < 2 * half <= D:
        raise ValueError(f"{2 * half} of {D} dims cannot be rotated")
    sizes = (np.int32(H), np.int32(D), np.int32(2 * half), np.int32(pages.shape[1]), np.int32(S))
    arguments = (qkv, bias, cos, sin, texts, positions, q, keys, values, pages, *sizes)
    q.device.launch(ROTARY_APPEND, f"rotary_append<{type_of(q)}>", N * H, min(D, THREADS), arguments)


def attention_decode(
    q: Array,
    keys: Array,
    values: Array,
    pages: Array,
    texts: Array,
    positions: Array,
    partial: Array,
    out: Array,
) -> None:
    """One query of each of N texts over the cache: (N,C), 2 x (pages,H,S,D), int32 (B,P), 2 x int32 (N) -> (N,C).

    A query sees the positions of its text up to its own. partial: float32 (N,H,splits,D+2), of as many splits as the
    keys are to be shared out over. D must be a multiple of 8, up to 768.
    """
    check_cache(q, keys, values, pages, texts, positions)
    (N, C), (_, H, S, D), splits = q.shape, keys.shape, partial.shape[2]
    if D % 8 or D > 768:
        raise ValueError(f"head_dim must be a multiple of 8, at most 768, not {D}")
    expect("partial", partial, (N, H, splits, D + 2), np.float32)
    expect("out", out, (N, C), q.dtype)
    T = type_of(q)
    names = (f"attention_decode_split<{T}, {D}>", f"attention_decode_combine<{T}>")
    source, launch = replace(ATTENTION_DECODE, kernels=names), out.device.launch  # of all head_dims, only this one's
    sizes = (np.int32(H), np.int32(pages.shape[1]), np.int32(S))
    arguments = (q, keys, values, pages, texts, positions, partial, *sizes)
    launch(source, names[0], (N * H, splits), ATTENTION_THREADS, arguments)
    launch(source, names[1], N * H, min(D, THREADS), (partial, out, np.int32(splits), np.int32(D)))


def attention_decode_naive(
    q: Array, keys: Array, values: Array, pages: Array, texts: Array, positions: Array, out: Array
) -> None:
    """The same for any D, one thread to a number."""
    check_cache(q, keys, values, pages, texts, positions)
    (N, C), (_, H, S, D) = q.shape, keys.shape
    expect("out", out, (N, C), q.dtype)
    name = f"attention_decode_naive<{type_of(q)}>"
    sizes = (np.int32(N), np.int32(H), np.int32(D), np.int32(pages.shape[1]), np.int32(S))
    arguments = (q, keys, values, pages, texts, positions, out, *sizes)
    out.device.launch(replace(ATTENTION_DECODE, kernels=(name,)), name, -(-N * C // 32), 32, arguments)


def query_tiles(texts: NDArray, positions: NDArray) -> NDArray[np.int32]:
    """N positions as tiles of up to 64 that follow one another in one text: 2 x (N) -> (M,4).

    A row is: text, first of the N, where in the text it stands, how many. Those that see the most keys come first.
    """
    ends = np.flatnonzero((np.diff(texts) != 0) | (np.diff(positions) != 1)) + 1
    tiles = [
        (texts[n], n, positions[n], min(end - n, TILE_QUERIES))
        for first, end in pairwise((0, *ends, len(texts)))
        for n in range(first, end, TILE_QUERIES)
    ]
    return np.array(sorted(tiles, key=lambda tile: -(tile[2] + tile[3])), np.int32)


def can_prefill(dtype: np.dtype, D: int) -> bool:
    """Whether attention_prefill is made for this dtype and head_dim."""
    return TYPES[dtype.name] in SHORT_TYPES and D % 8 == 0 and D <= LARGEST_PREFILL_HEAD_DIM


def attention_prefill(q: Array, keys: Array, values: Array, pages: Array, tiles: Array, out: Array) -> None:
    """N queries of any texts over the cache, on tensor cores: (N,C), 2 x (pages,H,S,D) -> (N,C).

    A query sees the positions of its text up to its own. pages: int32 (B,P); tiles: int32 (M,4), of query_tiles;
    every n in one of them. float16 or bfloat16, D a multiple of 8, up to 256.
    """
    (N, C), (_, H, S, D), (M, _) = q.shape, keys.shape, tiles.shape
    expect("q", q, (N, H * D), keys.dtype)
    expect("values", values, keys.shape, keys.dtype)
    expect("pages", pages, (pages.shape[0], pages.shape[1]), np.int32)
    expect("tiles", tiles, (M, 4), np.int32)
    expect("out", out, (N, C), q.dtype)
    if not can_prefill(keys.dtype, D):
        raise ValueError(f"tensor cores take float16 or bfloat16 and head_dim 8, 16, ... 256, not {keys.dtype} and {D}")
    name = f"attention_prefill<{type_of(q)}, {D}>"
    arguments = (q, keys, values, pages, tiles, out, np.int32(H), np.int32(pages.shape[1]), np.int32(S))
    out.device.launch(replace(ATTENTION_PREFILL, kernels=(name,)), name, (M, H), PREFILL_THREADS, arguments)


def residual(y: Array, bias: Array | None, dtype: np.dtype, x: Array) -> None:
    """x += y + bias: float32 (N,C), (C) in dtype or None -> float32 (N,C)."""
    grid, C = _check_residual((y,), (bias,), dtype, x)
    x.device.launch(RESIDUAL, f"residual<{TYPES[dtype.name]}>", grid, THREADS, (y, bias, x, C))


def residual_pair(m: Array, bias_m: Array | None, a: Array, bias_a: Array | None, dtype: np.dtype, x: Array) -> None:
    """x += (m + bias_m) + (a + bias_a): 2 x float32 (N,C), 2 x (C) in dtype or None -> float32 (N,C)."""
    grid, C = _check_residual((m, a), (bias_m, bias_a), dtype, x)
    x.device.launch(RESIDUAL, f"residual_pair<{TYPES[dtype.name]}>", grid, THREADS, (m, bias_m, a, bias_a, x, C))


def argmax(logits: Array, allowed: Array | None, ids: Array) -> None:
    """The likeliest id of each row, the lowest of equals: float32 (N,V), uint8 (V) or None -> int32 (N).

    Where allowed is 0 an id is ruled out. The id is -1 if an allowed logit is not finite.
    """
    N, V = logits.shape
    expect("logits", logits, (N, V), np.float32)
    if allowed is not None:
        expect("allowed", allowed, (V,), np.uint8)
    expect("ids", ids, (N,), np.int32)
    ids.device.launch(ARGMAX, "argmax", N, _row_threads(V), (logits, allowed, ids, np.int32(V)))


def uniform(seeds: Array, texts: Array, positions: Array, numbers: Array) -> None:
    """64 random bits for each of N texts: uint64 (B), 2 x int32 (N) -> uint64 (N).

    They depend on the text's seed and position alone. texts must lie below B.
    """
    (N,), (B,) = numbers.shape, seeds.shape
    expect("seeds", seeds, (B,), np.uint64)
    expect("texts", texts, (N,), np.int32)
    expect("positions", positions, (N,), np.int32)
    expect("numbers", numbers, (N,), np.uint64)
    arguments = (seeds, texts, positions, numbers, np.int32(N))
    numbers.device.launch(SAMPLE, "uniform", -(-N // THREADS), THREADS, arguments)


def sample(
    logits: Array,
    allowed: Array | None,
    temperatures: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    texts: Array,
    numbers: Array,
    ids: Array,
) -> None:
    """An id of each row, drawn by its number from what its text's filters keep: float32 (N,V) -> int32 (N).

    allowed: uint8 (V) or None; where it is 0 an id is ruled out. Of each of B texts: temperatures float32, 0 for the
    likeliest id; top_k int32, top_p and min_p uint64, in parts of 2^64, 0 for off. texts: int32 (N), below B. numbers:
    uint64 (N). V at most 2^19. The id is -1 if an allowed logit is not finite.
    """
    (N, V), (B,) = logits.shape, temperatures.shape
    expect("logits", logits, (N, V), np.float32)
    if allowed is not None:
        expect("allowed", allowed, (V,), np.uint8)
    expect("temperatures", temperatures, (B,), np.float32)
    expect("top_k", top_k, (B,), np.int32)
    expect("top_p", top_p, (B,), np.uint64)
    expect("min_p", min_p, (B,), np.uint64)
    expect("texts", texts, (N,), np.int32)
    expect("numbers", numbers, (N,), np.uint64)
    expect("ids", ids, (N,), np.int32)
    if V > LARGEST_SAMPLED_VOCAB:
        raise ValueError(f"{V} ids: the sum of the weights of more than {LARGEST_SAMPLED_VOCAB} could overflow")
    arguments = (logits, allowed, temperatures, top_k, top_p, min_p, texts, numbers, ids, np.int32(V))
    bins = SAMPLE_PARTS * SAMPLE_THREADS * 8  # bytes
    ids.device.launch(SAMPLE, "sample", N, SAMPLE_THREADS, arguments, shared_bytes=bins)


def advance(positions: Array) -> None:
    """positions += 1: int32 (N)."""
    (N,) = positions.shape
    expect("positions", positions, (N,), np.int32)
    positions.device.launch(ADVANCE, "advance", -(-N // THREADS), THREADS, (positions, np.int32(N)))


def mailbox_bytes(capacity: int) -> int:
    """Of a mailbox for sums of up to `capacity` numbers."""
    return MAILBOX_BYTES + 2 * 4 * capacity


def all_reduce(
    mailboxes: Array, rank: int, capacity: int, x: Array, patience: int, *, blocks: int = MOST_BLOCKS
) -> None:
    """x = the sum of all ranks' x, in their order: float32 (n), n a multiple of 4, up to capacity.

    mailboxes: uint64 (P), addresses of mailbox_bytes(capacity) bytes each, the first MAILBOX_BYTES of them 0 at first,
    which every rank's device can read and write. patience: looks for another rank before x becomes NaN.
    """
    (P,), (n,) = mailboxes.shape, x.shape
    expect("mailboxes", mailboxes, (P,), np.uint64)
    expect("x", x, (n,), np.float32)
    if P > MOST_RANKS or not 0 <= rank < P:
        raise ValueError(f"rank {rank} of {P}: there can be {MOST_RANKS}")
    if n % 4 or x.address % 16 or capacity % 4 or n > capacity:
        raise ValueError(f"{n} numbers are not whole pieces of 4 at a multiple of 16 bytes, up to {capacity}")
    name = f"all_reduce<{P}>"
    grid = min(blocks, MOST_BLOCKS, -(-n // (4 * THREADS)))
    sizes = np.int32(n), np.int32(rank), np.int32(capacity), np.uint32(patience)
    x.device.launch(replace(ALL_REDUCE, kernels=(name,)), name, grid, THREADS, (mailboxes, x, *sizes))


def sum_parts(parts: Array, x: Array) -> None:
    """x[i] = ((parts[0,i] + parts[1,i]) + parts[2,i]) + ...: float32 (P,n) -> float32 (n)."""
    P, n = parts.shape
    expect("parts", parts, (P, n), np.float32)
    expect("x", x, (n,), np.float32)
    x.device.launch(SUM_PARTS, "sum_parts", -(-n // THREADS), THREADS, (parts, x, np.int32(P), np.int32(n)))


def check_cache(q: Array, keys: Array, values: Array, pages: Array, texts: Array, positions: Array) -> None:
    """ValueError unless queries (N,C), a cache 2 x (pages,H,S,D), pages int32 (B,P), and int32 2 x (N) go together."""
    (N, _), (_, H, _, D), (B, P) = q.shape, keys.shape, pages.shape
    expect("q", q, (N, H * D), keys.dtype)
    expect("values", values, keys.shape, keys.dtype)
    expect("pages", pages, (B, P), np.int32)
    expect("texts", texts, (N,), np.int32)
    expect("positions", positions, (N,), np.int32)


def _check_pieces(x: Array, weight: Array, out: Array) -> tuple[int, int, int]:
    """That rows can be read in pieces of 16 bytes."""
    N, outputs, inputs = product_sizes(x, weight, out)
    if inputs % 8 or x.address % 16 or weight.address % 16:
        raise ValueError(f"rows of {inputs} numbers are not whole pieces of 8 at multiples of 16 bytes")
    return N, outputs, inputs


def _check_residual(
    branches: tuple[Array, ...], biases: tuple[Array | None, ...], dtype: np.dtype, x: Array
) -> tuple[tuple[int, int], np.int32]:
    N, C = x.shape
    expect("x", x, (N, C), np.float32)
    for branch, bias in zip(branches, biases, strict=True):
        expect("a branch", branch, (N, C), np.float32)
        if bias is not None:
            expect("bias", bias, (C,), dtype)
    return (-(-C // THREADS), N), np.int32(C)


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
