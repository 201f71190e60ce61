// mma.sync.m16n8k16 and ldmatrix, with the fragment layouts of the PTX ISA (sections "Matrix fragments for
// mma.m16n8k16" and "ldmatrix"). Products are summed in float in the order of k; hardware differs in the last bits.
#pragma once

namespace host {

struct Mma { float* d; const uint32_t *a, *b; const float* c; };

template <class T> HOST_UNCHECKED static float half_of(uint32_t pair, int which) {
    T x;
    x.bits = static_cast<uint16_t>(pair >> 16 * which);
    return x;
}

// Lane l holds, with g = l/4 and t = l%4:  a[i] = A[g + 8(i%2)][2t + 8(i/2) ..+1],  b[i] = B[2t + 8i ..+1][g],
// d[i] = D[g + 8(i/2)][2t + i%2].
template <class T> HOST_UNCHECKED static void do_mma(void** lanes, unsigned) {
    float a[16][16], b[16][8], sum[16][8] = {};
    for (int lane = 0; lane < 32; lane++) {
        auto* m = static_cast<Mma*>(lanes[lane]);
        int g = lane / 4, t = lane % 4;
        for (int which = 0; which < 2; which++) {
            for (int i = 0; i < 4; i++) a[g + 8 * (i % 2)][2 * t + which + 8 * (i / 2)] = half_of<T>(m->a[i], which);
            for (int i = 0; i < 2; i++) b[2 * t + which + 8 * i][g] = half_of<T>(m->b[i], which);
        }
    }
    for (int k = 0; k < 16; k++)
        for (int row = 0; row < 16; row++)
            for (int column = 0; column < 8; column++) sum[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++) {
        auto* m = static_cast<Mma*>(lanes[lane]);
        for (int i = 0; i < 4; i++) m->d[i] = m->c[i] + sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
}

template <class T>
static void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const float* c, HOST_WHERE) {
    Mma lane{d, a, b, c};
    collective(~0u, do_mma<T>, &lane, {"mma.m16n8k16", file, line});
}

struct LoadMatrix { uint32_t* registers; uint16_t row[8]; };

HOST_UNCHECKED static uint32_t element(void** rows, int row, int column) {
    return static_cast<LoadMatrix*>(rows[row])->row[column];
}

template <int COUNT, bool TRANSPOSED> HOST_UNCHECKED static void do_load_matrix(void** lanes, unsigned) {
    for (int lane = 0; lane < 32; lane++) {
        auto* mine = static_cast<LoadMatrix*>(lanes[lane]);
        int row = lane / 4, column = 2 * (lane % 4);
        for (int i = 0; i < COUNT; i++) {
            void** rows = lanes + 8 * i;
            uint32_t low = TRANSPOSED ? element(rows, column, row) : element(rows, row, column);
            uint32_t high = TRANSPOSED ? element(rows, column + 1, row) : element(rows, row, column + 1);
            mine->registers[i] = low | high << 16;
        }
    }
}

// Lane 8i + r gives the address of row r of matrix i. A row is read when its lane arrives, and not when the last one
// does: a missing __syncwarp shows.
template <int COUNT, bool TRANSPOSED> static void load_matrix(uint32_t* registers, const void* row, HOST_WHERE) {
    LoadMatrix lane{registers, {}};
    if (running->lane < 8 * COUNT) {
        if (reinterpret_cast<uintptr_t>(row) % 16)
            fail("ldmatrix at %s:%d: a row must start at a multiple of 16 bytes", file, line);
        for (int i = 0; i < 8; i++) lane.row[i] = static_cast<const uint16_t*>(row)[i];
    }
    collective(~0u, do_load_matrix<COUNT, TRANSPOSED>, &lane, {"ldmatrix", file, line});
}

}  // namespace host
