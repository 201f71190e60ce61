// Mean and variance of a row, and what LayerNorm makes of its numbers.
#pragma once
#include "common.cuh"

struct Statistics { float mean, scale; };  // scale = 1 / sqrt(variance + eps)

// Of one row, in every thread of the block.
__device__ __forceinline__ Statistics row_statistics(const float* __restrict__ row, int C, float eps) {
    __shared__ float partial[32];
    float sum = 0.0f;
    for (int c = threadIdx.x; c < C; c += blockDim.x) sum += row[c];
    float mean = block_sum(sum, partial) / C;
    float squares = 0.0f;
    for (int c = threadIdx.x; c < C; c += blockDim.x) squares += (row[c] - mean) * (row[c] - mean);
    return {mean, 1.0f / sqrtf(block_sum(squares, partial) / C + eps)};
}

template <class T> __device__ __forceinline__ T normalized(float x, Statistics s, T weight, T bias) {
    return from_float<T>((x - s.mean) * s.scale * to_float(weight) + to_float(bias));
}
