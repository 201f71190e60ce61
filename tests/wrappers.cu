// Each wrapper of ptx.cuh by itself, and all of them together: one warp.
#include "ptx.cuh"

// d += a b, in fragments as the lanes hold them: words (32,4), words (32,2), float (32,4).
template <class T> __global__ void fragments(const uint32_t* a, const uint32_t* b, float* d) {
    int lane = threadIdx.x;
    uint32_t of_a[4], of_b[2];
    float sum[4];
    for (int i = 0; i < 4; i++) of_a[i] = a[4 * lane + i], sum[i] = d[4 * lane + i];
    for (int i = 0; i < 2; i++) of_b[i] = b[2 * lane + i];
    mma_m16n8k16<T>(sum, of_a, of_b);
    for (int i = 0; i < 4; i++) d[4 * lane + i] = sum[i];
}

// What ldmatrix gives each lane, words (32,4) and (32,2): of 32 rows of 8 numbers, lane l names row rows[l].
template <bool TRANSPOSED> __global__ void matrices(const uint16_t* x, const int* rows, uint32_t* four, uint32_t* two) {
    __shared__ uint4 s[32];
    int lane = threadIdx.x;
    uint32_t of_four[4], of_two[2];
    const uint4* row = s + rows[lane];
    s[lane] = reinterpret_cast<const uint4*>(x)[lane];
    __syncwarp();  // every row is there before ldmatrix reads it
    if (TRANSPOSED) load_matrix_x4_transposed(of_four, row), load_matrix_x2_transposed(of_two, row);
    else load_matrix_x4(of_four, row), load_matrix_x2(of_two, row);
    for (int i = 0; i < 4; i++) four[4 * lane + i] = of_four[i];
    for (int i = 0; i < 2; i++) two[2 * lane + i] = of_two[i];
}

// y = x where wanted, zeros elsewhere: pieces of 16 bytes, (64), in two groups that are waited for one after the other.
extern "C" __global__ void copies(const float* x, const int* wanted, float* y) {
    __shared__ float4 s[64];
    for (int i = threadIdx.x; i < 64; i += 32) {
        copy_async_16(s + i, x + 4 * i, wanted[i]);
        copy_async_commit();
    }
    copy_async_wait<1>();
    float4* pieces = reinterpret_cast<float4*>(y);
    pieces[threadIdx.x] = s[threadIdx.x];
    copy_async_wait<0>();
    pieces[threadIdx.x + 32] = s[threadIdx.x + 32];
}

// y = x: pieces of 16 bytes, (32).
extern "C" __global__ void loads(const float* x, float* y) {
    const uint64_t policy = used_once();
    reinterpret_cast<uint4*>(y)[threadIdx.x] = load_once(x + 4 * threadIdx.x, policy);
}

// y = x: pieces of 16 bytes, (32); what was released last in each of 32 words; what was stored last in each of 32 more.
extern "C" __global__ void messages(const float* x, unsigned* words, unsigned long long* long_words, float* y,
                                    unsigned* seen, unsigned long long* long_seen) {
    store_system(long_words + (threadIdx.x + 3) % 32, (threadIdx.x + 1ull) << 33);
    store_release_system(words + (threadIdx.x + 5) % 32, threadIdx.x);
    __syncthreads();
    seen[threadIdx.x] = load_acquire_system(words + threadIdx.x);
    long_seen[threadIdx.x] = load_system(long_words + threadIdx.x);
    reinterpret_cast<float4*>(y)[threadIdx.x] = load_system(reinterpret_cast<const float4*>(x) + threadIdx.x);
}

// One tile through all of them: D += A B with A (16,16), B (16,8) in T and D in float.
//
// BY_COLUMNS: A and B are stored transposed, as (16,16) and (8,16); ldmatrix transposes A then, and B otherwise.
template <class T, bool BY_COLUMNS> __global__ void tile(const T* a, const T* b, float* d) {
    __shared__ __align__(16) T a_shared[16 * 16];
    __shared__ __align__(16) T b_shared[16 * 8];
    int lane = threadIdx.x;
    copy_async_16(a_shared + 8 * lane, a + 8 * lane, true);
    if (lane < 16) copy_async_16(b_shared + 8 * lane, b + 8 * lane, true);
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();  // every lane's copies have landed before ldmatrix reads them
    uint32_t fragment_a[4], fragment_b[2];
    if (BY_COLUMNS) load_matrix_x4_transposed(fragment_a, a_shared + 16 * (lane % 8 + lane / 16 * 8) + lane / 8 % 2 * 8);
    else load_matrix_x4(fragment_a, a_shared + 16 * (lane % 16) + 8 * (lane / 16));
    if (BY_COLUMNS) load_matrix_x2(fragment_b, b_shared + 16 * (lane % 8) + 8 * (lane / 8 % 2));
    else load_matrix_x2_transposed(fragment_b, b_shared + 8 * (lane % 16));
    float* mine = d + 8 * (lane / 4) + 2 * (lane % 4);
    float sum[4] = {mine[0], mine[1], mine[64], mine[65]};
    mma_m16n8k16<T>(sum, fragment_a, fragment_b);
    for (int i = 0; i < 4; i++) mine[64 * (i / 2) + i % 2] = sum[i];
}
