// Kernels with one fault each, and their sound counterparts. A fault that is reported by its line stands on a line
// marked with the name of its kernel.
#include "common.cuh"
#include "ptx.cuh"

extern "C" __global__ void scale(float* x, float by) { x[threadIdx.x] *= by; }

extern "C" __global__ void read_past_the_end(const float* x, float* y, int by) {
    y[threadIdx.x] = x[threadIdx.x + by];  // AT read_past_the_end
}

extern "C" __global__ void write_past_the_end(float* y, int by) {
    y[threadIdx.x + by] = 1.0f;  // AT write_past_the_end
}

extern "C" __global__ void write_before_the_start(float* y) { y[static_cast<int>(threadIdx.x) - 1] = 1.0f; }

extern "C" __global__ void null_pointer(const float* x, float* y) {
    y[0] = x[0];  // AT null_pointer
}

extern "C" __global__ void past_static_shared(float* y) {
    __shared__ float s[32];
    s[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x + 1];  // AT past_static_shared
}

extern "C" __global__ void past_dynamic_shared(float* y) {
    DYNAMIC_SHARED(float, s);
    s[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x + 1];  // AT past_dynamic_shared
}

extern "C" __global__ void past_local(float* y, int by) {
    float a[8];
    for (int i = 0; i < 8; i++) a[i] = y[i];
    y[threadIdx.x] = a[threadIdx.x % 8 + by];  // AT past_local
}

extern "C" __global__ void misaligned(float* y, int by) {
    *reinterpret_cast<float4*>(y + by) = make_float4(1, 2, 3, 4);  // AT misaligned
}

extern "C" __global__ void divide(int* y, int by) {
    y[threadIdx.x] = 5 / by;  // AT divide
}

extern "C" __global__ void deep_recursion(float* y, int n) {  // AT deep_recursion
    volatile char frame[1 << 17];
    frame[n] = 1;
    y[0] = frame[n];
}

extern "C" __global__ void uninitialized_shared(float* y) {
    __shared__ float s[32];
    if (threadIdx.x != 3) s[threadIdx.x] = 1.0f;
    y[threadIdx.x] = s[threadIdx.x];
}

template <class T> __global__ void uninitialized_shared_of_a_template(float* y) {
    __shared__ T s[32];
    if (threadIdx.x != 3) s[threadIdx.x] = T(1.0f);
    y[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void uninitialized_dynamic_shared(float* y) {
    DYNAMIC_SHARED(float, s);
    if (threadIdx.x != 3) s[threadIdx.x] = 1.0f;
    y[threadIdx.x] = s[threadIdx.x];
}

// Reverses 64 numbers, in two warps.
template <bool BARRIER> __global__ void reversed(const float* x, float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    if (BARRIER) __syncthreads();  // all have written before any reads
    y[threadIdx.x] = s[63 - threadIdx.x];
}

// Reverses 32 numbers in each warp. A shuffle exchanges registers only, and is no barrier.
template <bool BARRIER> __global__ void warp_reversed(const float* x, float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    if (BARRIER) __syncwarp();  // the warp has written before any of it reads
    y[threadIdx.x] = s[threadIdx.x ^ 31];
}

// The sum of each of two rows, through one buffer: without the last barrier it is overwritten while others still read.
template <bool BARRIER> __global__ void two_sums(const float* x, float* y) {
    __shared__ float partial[2];
    for (int row = 0; row < 2; row++) {
        float sum = warp_sum(x[64 * row + threadIdx.x]);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
        __syncthreads();  // both sums are written before they are read
        y[64 * row + threadIdx.x] = partial[0] + partial[1];
        if (BARRIER) __syncthreads();  // all have read before the next row overwrites
    }
}

extern "C" __global__ void divergent_barrier() {
    if (threadIdx.x < 16) __syncthreads();
    else __syncthreads();  // AT divergent_barrier
}

extern "C" __global__ void early_end(int n) {
    if (threadIdx.x >= n) return;
    __syncthreads();  // AT early_end
}

extern "C" __global__ void deadlock() {
    if (threadIdx.x == 5) __syncthreads();  // AT deadlock
    else __shfl_sync(0xffffffffu, 1.0f, 0);
}

extern "C" __global__ void endless_spin(const float* x) {
    while (x[0] == 0.0f) __nanosleep(100);  // AT endless_spin
}

extern "C" __global__ void spin_until_set(volatile int* flag, int* y) {
    if (threadIdx.x == 0) while (!*flag) __nanosleep(100);
    if (threadIdx.x == 31) *flag = 7;
    y[threadIdx.x] = *flag;
}

extern "C" __global__ void mask_without_caller(float* y) {
    if (threadIdx.x < 17) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1);  // AT mask_without_caller
}

extern "C" __global__ void mask_of_absent_lanes(float* y) {
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);  // AT mask_of_absent_lanes
}

extern "C" __global__ void mask_of_divergent_lanes(float* y) {
    if (threadIdx.x < 16) y[0] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);  // AT mask_of_divergent_lanes
}

extern "C" __global__ void mask_of_ended_lanes(float* y) {
    if (threadIdx.x >= 16) return;
    __syncwarp(0x0000ffffu);
    y[0] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);  // AT mask_of_ended_lanes
}

