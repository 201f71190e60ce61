"""Wrong kernels: each differs from the right one in one place, and the check named beside it must fail.

A mutant counts as killed if, on any of the cases, a result is wrong or the host device reports a fault.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from devices import SCHEDULES, host
from test_kernels_all_reduce import check_alone, check_sum_parts
from test_kernels_argmax import check_advance, check_argmax
from test_kernels_attention_decode import check_attention
from test_kernels_attention_prefill import check_counting, check_prefill
from test_kernels_embedding import check_embedding, check_embedding_share
from test_kernels_fused import check_mlp, check_output, check_qkv
from test_kernels_gelu import check_gelu, check_tail
from test_kernels_layer_norm import check_block, check_naive, check_pair
from test_kernels_products import check_gemm, check_matvec, check_product_naive
from test_kernels_residual import check_residual, check_residual_pair
from test_kernels_rotary_append import check_rotary_append
from test_kernels_sample import check_greedy, check_sample, check_uniform

from neox.gpu import ops
from neox.gpu.host.module import KernelError
from neox.gpu.source import KERNELS, Source
from neox.reference.sampling import Sampling

CASES: dict[Callable[..., None], tuple[str, list[tuple]]] = {
    # check: the source it launches, and its cases, which the right kernel must pass
    check_block: ("LAYER_NORM", [(3, 257, "float32"), (2, 1025, "float16", 1000), (2, 40, "bfloat16", 0, 80000)]),
    check_naive: ("LAYER_NORM", [(33, 37, "float32"), (2, 40, "float16", 1000)]),
    check_pair: ("LAYER_NORM", [(3, 257, "float32"), (2, 1025, "float16", 5)]),
    check_alone: ("ALL_REDUCE", [(2048, 3), (40, 1)]),
    check_sum_parts: ("SUM_PARTS", [(3, 300), (1, 7)]),
    check_embedding_share: ("EMBEDDING", [(3, 11, 257, "float32"), (5, 7, 120, "float16")]),
    check_embedding: ("EMBEDDING", [(3, 11, 257, "float32"), (5, 7, 120, "float16")]),
    check_gelu: ("GELU", [(3, 257, a, d, 2) for a in ("gelu", "gelu_fast") for d in ("float32", "float16")]),
    check_tail: ("GELU", [("gelu",), ("gelu_fast",)]),
    check_rotary_append: (
        "ROTARY_APPEND",
        [
            (5, 3, 24, 6, "float32"),
            (2, 2, 96, 24, "float16"),
            (2, 2, 24, 6, "float32", 9, False),
            (9, 2, 24, 6, "float16", 4, True, 0, 3),
        ],
    ),
    check_attention: (
        "ATTENTION_DECODE",
        [
            ([37, 1, 70], 2, 96, "float32", 3),
            ([300], 1, 96, "float16", 1),
            ([5], 2, 96, "float32", 9),
            ([300], 1, 24, "float16", 1, 300),
            ([37, 5], 2, 80, "float32", 3),
            ([9, 3], 2, 24, "float32", 0),
            ([37, 5, 70], 2, 24, "float16", 3, 1, 0, 16, 20),  # the first page is shared
        ],
    ),
    check_prefill: (
        "ATTENTION_PREFILL",
        [
            # A warp begins at 62, whose query sees all of the first 64 keys but one; and a text of 65.
            ([(30, 70), (5, 60), (0, 9)], 2, 24, "float16"),
            ([(0, 70)], 2, 24, "float16", 300),
            ([(64, 65)], 1, 96, "bfloat16"),
            ([(30, 90), (5, 60)], 2, 24, "float16", 1, 0, 40, 50),  # the first page is shared
            ([(90, 30)], 1, 24, "float16", 1, 0, 100),
        ],
    ),
    check_counting: ("ATTENTION_PREFILL", [([(0, 330), (3, 9)], 1, 24, "float16")]),
    check_argmax: ("ARGMAX", [(3, 1030, 0.5, 3), (150, 33, 0.0), (40, 70, 0.3), (2, 990, 0.0)]),
    check_sample: (
        "SAMPLE",
        [
            (530, Sampling(0.8, 30, 0.97, 0.1), 0.2),
            (101, Sampling(2.0), 0.5, 0, 1),
            (600, Sampling(1.0, 220), 0.1, 1),
            (101, Sampling(3.0, 9)),
            (4000, Sampling(1.0, top_p=0.9), 0.3),
            (40, Sampling(0.7, top_p=0.9), 0.0, 1),
        ],
    ),
    check_greedy: ("SAMPLE", [(5, 530, 0.5), (2, 1100, 0.0, 1)]),
    check_uniform: ("SAMPLE", [(5, 3), (257, 2)]),
    check_advance: ("ADVANCE", [(5,), (257,)]),
    check_residual: ("RESIDUAL", [(3, 257, "float16"), (2, 40, "float32", False)]),
    check_residual_pair: ("RESIDUAL", [(3, 257, "float16"), (2, 40, "float32", False)]),
    check_product_naive: ("PRODUCT", [(3, 37, 41, "float32"), (8, 32, 8, "float16")]),
    check_matvec: (
        "MATVEC",
        [(3, 17, 129, "float32"), (9, 3, 265, "float16"), (1, 33, 31, "bfloat16")],
    ),
    check_output: (
        "FUSED_OUTPUT",
        [
            (1, 24, 1544, "float16", 1),
            (9, 40, 40, "bfloat16", 2),
            (7, 24, 264, "float16", 1, False),
            (3, 24, 40, "float16", 2, True, 0, 264),
            (3, 40, 264, "float16", 1, True, 0, 16, False),
        ],
    ),
    check_qkv: (
        "FUSED_QKV",
        [
            (3, 2, 24, 6, "float16", 2),
            (9, 2, 16, 4, "bfloat16", 1, False),
            (1, 1, 96, 24, "float16", 264),
            (9, 2, 24, 6, "float16", 2, True, 4, 0, 3),
            (3, 2, 24, 6, "float16", 2, True, 9, 0, 1, 40),
        ],
    ),
    check_mlp: (
        "FUSED_MLP",
        [
            ([19, 1], 2, 24, 40, "float16", 2, 3),
            ([70], 1, 24, 72, "float16", 5, 2),
            ([2] * 9, 1, 24, 24, "float16"),
            ([70, 19], 2, 24, 40, "float16", 5, 2, "gelu_fast", 0, 16),
            ([19, 1], 1, 24, 40, "float16", 2, 3, "gelu", 0, 0, 72),
        ],
    ),
    check_gemm: ("GEMM", [(65, 37, 17, "float16"), (9, 66, 4, "bfloat16"), (64, 64, 40, "bfloat16")]),
}


@dataclass(frozen=True)
class Mutant:
    file: str
    right: str
    wrong: str
    check: Callable[..., None]

    def __str__(self) -> str:
        return f"{self.file}: {self.right.strip()} -> {self.wrong.strip() or 'nothing'}"


def mutants(file: str, check: Callable[..., None], *changes: tuple[str, str]) -> list[Mutant]:
    return [Mutant(file, right, wrong, check) for right, wrong in changes]


PAIRS_OF_HALVES = """    bool first = d < r.half;
    int i = first ? d : d - r.half;
    float other = biased(x, bias, first ? d + r.half : i);
