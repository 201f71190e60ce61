// Embedding:  x[n] = table[ids[n]],  widened to float: x becomes the residual stream.
//
//   ids    int    (N)
//   table  T      (V,C)
//   x      float  (N,C)
//
// Grid: one block for each n. Block: any size; its threads take every blockDim.x-th column, so that a warp reads and
// writes neighbouring columns.
// Preconditions: 0 <= id < V, checked before ids reach the device.
// Bytes: N C (sizeof(T) + 4), each moved once.
#include "common.cuh"

template <class T> __global__ void embedding(const int* __restrict__ ids, const T* __restrict__ table,
                                             float* __restrict__ x, int C) {
    const T* row = table + static_cast<long long>(ids[blockIdx.x]) * C;  // V C exceeds 2^31 in no model, N C may
    float* out = x + static_cast<long long>(blockIdx.x) * C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) out[c] = to_float(row[c]);
}
