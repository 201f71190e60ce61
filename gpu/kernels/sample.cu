// One id of each text, drawn: top-k, temperature, top-p, min-p and one number, as in reference/sampling.py.
//
//   numbers[n] = 64 bits of Philox(key: seeds[texts[n]], counter: positions[n])
//   weight(v)  = floor(2^44 exp((logits[n,v] - best) / temperature)),  0 for ids that are not kept
//   ids[n]     = the lowest v with  weight(0) + ... + weight(v) > numbers[n] / 2^64 * the sum of all weights
//
// Weights are whole numbers, so their sums are the same in any order, and nothing depends on how threads share them out.
// An id has a place among all: the higher logit comes first, of equals the lower id. The filters keep what comes no later
// than some place; nothing is sorted to find it. Both searches, for a rank and for an id, narrow what is left to one of
// 16 parts at a time, by the sums of the parts.
//
//   logits        float          (N,V)   V up to 2^19, or the sum of the weights could overflow
//   allowed       unsigned char  (V)     0 rules an id out; or null
//   temperatures  float          (B)     0 takes the first place
//   top_k         int            (B)     keep so many; 0 keeps all
//   top_p, min_p  uint64_t       (B)     as parts of 2^64; 0 keeps all
//   seeds         uint64_t       (B)
//   texts         int            (N)     below B
//   positions     int            (N)
//   numbers       uint64_t       (N)
//   ids           int            (N)     -1 if an allowed logit is not finite, or no id is allowed
//
// Grid: of `sample` one block for each n, of `uniform` ceil(N / blockDim.x). Block: of `sample` 512 threads, with 64 KB of
// shared memory, of `uniform` any size.
// Bytes: 4 N V from memory; from the caches again, 3 times in all, 14 times with top-k, 25 times with top-p as well.
#include "common.cuh"

constexpr int THREADS = 512, PARTS = 16;  // a warp for each part
constexpr uint64_t NOT_FINITE = 0, NOWHERE = ~0ull;  // no finite number's places
constexpr float ONE = 17592186044416.0f;  // 2^44: the weight of the best

// The counter-based generator of Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3": philox4x32-10.
__device__ __forceinline__ uint64_t philox(uint64_t key, uint32_t position) {
    uint32_t x[4] = {position, 0, 0, 0}, k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * x[0], b = static_cast<uint64_t>(0xCD9E8D57u) * x[2];
        x[0] = static_cast<uint32_t>(b >> 32) ^ x[1] ^ k0;
        x[1] = static_cast<uint32_t>(b);
        x[2] = static_cast<uint32_t>(a >> 32) ^ x[3] ^ k1;
        x[3] = static_cast<uint32_t>(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return static_cast<uint64_t>(x[1]) << 32 | x[0];
}

extern "C" __global__ void uniform(const uint64_t* __restrict__ seeds, const int* __restrict__ texts,
                                   const int* __restrict__ positions, uint64_t* __restrict__ numbers, int N) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) numbers[n] = philox(seeds[texts[n]], positions[n]);
}

// 0 for no finite number, less for higher ones, the same for 0 and -0. By bits: as floats, CuPy's denormals are 0.
__device__ __forceinline__ uint32_t rank_of(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) >= 0x7f800000u) return 0;
    return bits >> 31 && bits << 1 ? bits : (bits & 0x7fffffffu) ^ 0x7fffffffu;
}

__device__ __forceinline__ uint64_t place_of(uint32_t rank, int v) { return static_cast<uint64_t>(rank) << 32 | v; }

// ceil(total * fraction / 2^64)
__device__ __forceinline__ uint64_t share(uint64_t total, uint64_t fraction) {
    return __umul64hi(total, fraction) + (total * fraction != 0);
}

struct Text {
    const float* logits;
    const unsigned char* allowed;
    int V;
    uint64_t last;  // place that is kept

    __device__ __forceinline__ bool keeps(int v) const {
        return (!allowed || allowed[v]) && place_of(rank_of(logits[v]), v) <= last;
    }
};

struct One {
    __device__ __forceinline__ uint64_t of(const Text& text, int v) const { return text.keeps(v); }
};

struct Mass {
    float best, temperature;
    uint64_t least;  // weight that is kept

    __device__ __forceinline__ uint64_t of(const Text& text, int v) const {
        if (!text.keeps(v)) return 0;
        const uint64_t weight = static_cast<uint64_t>(ONE * expf((text.logits[v] - best) / temperature));
        return weight >= least ? weight : 0;
    }
};

template <class Weight> struct Equals {  // only the ids of one rank
    Weight weight;
    uint32_t rank;

    __device__ __forceinline__ uint64_t of(const Text& text, int v) const {
        return rank_of(text.logits[v]) == rank ? weight.of(text, v) : 0;
    }
};

// Every function from here on must be called by all threads, and returns the same to all.

