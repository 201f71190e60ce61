// Attention of one query over some of its keys, by a block, and the average of such averages.
//
// The average over some keys is kept as  maximum = max score,  weight = sum exp(score - maximum)  and
// sum = sum exp(score - maximum) value.  Two of them join as each is scaled by exp(own maximum - common maximum), so
// keys can be taken in any order and any grouping (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867).
// Over no key at all, maximum is -infinity, and weight and sum are 0.
//
// One warp loads the key of 32 / LANES positions at a time; each of the LANES lanes that share a key has PIECES pieces of
// 8 dims of it, 16 bytes each in float16. In the 20B (D = 96) that is 4 lanes, 3 pieces, 8 keys a warp.
#pragma once
#include "pages.cuh"

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

// The averages of a block's groups of lanes, in shared memory.
template <class T, int D, int THREADS> struct Groups {
    static constexpr int COUNT = THREADS / Average<T, D>::LANES;
    float maxima[COUNT], weights[COUNT], sums[COUNT][D];
};

// One head of one text of the cache.
template <class T> struct Text {
    const T *keys, *values;
    Pages pages;
    int text, h;
};

// The average over the keys from first to last - 1 of one text and head, in out (D+2). All threads must call it; before
// they do so again, or touch `groups`, they must meet at a barrier.
template <class T, int D, int THREADS>
__device__ __forceinline__ void attend(const T* q, const Text<T>& text, int first, int last,
                                       Groups<T, D, THREADS>& groups, float* out) {
    using A = Average<T, D>;
    constexpr int GROUPS = Groups<T, D, THREADS>::COUNT;
    const int group = threadIdx.x / A::LANES, lane = threadIdx.x % A::LANES;
    float query[A::PIECES][8];
    A average{MINUS_INFINITY, 0.0f, {}};
#pragma unroll
    for (int piece = 0; piece < A::PIECES; piece++) {
        if (!A::has(lane, piece)) continue;
        load_8(q + A::dim(lane, piece), query[piece]);
#pragma unroll
        for (int i = 0; i < 8; i++) query[piece][i] /= sqrtf(D);
    }
    for (int start = first, stop; start < last; start = stop) {
        stop = min(last, start + text.pages.in_a_row(start));
        const long long page = text.pages.slot(text.text, text.h, start) - static_cast<long long>(start) * D;
        for (int s = start; s < stop; s += GROUPS) {  // as often in every thread: the lanes of a warp work together
            const bool exists = s + group < stop;
            const long long slot = page + static_cast<long long>(exists ? s + group : s) * D;
            const float score = score_of<T, D>(query, text.keys + slot, lane);
            if (exists) take<T, D>(average, score, text.values + slot, lane);
        }
    }
    if (lane == 0) groups.maxima[group] = average.maximum, groups.weights[group] = average.weight;
#pragma unroll
    for (int piece = 0; piece < A::PIECES; piece++)
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (A::has(lane, piece)) groups.sums[group][A::dim(lane, piece) + i] = average.sum[piece][i];
    __syncthreads();  // every group has left its average before any thread joins them

    const Joined all = joined(groups.maxima, groups.weights, GROUPS, 1);
    for (int d = threadIdx.x; d < D; d += THREADS) {
        float sum = 0.0f;
        for (int g = 0; g < GROUPS; g++) sum += share(groups.maxima[g], all.maximum) * groups.sums[g][d];
        out[2 + d] = sum;
    }
    if (threadIdx.x == 0) out[0] = all.maximum, out[1] = all.weight;
}

// z (D) of the averages (splits,D+2).
template <class T> __device__ __forceinline__ void combine(const float* part, int splits, int D, T* z) {
    const Joined all = joined(part, part + 1, splits, D + 2);
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float sum = 0.0f;
        for (int i = 0; i < splits; i++) sum += share(part[i * (D + 2)], all.maximum) * part[i * (D + 2) + 2 + d];
        z[d] = from_float<T>(sum / all.weight);
    }
}
