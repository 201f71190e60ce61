// The likeliest id:  ids[n] = the lowest v with logits[n,v] = max over the allowed v of logits[n,v]
//
//   logits   float          (N,V)
//   allowed  unsigned char  (V)     0 rules an id out: the last rows of the vocabulary belong to no token; or null
//   ids      int            (N)     -1 if an allowed logit is not finite, or no id is allowed
//
// Grid: one block for each n. Block: a multiple of 32 threads; each looks at every blockDim.x-th id.
// Bytes: N V 4.
#include "common.cuh"
#include "ptx.cuh"

struct Best { float logit; int id; };  // id -1: none
struct Candidate { float logit; unsigned char allowed; };

__device__ __forceinline__ Best better(Best a, Best b) {
    if (a.logit != b.logit) return a.logit > b.logit ? a : b;
    return a.id < b.id ? a : b;
}

// Of the warp, in every lane. All 32 lanes must call it.
__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
    for (int flip = 16; flip > 0; flip /= 2)
        best = better(best, {__shfl_xor_sync(ALL_LANES, best.logit, flip), __shfl_xor_sync(ALL_LANES, best.id, flip)});
    return best;
}

extern "C" __global__ void __launch_bounds__(1024)
argmax(const float* logits, const unsigned char* __restrict__ allowed, int* ids, int V) {
    after_earlier_launches();
    const float largest = 3.40282347e38f, infinity = __int_as_float(0x7f800000);  // NVRTC has no <cmath>
    __shared__ Best of_warp[32];
    const float* row = logits + static_cast<long long>(blockIdx.x) * V;
    Best best{-infinity, -1};
    auto load = [&](int v) { return Candidate{row[v], allowed ? allowed[v] : static_cast<unsigned char>(1)}; };
    share_out(V, load, [&](int v, Candidate c) {
        // What is not finite beats all others, and its id of -1 remains.
        bool finite = fabsf(c.logit) <= largest;
        if (c.allowed) best = better(best, finite ? Best{c.logit, v} : Best{infinity, -1});
    });
    best = warp_best(best);
    int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) of_warp[threadIdx.x / 32] = best;
    __syncthreads();  // each warp's best is written before the first warp reads it
    if (threadIdx.x >= 32) return;
    best = warp_best(lane < warps ? of_warp[lane] : Best{-infinity, -1});
    if (lane == 0) ids[blockIdx.x] = best.id;
}