__device__ __forceinline__ uint64_t first_place(const Text& text) {
    __shared__ uint64_t of_warp[PARTS];
    uint64_t first = NOWHERE;
    for (int v = threadIdx.x; v < text.V; v += THREADS) {
        if (text.allowed && !text.allowed[v]) continue;
        const uint32_t rank = rank_of(text.logits[v]);
        const uint64_t place = rank ? place_of(rank, v) : NOT_FINITE;
        if (place < first) first = place;
    }
#pragma unroll
    for (int flip = 16; flip > 0; flip /= 2) {
        const uint64_t other = __shfl_xor_sync(ALL_LANES, first, flip);
        if (other < first) first = other;
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = first;
    __syncthreads();  // each warp's first is written before any thread reads it
    for (int warp = 0; warp < PARTS; warp++)
        if (of_warp[warp] < first) first = of_warp[warp];
    return first;
}

template <class Weight> __device__ __forceinline__ uint64_t total_of(const Weight& weight, const Text& text) {
    __shared__ uint64_t partial[32];
    uint64_t sum = 0;
    for (int v = threadIdx.x; v < text.V; v += THREADS) sum += weight.of(text, v);
    return block_sum(sum, partial);
}

struct Part { int index; uint64_t before; };  // before: the sum of the parts that come first

// Of 16 parts, each summed by a warp, that in which the running sum first exceeds the target.
__device__ __forceinline__ Part part_at(uint64_t sum, uint64_t target) {
    __shared__ uint64_t sums[PARTS];
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();  // each part's sum is written before any thread reads it
    Part part{0, 0};
    while (part.index < PARTS - 1 && part.before + sums[part.index] <= target) part.before += sums[part.index++];
    __syncthreads();  // all have read before the next call overwrites
    return part;
}

// The id at which the running sum, over ascending ids, first exceeds the target, which the total exceeds.
template <class Weight> __device__ __forceinline__ int id_at(const Weight& weight, const Text& text, uint64_t target) {
    int first = 0, count = text.V;
    while (count > 1) {
        const int size = (count + PARTS - 1) / PARTS, begin = first + threadIdx.x / 32 * size;
        const int end = min(begin + size, first + count);
        uint64_t sum = 0;
        for (int v = begin + threadIdx.x % 32; v < end; v += 32) sum += weight.of(text, v);
        const Part part = part_at(warp_sum(sum), target);
        target -= part.before;
        count = min(size, count - part.index * size);
        first += part.index * size;
    }
    return first;
}

// The rank at which the running sum, the best first, exceeds the target; of the target remains what better ranks leave.
// bins: (16,512) in shared memory; a thread adds to its own column.
template <class Weight>
__device__ __forceinline__ uint32_t rank_at(const Weight& weight, const Text& text, uint64_t& target, uint64_t* bins) {
    uint32_t rank = 0;
    for (int shift = 28; shift >= 0; shift -= 4) {  // four bits at a time, the highest first
        for (int digit = 0; digit < PARTS; digit++) bins[digit * THREADS + threadIdx.x] = 0;
        for (int v = threadIdx.x; v < text.V; v += THREADS) {
            const uint32_t digit = (rank_of(text.logits[v]) ^ rank) >> shift;
            if (digit < PARTS) bins[digit * THREADS + threadIdx.x] += weight.of(text, v);  // else higher bits differ
        }
        __syncthreads();  // all columns are written before the warps add up the rows
        uint64_t sum = 0;
        for (int i = threadIdx.x % 32; i < THREADS; i += 32) sum += bins[threadIdx.x / 32 * THREADS + i];
        const Part part = part_at(warp_sum(sum), target);  // whose barriers let no thread go on while others still add
        target -= part.before;
        rank |= static_cast<uint32_t>(part.index) << shift;
    }
    return rank;
}

// The last place of the fewest, the best first, that weigh as much as is wanted: at least 1, at most the total.
template <class Weight>
__device__ __forceinline__ uint64_t last_place(const Weight& weight, const Text& text, uint64_t wanted, uint64_t* bins) {
    uint64_t target = wanted - 1;
    const uint32_t rank = rank_at(weight, text, target, bins);
    return place_of(rank, id_at(Equals<Weight>{weight, rank}, text, target));
}

extern "C" __global__ void __launch_bounds__(THREADS)
sample(const float* __restrict__ logits, const unsigned char* __restrict__ allowed,
       const float* __restrict__ temperatures, const int* __restrict__ top_k, const uint64_t* __restrict__ top_p,
       const uint64_t* __restrict__ min_p, const int* __restrict__ texts, const uint64_t* __restrict__ numbers,
       int* __restrict__ ids, int V) {
    DYNAMIC_SHARED(uint64_t, bins);
    const int n = blockIdx.x, b = texts[n];
    Text text{logits + static_cast<long long>(n) * V, allowed, V, NOWHERE};
    const uint64_t first = first_place(text);
    int id = first == NOT_FINITE || first == NOWHERE ? -1 : static_cast<int>(first);
    if (id >= 0 && temperatures[b] > 0) {
        const uint64_t k = top_k[b];
        if (k > 0 && k < total_of(One{}, text)) text.last = last_place(One{}, text, k, bins);
        Mass mass{text.logits[id], temperatures[b], 0};
        if (top_p[b]) text.last = last_place(mass, text, share(total_of(mass, text), top_p[b]), bins);
        mass.least = share(static_cast<uint64_t>(ONE), min_p[b]);
        id = id_at(mass, text, __umul64hi(total_of(mass, text), numbers[n]));
    }
    if (threadIdx.x == 0) ids[n] = id;
}
