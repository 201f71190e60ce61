// The texts have grown:  positions[n] += 1
//
// Positions live in device memory, so that one captured graph serves every step.
//
//   positions  int  (N)
//
// Grid: ceil(N / blockDim.x). Block: 1-D, of any size.
extern "C" __global__ void advance(int* positions, int N) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) positions[n] += 1;
}
