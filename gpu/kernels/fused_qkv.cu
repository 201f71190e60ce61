// Norm, product with query_key_value, bias, rotation and cache in one launch, for up to 16 rows:
//
//   normed = LayerNorm(x[n])                                        layer_norm.cu
//   q, k, v = normed . weight[h] + bias[h]                          three vectors of D
//   (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)                  of q and k: dim i with dim i + R/2, for i < R/2
//   key and value of positions[n] of texts[n], head h = k, v
//
//   x          float  (N,C)       the residual stream
//   gain, shift  T    (C)         weight and bias of the norm
//   weight     T      (3HD,C)     rows ordered (head, q|k|v, dim); HD = C, or less on one of several ranks
//   the others as in rotary_append.cu
//
// A pair that is rotated together must come to one thread, which has two neighbouring outputs (stream.cuh). So the
// outputs of a q or k are taken in another order: for p < R, output p is dim p/2 or, if p is odd, p/2 + R/2.
//
// Grid: as many blocks as fit on the card at once, at most ceil(3HD / 16). Block: STREAM_THREADS. Dynamic shared memory:
// N rows of normed_row(C).
// Preconditions: N <= ROWS; D a multiple of 8, the weights at a multiple of 16 bytes; R even; texts[n] and positions[n]
// as in rotary_append.cu.
// Bytes: 3 H D C sizeof(T), each weight once; x, q, k and v are small.
#include "normed.cuh"
#include "pages.cuh"

struct Heads { int D, half; };  // half: of the rotary dims

__device__ __forceinline__ int dim_of(int p, int half) { return p < 2 * half ? p / 2 + p % 2 * half : p; }

// Where N positions stand, and what the tables say of them.
struct Rotary {
    const float *cos, *sin;
    const int *texts, *positions;
};

template <class T> struct QkvWork {
    Norm<T> norm;
    const T *weights, *bias;
    Rotary rotary;
    T *q, *keys, *values, *normed;
    Heads heads;
    Pages pages;
    unsigned* taken;
    int N, O, C, rounds;

    __device__ __forceinline__ int part_of_head(int o) const { return o / heads.D % 3; }  // q, k or v
    __device__ __forceinline__ int dim(int o) const {
        const int p = o % heads.D;
        return part_of_head(o) < 2 ? dim_of(p, heads.half) : p;
    }
    __device__ __forceinline__ int row_of(int o) const { return o / heads.D * heads.D + dim(o); }
    __device__ __forceinline__ Part<T> part(int round) const {
        return part_of(weights, C, normed, normed_row(C), C, round);
    }
    __device__ __forceinline__ uint4 load_x(const T* p) const { return *reinterpret_cast<const uint4*>(p); }
    __device__ __forceinline__ void prepare() const { norm_rows(norm, normed, N, C); }

    // Where dim 0 of the vector that output o belongs to is stored, for row n.
    __device__ __forceinline__ T* vector_of(int n, int o) const {
        const int h = o / heads.D / 3, which = part_of_head(o);
        if (which == 0) return q + (n * pages.H + h) * heads.D;
        return (which == 1 ? keys : values) + pages.slot(rotary.texts[n], h, rotary.positions[n]);
    }
    __device__ __forceinline__ void finish(int n, int o, float a, float b) const {
        if (bias) a += to_float(bias[row_of(o)]), b += to_float(bias[row_of(o + 1)]);
        T* vector = vector_of(n, o);
        if (part_of_head(o) < 2 && o % heads.D < 2 * heads.half) {
            const int i = rotary.positions[n] * heads.half + dim(o);
            const float cos = rotary.cos[i], sin = rotary.sin[i], first = a;
            a = a * cos - b * sin;
            b = b * cos + first * sin;
        }
        vector[dim(o)] = from_float<T>(a);
        vector[dim(o + 1)] = from_float<T>(b);
    }
};

template <class T, int ROWS> __global__ void __launch_bounds__(STREAM_THREADS, 2)
fused_qkv(const float* x, const T* __restrict__ gain, const T* __restrict__ shift,
          const T* __restrict__ weight, const T* __restrict__ bias, const float* __restrict__ cos,
          const float* __restrict__ sin, const int* __restrict__ texts, const int* positions,
          T* q, T* keys, T* values, const int* __restrict__ pages,
          unsigned* taken, int N, int C, int H, int D, int R, int P, int S,
          float eps) {
    DYNAMIC_SHARED(T, normed);
    stream<T, ROWS>(QkvWork<T>{{x, gain, shift, eps}, weight, bias, {cos, sin, texts, positions}, q, keys, values,
                               normed, {D, R / 2}, {pages, P, H, S, D}, taken, N, 3 * H * D, C, rounds_of(C)});
}
