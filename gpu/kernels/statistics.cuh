// Mean and variance of a row, and what LayerNorm makes of its numbers.
#pragma once
#include "common.cuh"

struct Statistics { float mean, scale; };  // scale = 1 / sqrt(variance + eps)

// Of one row, in every thread of the block.
__device__ __forceinline__ Statistics row_statistics(const float* row, int C, float eps) {
    __shared__ float partial[32];
    const auto number = [&](int c) { return row[c]; };
    float sum = 0.0f;
    share_out(C, number, [&](int, float x) { sum += x; });
    float mean = block_sum(sum, partial) / C;
    float squares = 0.0f;
    share_out(C, number, [&](int, float x) { squares += (x - mean) * (x - mean); });
    return {mean, 1.0f / sqrtf(block_sum(squares, partial) / C + eps)};
}

// A number of a row, and of the norm's weight and bias.
template <class T> struct Term {
    float x;
    T weight, bias;
};

template <class T> __device__ __forceinline__ T normalized(const Term<T>& t, Statistics s) {
    return from_float<T>((t.x - s.mean) * s.scale * to_float(t.weight) + to_float(t.bias));
}
