// The texts have grown:  positions[n] += 1
//
// Positions live in device memory, so that one captured graph serves every step.
//
//   positions  int  (N)
//
// Grid: ceil(N / blockDim.x). Block: 1-D, of any size.
#include "ptx.cuh"

extern "C" __global__ void advance(int* positions, int N) {
    after_earlier_launches();
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) positions[n] += 1;
}
