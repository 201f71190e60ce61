// Skinny matrix product:  y[n,o] = sum_i x[n,i] weight[o,i]  for a few rows n, as a step of decoding has.
//
//   x       T      (N,I)   I a multiple of 8, both arrays at multiples of 16 bytes
//   weight  T      (O,I)
//   y       float  (N,O)
//
// A weight is used only N times, so the time is that of reading them all, and memory is busy only while much is asked of
// it at once. A warp takes OUTPUTS neighbouring outputs and up to ROWS rows. Its lanes share out i in pieces of 8, and
// each asks for the next STEPS pieces of every output, 8 loads of 16 bytes (4 where the sums of 8 rows take up the
// registers), before it uses the first. The rows of x come from the first-level cache: all warps of a block read them at
// about the same time.
//
// Grid: (ceil(O / (8 OUTPUTS)), ceil(N / ROWS)). Block: 256 threads, 8 warps.
// Bytes: O I sizeof(T) for each ROWS rows, and x and y, which are small.
#include "common.cuh"
#include "ptx.cuh"

constexpr int OUTPUTS = 2;

template <class T> __device__ __forceinline__ const T* row(const T* matrix, int index, int count, int I) {
    return matrix + static_cast<long long>(min(index, count - 1)) * I;  // beyond the last, that again: never stored
}

template <class T, int ROWS> __global__ void __launch_bounds__(256, 2)
matvec(const T* x, const T* __restrict__ weight, float* y, int N, int O, int I) {
    after_earlier_launches();
    constexpr int STEPS = (ROWS > 4 ? 8 : 16) / OUTPUTS / sizeof(T);
    int lane = threadIdx.x % 32, n = blockIdx.y * ROWS;
    int o = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * OUTPUTS;
    if (o >= O) return;
    float sum[ROWS * OUTPUTS] = {};
    for (int first = 8 * lane; first < I; first += 256 * STEPS) {
        Eight<T> w[STEPS][OUTPUTS];
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int k = 0; k < OUTPUTS; k++)
                if (first + 256 * step < I) w[step][k] = eight(row(weight, o + k, O, I) + first + 256 * step);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (first + 256 * step >= I) break;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                Eight<T> v = eight(row(x, n + r, N, I) + first + 256 * step);
#pragma unroll
                for (int j = 0; j < 8; j++)
#pragma unroll
                    for (int k = 0; k < OUTPUTS; k++) sum[r * OUTPUTS + k] += v[j] * w[step][k][j];
            }
        }
    }
    constexpr int LANES = 32 / (ROWS * OUTPUTS);  // that have the same sum
    float total = warp_sums(sum);
    n += lane / LANES / OUTPUTS;
    o += lane / LANES % OUTPUTS;
    if (lane % LANES == 0 && n < N && o < O) y[static_cast<long long>(n) * O + o] = total;
}
