// Matrix product on tensor cores for up to 64 rows:  y[n,o] = sum_i x[n,i] weight[o,i],  as fast as the weights are read.
//
//   x        T         (N,I)   T in 16 bits; I a multiple of 8, both arrays at multiples of 16 bytes
//   weight   T         (O,I)
//   y        float     (N,O)
//   partial  float     (gridDim.x,2,ROWS,OUTPUTS)   scratch
//   arrived  unsigned  (ceil(O / OUTPUTS))          0 before the launch and after it
//
// A tile is all rows and 128 outputs: x is read from the caches once for every 128 rows of weights. A tile is summed a
// slice of 64 i after the other. All slices of all tiles are numbered and shared out evenly among the blocks, wherever
// that cuts a tile (Osama et al. 2023, "Stream-K", arXiv 2301.03598): every multiprocessor reads as much as any other,
// whatever O and I are. Where several blocks have part of a tile, each leaves its sums in `partial`, and the last of them
// adds all up, in the order of the blocks: the result is the same in every run on a card.
//
// Slices of x and weight are copied to a ring in shared memory, STAGES - 1 ahead of the one that is multiplied, also
// across the end of a tile: two blocks on a multiprocessor have 96 KB of weights on their way. A warp computes 32 rows and
// as many outputs as are left for it, in fragments of m16n8k16. Beyond the edges of x and weight, slices are zero.
//
// A slice's row has 144 bytes in shared memory, 128 of which are used: ldmatrix reads 8 rows at a time, and so their
// pieces of 16 bytes lie in different banks.
//
// Grid: as many blocks as fit on the card at once, at most one for each slice. Block: 128 threads. Dynamic shared memory:
// STAGES of Slice<T, ROWS>.
// Preconditions: N <= ROWS.
// Bytes: O I sizeof(T) from memory, each weight once; N / OUTPUTS of it again from the caches for x; partial: up to
// 2 gridDim.x ROWS OUTPUTS floats, written and read in the caches.
#include "ptx.cuh"

constexpr int THREADS = 128, OUTPUTS = 128, SLICE = 64, STAGES = 4;
constexpr int PITCH = SLICE + 8, PIECES = SLICE / 8;  // of a row: elements to the next one, copies of 16 bytes

template <class T, int ROWS> struct Slice {
    T x[ROWS][PITCH], weight[OUTPUTS][PITCH];
};

// The numbers of a warp: 32 rows, and OUTPUTS shared among the warps that have the same rows.
template <int ROWS> struct Share {
    static constexpr int ROW_GROUPS = ROWS / 32, WIDTH = OUTPUTS * ROW_GROUPS / (THREADS / 32), PAIRS = WIDTH / 16;
    int row, column;

    __device__ __forceinline__ Share()
        : row(threadIdx.x / 32 % ROW_GROUPS * 32), column(threadIdx.x / 32 / ROW_GROUPS * WIDTH) {}
};

template <int ROWS> using Sums = float[2][2 * Share<ROWS>::PAIRS][4];

// COUNT rows of a matrix (count, I) from row `first` and column i on; zeros beyond its edges.
template <int COUNT, class T>
__device__ __forceinline__ void fetch(T (*slice)[PITCH], const T* matrix, int first, int count, int i, int I) {
#pragma unroll
    for (int k = 0; k < COUNT * PIECES / THREADS; k++) {
        int piece = threadIdx.x + k * THREADS, row = piece / PIECES, column = piece % PIECES * 8;
        bool inside = first + row < count && i + column < I;
        const T* from = matrix + static_cast<long long>(first + row) * I + i + column;
        copy_async_16(&slice[row][column], inside ? from : matrix, inside);
    }
}

template <class T, int ROWS>
__device__ __forceinline__ void multiply(Sums<ROWS>& sum, const Slice<T, ROWS>& slice, const Share<ROWS>& share) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < SLICE; i += 16) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
            load_matrix_x4(a[m], &slice.x[share.row + 16 * m + lane % 16][i + lane / 16 * 8]);
#pragma unroll
        for (int pair = 0; pair < Share<ROWS>::PAIRS; pair++) {
            uint32_t b[4];  // of 8 outputs, and of the next 8
            load_matrix_x4(b, &slice.weight[share.column + 16 * pair + lane / 16 * 8 + lane % 8][i + lane / 8 % 2 * 8]);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma_m16n8k16<T>(sum[m][2 * pair], a[m], {b[0], b[1]});
                mma_m16n8k16<T>(sum[m][2 * pair + 1], a[m], {b[2], b[3]});
            }
        }
    }
}

template <int ROWS> __device__ __forceinline__ void clear(Sums<ROWS>& sum) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int o = 0; o < 2 * Share<ROWS>::PAIRS; o++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[m][o][j] = 0.0f;
}

// Lane l holds, of each fragment, rows l/4 and l/4 + 8, columns 2(l%4) and the next. put(row, column, sum).
template <int ROWS, class Put>
__device__ __forceinline__ void for_each_sum(const Sums<ROWS>& sum, const Share<ROWS>& share, Put put) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int o = 0; o < 2 * Share<ROWS>::PAIRS; o++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                put(share.row + 16 * m + lane / 4 + j / 2 * 8, share.column + 8 * o + lane % 4 * 2 + j % 2, sum[m][o][j]);
}

