// What attention and MLP add to the residual stream, as one product, for up to 16 rows:
//
//   x[n,c] = before[n,c] + sum_i z[n,i] dense[c,i] + sum_f activated[n,f] down[c,f] + (dense_bias[c] + down_bias[c])
//
//   z          T      (N,I)   I = C, or less on one of several ranks, which has some of the heads
//   dense      T      (C,I)
//   activated  T      (N,F)
//   down       T      (C,F)
//   biases     T      (C)     or null: some models have no dense_bias, and a rank has neither
//   before     float  (N,C)   the residual stream: x itself, or null on a rank, which computes a part of what is added
//   x          float  (N,C)   each number is read and written by one thread
//   taken      unsigned       of the stream: 0 before the launch and after it
//
// The two sums are one, first over i, then over f, which the warps of a block share out (stream.cuh): were each of 6144
// outputs a warp's own, a second wave of a few warps would follow the first. Warps are added in their order: the result
// is the same in every run.
//
// Grid: as many blocks as fit on the card at once, at most ceil(C / 16). Block: STREAM_THREADS.
// Preconditions: N <= ROWS; C, I and F multiples of 8, the matrices at multiples of 16 bytes.
// Bytes: C (I + F) sizeof(T), each weight once; z, activated and x, which are small, but z and activated are read anew
// for each unit, N / 16 bytes for each byte of weights, from the caches.
#include "stream.cuh"

template <class T> struct OutputWork {
    const T *z, *dense, *dense_bias, *activated, *down, *down_bias;
    const float* before;
    float* x;
    unsigned* taken;
    int N, O, I, F, rounds;

    __device__ __forceinline__ int row_of(int o) const { return o; }
    __device__ __forceinline__ Part<T> part(int round) const {
        const int first = rounds_of(I);
        return round < first ? part_of(dense, I, z, I, I, round) : part_of(down, F, activated, F, F, round - first);
    }
    __device__ __forceinline__ uint4 load_x(const T* p) const { return load_global(p); }
    __device__ __forceinline__ void prepare() const {}
    __device__ __forceinline__ float biased(int c, float sum) const {
        return sum + ((dense_bias ? to_float(dense_bias[c]) : 0.0f) + (down_bias ? to_float(down_bias[c]) : 0.0f));
    }
    __device__ __forceinline__ void finish(int n, int c, float a, float b) const {
        const long long place = static_cast<long long>(n) * O + c;
        a = biased(c, a), b = biased(c + 1, b);
        if (before) a += before[place], b += before[place + 1];
        x[place] = a, x[place + 1] = b;
    }
};

template <class T, int ROWS> __global__ void __launch_bounds__(STREAM_THREADS, 2)
fused_output(const T* z, const T* __restrict__ dense, const T* __restrict__ dense_bias,
             const T* activated, const T* __restrict__ down, const T* __restrict__ down_bias,
             const float* before, float* x, unsigned* taken, int N, int C, int I, int F) {
    const int rounds = rounds_of(I) + rounds_of(F);
    stream<T, ROWS>(OutputWork<T>{z, dense, dense_bias, activated, down, down_bias, before, x, taken, N, C, I, F,
                                  rounds});
}