extern "C" __global__ void overlapping_masks(float* y) {
    y[threadIdx.x] = __shfl_sync(threadIdx.x < 16 ? 0x0001ffffu : 0xffff0000u, 1.0f, 16);  // AT overlapping_masks
}

extern "C" __global__ void two_collectives(float* y) {
    if (threadIdx.x < 16) y[0] = __shfl_sync(0xffffffffu, 1.0f, 0);
    else y[0] = __any_sync(0xffffffffu, 1);  // AT two_collectives
}

extern "C" __global__ void shuffle_from_outside(float* y) {
    if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}

extern "C" __global__ void failed_assert(int n) {
    assert(threadIdx.x < n);  // AT failed_assert
}

// Copies 32 x 16 bytes through shared memory, asynchronously, in reverse order.
template <bool WAIT> __global__ void async_copy(const float* x, float* y) {
    __shared__ __align__(16) float s[128];
    copy_async_16(&s[4 * threadIdx.x], x + 4 * threadIdx.x, true);
    copy_async_commit();
    if (WAIT) copy_async_wait<0>();
    __syncthreads();  // every thread's copy has landed before any reads
    for (int i = 0; i < 4; i++) y[4 * threadIdx.x + i] = s[127 - (4 * threadIdx.x + i)];
}

// Fills its buffer anew; wrongly so if it does before it has read what was there.
template <bool BARRIER> __global__ void async_overwrite(const float* x, float* y) {
    __shared__ __align__(16) float s[128];
    float* mine = s + 4 * threadIdx.x;
    for (int i = 0; i < 4; i++) mine[i] = x[4 * threadIdx.x + i];
    if (!BARRIER) copy_async_16(mine, x + 128 + 4 * threadIdx.x, true);
    for (int i = 0; i < 4; i++) y[4 * threadIdx.x + i] = mine[i];
    if (BARRIER) copy_async_16(mine, x + 128 + 4 * threadIdx.x, true);
    copy_async_commit();
    copy_async_wait<0>();
}

// A two-stage ring of one buffer too few: the next piece is asked for before the last one has been read by all.
template <bool BARRIER> __global__ void async_refill(const float* x, float* y) {
    __shared__ __align__(16) float s[256];
    for (int piece = 0; piece < 3; piece++) {
        copy_async_16(&s[4 * threadIdx.x], x + 256 * piece + 4 * threadIdx.x, true);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();  // the piece is there before any thread reads it
        for (int i = 0; i < 4; i++) y[256 * piece + 4 * threadIdx.x + i] = s[255 - (4 * threadIdx.x + i)];
        if (BARRIER) __syncthreads();  // all have read before the buffer is filled again
    }
}

extern "C" __global__ void last_block_sum(const float* x, float* partial, unsigned* finished, float* y) {
    __shared__ bool last;
    float sum = warp_sum(x[32 * blockIdx.x + threadIdx.x]);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        __threadfence();
        last = atomicAdd(finished, 1u) == gridDim.x - 1;
    }
    __syncthreads();  // thread 0 has set `last`
    if (last && threadIdx.x == 0) {
        float total = 0.0f;
        for (int i = 0; i < gridDim.x; i++) total += partial[i];
        *y = total;
    }
}

extern "C" __global__ void votes(const int* x, int* y) {
    int t = threadIdx.x;
    y[t] = __syncthreads_count(x[t]);
    y[64 + t] = __syncthreads_and(x[t]);
    y[128 + t] = __syncthreads_or(x[t]);
    y[192 + t] = __ballot_sync(0xffffffffu, x[t]);
    y[256 + t] = __any_sync(0xffffffffu, x[t]);
    y[320 + t] = __all_sync(0xffffffffu, x[t]);
}

extern "C" __global__ void shuffles(const int* x, int* y, int by) {
    int t = threadIdx.x, v = x[t];
    y[t] = __shfl_sync(0xffffffffu, v, by, 16);
    y[64 + t] = __shfl_up_sync(0xffffffffu, v, by, 16);
    y[128 + t] = __shfl_down_sync(0xffffffffu, v, by, 16);
    y[192 + t] = __shfl_xor_sync(0xffffffffu, v, by, 16);
}

// In which order the threads came.
extern "C" __global__ void arrivals(int* counter, int* y) {
    y[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

extern "C" __global__ void where_am_i(int* y) {
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    y[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1 + block * 1000 + thread;
}

// The three types' conversions and fused multiply-add.
template <class T> __global__ void round_trip(const float* x, T* y, float* z) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = from_float<T>(x[i]);
    z[i] = to_float(y[i]);
}
template <class T> __global__ void fused(const T* a, const T* b, const T* c, T* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = __hfma(a[i], b[i], c[i]);
}

// What x is before the launches before this one have ended, and after.
extern "C" __global__ void early(const float* x, float* before, float* after) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    before[i] = x[i];
    after_earlier_launches();
    after[i] = x[i];
}

extern "C" __global__ void early_sum(const float* x, float* y) {
    __shared__ float s[32];
    s[threadIdx.x] = 1;
    if (threadIdx.x < 16) after_earlier_launches();
    __syncthreads();  // half of the threads come late
    y[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x] + s[31 - threadIdx.x];
}

extern "C" __global__ void early_fault(const float* x, float* y, int by) {
    after_earlier_launches();
    y[threadIdx.x] = x[threadIdx.x + by];  // AT early_fault
}
