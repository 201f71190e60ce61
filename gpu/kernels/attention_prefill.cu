// Attention of many queries of each text over the cache, on tensor cores (flash attention: Dao et al. 2022, arXiv
// 2205.14135; warps share out the queries: Dao 2023, arXiv 2307.08691):
//
//   z[n,h] = sum_s p[s] values[t,h,s],   p = softmax_s(q[n,h] . keys[t,h,s] / sqrt(D)),   s <= position of n in text t
//
//   q       T     (N,H,D)     T in 16 bits
//   keys    T     (pages,H,S,D)   after rotation
//   values  T     (pages,H,S,D)
//   pages   int   (B,P)       of each text: pages.cuh. keys[t,h,s] above is that of position s of text t
//   tiles   int4  (M)         up to 64 queries each, which follow one another in one text: which text of the cache, the
//                             first n, where in the text it stands, how many
//   z       T     (N,H,D)
//
// A block takes one head of one tile, each of its 4 warps 16 of the queries. They walk over the keys that the tile sees,
// up to KEYS of one page at a time, so that no more scores exist at once. What a warp has seen so far it keeps as attention_decode.cu
// does: of each query the largest score, the sum of exp(score - largest) and that of exp(score - largest) value.
//
// Both products are mma.m16n8k16, accumulated in float. Scores lie in the lanes as the first factor of the second
// product must, so they stay in registers; there probabilities are rounded to T, and nothing else is but z. Where D is
// not a multiple of 16, both factors are zero in the dims that are missing of the last 16. A row in shared memory is 16
// bytes longer than need be: ldmatrix reads 8 rows at a time, and so their pieces of 16 bytes lie in different banks.
//
// Values are on their way while scores are computed, and the next keys while values are added: one buffer of each is
// enough.
//
// Grid: (M, H). Block: 128 threads. Tiles that see more keys should come first: the last blocks to start are then short.
// Preconditions: D is a multiple of 8; arrays start at multiples of 16 bytes; keys and values are there up to the last
// query of each tile.
// Bytes: 2 (position + count) D sizeof(T) for each head of each tile, most of it from the second-level cache, where
// other tiles of the text have left it.
#include "pages.cuh"
#include "ptx.cuh"

constexpr int PREFILL_THREADS = 128;

template <int D> struct Shape {
    static constexpr int STEPS = (D + 15) / 16;                   // of 16 dims
    static constexpr int PITCH = 16 * STEPS + 8;                  // of a row in shared memory
    static constexpr int KEYS = D <= 128 ? 64 : 16;               // whose scores a thread's registers can take
    static constexpr int BLOCKS = D <= 64 ? 4 : D <= 96 ? 3 : 2;  // on a multiprocessor: 128, 168 or 255 registers
};

// Lane l holds rows l/4 and l/4 + 8 of its warp's 16 queries, and of each fragment columns 2(l%4) and the next.
template <int D> struct Averages {
    float largest[2];  // of the scores, in units of log 2
    float weight[2];   // of the columns that the lane holds
    float sum[2 * Shape<D>::STEPS][4];
};

template <int D> struct Scores { float of[Shape<D>::KEYS / 8][4]; };

// Keys that are taken together: they lie one after the other.
struct Chunk {
    int first, count;  // in the text; up to KEYS, and none after the last
    long long slot;
};

template <int D>
__device__ __forceinline__ Chunk chunk_at(const Pages& pages, int text, int h, int first, int length) {
    if (first >= length) return {first, 0, 0};
    const int count = min(min(Shape<D>::KEYS, length - first), pages.in_a_row(first));
    return {first, count, pages.slot(text, h, first)};
}

