// The rows that a fused product multiplies, normed, in shared memory: layer_norm.cu in the prologue of each block.
//
// Each block computes the statistics of up to 16 rows anew, which come from the caches, while its first weights are on
// their way. Rows lie so far apart that the 16 bytes that the lanes of two rows read at a time are in different banks.
#pragma once
#include "statistics.cuh"
#include "stream.cuh"

// From a row to the next: the smallest 64 k + 32 that C numbers of 16 bits fit into.
constexpr int normed_row(int C) { return (C + 31) / 64 * 64 + 32; }

// What is normed, and with what: x float (N,C), weight and bias T (C).
template <class T> struct Norm {
    const float* x;
    const T *weight, *bias;
    float eps;
};

// All threads must call it. A barrier must follow before the rows are read.
template <class T> __device__ __forceinline__ void norm_rows(const Norm<T>& norm, T* rows, int N, int C) {
    for (int n = 0; n < N; n++) {
        const float* row = norm.x + n * C;
        const Statistics s = row_statistics(row, C, norm.eps);
        share_out(C, [&](int c) { return Term<T>{row[c], norm.weight[c], norm.bias[c]}; },
                  [&](int c, const Term<T>& t) { rows[n * normed_row(C) + c] = normalized(t, s); });
    }
}
