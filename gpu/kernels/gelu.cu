// Bias and GELU:  y[n,f] = gelu(x[n,f] + bias[f])
//
//   x     float  (N,F)   of the matrix product, as it was accumulated
//   bias  T      (F)
//   y     T      (N,F)
//
//   gelu       x P(Z < x) for a normal Z  =  x erfc(-x / sqrt(2)) / 2
//   gelu_fast  x (1 + tanh u) / 2  =  x / (1 + exp(-2u)),   u = sqrt(2/pi) (x + 0.044715 x^3)
//
// The forms on the right are used: for negative x nothing cancels in them.
//
// Grid: (ceil(F / blockDim.x), N): a thread for each element. Block: 1-D, of any size.
// Preconditions: N <= 65535, the limit of grid.y.
// Bytes: N F (4 + sizeof(T)) + F sizeof(T).
#include "common.cuh"

struct Gelu {
    static __device__ __forceinline__ float of(float x) { return 0.5f * x * erfcf(-0.70710678f * x); }
};

struct GeluFast {
    static __device__ __forceinline__ float of(float x) {
        float u = 0.79788456f * (x + 0.044715f * x * x * x);
        return x / (1.0f + expf(-2.0f * u));  // exp overflows to infinity, and the quotient to 0, as it should
    }
};

template <class T, class Activation> __global__ void bias_gelu(const float* __restrict__ x, const T* __restrict__ bias,
                                                               T* __restrict__ y, int F) {
    int f = blockIdx.x * blockDim.x + threadIdx.x;
    if (f >= F) return;
    long long i = static_cast<long long>(blockIdx.y) * F + f;
    y[i] = from_float<T>(Activation::of(x[i] + to_float(bias[f])));
}
