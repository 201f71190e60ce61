// One id of each text, drawn: top-k, temperature, top-p, min-p and one number, as in reference/sampling.py.
//
//   numbers[n] = 64 bits of Philox(key: seeds[texts[n]], counter: positions[n])
//   weight(v)  = floor(2^44 exp((logits[n,v] - best) / temperature)), 0 for ids that are not kept
//   ids[n]     = the lowest v with  weight(0) + ... + weight(v) > numbers[n] / 2^64 * the sum of all weights
//
// Weights are whole numbers: their sums are the same in any order, and nothing depends on how threads share them out.
// An id has a place among all: the higher logit comes first, of equals the lower id. A filter keeps what comes no later
// than some place, and nothing is sorted to find it: both searches, for a rank and for an id, narrow what is left to one
// of 16 parts at a time, by the sums of the parts.
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
// Grid: `sample` one block for each n, `uniform` ceil(N / blockDim.x). Block: `sample` 512 threads and 64 KB of shared
// memory, `uniform` 1-D, of any size.
// Bytes: 4 N V from memory; from the caches 3 times, 9 times more with top-k and 10 times more with top-p.
#include "common.cuh"
#include "ptx.cuh"

constexpr int THREADS = 512, PARTS = 16;  // a warp for each part
constexpr int AHEAD = 8;  // logits that a thread asks for before it waits for one
constexpr uint32_t NOT_FINITE = 0, NONE = 0xffffffffu;  // no finite number's ranks
constexpr float ONE = 17592186044416.0f, LOG2_E = 1.44269504f;  // 2^44: the weight of the best

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
                                   const int* positions, uint64_t* numbers, int N) {
    after_earlier_launches();
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) numbers[n] = philox(seeds[texts[n]], positions[n]);
}

// Of a finite logit: less for higher ones, the same for 0 and -0. By its bits: CuPy has denormal floats taken for 0.
__device__ __forceinline__ uint32_t rank_of(float x) {
    const uint32_t bits = __float_as_uint(x), minus_zero = 0x80000000u;
    const uint32_t rank = bits & minus_zero ? bits : bits ^ 0x7fffffffu;
    return rank - (rank == minus_zero);
}

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7fffffffu) < 0x7f800000u; }

__device__ __forceinline__ uint64_t place_of(uint32_t rank, int v) { return static_cast<uint64_t>(rank) << 32 | v; }

// ceil(total * fraction / 2^64)
__device__ __forceinline__ uint64_t share(uint64_t total, uint64_t fraction) {
    return __umul64hi(total, fraction) + (total * fraction != 0);
}

struct Row {
    const float* logits;
    const unsigned char* allowed;
    int V;

    // use(v, logit) for begin, begin + STEP ... up to end, but for ids that are ruled out.
    template <int STEP, class Use> __device__ __forceinline__ void visit(int begin, int end, Use use) const {
        int v = begin;
        for (; v + (AHEAD - 1) * STEP < end; v += AHEAD * STEP) {
            float x[AHEAD];
            bool taken[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                x[i] = logits[v + i * STEP];
                taken[i] = allowed ? allowed[v + i * STEP] : true;
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (taken[i]) use(v + i * STEP, x[i]);
        }
#pragma unroll 1
        for (; v < end; v += STEP)
            if (!allowed || allowed[v]) use(v, logits[v]);
    }
};

struct One {
    __device__ __forceinline__ uint64_t of(int, float) const { return 1; }
};

struct Mass {
    uint64_t last, least;  // place and weight that are kept
    float best, scale;     // of 2 to the power of the logits, not of e: what the hardware has

