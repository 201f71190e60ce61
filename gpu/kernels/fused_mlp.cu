// Attention of one query of each text over the cache, and beside it the first half of the MLP, for up to 16 rows:
//
//   z[n,h] = sum_s p[s] values[t,h,s],  p as in attention_decode.cu
//   activated[n,f] = gelu(LayerNorm(x[n]) . up[f] + up_bias[f])
//
//   x            float  (N,C)   the residual stream
//   gain, shift  T      (C)     weight and bias of the norm
//   up           T      (F,C)
//   up_bias      T      (F)
//   activated    T      (N,F)
//   arrived      unsigned (N,H) how many splits of a head are done: 0 before the launch and after it
//   taken        unsigned (2)   units of the stream and jobs of attention that were taken, likewise
//   q, keys, values, pages, texts, positions, partial, z as in attention_decode.cu
//
// Neither needs the other, and attention waits for memory more than it asks of it. The first `attending` blocks take its
// jobs, one for each split of each head of each row, until there are none, and then come to the stream of weights, of
// which the others have taken more by then (stream.cuh). If those are done first they help with the jobs. The split of a
// head that is done last joins them all, in their order.
//
// Grid: as many blocks as fit on the card at once. Block: STREAM_THREADS. Dynamic shared memory: N rows of normed_row(C)
// or Groups<T, D, STREAM_THREADS>, whichever is larger.
// Preconditions: N <= ROWS; C and D multiples of 8, the matrices at multiples of 16 bytes; positions[n] is in a
// page of the text; attending <= gridDim.x <= ceil(F / 16).
// Bytes: C F sizeof(T) + sum_n 2 (positions[n] + 1) C sizeof(T), each weight, key and value once.
#include "activation.cuh"
#include "attention.cuh"
#include "normed.cuh"

template <class T> struct Attention {
    const T *q, *keys, *values;
    Pages pages;
    const int *texts, *positions;
    float* partial;
    T* z;
    unsigned* arrived;
    int heads, splits;  // heads: of all rows
};

// One split of one head of one row; all threads must call it.
template <class T, int D>
__device__ __forceinline__ void attend_split(const Attention<T>& a, int job, Groups<T, D, STREAM_THREADS>& groups) {
    __shared__ bool joins;
    const int head = job % a.heads, split = job / a.heads, n = head / a.pages.H, h = head % a.pages.H;
    const int length = a.positions[n] + 1, part = (length + a.splits - 1) / a.splits, first = split * part;
    const Text<T> text{a.keys, a.values, a.pages, a.texts[n], h};
    float* averages = a.partial + static_cast<long long>(head) * a.splits * (D + 2);
    attend(a.q + head * D, text, first, min(length, first + part), groups, averages + split * (D + 2));
    __threadfence();  // this thread's part of the average is there for other blocks before the block says so
    __syncthreads();  // every thread's is, which only other blocks could miss; and none reads `groups` any more
    if (threadIdx.x == 0) joins = atomicInc(a.arrived + head, a.splits - 1) == a.splits - 1;
    __syncthreads();  // all know whether this was the last
    if (!joins) return;
    __threadfence();  // what the other blocks wrote before they arrived is read after it
    combine(averages, a.splits, D, a.z + head * D);
}

// Jobs, as long as there are any that nobody has taken. A block asks once for each that it does, and once in vain: then
// the count is 0 again.
template <class T, int D>
__device__ __forceinline__ void attend_jobs(const Attention<T>& a, int jobs, unsigned* taken, void* groups) {
    __shared__ int job;
    while (true) {
        if (threadIdx.x == 0) job = atomicInc(taken, jobs + gridDim.x - 1);
        __syncthreads();  // all know the job; they meet again before it is overwritten
        if (job >= jobs) return;
        attend_split<T, D>(a, job, *static_cast<Groups<T, D, STREAM_THREADS>*>(groups));
    }
}

template <class T, class Activation> struct UpWork {
    Norm<T> norm;
    const T *up, *bias;
    T *activated, *normed;
    unsigned* taken;
    int N, O, C, rounds;

    __device__ __forceinline__ int row_of(int o) const { return o; }
    __device__ __forceinline__ Part<T> part(int round) const { return part_of(up, C, normed, normed_row(C), C, round); }
    __device__ __forceinline__ uint4 load_x(const T* p) const { return *reinterpret_cast<const uint4*>(p); }
    __device__ __forceinline__ void prepare() const { norm_rows(norm, normed, N, C); }
    __device__ __forceinline__ void finish(int n, int f, float a, float b) const {
        T* place = activated + static_cast<long long>(n) * O + f;
        place[0] = from_float<T>(Activation::of(a + to_float(bias[f])));
        place[1] = from_float<T>(Activation::of(b + to_float(bias[f + 1])));
    }
};

template <class T, class Activation, int D, int ROWS> __global__ void __launch_bounds__(STREAM_THREADS, 2)
fused_mlp(const float* x, const T* __restrict__ gain, const T* __restrict__ shift,
          const T* __restrict__ up, const T* __restrict__ up_bias, T* activated, const T* q,
          const T* keys, const T* values, const int* __restrict__ pages,
          const int* __restrict__ texts, const int* positions, float* partial, T* z,
          unsigned* arrived, unsigned* taken, int attending, int splits, int N, int C, int F,
          int H, int P, int S, float eps) {
    DYNAMIC_SHARED(T, normed);
    const Attention<T> attention{q,         keys,    values, {pages, P, H, S, D}, texts,
                                 positions, partial, z,      arrived,             N * H, splits};
    const bool first = blockIdx.x < attending;
    // The groups lie where the normed rows are before or after. Between the two is a barrier of the stream or of a job.
    if (first) {
        after_earlier_launches();
        attend_jobs<T, D>(attention, N * H * splits, taken + 1, normed);
    }
    stream<T, ROWS>(UpWork<T, Activation>{{x, gain, shift, eps}, up, up_bias, activated, normed, taken, N, F, C,
                                          rounds_of(C)});
    if (!first) attend_jobs<T, D>(attention, N * H * splits, taken + 1, normed);
}
