// What attention and MLP add to the residual stream, as one product, for up to 16 rows:
//
//   x[n,c] += sum_i z[n,i] dense[c,i] + sum_f activated[n,f] down[c,f] + (dense_bias[c] + down_bias[c])
//
//   z          T      (N,C)
//   dense      T      (C,C)
//   activated  T      (N,F)
//   down       T      (C,F)
//   biases     T      (C)     dense_bias or null: some models have none
//   x          float  (N,C)   the residual stream; each number is read and written by one thread
//
// The two sums are one over C + F numbers, whose slices the warps of a block share out (stream.cuh): were each of 6144
// outputs a warp's own, a second round of a few warps would follow the first. Warps are added in their order: the result
// is the same in every run.
//
// Grid: as many blocks as fit on the card at once, at most ceil(C / 16). Block: STREAM_THREADS.
// Preconditions: N <= ROWS; C and F multiples of 8, the matrices at multiples of 16 bytes.
// Bytes: C (C + F) sizeof(T), each weight once; z, activated and x, which are small, but z and activated are read anew
// for each unit, N / 16 bytes for each byte of weights, from the caches.
#include "stream.cuh"

template <class T> struct Branch {
    const T *weight, *x;
    int I;

    __device__ __forceinline__ int slices() const { return (I + SLICE - 1) / SLICE; }
};

template <class T> struct OutputWork {
    Branch<T> dense, down;
    const T *dense_bias, *down_bias;
    float* stream;
    int N, O, slices;

    // Of row `index` of a branch's weights or x, the numbers of lane t in a slice; null beyond the row.
    __device__ __forceinline__ const T* piece(bool weights, int index, int slice, int t) const {
        const bool second = slice >= dense.slices();
        const Branch<T> branch{second ? down.weight : dense.weight, second ? down.x : dense.x, second ? down.I : dense.I};
        const int i = SLICE * (second ? slice - dense.slices() : slice) + 8 * t;
        const T* matrix = weights ? branch.weight : branch.x;
        return i < branch.I ? matrix + static_cast<long long>(index) * branch.I + i : nullptr;
    }
    __device__ __forceinline__ const T* weight(int o, int slice, int t) const {
        return o < O ? piece(true, o, slice, t) : nullptr;
    }
    __device__ __forceinline__ uint4 x(int n, int slice, int t) const {
        const T* numbers = piece(false, n, slice, t);
        return numbers ? *reinterpret_cast<const uint4*>(numbers) : no_numbers();
    }
    __device__ __forceinline__ void prepare() const {}
    __device__ __forceinline__ float biased(int c, float sum) const {
        return sum + ((dense_bias ? to_float(dense_bias[c]) : 0.0f) + to_float(down_bias[c]));
    }
    __device__ __forceinline__ void finish(int n, int c, float a, float b) const {
        float* place = stream + static_cast<long long>(n) * O + c;
        place[0] += biased(c, a);
        place[1] += biased(c + 1, b);
    }
};

template <class T, int ROWS> __global__ void __launch_bounds__(STREAM_THREADS, 2)
fused_output(const T* __restrict__ z, const T* __restrict__ dense, const T* __restrict__ dense_bias,
             const T* __restrict__ activated, const T* __restrict__ down, const T* __restrict__ down_bias,
             float* __restrict__ x, int N, int C, int F) {
    const Branch<T> first{dense, z, C}, second{down, activated, F};
    stream<T, ROWS>(OutputWork<T>{first, second, dense_bias, down_bias, x, N, C, first.slices() + second.slices()});
}
