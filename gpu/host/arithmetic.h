// CUDA's names for arithmetic. Fast approximations are computed exactly here: their error is a matter of the hardware.
#pragma once

// glibc declares __expf and its like without exporting them, hence macros and not functions.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __exp2f(x) exp2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __log2f(x) log2f(x)
HOST_INLINE float rsqrtf(float x) { return 1.0f / sqrtf(x); }
HOST_INLINE float __frcp_rn(float x) { return 1.0f / x; }
HOST_INLINE float __fdividef(float a, float b) { return a / b; }
HOST_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

#define HOST_MIN_MAX(T)                                                                                                \
    HOST_INLINE T min(T a, T b) { return b < a ? b : a; }                                                             \
    HOST_INLINE T max(T a, T b) { return a < b ? b : a; }
HOST_MIN_MAX(int)
HOST_MIN_MAX(unsigned)
HOST_MIN_MAX(long long)
HOST_MIN_MAX(unsigned long long)
HOST_INLINE float min(float a, float b) { return fminf(a, b); }
HOST_INLINE float max(float a, float b) { return fmaxf(a, b); }

template <class To, class From> HOST_INLINE To host_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
HOST_INLINE int __float_as_int(float x) { return host_bits<int>(x); }
HOST_INLINE unsigned __float_as_uint(float x) { return host_bits<unsigned>(x); }
HOST_INLINE float __int_as_float(int x) { return host_bits<float>(x); }
HOST_INLINE float __uint_as_float(unsigned x) { return host_bits<float>(x); }
HOST_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
HOST_INLINE int __clz(int x) { return x ? __builtin_clz(x) : 32; }
HOST_INLINE int __ffs(int x) { return __builtin_ffs(x); }
HOST_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned __int128>(a) * b >> 64;
}
HOST_INLINE size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<size_t>(p); }
