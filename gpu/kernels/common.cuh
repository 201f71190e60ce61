// Sums over a warp and over a block, and how a block shares out a row.
#pragma once
#include "types.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum over the warp, in every lane: a butterfly of 5 exchanges. All 32 lanes must call it.
template <class T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int flip = 16; flip > 0; flip /= 2) x += __shfl_xor_sync(ALL_LANES, x, flip);
    return x;
}

// COUNT sums over the warp, a power of two up to 32: the i-th in the lanes that i 32/COUNT starts. At each exchange a lane
// gives away half of its sums and goes on with the other half: COUNT + log2(32/COUNT) - 1 exchanges instead of 5 COUNT.
// All 32 lanes must call it; x is overwritten.
template <int COUNT> __device__ __forceinline__ float warp_sums(float (&x)[COUNT]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int flip = 16; flip > 0; flip /= 2) {
        const int half = COUNT * flip / 32;
        if (half == 0) x[0] += __shfl_xor_sync(ALL_LANES, x[0], flip);
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {  // a constant, or the loop is not unrolled and x leaves the registers
            if (i >= half) break;
            float a = x[i], b = x[i + half];
            x[i] = (lane & flip ? b : a) + __shfl_xor_sync(ALL_LANES, lane & flip ? a : b, flip);
        }
    }
    return x[0];
}

// The sum over the block, in every thread. All threads must call it; the block is 1-D, of whole warps.
// partial: 32 numbers of shared memory, which only this function touches.
template <class T> __device__ __forceinline__ T block_sum(T x, T* partial) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();  // each warp's sum is written before any warp reads it
    x = warp_sum(lane < warps ? partial[lane] : T(0));
    __syncthreads();  // all have read before the next call overwrites
    return x;
}

// use(i, load(i)) for a thread's share of 0 to n - 1: i = threadIdx.x, then every blockDim.x-th, in that order. AHEAD of
// them are asked for at a time: were each used before the next is asked for, a thread would wait for the caches each time.
template <int AHEAD = 8, class Load, class Use> __device__ __forceinline__ void share_out(int n, Load load, Use use) {
    const int step = blockDim.x;
    for (int first = threadIdx.x; first < n; first += AHEAD * step) {
        decltype(load(0)) x[AHEAD] = {};
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (first + k * step < n) x[k] = load(first + k * step);
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (first + k * step < n) use(first + k * step, x[k]);
    }
}
