// The stream of weights that the fused products of a decode step share:  sum_i x[n,i] weight[o,i]  for up to 16 rows n.
//
// A step reads every weight once, so its time is that of reading them, if enough is on its way at any moment. A block
// takes a unit of 16 outputs at a time, and its warps share out i in slices of 32: warp w takes the slices w, w + 8, ...
// A lane keeps DEPTH slices of both tiles of 8 outputs on their way, 12 loads of 16 bytes, and asks for the next as soon
// as it has used some, also across the end of a unit, whose first weights are there when it begins. Two blocks on a
// multiprocessor have 64 to 96 KB on their way. Blocks stay: block b takes the units b, b + gridDim.x, ...
//
// Products are on tensor cores: x is the left factor, 16 rows, of which the last may be missing, and the weights the
// right one, 8 outputs. A sum over i may be taken in any order, so a lane's 16 bytes, i = 8t to 8t + 7 of a slice, are
// taken for what the fragments want of lane t: the first four numbers for its columns in one mma, the others in the next.
//
// A `Work` says what is multiplied:
//   O, slices            outputs, a multiple of 8, and slices of i
//   weight(o, slice, t)  8 weights at a multiple of 16 bytes, or null beyond the edges
//   x(n, slice, t)       the 8 numbers of a row that go with them, zeros beyond the edge; called after prepare()
//   N                    rows
//   prepare()            what must be done before x, while the first weights are on their way
//   finish(n, o, a, b)   takes the sums of the outputs o, an even number, and o + 1; each by one thread of one block
#pragma once
#include "ptx.cuh"

constexpr int WARPS = 8, STREAM_THREADS = 32 * WARPS;
constexpr int TILES = 2, UNIT = 8 * TILES;   // outputs of a block at a time
constexpr int SLICE = 32, DEPTH = 6, BATCH = 2;  // of DEPTH slices on their way, BATCH are used and asked for together

__device__ __forceinline__ uint4 no_numbers() { return make_uint4(0, 0, 0, 0); }

template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint4& low, const uint4& high, const uint4& weight) {
    mma_m16n8k16<T>(sum, {low.x, high.x, low.y, high.y}, {weight.x, weight.y});
    mma_m16n8k16<T>(sum, {low.z, high.z, low.w, high.w}, {weight.z, weight.w});
}

template <class T, int ROWS, class Work> __device__ __forceinline__ void stream(const Work& work) {
    __shared__ __align__(16) float partial[2][WARPS][ROWS][UNIT];
    const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int rounds = (work.slices + WARPS * DEPTH - 1) / (WARPS * DEPTH), step = gridDim.x * UNIT;
    const uint64_t policy = used_once();
    uint4 ahead[DEPTH][TILES];
    auto slice_of = [&](int round, int k) { return (round * DEPTH + k) * WARPS + warp; };
    auto fetch = [&](int first, int round, int k) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const T* weight = work.weight(first + 8 * tile + row, slice_of(round, k), t);
            ahead[k][tile] = weight ? load_once(weight, policy) : no_numbers();
        }
    };
    int first = blockIdx.x * UNIT;
#pragma unroll
    for (int k = 0; k < DEPTH; k++) fetch(first, 0, k);
    work.prepare();
    for (int turn = 0; first < work.O; first += step, turn ^= 1) {
        float sum[TILES][4] = {};
        for (int round = 0; round < rounds; round++) {
            const bool last = round == rounds - 1;
#pragma unroll
            for (int batch = 0; batch < DEPTH; batch += BATCH) {
#pragma unroll
                for (int k = batch; k < batch + BATCH; k++) {
                    const int slice = slice_of(round, k);
                    const uint4 low = work.x(min(row, work.N - 1), slice, t);  // beyond the last, that again: not stored
                    const uint4 high = ROWS > 8 ? work.x(min(row + 8, work.N - 1), slice, t) : no_numbers();
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) multiply<T>(sum[tile], low, high, ahead[k][tile]);
                }
#pragma unroll
                for (int k = batch; k < batch + BATCH; k++) fetch(last ? first + step : first, last ? 0 : round + 1, k);
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int half = 0; half < ROWS / 8; half++)
                *reinterpret_cast<float2*>(&partial[turn][warp][row + 8 * half][8 * tile + 2 * t]) =
                    make_float2(sum[tile][2 * half], sum[tile][2 * half + 1]);
        // Every warp's share is there before any is added. The next turn has other memory, and the one after it comes
        // after the next barrier, which those that add now have yet to reach.
        __syncthreads();
        const int n = threadIdx.x / (UNIT / 2), pair = threadIdx.x % (UNIT / 2) * 2;
        if (n >= work.N || first + pair >= work.O) continue;
        float a = 0.0f, b = 0.0f;
        for (int w = 0; w < WARPS; w++) a += partial[turn][w][n][pair], b += partial[turn][w][n][pair + 1];
        work.finish(n, first + pair, a, b);
    }
}