"""
PAIRS_OF_NEIGHBOURS = """    bool first = d % 2 == 0;
    int i = d / 2;
    float other = biased(x, bias, first ? d + 1 : d - 1);
"""

MUTANTS = [
    *mutants(
        "common.cuh",
        check_block,
        ("__syncthreads();  // each warp's sum", "// each warp's sum"),
        ("__syncthreads();  // all have read", "// all have read"),
        ("flip = 16", "flip = 8"),
        ("flip > 0", "flip > 1"),
        ("lane < warps", "lane <= warps"),
        ("lane < warps", "lane < warps - 1"),
        ("partial[warp] = x", "partial[0] = x"),
    ),
    *mutants("types.cuh", check_block, ("__float2half_rn(x)", "__float2half_rn(x * 1.0005f)")),
    *mutants(
        "layer_norm.cu",
        check_block,
        ("s, weight[c], bias[c]", "s, bias[c], weight[c]"),
        ("normalized(x[first + c], s, weight[c]", "normalized(x[c], s, weight[c]"),
    ),
    *mutants(
        "statistics.cuh",
        check_block,
        ("c < C; c += blockDim.x) sum +=", "c < C - 1; c += blockDim.x) sum +="),
        ("c < C; c += blockDim.x) squares", "c <= C; c += blockDim.x) squares"),
        ("(row[c] - mean) * (row[c] - mean);\n    return", "row[c] * row[c] - mean * mean;\n    return"),
        ("block_sum(squares, partial) / C + eps", "block_sum(squares, partial) / (C - 1) + eps"),
        ("block_sum(squares, partial) / C + eps", "block_sum(squares, partial) / C"),
        ("block_sum(sum, partial) / C;", "to_float(from_float<__half>(block_sum(sum, partial) / C));"),
        ("return {mean, 1.0f / sqrtf", "return {0.0f, 1.0f / sqrtf"),
        ("* to_float(weight) + to_float(bias));", "* to_float(weight));"),
        ("* to_float(weight) + to_float(bias));", "+ to_float(bias));"),
    ),
    *mutants(
        "layer_norm.cu",
        check_naive,
        ("if (n >= N) return;", "if (n > N) return;"),
        ("if (n >= N) return;", "if (n >= N - 1) return;"),
        ("mean = sum / C", "mean = sum / (C + 1)"),
        ("blockIdx.x * blockDim.x + threadIdx.x", "threadIdx.x"),
    ),
    *mutants(
        "layer_norm.cu",
        check_pair,
        ("weight2[c], bias2[c]", "weight1[c], bias2[c]"),
        ("weight2[c], bias2[c]", "weight2[c], bias1[c]"),
        ("s, weight1[c]", "s, weight2[c]"),
        ("y2[first + c] =", "y1[first + c] ="),
    ),
    *mutants(
        "embedding.cu",
        check_embedding,
        ("c < C", "c < C - 1"),
        ("c < C", "c <= C"),
        ("ids[blockIdx.x]", "blockIdx.x"),
        ("ids[blockIdx.x]) * C", "ids[blockIdx.x]) * (C - 1)"),
        ("x + static_cast<long long>(blockIdx.x) * C", "x"),
    ),
    # The others of all_reduce.cu need more than one rank: test_kernels_all_reduce.py.
    *mutants(
        "all_reduce.cu",
        check_alone,
        ("threadIdx.x < RANKS", "threadIdx.x <= RANKS"),
        ("own->sums = turn", "own->sums = turn + 1"),
    ),
    *mutants(
        "sum_parts.cu",
        check_sum_parts,
        ("float sum = parts[i];", "float sum = 0;"),
        ("int p = 1; p < P", "int p = 1; p < P - 1"),
        ("int p = 1; p < P", "int p = 1; p <= P"),
        ("(p) * n + i]", "(P - p) * n + i]"),
        ("i >= n", "i > n"),
        ("i >= n", "i >= n - 1"),
    ),
    *mutants(
        "embedding.cu",
        check_embedding_share,
        ("ids[blockIdx.x] - first", "ids[blockIdx.x]"),
        ("0 <= held && held < V", "held < V"),
        ("0 <= held && held < V", "0 <= held && held <= V"),
        ("0 <= held && held < V", "0 < held && held < V"),
        (" : 0.0f", " : to_float(table[c])"),
    ),
    *mutants(
        "gelu.cu",
        check_gelu,
        ("x[i] + to_float(bias[f])", "x[i]"),
        ("to_float(bias[f])", "to_float(bias[0])"),
        ("f >= F", "f >= F - 1"),
        ("f >= F", "f > F"),
        ("blockIdx.y) * F", "blockIdx.y) * (F + 1)"),
    ),
    *mutants(
        "activation.cuh",
        check_gelu,
        ("0.044715f", "0.0447f"),
        ("0.79788456f", "0.7978f"),
        ("return x / (1.0f + expf(-2.0f * u))", "return 0.5f * x * erfcf(-0.70710678f * x)"),
        ("return 0.5f * x * erfcf(-0.70710678f * x)", "return x / (1.0f + expf(-1.702f * x))"),
    ),
    *mutants(
        "activation.cuh",
        check_tail,
        ("-0.70710678f", "-0.70711f"),
        ("0.5f * x * erfcf(-0.70710678f * x)", "0.5f * x * (1.0f + erff(0.70710678f * x))"),
        ("return x / (1.0f + expf(-2.0f * u))", "return 0.5f * x * (1.0f + tanhf(u))"),
    ),
    *mutants(
        "rotary_append.cu",
        check_rotary_append,
        (PAIRS_OF_HALVES, PAIRS_OF_NEIGHBOURS),
        ("* r.cos[i] - other", "* r.cos[i] + other"),
        ("d >= 2 * r.half", "d >= 2 * r.half - 1"),
        ("d >= 2 * r.half", "d > 2 * r.half"),
        ("d >= 2 * r.half", "d >= r.half"),
        ("qkv + static_cast<long long>(blockIdx.x) * 3 * D", "qkv + (static_cast<long long>(n) * 3 * H + h) * D"),
        ("bias ? x[d] + to_float(bias[d]) : x[d]", "x[d]"),
        ("bias + h * 3 * D", "bias"),
        ("b ? b + D : nullptr, d, rotation", "b, d, rotation"),
        ("b ? b + 2 * D : nullptr, d", "b, d"),
        ("rotated(x + D, b ? b + D : nullptr, d, rotation)", "biased(x + D, b ? b + D : nullptr, d)"),
        ("biased(x + 2 * D, b ? b + 2 * D : nullptr, d)", "rotated(x + 2 * D, b ? b + 2 * D : nullptr, d, rotation)"),
        ("position = positions[n]", "position = n"),
        ("cos + position * (R / 2)", "cos + position * R"),
        ("cos + position * (R / 2)", "cos + n * (R / 2)"),
        ("sin + position * (R / 2), R / 2", "sin + position * (R / 2), R / 2 - 1"),
        ("slot(texts[n], h, position)", "slot(n, h, position)"),
        ("slot(texts[n], h, position)", "slot(texts[n], h, position + 1)"),
        ("Pages{pages, P, H, S, D}", "Pages{pages, 1, H, S, D}"),
        ("d < D; d +=", "d < D - 1; d +="),
        ("d < D; d +=", "d <= D; d +="),
        ("from_float<T>(rotated(x, b", "from_float<T>(0.999f * rotated(x, b"),
    ),
    *mutants(
        "attention_decode.cu",
        check_attention,
        ("length = positions[n] + 1", "length = positions[n]"),
        ("length = positions[n] + 1", "length = positions[n] + 2"),
        ("(length + gridDim.y - 1) / gridDim.y", "length / gridDim.y"),
        ("min(length, first + part)", "first + part"),
        ("min(length, first + part)", "min(length, first + part - 1)"),
        ("first = blockIdx.y * part", "first = blockIdx.y * part + 1"),
        ("{pages, P, H, S, D}, texts[n], h}", "{pages, P, H, S, D}, n, h}"),
        ("{pages, P, H, S, D}, texts[n], h}", "{pages, 1, H, S, D}, texts[n], h}"),
        ("at.slot(texts[n], h, s);", "at.slot(n, h, s);"),
        ("at.slot(texts[n], h, s) + d", "at.slot(texts[n], 0, s) + d"),
        ("s <= positions[n]; s++) {", "s < positions[n]; s++) {"),
        ("s <= positions[n]; s++) {", "s <= positions[n] + 1; s++) {"),
        ("return sum / sqrtf(D)", "return sum"),
    ),
    *mutants(
        "attention.cuh",
        check_attention,
        ("__syncthreads();  // every group", "// every group"),
        ("s + group < stop;", "s + group <= stop;"),
        ("s + group < stop;", "s + group < stop - 1;"),
        ("min(last, start + text.pages.in_a_row(start))", "last"),
        ("min(last, start + text.pages.in_a_row(start))", "start + text.pages.in_a_row(start)"),
        ("- static_cast<long long>(start) * D", ""),
        ("query[piece][i] /= sqrtf(D)", "query[piece][i] /= sqrtf(D + 1)"),
        ("query[piece][i] /= sqrtf(D)", "query[piece][i] /= D"),
        ("flip = A::LANES / 2", "flip = A::LANES / 4"),
        ("lane + piece * LANES < D / 8", "true"),
        ("lane + piece * LANES < D / 8", "lane + piece * LANES < D / 8 - 1"),
        ("sum += q[piece][i] * k[i];", "sum = to_float(from_float<__half>(sum + q[piece][i] * k[i]));"),
        ("maximum = fmaxf(average.maximum, score)", "maximum = score"),
        ("average.weight * kept + p", "average.weight + p"),
        ("average.sum[piece][i] * kept + p", "average.sum[piece][i] + p"),
        ("own == MINUS_INFINITY ? 0.0f : expf", "expf"),
        ("share(groups.maxima[g], all.maximum) * groups.sums[g][d]", "groups.sums[g][d]"),
        ("all.maximum = fmaxf(all.maximum, maxima[i * stride])", "all.maximum = maxima[i * stride]"),
        ("all.maximum) * weights[i * stride]", "all.maximum)"),
        ("g < GROUPS; g++) sum", "g < GROUPS - 1; g++) sum"),
        ("i < splits; i++) sum", "i < splits - 1; i++) sum"),
        ("joined(part, part + 1, splits, D + 2)", "joined(part, part + 1, splits - 1, D + 2)"),
        ("part[i * (D + 2) + 2 + d]", "part[i * (D + 2) + 1 + d]"),
        ("sum / all.weight", "sum"),
    ),
    *mutants(
        "attention_prefill.cu",
        check_prefill,
        ("__syncthreads();  // every thread's copies of keys", "// every thread's copies of keys"),
        ("__syncthreads();  // every thread's copies of values", "// every thread's copies of values"),
        ("copy_async_wait<0>();\n        __syncthreads();  // every thread's copies of keys", "__syncthreads();  //"),
        ("copy_async_wait<0>();\n        __syncthreads();  // every thread's copies of values", "__syncthreads();  //"),
        ("inside = piece < there", "inside = true"),
        ("inside = piece < there", "inside = piece + PIECES < there"),
        ("chunk.count * PIECES", "Shape<D>::KEYS * PIECES"),
        ("cache + chunk.slot", "cache"),
        ("first >= length) return", "first >= length - 1) return"),
        ("min(min(Shape<D>::KEYS, length - first), pages.in_a_row(first))", "min(Shape<D>::KEYS, length - first)"),
        ("min(min(Shape<D>::KEYS, length - first), pages", "min(Shape<D>::KEYS, pages"),
        ("k < COPIES; k +=", "k < COPIES - PREFILL_THREADS; k +="),
        ("if (D % 16 && threadIdx.x < KEYS)", "if (false)"),
        ("threadIdx.x < KEYS)", "threadIdx.x < KEYS - 1)"),
        ("n < count && d < D", "n < count"),
        ("n < count && d < D", "d < D"),
        ("n < count &&", "n < count - 1 &&"),
        ("row + i % 2 * 8, d = 16 * step + column + i / 2 * 8", "row + i / 2 * 8, d = 16 * step + column + i % 2 * 8"),
        ("lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * 8", "lane % 16, column = lane / 16 * 8"),
        ("{k[2], k[3]}", "{k[0], k[1]}"),
        ("q[step], {k[0]", "q[0], {k[0]"),
        (
            "step < Shape<D>::STEPS; step++)\n#pragma unroll\n        for (int j",
            "step < 1; step++)\n        for (int j",
        ),
        (
            "    return scores;",
            "    for (auto& fragment : scores.of)\n"
            "        for (float& x : fragment) x = to_float(from_float<T>(x));\n    return scores;",
        ),
        ("first + key > row", "first + key >= row"),
        ("first + key > row", "first + key > row + 1"),
        ("column + i % 2;", "column;"),
        ("> row + i / 2 * 8 ||", "> row ||"),
        ("|| key >= count", ""),
        ("|| key >= count", "|| key > count"),
        ("chunk.count < KEYS ||", ""),
        ("chunk.first + KEYS > position + 1", "chunk.first + KEYS > position + 2"),
        ("chunk.first - position, chunk.count", "chunk.first - tile.z, chunk.count"),
        ("return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2))", "return x"),
        ("return x + __shfl_xor_sync(ALL_LANES, x, 2)", "return x"),
        ("1.44269504f / sqrtf(D)", "1.44269504f"),
        ("1.44269504f / sqrtf(D)", "1.0f / sqrtf(D)"),
        ("fmaxf(averages.largest[r], scale * row_max(largest))", "scale * row_max(largest)"),
        ("scale * row_max(largest))", "row_max(largest))"),
        ("averages.weight[r] * kept + weight", "averages.weight[r] + weight"),
        ("averages.sum[i][2 * r] *= kept, averages.sum[i][2 * r + 1] *= kept;", ";"),
        ("averages.largest[r] = largest;", ""),
        ("averages{{MINUS_INFINITY, MINUS_INFINITY}", "averages{{0.0f, 0.0f}"),
        ("row = lane % 16, column = lane / 16 * 8", "row = lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * 8"),
        ("load_matrix_x4_transposed(v", "load_matrix_x4(v"),
        ("{v[2], v[3]}", "{v[0], v[1]}"),
        ("p.of[j][2], p.of[j][3])", "p.of[j + 1][0], p.of[j + 1][1])"),
        ("row + 8 * r >= count", "row + 8 * r > count"),
        ("row + 8 * r >= count", "row + 8 * r >= count - 1"),
        ("i < D / 8", "i < 2 * Shape<D>::STEPS"),
        ("sum[2 * r + 1] / weight", "sum[2 * r + 1]"),
        ("row_sum(averages.weight[r])", "averages.weight[r]"),
        ("if (next.count > 0) fetch", "if (next.count > 1) fetch"),
        ("if (chunk.first < seen) scores", "if (chunk.first < seen - 1) scores"),
        ("if (chunk.first >= seen)", "if (chunk.first >= seen - 1)"),
        ("fetch<T, D>(value_rows, values, chunk)", "fetch<T, D>(value_rows, values, next)"),
        ("n = tile.y + skipped", "n = tile.y"),
        ("position = tile.z + skipped", "position = tile.z"),
        ("min(tile.w - skipped, 16)", "min(tile.w, 16)"),
        ("chunk_at<D>(at, tile.x, h, 0", "chunk_at<D>(at, blockIdx.x, h, 0"),
        ("chunk_at<D>(at, tile.x, h, chunk", "chunk_at<D>(at, 0, h, chunk"),
        ("Pages at{pages, P, H", "Pages at{pages, 1, H"),
    ),
    *mutants(
        "pages.cuh",
        check_attention,
        ("index = position / S", "index = 0"),
        ("(text) * P + index", "(text) * P"),
        ("(text) * P + index", "(0) * P + index"),
        ("position - index * S", "position"),
        ("page * H + h", "page * H"),
        ("page * H + h", "text * H + h"),
        ("S - position % S", "S"),
    ),
    *mutants("pages.cuh", check_prefill, ("(text) * P + index", "(text) * P"), ("S - position % S", "S")),
    *mutants(
        "pages.cuh",
        check_rotary_append,
        ("position - index * S", "position"),
        ("(text) * P + index", "(text) + index"),
        ("index = position / S", "index = (position + 1) / S"),
    ),
    *mutants(
        "attention_prefill.cu",
        check_counting,
        (  # accumulation in 16 bits
            "    for (int j = 0; j < Shape<D>::KEYS / 8; j += 2) {\n        const uint32_t a",
            "    for (int j = 0; j < Shape<D>::KEYS / 8; j += 2) {\n"
            "        for (auto& sum : averages.sum)\n"
            "            for (float& x : sum) x = to_float(from_float<T>(x));\n        const uint32_t a",
        ),
        ("averages.weight[r] = averages.weight[r] * kept", "averages.weight[r] = averages.weight[r] * kept * 0.999f"),
    ),
    *mutants(
        "argmax.cu",
        check_argmax,
        ("__syncthreads();  // each warp's best", "// each warp's best"),
        ("a.id < b.id", "a.id > b.id"),
        ("flip > 0", "flip > 1"),
        ("a.logit > b.logit ?", "a.logit < b.logit ?"),
        ("flip = 16", "flip = 8"),
        ("lane < warps", "lane < warps - 1"),
        ("lane < warps", "lane <= warps"),
        ("if (allowed && !allowed[v]) continue;", ""),
        ("v < V;", "v < V - 1;"),
        ("v < V;", "v <= V;"),
        ("Best best{-infinity, -1}", "Best best{0.0f, -1}"),
    ),
    *mutants(
        "sample.cu",
        check_sample,
        # Places.
        ("v) <= last ?", "v) < last ?"),
        ("rank) << 32 | v;", "rank) << 32 | (1 << 20) - v;"),
        ("if (taken[i]) use", "use"),
        ("if (!allowed || allowed[v]) use", "use"),
        ("bits & minus_zero ?", "!(bits & minus_zero) ?"),
        ("bits ^ 0x7fffffffu;", "bits;"),
        # Filters.
        ("if (top_k[b]) mass.last", "if (top_k[b]) mass.least"),
        ("row, top_k[b], bins", "row, top_k[b] + 1, bins"),
        ("last_place(One{}", "last_place(mass"),
        ("share(total_of(mass, row), top_p[b])", "share(static_cast<uint64_t>(ONE), top_p[b])"),
        ("mass.last = last_place(mass,", "mass.last = last_place(One{},"),
        ("mass.least = share(static_cast<uint64_t>(ONE)", "mass.least = share(total_of(mass, row)"),
        ("weight >= least && place", "place"),
        (" && place_of(rank_of(x), v) <= last ?", " ?"),
        ("(x - best) * scale", "(x - best)"),
        ("(x - best) * scale", "x * scale"),
        ("LOG2_E / temperatures[b]", "1.0f / temperatures[b]"),
        ("b = texts[n];", "b = 0;"),
        # Searches.
        ("target = wanted - 1;", "target = wanted;"),
        ("== rank ? weight.of", "<= rank ? weight.of"),
        ("row), numbers[n]));", "row), ~numbers[n]));"),
        ("row), numbers[n]));", "row), numbers[0]));"),
        ("sums[part.index] <= target", "sums[part.index] < target"),
        ("target -= part.before;\n        count", "count"),
        ("target -= part.before;\n        rank", "rank"),
        ("(count + PARTS - 1) / PARTS", "count / PARTS"),
        ("min(begin + size, first + count)", "begin + size"),
        ("min(size, count - part.index * size)", "size"),
        ("shift = 28", "shift = 24"),
        ("shift >= 0", "shift > 0"),
        ("^ rank) >> shift", ") >> shift & 15"),
        ("if (digit < PARTS) column[digit", "column[digit % PARTS"),
        ("threadIdx.x / 32 * THREADS + i]", "i]"),
        ("v + (AHEAD - 1) * STEP < end", "v + (AHEAD - 2) * STEP < end"),
        ("v += AHEAD * STEP", "v += STEP"),
        # Barriers.
        ("__syncthreads();  // each warp's first", "// each warp's first"),
        ("__syncthreads();  // each part's sum", "// each part's sum"),
        ("__syncthreads();  // all have read", "// all have read"),
        ("__syncthreads();  // all columns", "// all columns"),
        ("column[digit * THREADS] = 0", ""),
    ),
    *mutants(
        "sample.cu",
        check_greedy,
        ("if (rank < best) best", "if (rank <= best) best"),
        ("if (other < first)", "if (other > first)"),
        ("place_of(best, id);", "place_of(best, 0);"),
        ("if (threadIdx.x == 0) ids[n]", "if (threadIdx.x == 0) ids[b]"),
        ("static_cast<long long>(n) * V", "0"),
    ),
    *mutants(
        "sample.cu",
        check_uniform,
        ("round < 10", "round < 9"),
        ("0xD2511F53u", "0xD2511F51u"),
        ("0x9E3779B9u", "0x9E3779B8u"),
        ("philox(seeds[texts[n]]", "philox(seeds[0]"),
        ("philox(seeds[texts[n]]", "philox(seeds[n]"),
        (", positions[n])", ", 0)"),
        (", positions[n])", ", n)"),
        ("key >> 32", "key"),
        ("x[1]) << 32 | x[0]", "x[0]) << 32 | x[1]"),
        ("(n < N)", "(n <= N)"),
    ),
    *mutants(
        "advance.cu",
        check_advance,
        ("N) positions[n] += 1", "N) positions[n] += 2"),
        ("n < N", "n <= N"),
        ("n < N", "n < N - 1"),
    ),
    *mutants(
        "residual.cu",
        check_residual,
        ("bias ? y + to_float(bias[c]) : y", "y"),
        ("c >= C", "c > C"),
        ("c >= C", "c >= C - 1"),
        ("x[i] += biased(y[i], bias, c)", "x[i] = biased(y[i], bias, c)"),
        ("blockIdx.y) * C", "blockIdx.y) * (C + 1)"),
    ),
    *mutants(
        "residual.cu",
        check_residual_pair,
        ("biased(a[i], bias_a, c)", "biased(a[i], bias_m, c)"),
        ("biased(m[i], bias_m, c) +", "m[i] +"),
        ("biased(m[i], bias_m, c) + biased(a[i], bias_a, c)", "biased(m[i], bias_m, c)"),
        ("x[i] += biased(m[i], bias_m, c) +", "x[i] = x[i] + biased(m[i], bias_m, c) +"),
    ),
    *mutants(
        "product_naive.cu",
        check_product_naive,
        ("i < I", "i < I - 1"),
        ("i < I", "i <= I"),
        ("j / O * I", "j / O * O"),
        ("j % O * I", "j / O * I"),
        (">= static_cast<long long>(N) * O", "> static_cast<long long>(N) * O"),
        (">= static_cast<long long>(N) * O", ">= static_cast<long long>(N) * O - 1"),
        (
            "sum += to_float(row[i]) * to_float(w[i])",
            "sum = to_float(from_float<T>(sum + to_float(row[i]) * to_float(w[i])))",
        ),
    ),
    *mutants(
        "matvec.cu",
        check_matvec,
        ("min(index, count - 1)", "index"),
        ("min(index, count - 1)", "min(index, count)"),
        ("if (o >= O)", "if (o >= O - 1)"),
        ("first = 8 * lane; first < I;", "first = 8 * lane; first < I - 8;"),
        ("first += 256 * STEPS", "first += 256"),
        ("if (first + 256 * step < I) w", "w"),
        ("if (first + 256 * step >= I) break;", ""),
        ("if (first + 256 * step >= I) break;", "if (first + 256 * step >= I - 8) break;"),
        ("eight(row(weight, o + k, O, I) + first + 256 * step)", "eight(row(weight, o + k, O, I) + first)"),
        ("eight(row(x, n + r, N, I) + first + 256 * step)", "eight(row(x, n + r, N, I) + first)"),
        ("eight(row(x, n + r, N, I)", "eight(row(x, r, N, I)"),
        ("v[j] * w[step][k][j]", "v[j] * w[0][k][j]"),
        ("v[j] * w[step][k][j]", "v[j] * w[step][0][j]"),
        (
            "sum[r * OUTPUTS + k] += v[j] * w[step][k][j]",
            "sum[r] = to_float(from_float<T>(sum[r] + v[j] * w[step][k][j]))",
        ),
        ("n < N && o < O", "o < O"),
        ("n < N && o < O", "n < N"),
        ("n < N && o < O", "n < N - 1 && o < O"),
        ("n += lane / LANES / OUTPUTS", "n += lane / LANES % ROWS"),
        ("o += lane / LANES % OUTPUTS", "o += lane / LANES / ROWS"),
        ("o += lane / LANES % OUTPUTS;", ""),
    ),
    *mutants(
        "common.cuh",
        check_matvec,
        ("half = COUNT * flip / 32", "half = COUNT * flip / 64"),
        ("if (half == 0) x[0] +=", "x[0] +="),
        ("if (half == 0) x[0] +=", "if (half == 0) x[0] ="),
        ("(lane & flip ? b : a)", "a"),
        ("lane & flip ? a : b", "b"),
    ),
    *mutants(
        "stream.cuh",
        check_output,
        ("k * STRIDE < left", "true"),
        ("k * STRIDE < left", "k * STRIDE < left - 8"),
        ("min(n, N - 1)", "n"),
        ("min(n, N - 1)", "min(n, N - 2)"),
        ("threadIdx.x / 32 * SLICE + threadIdx.x % 4 * 8", "threadIdx.x / 32 * SLICE + threadIdx.x % 4 * 4"),
        ("threadIdx.x / 32 * SLICE + threadIdx.x % 4 * 8", "threadIdx.x % 4 * 8"),
        ("round * ROUND + threadIdx", "threadIdx"),
        ("(I + ROUND - 1) / ROUND", "I / ROUND"),
        ("gridDim.x + units - 1);", "units - 1);"),
        ("gridDim.x + units - 1);", "gridDim.x + units);"),
        ("return gridDim.x + atomicInc", "return atomicInc"),
        ("return gridDim.x + atomicInc", "return 1 + gridDim.x + atomicInc"),
        ("__syncthreads();  // x is prepared", "// x is prepared"),
        ("        __syncthreads();\n        const int n", "        const int n"),
        ("turn ^= 1", "turn = 0"),
        ("(work.O + UNIT - 1) / UNIT", "work.O / UNIT"),
        ("unit * UNIT + 8 * tile + row", "unit * UNIT + row"),
        ("return o < work.O ?", "return true ?"),
        ("return o < work.O ?", "return o < work.O - 8 ?"),
        ("k < DEPTH; k++) fetch(beginning", "k < 0; k++) fetch(beginning"),
        ("last = round == work.rounds - 1", "last = true"),
        ("last = round == work.rounds - 1", "last = false"),
        ("whose = last ? next_unit : unit", "whose = unit"),
        ("then = last ? 0 : round + 1", "then = round"),
        (
            "{weights_of(then, whose, 0), weights_of(then, whose, 1)}",
            "{weights_of(then, whose, 0), weights_of(then, whose, 0)}",
        ),
        ("part.of_x(row + 8, work.N)", "part.of_x(row, work.N)"),
        ("low, high, ahead[k][tile]", "low, high, ahead[k][0]"),
        ("low, high, ahead[k][tile]", "low, high, ahead[0][tile]"),
        ("low, high, ahead[k][tile]", "low, low, ahead[k][tile]"),
        ("{weight.x, weight.y}", "{weight.x, weight.z}"),
        ("{low.z, high.z, low.w, high.w}", "{low.z, low.w, high.z, high.w}"),
        ("half < ROWS / 8", "half < 1"),
        ("[8 * tile + 2 * t]", "[8 * tile + t]"),
        ("[row + 8 * half]", "[row]"),
        ("sum[tile][2 * half + 1]", "sum[tile][2 * half]"),
        ("next_unit = coming[turn];", "next_unit = coming[turn ^ 1];"),
        ("n >= work.N ||", ""),
        ("n >= work.N", "n >= work.N - 1"),
        ("|| o >= work.O", ""),
        ("w < WARPS; w++", "w < WARPS - 1; w++"),
        ("b += partial[turn][w][n][o % UNIT + 1]", "b += partial[turn][w][n][o % UNIT]"),
        ("float sum[TILES][4] = {};", "float sum[TILES][4] = {{1.0f}};"),
    ),
    *mutants(
        "fused_output.cu",
        check_output,
        ("round < first ? part_of", "round <= first ? part_of"),
        ("F, F, round - first)", "F, F, round)"),
        ("F, F, round - first)", "F, I, round - first)"),
        ("part_of(down, F, activated, F", "part_of(down, F, z, I"),
        ("part_of(dense, I, z, I", "part_of(dense, O, z, I"),
        ("part_of(dense, I, z, I", "part_of(dense, I, z, O"),
        ("dense_bias ? to_float(dense_bias[c]) : 0.0f", "0.0f"),
        ("dense_bias ? to_float(dense_bias[c]) : 0.0f", "to_float(dense_bias[c])"),
        ("down_bias ? to_float(down_bias[c]) : 0.0f", "0.0f"),
        ("down_bias ? to_float(down_bias[c]) : 0.0f", "to_float(down_bias[c])"),
        ("b = biased(c + 1, b)", "b = biased(c, b)"),
        ("b = biased(c + 1, b)", "b = biased(c + 1, a)"),
        ("if (before) a += before[place]", "if (false) a += before[place]"),
        ("if (before) a += before[place]", "a += before[place]"),
        ("before[place + 1]", "before[place]"),
        ("(n) * O + c", "(n) * O"),
        ("rounds_of(I) + rounds_of(F)", "rounds_of(I)"),
        ("rounds_of(I) + rounds_of(F)", "rounds_of(F)"),
    ),
    *mutants(
        "normed.cuh",
        check_qkv,
        ("(C + 31) / 64 * 64 + 32", "C / 64 * 64"),
        ("norm.x + n * C", "norm.x"),
        ("n < N; n++", "n < N - 1; n++"),
        ("c < C; c += blockDim.x", "c < C - 1; c += blockDim.x"),
        ("norm.weight[c], norm.bias[c]", "norm.bias[c], norm.weight[c]"),
        ("rows[n * normed_row(C) + c]", "rows[n * C + c]"),
    ),
    *mutants(
        "stream.cuh",
        check_qkv,
        ("(o) * weight_row", "(o) * x_row"),
        ("__syncthreads();  // x is prepared", "// x is prepared"),
    ),
    *mutants(
        "fused_qkv.cu",
        check_qkv,
        ("p / 2 + p % 2 * half", "p"),
        ("p < 2 * half ?", "p < 2 * half - 2 ?"),
        ("o / heads.D % 3", "o / heads.D % 2"),
        ("part_of_head(o) < 2 ? dim_of(p, heads.half) : p", "part_of_head(o) < 2 ? p : dim_of(p, heads.half)"),
        ("o / heads.D * heads.D + dim(o)", "o"),
        ("part_of(weights, C, normed, normed_row(C), C, round)", "part_of(weights, C, normed, C, C, round)"),
        ("h = o / heads.D / 3", "h = o / heads.D % 3"),
        ("which == 1 ? keys : values", "which == 1 ? values : keys"),
        ("pages.slot(rotary.texts[n]", "pages.slot(n"),
        ("h, rotary.positions[n]);", "h, rotary.positions[n] + 1);"),
        ("{pages, P, H", "{pages, 1, H"),
        ("q + (n * pages.H + h)", "q + (n + h)"),
        ("if (bias) a +=", "if (false) a +="),
        ("if (bias) a +=", "a +="),
        ("to_float(bias[row_of(o + 1)])", "to_float(bias[row_of(o)])"),
        ("to_float(bias[row_of(o)])", "to_float(bias[o])"),
        ("part_of_head(o) < 2 && o", "part_of_head(o) < 3 && o"),
        ("part_of_head(o) < 2 && o", "part_of_head(o) < 1 && o"),
        ("o % heads.D < 2 * heads.half", "o % heads.D < heads.half"),
        ("rotary.positions[n] * heads.half + dim(o)", "n * heads.half + dim(o)"),
        ("rotary.positions[n] * heads.half + dim(o)", "rotary.positions[n] * heads.half"),
        ("a * cos - b * sin", "a * cos + b * sin"),
        ("b * cos + first * sin", "b * cos + a * sin"),
        ("vector[dim(o + 1)] = from_float<T>(b)", "vector[dim(o) + 1] = from_float<T>(b)"),
        ("3 * H * D, C, rounds_of(C)", "2 * H * D, C, rounds_of(C)"),
        ("3 * H * D, C, rounds_of(C)", "3 * C, C, rounds_of(C)"),
    ),
    *mutants(
        "fused_mlp.cu",
        check_mlp,
        ("__syncthreads();  // all know", "// all know"),
        ("split = job / a.heads", "split = 0"),
        ("job >= jobs", "job >= jobs - 1"),
        ("jobs + gridDim.x - 1", "jobs + gridDim.x"),
        ("if (first) attend_jobs", "attend_jobs"),
        ("if (!first) attend_jobs", "if (false) attend_jobs"),
        ("N * H * splits, taken + 1", "N * H * splits, taken"),
        ("n = head / a.pages.H, h = head % a.pages.H", "n = head % a.pages.H, h = head / a.pages.H"),
        ("length = a.positions[n] + 1", "length = a.positions[n]"),
        ("length = a.positions[n] + 1", "length = a.positions[n] + 2"),
        ("(length + a.splits - 1) / a.splits", "length / a.splits"),
        ("min(length, first + part)", "first + part"),
        ("min(length, first + part)", "length"),
        ("a.texts[n], h}", "n, h}"),
        ("{pages, P, H,", "{pages, 1, H,"),
        ("a.q + head * D", "a.q + h * D"),
        ("averages + split * (D + 2)", "averages"),
        ("(head) * a.splits * (D + 2)", "(h) * a.splits * (D + 2)"),
        ("a.splits - 1) == a.splits - 1", "a.splits - 1) == 0"),
        ("a.splits - 1) == a.splits - 1", "a.splits) == a.splits - 1"),
        ("a.arrived + head", "a.arrived + n"),
        ("combine(averages, a.splits", "combine(averages, a.splits - 1"),
        ("a.z + head * D", "a.z + h * D"),
        ("to_float(bias[f])", "to_float(bias[0])"),
        ("to_float(bias[f + 1])", "to_float(bias[f])"),
        ("Activation::of(a +", "(a +"),
        ("(n) * O + f", "(n) * O"),
        ("rounds_of(C)});", "rounds_of(C) - 1});"),
    ),
    *mutants(
        "gemm.cu",
        check_gemm,
        ("__syncthreads();  // every", "// every"),
        ("copy_async_wait<STAGES - 2>();", "copy_async_wait<STAGES - 1>();"),
        ("copy_async_wait<STAGES - 2>();", ""),
        ("first + row < count && i", "i"),
        ("first + row < count", "first + row < count - 1"),
        ("&& i + column < I", ""),
        ("i + column < I", "i + column < I - 8"),
        ("first + row) * I + i + column", "first + row) * I + column"),
        ("first + row) * I + i + column", "row) * I + i + column"),
        ("if (slice * SLICE < I) {", "if (slice * SLICE < I - SLICE) {"),
        ("fetch_both(slice + STAGES - 1);", "fetch_both(slice + STAGES);"),
        ("slice < STAGES - 1; slice++", "slice < STAGES - 2; slice++"),
        ("TILE * PIECES / THREADS; k++", "TILE * PIECES / THREADS - 1; k++"),
        ("for (int slice = 0; slice * SLICE < I;", "for (int slice = 0; slice * SLICE < I - SLICE;"),
        ("i < SLICE; i += 16", "i < SLICE; i += 32"),
        ("&x[16 * m + lane % 16][i + lane / 16 * 8]", "&x[16 * m + lane % 16][i + lane / 8 % 2 * 8]"),
        ("&x[16 * m +", "&x[8 * m +"),
        ("[i + lane / 8 % 2 * 8]);", "[i + lane / 16 * 8]);"),
        ("a[m], b[o]", "a[0], b[o]"),
        ("warp / 2 * 32, column = warp % 2 * 32", "warp / 2 * 32, column = warp / 2 * 32"),
        ("weight_slices[slice % STAGES] + column", "weight_slices[slice % STAGES]"),
        ("lane / 4 + j / 2 % 2 * 8", "lane / 4 + j % 2 * 8"),
        ("n < N &&", "n <= N &&"),
        ("o < O) y", "o <= O) y"),
        ("o < O) y", "o < O - 1) y"),
        ("n < N &&", "n < N - 1 &&"),
        (
            "mma_m16n8k16<T>(sum[m][o], a[m], b[o]);",
            "mma_m16n8k16<T>(sum[m][o], a[m], b[o]), sum[m][o][0] = to_float(from_float<T>(sum[m][o][0]));",
        ),
    ),
]


def survives(check: Callable[..., None]) -> bool:
    try:
        for case in CASES[check][1]:
            for schedule in SCHEDULES:
                check(host(*schedule), *case)
    except (AssertionError, KernelError):
        return False
    return True


def altered(source: Source, mutant: Mutant | None, folder: Path) -> Source:
    for path in (*KERNELS.glob("*.cuh"), KERNELS / source.file):
        shutil.copy(path, folder)
    if mutant:
        text = (folder / mutant.file).read_text()
        assert text.count(mutant.right) >= 1, "the mutant no longer fits the kernel"
        (folder / mutant.file).write_text(text.replace(mutant.right, mutant.wrong, 1))
    return replace(source, folder=folder)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEOX_CACHE", str(tmp_path))
    name = CASES[mutant.check][0]
    monkeypatch.setattr(ops, name, altered(getattr(ops, name), mutant, tmp_path))
    assert not survives(mutant.check)


@pytest.mark.parametrize("check", CASES, ids=lambda check: check.__name__)
def test_the_right_kernel_survives(check: Callable[..., None]) -> None:
    assert survives(check)
