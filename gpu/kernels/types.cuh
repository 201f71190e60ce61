// The only file, beside ptx.cuh, that knows of the two compilers: what NVRTC lacks or spells otherwise, and the three
// dtypes. Kernels are templates over the dtype T they store; all of them compute in float.
#pragma once

#ifndef NEOX_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef unsigned short uint16_t;  // NVRTC has no <cstdint>
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define DYNAMIC_SHARED(T, name)                                      \
    extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared_)
#endif

#define MINUS_INFINITY __int_as_float(0xff800000)  // NVRTC has no <cmath>

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);  // rounds to nearest even
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Two neighbours as they lie in memory: the first in the lower bits.
template <class T> __device__ __forceinline__ uint32_t packed(float first, float second);
template <> __device__ __forceinline__ uint32_t packed<__half>(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <> __device__ __forceinline__ uint32_t packed<__nv_bfloat16>(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// 8 neighbours as they lie in memory, widened where they are used: registers hold no more than was read.
template <class T> struct Eight {
    uint4 words[sizeof(T) / 2];

    __device__ __forceinline__ float operator[](int i) const { return to_float(reinterpret_cast<const T*>(words)[i]); }
};

// In loads of 16 bytes: p must be a multiple of 16.
template <class T> __device__ __forceinline__ Eight<T> eight(const T* p) {
    return *reinterpret_cast<const Eight<T>*>(p);
}

template <class T> __device__ __forceinline__ void load_8(const T* p, float (&x)[8]) {
    const Eight<T> packed = eight(p);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = packed[i];
}
