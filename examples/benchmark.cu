// What benchmark_gpu.py needs beside the kernels of the model: weights that were never on the host, and what a card can
// do at most.
#include "ptx.cuh"

// Philox4x32-10: four words of random bits for a counter. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3".
__device__ __forceinline__ uint4 philox(uint4 counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t a = 0xD2511F53ull * counter.x, b = 0xCD9E8D57ull * counter.z;
        counter = make_uint4(static_cast<uint32_t>(b >> 32) ^ counter.y ^ key0, static_cast<uint32_t>(b),
                             static_cast<uint32_t>(a >> 32) ^ counter.w ^ key1, static_cast<uint32_t>(a));
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return counter;
}

// Two numbers of the standard normal distribution (Box and Muller). The logarithm's argument is never zero; the angle is
// between -pi and pi, where the card's approximations are good to 2^-21.
__device__ __forceinline__ float2 normals(uint32_t a, uint32_t b) {
    const float radius = sqrtf(-2.0f * logf((a + 0.5f) * 0x1p-32f));
    const float angle = static_cast<int>(b) * (3.14159265f * 0x1p-31f);
    return make_float2(radius * __cosf(angle), radius * __sinf(angle));
}

// out[i] = mean + deviation N(0,1), which depends on i and the seed alone
//
//   out  T  (count)
//
// Grid: any number of blocks, which stay. Block: 1-D, of any size.
// Bytes: count sizeof(T).
template <class T> __global__ void draw(T* out, long long count, uint32_t seed, float mean, float deviation) {
    const long long step = 4ll * gridDim.x * blockDim.x;
    for (long long i = 4ll * (1ll * blockIdx.x * blockDim.x + threadIdx.x); i < count; i += step) {
        const uint4 bits = philox(
            make_uint4(static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), 0u, 0u), seed, 0u);
        const float2 first = normals(bits.x, bits.y), second = normals(bits.z, bits.w);
        const float drawn[4] = {first.x, first.y, second.x, second.y};
        for (int k = 0; k < 4 && i + k < count; k++) out[i + k] = from_float<T>(mean + deviation * drawn[k]);
    }
}

// sums[t] = sum of the 32-bit words that thread t reads, modulo 2^32: the words must be read, and nearly nothing is
// written.
//
//   data  uint32_t  (count,4)  at a multiple of 16 bytes
//   sums  uint32_t  (gridDim.x blockDim.x)
//
// A thread keeps 8 loads of 16 bytes on their way.
// Grid: any number of blocks, which stay. Block: 1-D, of any size.
// Bytes: 16 count.
extern "C" __global__ void read_stream(const uint32_t* __restrict__ data, uint32_t* sums, long long count) {
    const long long threads = 1ll * gridDim.x * blockDim.x, thread = 1ll * blockIdx.x * blockDim.x + threadIdx.x;
    const uint64_t policy = used_once();
    uint32_t sum = 0;
    for (long long first = thread; first < count; first += 8 * threads) {
        uint4 piece[8];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const long long i = first + k * threads;
            piece[k] = i < count ? load_once(data + 4 * i, policy) : make_uint4(0u, 0u, 0u, 0u);
        }
#pragma unroll
        for (int k = 0; k < 8; k++) sum += piece[k].x + piece[k].y + piece[k].z + piece[k].w;
    }
    sums[thread] = sum;
}

// out[i] = data[i]
//
//   data, out  uint32_t  (count,4)  at multiples of 16 bytes
//
// Grid, block and loads as of read_stream.
// Bytes: 32 count.
extern "C" __global__ void copy_stream(const uint32_t* __restrict__ data, uint32_t* __restrict__ out, long long count) {
    const long long threads = 1ll * gridDim.x * blockDim.x;
    const uint64_t policy = used_once();
    for (long long first = 1ll * blockIdx.x * blockDim.x + threadIdx.x; first < count; first += 8 * threads) {
        uint4 piece[8];
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (first + k * threads < count) piece[k] = load_once(data + 4 * (first + k * threads), policy);
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (first + k * threads < count) reinterpret_cast<uint4*>(out)[first + k * threads] = piece[k];
    }
}

// Nothing: what a launch costs.
extern "C" __global__ void nothing() {}
