// The stream of weights that the fused products of a decode step share:  sum_i x[n,i] weight[o,i]  for up to 16 rows n.
//
// A step reads every weight once, so its time is that of reading them, if enough is on its way at any moment. A block
// takes a unit of 16 outputs at a time, and its warps share out i in slices of 32: warp w takes the slices w, w + 8, ...
// A round is DEPTH of them for each warp. A lane has the weights of a whole round on their way, 12 loads of 16 bytes, and
// asks for those of the next as it uses them, also across the end of a unit, whose first weights are there when it
// begins: two blocks on a multiprocessor have up to 96 KB on their way.
//
// Blocks stay. The first unit of a block is that of its number; whoever is done takes the next that nobody has taken, so
// that a block that came late, or had something else to do before, leaves more to the others. A sum is added in one
// order whichever block does it: the result is the same in every run.
//
// The weights of the first round are asked for before the launches before this one have ended, if it began early: blocks
// of this one come as those of the last leave, and memory stays busy between the two.
//
// Products are on tensor cores: x is the left factor, 16 rows, of which the last may be missing, and the weights the
// right one, 8 outputs. A sum over i may be taken in any order, so a lane's 16 bytes, i = 8t to 8t + 7 of a slice, are
// taken for what the fragments want of lane t: the first four numbers for its columns in one mma, the others in the next.
//
// A `Work` says what is multiplied:
//   N, O, rounds     rows, outputs (a multiple of 8), rounds of i
//   taken            counts the units that were taken after the first ones: 0 before the launch and after it
//   row_of(o)        which row of the weights gives output o
//   part(round)      where a lane stands in a round
//   load_x(p)        8 numbers of x, not before prepare()
//   prepare()        what must be done before x is read, while the first weights are on their way; a barrier follows
//   finish(n,o,a,b)  takes the sums of the outputs o, an even number, and o + 1; each by one thread of one block
#pragma once
#include "ptx.cuh"

constexpr int WARPS = 8, STREAM_THREADS = 32 * WARPS;
constexpr int TILES = 2, UNIT = 8 * TILES;  // outputs of a block at a time
constexpr int SLICE = 32, STRIDE = WARPS * SLICE;  // numbers of a warp at a time, and from one of its slices to the next
constexpr int DEPTH = 6, ROUND = DEPTH * STRIDE;

// Of a row, what one lane takes in a round: 8 numbers at every STRIDE, as long as they lie in the row.
template <class T> struct Numbers {
    const T* start;
    int left;  // to the end of the row

    __device__ __forceinline__ bool has(int k) const { return k * STRIDE < left; }
};

// What a lane takes of every row in a round.
template <class T> struct Part {
    const T *weight, *x;  // where it begins in row 0
    int weight_row, x_row;  // numbers from a row to the next
    int left;

    __device__ __forceinline__ Numbers<T> of_weight(int o) const {
        return {weight + static_cast<long long>(o) * weight_row, left};
    }
    // Of the last row again beyond it: what is made of them is not stored.
    __device__ __forceinline__ Numbers<T> of_x(int n, int N) const { return {x + min(n, N - 1) * x_row, left}; }
};

template <class T>
__device__ __forceinline__ Part<T> part_of(const T* weight, int weight_row, const T* x, int x_row, int I, int round) {
    const int i = round * ROUND + threadIdx.x / 32 * SLICE + threadIdx.x % 4 * 8;
    return {weight + i, x + i, weight_row, x_row, I - i};
}

constexpr int rounds_of(int I) { return (I + ROUND - 1) / ROUND; }

__device__ __forceinline__ uint4 no_numbers() { return make_uint4(0, 0, 0, 0); }

template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint4& low, const uint4& high, const uint4& weight) {
    mma_m16n8k16<T>(sum, {low.x, high.x, low.y, high.y}, {weight.x, weight.y});
    mma_m16n8k16<T>(sum, {low.z, high.z, low.w, high.w}, {weight.z, weight.w});
}

// The next unit that nobody has taken, or one beyond the last. A block asks once when it begins, and once for each unit it
// works on; after as many times as there are blocks and units the count is 0 again.
__device__ __forceinline__ int take_unit(unsigned* taken, int units) {
    return gridDim.x + atomicInc(taken, gridDim.x + units - 1);
}

template <class T, int ROWS, class Work> __device__ __forceinline__ void stream(const Work& work) {
    __shared__ __align__(16) float partial[2][WARPS][ROWS][UNIT];
    __shared__ int coming[2];  // the unit after the next
    const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int units = (work.O + UNIT - 1) / UNIT;
    const uint64_t policy = used_once();
    uint4 ahead[DEPTH][TILES];
    auto weights_of = [&](int round, int unit, int tile) {
        const int o = unit * UNIT + 8 * tile + row;
        return o < work.O ? work.part(round).of_weight(work.row_of(o)) : Numbers<T>{nullptr, 0};
    };
    auto fetch = [&](const Numbers<T> (&weights)[TILES], int k) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            ahead[k][tile] = weights[tile].has(k) ? load_once(weights[tile].start + k * STRIDE, policy) : no_numbers();
    };
    int unit = blockIdx.x;
    const Numbers<T> beginning[TILES] = {weights_of(0, unit, 0), weights_of(0, unit, 1)};
#pragma unroll
    for (int k = 0; k < DEPTH; k++) fetch(beginning, k);
    after_earlier_launches();
    if (threadIdx.x == 0) coming[1] = take_unit(work.taken, units);
    work.prepare();
    __syncthreads();  // x is prepared, and the second unit known, before either is read
    int next_unit = coming[1];
    for (int turn = 0; unit < units; turn ^= 1) {
        if (threadIdx.x == 0) coming[turn] = take_unit(work.taken, units);
        float sum[TILES][4] = {};
        for (int round = 0; round < work.rounds; round++) {
            const bool last = round == work.rounds - 1;
            const int then = last ? 0 : round + 1, whose = last ? next_unit : unit;
            const Numbers<T> next[TILES] = {weights_of(then, whose, 0), weights_of(then, whose, 1)};
            const Part<T> part = work.part(round);
            const Numbers<T> x[2] = {part.of_x(row, work.N), part.of_x(row + 8, work.N)};
#pragma unroll
            for (int k = 0; k < DEPTH; k++) {
                const uint4 low = x[0].has(k) ? work.load_x(x[0].start + k * STRIDE) : no_numbers();
                const uint4 high = ROWS > 8 && x[1].has(k) ? work.load_x(x[1].start + k * STRIDE) : no_numbers();
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) multiply<T>(sum[tile], low, high, ahead[k][tile]);
                fetch(next, k);
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int half = 0; half < ROWS / 8; half++)
                *reinterpret_cast<float2*>(&partial[turn][warp][row + 8 * half][8 * tile + 2 * t]) =
                    make_float2(sum[tile][2 * half], sum[tile][2 * half + 1]);
        // Every warp's share, and the unit after the next, is there before any is read. The next turn has other memory,
        // and the one after it comes after the next barrier, which those that read now have yet to reach.
        __syncthreads();
        const int n = threadIdx.x / (UNIT / 2), o = unit * UNIT + threadIdx.x % (UNIT / 2) * 2;
        unit = next_unit, next_unit = coming[turn];
        if (n >= work.N || o >= work.O) continue;
        float a = 0.0f, b = 0.0f;
        for (int w = 0; w < WARPS; w++) a += partial[turn][w][n][o % UNIT], b += partial[turn][w][n][o % UNIT + 1];
        work.finish(n, o, a, b);
    }
}
