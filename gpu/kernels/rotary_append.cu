// Bias, rotation and cache: one position's product with query_key_value becomes its query, and its key and value in
// the cache.
//
//   q, k, v = qkv[n,h] + bias[h]                                    three vectors of D
//   (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)                  of q and k: dim i with dim i + R/2, for i < R/2
//   key and value of positions[n] of texts[n], head h = k, v
//
//   qkv        float  (N,H,3,D)   of the matrix product, as it was accumulated: q, k, v of head 0, then of head 1, ...
//   bias       T      (H,3,D)     or null: some models have none
//   cos, sin   float  (.,R/2)     of every position
//   texts      int    (N)         which text of the cache a position belongs to
//   positions  int    (N)         where in that text it stands
//   q          T      (N,H,D)
//   keys       T      (pages,H,S,D)   after rotation
//   values     T      (pages,H,S,D)
//   pages      int    (B,P)       of each text: pages.cuh
//
// All is computed in float and rounded once, when it is stored.
//
// Grid: N H blocks, one for each head of each position. Block: any size; its threads take every blockDim.x-th dim.
// Preconditions: texts[n] < B; positions[n] is in a page of the text, and in the tables; no two n write to the same row of
// a page.
// Bytes: N H D (3 * 4 + 3 sizeof(T)); bias and tables are small.
#include "pages.cuh"
#include "ptx.cuh"

struct Rotation { const float *cos, *sin; int half; };  // of one position

template <class T> __device__ __forceinline__ float biased(const float* x, const T* bias, int d) {
    return bias ? x[d] + to_float(bias[d]) : x[d];
}

template <class T> __device__ __forceinline__ float rotated(const float* x, const T* bias, int d, Rotation r) {
    float value = biased(x, bias, d);
    if (d >= 2 * r.half) return value;
    bool first = d < r.half;
    int i = first ? d : d - r.half;
    float other = biased(x, bias, first ? d + r.half : i);
    return first ? value * r.cos[i] - other * r.sin[i] : value * r.cos[i] + other * r.sin[i];
}

template <class T> __global__ void rotary_append(const float* qkv, const T* __restrict__ bias,
                                                 const float* __restrict__ cos, const float* __restrict__ sin,
                                                 const int* __restrict__ texts, const int* positions,
                                                 T* q, T* keys, T* values,
                                                 const int* __restrict__ pages, int H, int D, int R, int P, int S) {
    after_earlier_launches();
    const int n = blockIdx.x / H, h = blockIdx.x % H, position = positions[n];
    const Rotation rotation{cos + position * (R / 2), sin + position * (R / 2), R / 2};
    const float* x = qkv + static_cast<long long>(blockIdx.x) * 3 * D;
    const T* b = bias ? bias + h * 3 * D : nullptr;
    T* query = q + static_cast<long long>(blockIdx.x) * D;
    const long long slot = Pages{pages, P, H, S, D}.slot(texts[n], h, position);
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        query[d] = from_float<T>(rotated(x, b, d, rotation));
        keys[slot + d] = from_float<T>(rotated(x + D, b ? b + D : nullptr, d, rotation));
        values[slot + d] = from_float<T>(biased(x + 2 * D, b ? b + 2 * D : nullptr, d));
    }
}