// How slices are shared out: block b has those from first_of(b) on, up to first_of(b + 1).
struct Shares {
    int slices;  // of all tiles
    int blocks;

    __device__ __forceinline__ int first_of(int block) const { return static_cast<long long>(slices) * block / blocks; }
    __device__ __forceinline__ int block_of(int slice) const { return ((slice + 1ll) * blocks - 1) / slices; }
};

// The sums of a tile, of which blocks first to last have left parts: its first tile's in place 0, its last's in place 1.
// A thread adds 32 numbers at a time, in pieces of 4, all of which it asks of a block before it waits for one.
template <int ROWS>
__device__ __forceinline__ void add_parts(const float* partial, const Shares& shares, int first, int last,
                                          int tile_begin, float* y, int o, int N, int O) {
    constexpr int PIECES_AHEAD = 8;
#pragma unroll 1
    for (int begin = 0; begin < ROWS * OUTPUTS; begin += 4 * PIECES_AHEAD * THREADS) {
        float4 sum[PIECES_AHEAD] = {};
#pragma unroll 1
        for (int block = first; block <= last; block++) {
            const int place = shares.first_of(block) < tile_begin;
            const float* part = partial + (2ll * block + place) * ROWS * OUTPUTS + begin;
#pragma unroll
            for (int p = 0; p < PIECES_AHEAD; p++) {
                const float4 x = reinterpret_cast<const float4*>(part)[threadIdx.x + p * THREADS];
                sum[p] = make_float4(sum[p].x + x.x, sum[p].y + x.y, sum[p].z + x.z, sum[p].w + x.w);
            }
        }
#pragma unroll
        for (int p = 0; p < PIECES_AHEAD; p++) {
            const int k = begin + 4 * (threadIdx.x + p * THREADS), n = k / OUTPUTS, column = o + k % OUTPUTS;
            const float of_piece[4] = {sum[p].x, sum[p].y, sum[p].z, sum[p].w};
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (n < N && column + j < O) y[static_cast<long long>(n) * O + column + j] = of_piece[j];
        }
    }
}

template <class T, int ROWS> __global__ void __launch_bounds__(THREADS, 2)
wide(const T* x, const T* __restrict__ weight, float* y, float* partial,
     unsigned* arrived, int N, int O, int I) {
    DYNAMIC_SHARED(char, memory);
    __shared__ bool joins;
    Slice<T, ROWS>* ring = reinterpret_cast<Slice<T, ROWS>*>(memory);
    const Share<ROWS> share;
    const int of_a_tile = (I + SLICE - 1) / SLICE, tiles = (O + OUTPUTS - 1) / OUTPUTS;
    const Shares shares{of_a_tile * tiles, static_cast<int>(gridDim.x)};
    const int begin = shares.first_of(blockIdx.x), end = shares.first_of(blockIdx.x + 1);

    auto fetch_weights = [&](int at) {
        const int o = at / of_a_tile * OUTPUTS, i = at % of_a_tile * SLICE;
        fetch<OUTPUTS>(ring[(at - begin) % STAGES].weight, weight, o, O, i, I);
    };
    auto fetch_x = [&](int at) {
        fetch<ROWS>(ring[(at - begin) % STAGES].x, x, 0, N, at % of_a_tile * SLICE, I);
    };
    Sums<ROWS> sum;
    clear<ROWS>(sum);
    for (int at = begin; at < min(end, begin + STAGES - 1); at++) fetch_weights(at);
    after_earlier_launches();
    for (int at = begin; at < begin + STAGES - 1; at++) {
        if (at < end) fetch_x(at);
        copy_async_commit();  // a group, even if it is empty: the wait below counts groups
    }
    for (int at = begin; at < end; at++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // every thread's copies of this slice have landed, and all are done with the slice before it
        if (at + STAGES - 1 < end) {  // into the place of the slice before
            fetch_x(at + STAGES - 1);
            fetch_weights(at + STAGES - 1);
        }
        copy_async_commit();
        multiply<T, ROWS>(sum, ring[(at - begin) % STAGES], share);

        const int tile = at / of_a_tile, o = tile * OUTPUTS;
        const int tile_begin = tile * of_a_tile, tile_end = tile_begin + of_a_tile;
        if (at + 1 < tile_end && at + 1 < end) continue;
        const int first = shares.block_of(tile_begin), last = shares.block_of(tile_end - 1);
        if (first == last) {
            for_each_sum<ROWS>(sum, share, [&](int n, int column, float value) {
                if (n < N && o + column < O) y[static_cast<long long>(n) * O + o + column] = value;
            });
        } else {
            float* own = partial + (2ll * blockIdx.x + (begin < tile_begin)) * ROWS * OUTPUTS;
            for_each_sum<ROWS>(sum, share, [&](int n, int column, float value) { own[n * OUTPUTS + column] = value; });
            __threadfence();  // this thread's sums are there for other blocks before the block says so
            __syncthreads();  // every thread's are
            if (threadIdx.x == 0) joins = atomicInc(arrived + tile, last - first) == last - first;
            __syncthreads();  // all know whether this was the last; they meet again before it is overwritten
            if (joins) {
                __threadfence();  // what the other blocks wrote before they arrived is read after it
                add_parts<ROWS>(partial, shares, first, last, tile_begin, y, o, N, O);
            }
        }
        clear<ROWS>(sum);
    }
}
