// Attention of one query of each text over the cache:
//
//   z[n,h] = sum_s p[s] values[t,h,s],   p = softmax_s(q[n,h] . keys[t,h,s] / sqrt(D)),   t = texts[n], s <= positions[n]
//
//   q          T      (N,H,D)
//   keys       T      (B,H,S,D)   after rotation
//   values     T      (B,H,S,D)
//   texts      int    (N)         which text of the cache a query belongs to
//   positions  int    (N)         where in that text it stands: it sees itself and all before
//   partial    float  (N,H,splits,D+2)
//   z          T      (N,H,D)
//
//   attention_decode_naive    one thread for each number of z: the equation, read off the page
//   attention_decode_split    the keys shared out over blocks, each of which leaves the average over its own
//   attention_decode_combine  the average of those averages
//
// The average over some keys is kept as  maximum = max score,  weight = sum exp(score - maximum)  and
// sum = sum exp(score - maximum) value.  Two of them join as each is scaled by exp(own maximum - common maximum), so
// keys can be taken in any order and any grouping (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867).
// Over no key at all, maximum is -infinity, and weight and sum are 0. Scores are float from the first product on: in
// float16 they overflow in trained models.
//
// split: one warp loads the key of 32 / LANES positions at a time; each of the LANES lanes that share a key has PIECES
// pieces of 8 dims of it, 16 bytes each in float16. In the 20B (D = 96) that is 4 lanes, 3 pieces, 8 keys a warp.
// Its grid: (N H, splits), block: ATTENTION_THREADS. A split with no key of its own leaves an empty average.
// combine: N H blocks, of any size.
// naive: ceil(N H D / blockDim.x) blocks, of any size.
// Preconditions: D is a multiple of 8, at most 768; positions[n] < S.
// Bytes: 2 (positions[n] + 1) H D sizeof(T) for each n, each key and value once; partial is small beside them.
#include "common.cuh"

constexpr int ATTENTION_THREADS = 128, ATTENTION_BLOCKS = 6;  // as many on a multiprocessor: 80 registers each

template <class T> __global__ void attention_decode_naive(const T* q, const T* keys, const T* values, const int* texts,
                                                          const int* positions, T* z, int N, int H, int D, int S) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= static_cast<long long>(N) * H * D) return;
    int n = i / D / H, h = i / D % H, d = i % D;
    const T* query = q + i / D * D;
    const long long first = (static_cast<long long>(texts[n]) * H + h) * S * D;
    auto score = [&](int s) {
        float sum = 0.0f;
        for (int j = 0; j < D; j++) sum += to_float(query[j]) * to_float(keys[first + static_cast<long long>(s) * D + j]);
        return sum / sqrtf(D);
    };
    float maximum = MINUS_INFINITY, weight = 0.0f, sum = 0.0f;
    for (int s = 0; s <= positions[n]; s++) maximum = fmaxf(maximum, score(s));
    for (int s = 0; s <= positions[n]; s++) {
        float p = expf(score(s) - maximum);
        weight += p;
        sum += p * to_float(values[first + static_cast<long long>(s) * D + d]);
    }
    z[i] = from_float<T>(sum / weight);
}

// Of exp(own - common); 0 for an average over nothing, whose maximum is -infinity.
__device__ __forceinline__ float share(float own, float common) {
    return own == MINUS_INFINITY ? 0.0f : expf(own - common);
}

// The smallest power of two of lanes that share a key so that none has more than 3 pieces of it.
constexpr int lanes_for(int pieces, int lanes = 1) { return 3 * lanes >= pieces ? lanes : lanes_for(pieces, 2 * lanes); }

template <class T, int D> struct Average {
    static constexpr int LANES = lanes_for(D / 8), PIECES = (D / 8 + LANES - 1) / LANES;
    float maximum, weight, sum[PIECES][8];  // sum: of this lane's dims

    static __device__ __forceinline__ bool has(int lane, int piece) { return lane + piece * LANES < D / 8; }
    static __device__ __forceinline__ int dim(int lane, int piece) { return 8 * (lane + piece * LANES); }
};

// q . key / sqrt(D), in every lane that shares the key. All lanes of the warp must call it.
template <class T, int D>
__device__ __forceinline__ float score_of(const float (&q)[Average<T, D>::PIECES][8], const T* key, int lane) {
    using A = Average<T, D>;
    float sum = 0.0f;
#pragma unroll
    for (int piece = 0; piece < A::PIECES; piece++) {
        if (!A::has(lane, piece)) continue;
        float k[8];
        load_8(key + A::dim(lane, piece), k);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += q[piece][i] * k[i];
    }
#pragma unroll
    for (int flip = A::LANES / 2; flip > 0; flip /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, flip);
    return sum;
}

