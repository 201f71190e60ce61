// Bias and GELU:  y[n,f] = gelu(x[n,f] + bias[f])
//
//   x     float  (N,F)   of the matrix product, as it was accumulated
//   bias  T      (F)
//   y     T      (N,F)
//
// Activations: gelu and gelu_fast, activation.cuh.
//
// Grid: (ceil(F / blockDim.x), N): a thread for each element. Block: 1-D, of any size.
// Preconditions: N <= 65535, the limit of grid.y.
// Bytes: N F (4 + sizeof(T)) + F sizeof(T).
#include "activation.cuh"
#include "ptx.cuh"

template <class T, class Activation> __global__ void bias_gelu(const float* x, const T* __restrict__ bias,
                                                               T* y, int F) {
    after_earlier_launches();
    int f = blockIdx.x * blockDim.x + threadIdx.x;
    if (f >= F) return;
    long long i = static_cast<long long>(blockIdx.y) * F + f;
    y[i] = from_float<T>(Activation::of(x[i] + to_float(bias[f])));
}