// A chunk of keys or values; zeros after the last, up to KEYS.
template <class T, int D>
__device__ __forceinline__ void fetch(T (*rows)[Shape<D>::PITCH], const T* cache, const Chunk& chunk) {
    constexpr int PIECES = D / 8, COPIES = Shape<D>::KEYS * PIECES;  // of 16 bytes: in a row, in all
    const T* from = cache + chunk.slot;
    const int there = chunk.count * PIECES;
#pragma unroll 1  // or the addresses of all copies would stay in registers
    for (int k = 0; k < COPIES; k += PREFILL_THREADS) {
        const unsigned piece = k + threadIdx.x;
        if (COPIES % PREFILL_THREADS && piece >= COPIES) break;
        const bool inside = piece < there;
        copy_async_16(&rows[piece / PIECES][piece % PIECES * 8], inside ? from + 8 * piece : from, inside);
    }
    copy_async_commit();
}

// The warp's queries, as first factors of mma; zeros where there are none. q: the first of them.
template <class T, int D>
__device__ __forceinline__ void load_queries(uint32_t (&a)[Shape<D>::STEPS][4], const T* q, int count, int H) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int step = 0; step < Shape<D>::STEPS; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int n = row + i % 2 * 8, d = 16 * step + column + i / 2 * 8;
            const T* pair = q + static_cast<long long>(n) * H * D + d;
            a[step][i] = n < count && d < D ? *reinterpret_cast<const uint32_t*>(pair) : 0;
        }
}

// q . key of KEYS keys.
template <class T, int D>
__device__ __forceinline__ Scores<D> scores_of(const uint32_t (&q)[Shape<D>::STEPS][4],
                                               const T (*keys)[Shape<D>::PITCH]) {
    const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, column = lane / 8 % 2 * 8;
    Scores<D> scores{};
#pragma unroll
    for (int step = 0; step < Shape<D>::STEPS; step++)
#pragma unroll
        for (int j = 0; j < Shape<D>::KEYS / 8; j += 2) {
            uint32_t k[4];
            load_matrix_x4(k, &keys[8 * j + row][16 * step + column]);
            mma_m16n8k16<T>(scores.of[j], q[step], {k[0], k[1]});
            mma_m16n8k16<T>(scores.of[j + 1], q[step], {k[2], k[3]});
        }
    return scores;
}

// Scores of keys that come after their query are struck out, and those of none. first: of these `count` keys, as it
// stands in the text, minus the position of the warp's first query.
template <int D> __device__ __forceinline__ void mask(Scores<D>& scores, int first, int count) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < Shape<D>::KEYS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = 8 * j + column + i % 2;
            if (first + key > row + i / 2 * 8 || key >= count) scores.of[j][i] = MINUS_INFINITY;
        }
}

// Of the 4 lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// Scores become exp(score - largest), and what has been summed so far is scaled to the new largest score. Every query
// sees the text's first key, so no largest score is -infinity after the first keys.
template <int D> __device__ __forceinline__ void weigh(Averages<D>& averages, Scores<D>& scores) {
    const float scale = 1.44269504f / sqrtf(D);  // exp x = 2^(1.44 x), and the card knows only 2^x
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float largest = MINUS_INFINITY, weight = 0.0f;
#pragma unroll
        for (int j = 0; j < Shape<D>::KEYS / 8; j++)
            largest = fmaxf(largest, fmaxf(scores.of[j][2 * r], scores.of[j][2 * r + 1]));
        largest = fmaxf(averages.largest[r], scale * row_max(largest));
        const float kept = exp2f(averages.largest[r] - largest);
#pragma unroll
        for (int j = 0; j < Shape<D>::KEYS / 8; j++)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                scores.of[j][i] = exp2f(scale * scores.of[j][i] - largest);
                weight += scores.of[j][i];
            }
        averages.largest[r] = largest;
        averages.weight[r] = averages.weight[r] * kept + weight;
#pragma unroll
        for (int i = 0; i < 2 * Shape<D>::STEPS; i++) averages.sum[i][2 * r] *= kept, averages.sum[i][2 * r + 1] *= kept;
    }
}