    __device__ __forceinline__ uint64_t of(int v, float x) const {
        const uint64_t weight = static_cast<uint64_t>(ONE * exp2f((x - best) * scale));
        return weight >= least && place_of(rank_of(x), v) <= last ? weight : 0;
    }
};

template <class Weight> struct Equals {  // only the ids of one rank
    Weight weight;
    uint32_t rank;

    __device__ __forceinline__ uint64_t of(int v, float x) const { return rank_of(x) == rank ? weight.of(v, x) : 0; }
};

// Every function from here on must be called by all threads, and returns the same to all.

__device__ __forceinline__ uint64_t first_place(const Row& row) {
    __shared__ uint64_t of_warp[PARTS];
    uint32_t best = NONE;
    int id = 0;
    row.visit<THREADS>(threadIdx.x, row.V, [&](int v, float x) {
        const uint32_t rank = is_finite(x) ? rank_of(x) : NOT_FINITE;
        if (rank < best) best = rank, id = v;
    });
    uint64_t first = place_of(best, id);
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

__device__ __forceinline__ uint64_t total_of(const Mass& mass, const Row& row) {
    __shared__ uint64_t partial[32];
    uint64_t sum = 0;
    row.visit<THREADS>(threadIdx.x, row.V, [&](int v, float x) { sum += mass.of(v, x); });
    return block_sum(sum, partial);
}

struct Part { int index; uint64_t before; };  // before: the sum of the parts that come first

// Of 16 parts, each summed by a warp, that in which the running sum first exceeds the target; the last if in none.
__device__ __forceinline__ Part part_at(uint64_t sum, uint64_t target) {
    __shared__ uint64_t sums[PARTS];
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();  // each part's sum is written before any thread reads it
    Part part{0, 0};
    while (part.index < PARTS - 1 && part.before + sums[part.index] <= target) part.before += sums[part.index++];
    __syncthreads();  // all have read before the next call overwrites
    return part;
}

// The id at which the running sum, over ascending ids, first exceeds the target.
template <class Weight> __device__ __forceinline__ int id_at(const Weight& weight, const Row& row, uint64_t target) {
    int first = 0, count = row.V;
    while (count > 1) {
        const int size = (count + PARTS - 1) / PARTS, begin = first + threadIdx.x / 32 * size;
        uint64_t sum = 0;
        row.visit<32>(begin + threadIdx.x % 32, min(begin + size, first + count),
                      [&](int v, float x) { sum += weight.of(v, x); });
        const Part part = part_at(warp_sum(sum), target);
        target -= part.before;
        count = min(size, count - part.index * size);
        first += part.index * size;
    }
    return first;
}

// The rank at which the running sum, the best first, exceeds the target, or the last; of the target remains what better
// ranks leave. bins: (16,512) in shared memory; a thread adds to its own column.
template <class Weight>
__device__ __forceinline__ uint32_t rank_at(const Weight& weight, const Row& row, uint64_t& target, uint64_t* bins) {
    uint64_t* column = bins + threadIdx.x;
    uint32_t rank = 0;
    for (int shift = 28; shift >= 0; shift -= 4) {  // four bits at a time, the highest first
        for (int digit = 0; digit < PARTS; digit++) column[digit * THREADS] = 0;
        row.visit<THREADS>(threadIdx.x, row.V, [&](int v, float x) {
            const uint32_t digit = (rank_of(x) ^ rank) >> shift;
            if (digit < PARTS) column[digit * THREADS] += weight.of(v, x);  // else higher bits differ
        });
        __syncthreads();  // all columns are written before the warps add up the rows
        uint64_t sum = 0;
        for (int i = threadIdx.x % 32; i < THREADS; i += 32) sum += bins[threadIdx.x / 32 * THREADS + i];
        const Part part = part_at(warp_sum(sum), target);  // whose barriers let no thread go on while others still add
        target -= part.before;
        rank |= static_cast<uint32_t>(part.index) << shift;
    }
    return rank;
}

// The last place of the fewest, the best first, that weigh as much as is wanted, at least 1; beyond all if they do not.
template <class Weight>
__device__ __forceinline__ uint64_t last_place(const Weight& weight, const Row& row, uint64_t wanted, uint64_t* bins) {
    uint64_t target = wanted - 1;
    const uint32_t rank = rank_at(weight, row, target, bins);
    return place_of(rank, id_at(Equals<Weight>{weight, rank}, row, target));
}

// One block, or ptxas spills registers to make room for three.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
sample(const float* logits, const unsigned char* __restrict__ allowed,
       const float* __restrict__ temperatures, const int* __restrict__ top_k, const uint64_t* __restrict__ top_p,
       const uint64_t* __restrict__ min_p, const int* __restrict__ texts, const uint64_t* numbers,
       int* ids, int V) {
    after_earlier_launches();
    DYNAMIC_SHARED(uint64_t, bins);
    const int n = blockIdx.x, b = texts[n];
    const Row row{logits + static_cast<long long>(n) * V, allowed, V};
    const uint64_t first = first_place(row), beyond_all = ~0ull;
    const uint32_t rank = static_cast<uint32_t>(first >> 32);
    int id = rank == NOT_FINITE || rank == NONE ? -1 : static_cast<int>(first);
    if (id >= 0 && temperatures[b] > 0) {
        Mass mass{beyond_all, 0, row.logits[id], LOG2_E / temperatures[b]};
        if (top_k[b]) mass.last = last_place(One{}, row, top_k[b], bins);
        if (top_p[b]) mass.last = last_place(mass, row, share(total_of(mass, row), top_p[b]), bins);
        mass.least = share(static_cast<uint64_t>(ONE), min_p[b]);
        id = id_at(mass, row, __umul64hi(total_of(mass, row), numbers[n]));
    }
    if (threadIdx.x == 0) ids[n] = id;
}
