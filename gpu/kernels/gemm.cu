// Matrix product on tensor cores:  y[n,o] = sum_i x[n,i] weight[o,i],  for more rows than matvec.cu is for.
//
//   x       T      (N,I)   T in 16 bits; I a multiple of 8, both arrays at multiples of 16 bytes
//   weight  T      (O,I)
//   y       float  (N,O)
//
// A block computes a tile of 64 rows and 64 outputs, a slice of 32 i after the other: the slices of x and weight are
// copied to shared memory, two slices ahead of the one that is multiplied. Each of 4 warps holds a quarter of the tile,
// 32x32 sums in 2x4 fragments of m16n8k16, accumulated in float. Beyond the edges of x and weight, slices are zero.
//
// A slice's row has 80 bytes in shared memory, 64 of which are used: ldmatrix reads 8 rows at a time, and so their
// pieces of 16 bytes lie in different banks.
//
// Grid: (ceil(O / 64), ceil(N / 64)). Block: 128 threads.
// Bytes: (N O / 64) 2 I sizeof(T) from memory and the second-level cache, 4 N O written.
#include "ptx.cuh"

constexpr int THREADS = 128, TILE = 64, SLICE = 32, STAGES = 3;
constexpr int PITCH = SLICE + 8, PIECES = SLICE / 8;  // of a row: elements to the next one, copies of 16 bytes

// Rows first.. of a matrix (count, I), from column i on: two pieces of 8 for each thread.
template <class T> __device__ __forceinline__ void fetch(T (*slice)[PITCH], const T* matrix, int first, int count,
                                                         int i, int I) {
#pragma unroll
    for (int k = 0; k < TILE * PIECES / THREADS; k++) {
        int piece = threadIdx.x + k * THREADS, row = piece / PIECES, column = piece % PIECES * 8;
        bool inside = first + row < count && i + column < I;
        const T* from = matrix + static_cast<long long>(first + row) * I + i + column;
        copy_async_16(&slice[row][column], inside ? from : matrix, inside);
    }
}

// sum += 32 rows of x times 32 of weight, of one slice.
template <class T> __device__ __forceinline__ void multiply(float (&sum)[2][4][4], const T (*x)[PITCH],
                                                            const T (*weight)[PITCH]) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < SLICE; i += 16) {
        uint32_t a[2][4], b[4][2];
#pragma unroll
        for (int m = 0; m < 2; m++) load_matrix_x4(a[m], &x[16 * m + lane % 16][i + lane / 16 * 8]);
#pragma unroll
        for (int o = 0; o < 4; o++) load_matrix_x2(b[o], &weight[8 * o + lane % 8][i + lane / 8 % 2 * 8]);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int o = 0; o < 4; o++) mma_m16n8k16<T>(sum[m][o], a[m], b[o]);
    }
}

// Lane l holds, of each fragment, rows l/4 and l/4 + 8, columns 2(l%4) and the next.
__device__ __forceinline__ void store(const float (&sum)[2][4][4], float* y, int first_n, int first_o, int N, int O) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 32; j++) {
        int n = first_n + j / 16 * 16 + lane / 4 + j / 2 % 2 * 8, o = first_o + j / 4 % 4 * 8 + lane % 4 * 2 + j % 2;
        if (n < N && o < O) y[static_cast<long long>(n) * O + o] = sum[j / 16][j / 4 % 4][j % 4];
    }
}

template <class T> __global__ void __launch_bounds__(THREADS)
gemm(const T* x, const T* __restrict__ weight, float* y, int N, int O, int I) {
    after_earlier_launches();
    __shared__ __align__(16) T x_slices[STAGES][TILE][PITCH];
    __shared__ __align__(16) T weight_slices[STAGES][TILE][PITCH];
    int n = blockIdx.y * TILE, o = blockIdx.x * TILE, warp = threadIdx.x / 32;
    int row = warp / 2 * 32, column = warp % 2 * 32;  // of this warp's quarter
    auto fetch_both = [&](int slice) {  // a group, even if it is empty: the wait below counts groups
        if (slice * SLICE < I) {
            fetch(x_slices[slice % STAGES], x, n, N, slice * SLICE, I);
            fetch(weight_slices[slice % STAGES], weight, o, O, slice * SLICE, I);
        }
        copy_async_commit();
    };
    float sum[2][4][4] = {};
    for (int slice = 0; slice < STAGES - 1; slice++) fetch_both(slice);
    for (int slice = 0; slice * SLICE < I; slice++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // every thread's copies of this slice have landed, and all are done with the slice before it
        fetch_both(slice + STAGES - 1);  // into the place of the slice before
        multiply(sum, x_slices[slice % STAGES] + row, weight_slices[slice % STAGES] + column);
    }
    store(sum, y, n + row, o + column, N, O);
}