// sum += p value of KEYS keys.
template <class T, int D>
__device__ __forceinline__ void add_values(Averages<D>& averages, const Scores<D>& p,
                                           const T (*values)[Shape<D>::PITCH]) {
    const int lane = threadIdx.x % 32, row = lane % 16, column = lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < Shape<D>::KEYS / 8; j += 2) {
        const uint32_t a[4] = {packed<T>(p.of[j][0], p.of[j][1]), packed<T>(p.of[j][2], p.of[j][3]),
                               packed<T>(p.of[j + 1][0], p.of[j + 1][1]), packed<T>(p.of[j + 1][2], p.of[j + 1][3])};
#pragma unroll
        for (int step = 0; step < Shape<D>::STEPS; step++) {
            uint32_t v[4];
            load_matrix_x4_transposed(v, &values[8 * j + row][16 * step + column]);
            mma_m16n8k16<T>(averages.sum[2 * step], a, {v[0], v[1]});
            mma_m16n8k16<T>(averages.sum[2 * step + 1], a, {v[2], v[3]});
        }
    }
}

// z: of the warp's first query.
template <class T, int D>
__device__ __forceinline__ void store(const Averages<D>& averages, T* z, int count, int H) {
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float weight = row_sum(averages.weight[r]);
        if (row + 8 * r >= count) continue;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            T* pair = z + static_cast<long long>(row + 8 * r) * H * D + 8 * i + column;
            const float(&sum)[4] = averages.sum[i];
            *reinterpret_cast<uint32_t*>(pair) = packed<T>(sum[2 * r] / weight, sum[2 * r + 1] / weight);
        }
    }
}

template <class T, int D> __global__ void __launch_bounds__(PREFILL_THREADS, Shape<D>::BLOCKS)
attention_prefill(const T* q, const T* keys, const T* values,
                  const int* __restrict__ pages, const int* __restrict__ tiles, T* z, int H, int P,
                  int S) {
    after_earlier_launches();
    constexpr int KEYS = Shape<D>::KEYS;
    __shared__ __align__(16) T key_rows[KEYS][Shape<D>::PITCH];
    __shared__ __align__(16) T value_rows[KEYS][Shape<D>::PITCH];
    const int4 tile = reinterpret_cast<const int4*>(tiles)[blockIdx.x];
    const int h = blockIdx.y, skipped = threadIdx.x / 32 * 16;  // queries of the warps before this one
    const int n = tile.y + skipped, position = tile.z + skipped, count = min(tile.w - skipped, 16);
    const int length = tile.z + tile.w, seen = count > 0 ? position + count : 0;  // keys: by the tile, by this warp
    const Pages at{pages, P, H, S, D};
    Chunk chunk = chunk_at<D>(at, tile.x, h, 0, length), next;
    const long long query = (static_cast<long long>(n) * H + h) * D;

    if (D % 16 && threadIdx.x < KEYS) *reinterpret_cast<uint4*>(&key_rows[threadIdx.x][D]) = uint4{};
    fetch<T, D>(key_rows, keys, chunk);
    uint32_t queries[Shape<D>::STEPS][4];
    load_queries<T, D>(queries, q + query, count, H);
    Averages<D> averages{{MINUS_INFINITY, MINUS_INFINITY}, {}, {}};
    for (; chunk.count > 0; chunk = next) {
        next = chunk_at<D>(at, tile.x, h, chunk.first + chunk.count, length);
        Scores<D> scores;
        copy_async_wait<0>();
        __syncthreads();  // every thread's copies of keys have landed, and all are done with the values before them
        fetch<T, D>(value_rows, values, chunk);
        if (chunk.first < seen) scores = scores_of<T, D>(queries, key_rows);
        copy_async_wait<0>();
        __syncthreads();  // every thread's copies of values have landed, and all are done with the keys
        if (next.count > 0) fetch<T, D>(key_rows, keys, next);
        if (chunk.first >= seen) continue;
        if (chunk.count < KEYS || chunk.first + KEYS > position + 1) mask(scores, chunk.first - position, chunk.count);
        weigh(averages, scores);
        add_values<T, D>(averages, scores, value_rows);
    }
    store<T, D>(averages, z + query, count, H);
}