template <class T, int D>
__device__ __forceinline__ void take(Average<T, D>& average, float score, const T* value, int lane) {
    using A = Average<T, D>;
    const float maximum = fmaxf(average.maximum, score);
    const float kept = share(average.maximum, maximum), p = expf(score - maximum);
    average.maximum = maximum;
    average.weight = average.weight * kept + p;
#pragma unroll
    for (int piece = 0; piece < A::PIECES; piece++) {
        if (!A::has(lane, piece)) continue;
        float v[8];
        load_8(value + A::dim(lane, piece), v);
#pragma unroll
        for (int i = 0; i < 8; i++) average.sum[piece][i] = average.sum[piece][i] * kept + p * v[i];
    }
}

// The average of `count` averages, whose sums are `stride` apart: maximum and weight by all threads, the sum by dims.
struct Joined { float maximum, weight; };

__device__ __forceinline__ Joined joined(const float* maxima, const float* weights, int count, int stride) {
    Joined all{MINUS_INFINITY, 0.0f};
    for (int i = 0; i < count; i++) all.maximum = fmaxf(all.maximum, maxima[i * stride]);
    for (int i = 0; i < count; i++) all.weight += share(maxima[i * stride], all.maximum) * weights[i * stride];
    return all;
}

template <class T, int D> __global__ void __launch_bounds__(ATTENTION_THREADS, ATTENTION_BLOCKS)
attention_decode_split(const T* __restrict__ q, const T* __restrict__ keys, const T* __restrict__ values,
                       const int* __restrict__ texts, const int* __restrict__ positions, float* __restrict__ partial,
                       int H, int S) {
    using A = Average<T, D>;
    constexpr int GROUPS = ATTENTION_THREADS / A::LANES;  // of lanes that share a key
    __shared__ float maxima[GROUPS], weights[GROUPS], sums[GROUPS][D];
    const int n = blockIdx.x / H, h = blockIdx.x % H, group = threadIdx.x / A::LANES, lane = threadIdx.x % A::LANES;
    const int length = positions[n] + 1, part = (length + gridDim.y - 1) / gridDim.y;
    const int first = blockIdx.y * part, last = min(length, first + part);
    const long long text = (static_cast<long long>(texts[n]) * H + h) * S * D;

    float query[A::PIECES][8];
    A average{MINUS_INFINITY, 0.0f, {}};
#pragma unroll
    for (int piece = 0; piece < A::PIECES; piece++) {
        if (!A::has(lane, piece)) continue;
        load_8(q + static_cast<long long>(blockIdx.x) * D + A::dim(lane, piece), query[piece]);
#pragma unroll
        for (int i = 0; i < 8; i++) query[piece][i] /= sqrtf(D);
    }
    for (int s = first; s < last; s += GROUPS) {  // as often in every thread: the lanes of a warp work together
        const bool exists = s + group < last;
        const long long slot = text + static_cast<long long>(exists ? s + group : s) * D;
        const float score = score_of<T, D>(query, keys + slot, lane);
        if (exists) take<T, D>(average, score, values + slot, lane);
    }
    if (lane == 0) maxima[group] = average.maximum, weights[group] = average.weight;
#pragma unroll
    for (int piece = 0; piece < A::PIECES; piece++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (A::has(lane, piece)) sums[group][A::dim(lane, piece) + i] = average.sum[piece][i];
    __syncthreads();  // every group has left its average before any thread joins them

    const Joined all = joined(maxima, weights, GROUPS, 1);
    float* out = partial + (static_cast<long long>(blockIdx.x) * gridDim.y + blockIdx.y) * (D + 2);
    for (int d = threadIdx.x; d < D; d += ATTENTION_THREADS) {
        float sum = 0.0f;
        for (int g = 0; g < GROUPS; g++) sum += share(maxima[g], all.maximum) * sums[g][d];
        out[2 + d] = sum;
    }
    if (threadIdx.x == 0) out[0] = all.maximum, out[1] = all.weight;
}

template <class T> __global__ void attention_decode_combine(const float* __restrict__ partial, T* __restrict__ z,
                                                            int splits, int D) {
    const float* part = partial + static_cast<long long>(blockIdx.x) * splits * (D + 2);
    const Joined all = joined(part, part + 1, splits, D + 2);
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float sum = 0.0f;
        for (int i = 0; i < splits; i++) sum += share(part[i * (D + 2)], all.maximum) * part[i * (D + 2) + 2 + d];
        z[static_cast<long long>(blockIdx.x) * D + d] = from_float<T>(sum / all.weight);
    }
}
