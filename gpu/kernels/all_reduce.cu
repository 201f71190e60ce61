// The sum over the ranks that share a model, in the order of the ranks, so that all of them get the same bits:
//
//   x[i] = ((part_0[i] + part_1[i]) + part_2[i]) + ...        part_r being what x of rank r was
//
//   mailboxes  unsigned long long (RANKS)  where every rank's mailbox lies, as this device sees it
//   x          float (n)                   n a multiple of 4, at most `capacity`; at a multiple of 16 bytes
//   rank, capacity, patience               this rank; floats of a slot; how often to look for a rank before giving up
//
// Each rank runs this kernel on its own device, and all devices can read and write each other's mailbox. A block copies
// its piece of x into a slot of its own mailbox, tells the same block of every rank so, waits to be told so by all, and
// adds up the pieces that it reads from all mailboxes. No block waits for another of its own device.
//
// Why two slots are enough, and nothing has to be waited for at the end: a slot is written again two sums later. By then
// this rank has been through the sum in between, in which each rank told it that it was there; and a rank comes to a sum
// only when the one before is over for it, and what it had to read of that one read. So whatever stood in the slot has
// been read by all. With one slot it need not have been.
//
// The count of sums is in the mailbox and not an argument: a graph can be replayed. It may wrap around, and a block that
// took part in none of the last sums, being one too many for them, has flags of long ago: so a flag has to say this sum
// or the next. A rank can be no further, since that next one needs this rank too.
//
// If a rank does not come, no card hangs: after `patience` looks x is NaN, `missing` says whom this rank waited for, and
// it takes part in no sum after that. It must not: another may have more patience, and still have to read the slot that
// would be written next. So every number is right or NaN, and whoever waits for this rank will find it missing.
//
// Grid: any number of blocks up to MOST_BLOCKS, the same on every rank. Block: THREADS >= RANKS.
// Bytes: 4 n from each other rank over the link, 16 n in this device's memory.
#include "ptx.cuh"

constexpr int THREADS = 256, MOST_RANKS = 8, MOST_BLOCKS = 64;

struct Mailbox {
    unsigned sums;     // that this rank has been through
    unsigned arrived;  // blocks that are done with the present one: 0 between launches
    // 0, or 1 + the rank that was waited for in vain and, in the upper half, in which sum: one word, so that all threads
    // of a launch agree whether it was in an earlier one.
    unsigned long long missing;
    unsigned flags[MOST_BLOCKS][MOST_RANKS];  // the last sum for which a block of a rank has put its piece into its slot
};

__device__ __forceinline__ float4* slot_of(Mailbox* box, unsigned turn, int capacity) {
    return reinterpret_cast<float4*>(box + 1) + static_cast<long long>(turn % 2) * (capacity / 4);
}

// Whether a rank's flag came to `turn`, or to the next, before patience was over.
__device__ __forceinline__ bool comes(const unsigned* flag, unsigned turn, unsigned patience) {
    for (unsigned looks = 0; load_acquire_system(flag) - turn > 1; looks++) {
        if (looks == patience) return false;
        wait_for_others();
    }
    return true;
}

__device__ __forceinline__ float4 add(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <int RANKS> __global__ void __launch_bounds__(THREADS)
all_reduce(const unsigned long long* __restrict__ mailboxes, float* x, int n, int rank, int capacity,
           unsigned patience) {
    after_earlier_launches();
    Mailbox* boxes[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++) boxes[r] = reinterpret_cast<Mailbox*>(mailboxes[r]);
    Mailbox* own = reinterpret_cast<Mailbox*>(mailboxes[rank]);
    const unsigned turn = own->sums + 1;
    const unsigned long long missing = load_system(&own->missing);  // another block may be writing it
    const bool gone = missing && missing >> 32 != turn;
    float4* x4 = reinterpret_cast<float4*>(x);
    const int stride = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;

    if (!gone)
        for (int i = first; i < n / 4; i += stride) slot_of(own, turn, capacity)[i] = x4[i];
    __syncthreads();  // the whole block has written its pieces before its flags say so
    bool missed = false;
    if (threadIdx.x < RANKS) {
        Mailbox* peer = reinterpret_cast<Mailbox*>(mailboxes[threadIdx.x]);
        if (!gone) store_release_system(&peer->flags[blockIdx.x][rank], turn);
        const bool given_up = load_system(&own->missing);
        missed = given_up || !comes(&own->flags[blockIdx.x][threadIdx.x], turn, patience);
        if (missed && !given_up)
            store_system(&own->missing, static_cast<unsigned long long>(turn) << 32 | (1 + threadIdx.x));
    }
    // Every rank's pieces are there before any thread reads them; and all know if one's are not.
    const bool in_vain = __syncthreads_or(missed);
    const float nan = __int_as_float(0x7fc00000);
    for (int i = first; in_vain && i < n / 4; i += stride) x4[i] = make_float4(nan, nan, nan, nan);
    for (int i = first; !in_vain && i < n / 4; i += stride) {
        float4 parts[RANKS];
#pragma unroll
        for (int r = 0; r < RANKS; r++) parts[r] = load_system(slot_of(boxes[r], turn, capacity) + i);
        float4 sum = parts[0];
#pragma unroll
        for (int r = 1; r < RANKS; r++) sum = add(sum, parts[r]);
        x4[i] = sum;
    }
    // Each block has read `sums` by now, all of its threads before the barriers: the last may write it.
    if (threadIdx.x == 0 && atomicInc(&own->arrived, gridDim.x - 1) == gridDim.x - 1) own->sums = turn;
}
