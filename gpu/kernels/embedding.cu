// Embedding, widened to float: x becomes the residual stream.
//
//   embedding        x[n] = table[ids[n]]
//   embedding_share  x[n] = table[ids[n] - first], or zeros where the table has no such row: of a table that several
//                    ranks share, each holds some rows, and the sum over the ranks is the whole table's
//
//   ids    int    (N)
//   table  T      (V,C)
//   x      float  (N,C)
//
// Grid: one block for each n. Block: any size; its threads take every blockDim.x-th column, so that a warp reads and
// writes neighbouring columns.
// Preconditions: of embedding, 0 <= id < V, checked before ids reach the device.
// Bytes: N C (sizeof(T) + 4), each moved once.
#include "common.cuh"
#include "ptx.cuh"

template <class T> __global__ void embedding(const int* ids, const T* __restrict__ table,
                                             float* x, int C) {
    after_earlier_launches();
    const T* row = table + static_cast<long long>(ids[blockIdx.x]) * C;  // V C exceeds 2^31 in no model, N C may
    float* out = x + static_cast<long long>(blockIdx.x) * C;
    share_out(C, [&](int c) { return row[c]; }, [&](int c, T number) { out[c] = to_float(number); });
}

template <class T> __global__ void embedding_share(const int* ids, const T* __restrict__ table,
                                                   float* x, int first, int V, int C) {
    after_earlier_launches();
    const int held = ids[blockIdx.x] - first;
    const T* row = table + static_cast<long long>(held) * C;
    float* out = x + static_cast<long long>(blockIdx.x) * C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) out[c] = 0 <= held && held < V ? to_float(row[c]) : 0.0f;
}
