// The only file, beside ptx.cuh, that knows of the two compilers: what NVRTC lacks or spells otherwise, and the three
// dtypes. Kernels are templates over the dtype T they store; all of them compute in float.
#pragma once

#ifndef NEOX_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef unsigned short uint16_t;  // NVRTC has no <cstdint>
typedef unsigned int uint32_t;
#define DYNAMIC_SHARED(T, name)                                      \
    extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared_)
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);  // rounds to nearest even
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// 8 neighbours, in loads of 16 bytes: p must be a multiple of 16.
__device__ __forceinline__ void load_8(const float* p, float (&x)[8]) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
template <class T> __device__ __forceinline__ void load_8(const T* p, float (&x)[8]) {
    const uint4 words = *reinterpret_cast<const uint4*>(p);
    const T* halves = reinterpret_cast<const T*>(&words);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = to_float(halves[i]);
}
