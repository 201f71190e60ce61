// Matrix product:  y[n,o] = sum_i x[n,i] weight[o,i],  one thread for each number: the equation, read off the page.
//
//   x       T      (N,I)
//   weight  T      (O,I)
//   y       float  (N,O)
//
// Grid: ceil(N O / blockDim.x). Block: 1-D, of any size.
#include "common.cuh"
#include "ptx.cuh"

template <class T> __global__ void product_naive(const T* x, const T* weight, float* y, int N, int O, int I) {
    after_earlier_launches();
    long long j = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (j >= static_cast<long long>(N) * O) return;
    const T *row = x + j / O * I, *w = weight + j % O * I;
    float sum = 0.0f;
    for (int i = 0; i < I; i++) sum += to_float(row[i]) * to_float(w[i]);
    y[j] = sum;
}
