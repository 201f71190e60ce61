// The sum of what all ranks have sent, in their order:  x[i] = ((parts[0,i] + parts[1,i]) + parts[2,i]) + ...
//
//   parts  float (P,n)
//   x      float (n)
//
// Grid: ceil(n / blockDim.x): a thread for each sum. Block: 1-D, of any size.
// Bytes: 4 P n read, 4 n written.
#include "common.cuh"
#include "ptx.cuh"

extern "C" __global__ void sum_parts(const float* parts, float* x, int P, int n) {
    after_earlier_launches();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = parts[i];
    for (int p = 1; p < P; p++) sum += parts[static_cast<long long>(p) * n + i];
    x[i] = sum;
}
