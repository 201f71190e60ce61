// The residual stream takes what a branch has computed:
//
//   residual       x[n,c] = (y[n,c] + bias[c]) + x[n,c]                                      sequential blocks
//   residual_pair  x[n,c] = ((m[n,c] + bias_m[c]) + (a[n,c] + bias_a[c])) + x[n,c]           parallel: MLP and attention
//
//   y, m, a  float  (N,C)   of the matrix products, as they were accumulated
//   bias     T      (C)     or null
//   x        float  (N,C)   in float on every path: trained models have channels beyond what float16 can hold
//
// Grid: (ceil(C / blockDim.x), N): a thread for each element. Block: 1-D, of any size.
// Preconditions: N <= 65535, the limit of grid.y.
// Bytes: 12 N C and 16 N C.
#include "common.cuh"
#include "ptx.cuh"

template <class T> __device__ __forceinline__ float biased(float y, const T* bias, int c) {
    return bias ? y + to_float(bias[c]) : y;
}

template <class T> __global__ void residual(const float* y, const T* __restrict__ bias,
                                            float* x, int C) {
    after_earlier_launches();
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    long long i = static_cast<long long>(blockIdx.y) * C + c;
    x[i] += biased(y[i], bias, c);
}

template <class T> __global__ void residual_pair(const float* m, const T* __restrict__ bias_m,
                                                 const float* a, const T* __restrict__ bias_a,
                                                 float* x, int C) {
    after_earlier_launches();
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= C) return;
    long long i = static_cast<long long>(blockIdx.y) * C + c;
    x[i] += biased(m[i], bias_m, c) + biased(a[i], bias_a, c);
}
