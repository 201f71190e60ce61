// float16 and bfloat16. Stored as 16 bits; every operation is computed in float (a fused multiply-add in double) and
// rounded once to the nearest, ties to even, as the hardware does.
#pragma once

struct __half {
    uint16_t bits;
    __half() = default;
    __half(float x) { *this = rounded(x); }
    operator float() const {
        _Float16 x;
        memcpy(&x, &bits, 2);
        return static_cast<float>(x);
    }
    template <class F> static __half rounded(F x) {
        _Float16 y = static_cast<_Float16>(x);
        __half result;
        memcpy(&result.bits, &y, 2);
        return result;
    }
};

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) { *this = rounded(x); }
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float x;
        memcpy(&x, &wide, 4);
        return x;
    }
    static __nv_bfloat16 rounded(float x) {
        uint32_t wide;
        memcpy(&wide, &x, 4);
        __nv_bfloat16 result;
        result.bits = x != x ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
        return result;
    }
    // A double is first rounded to float towards an odd last bit, which keeps the second rounding from rounding twice.
    static __nv_bfloat16 rounded(double x) {
        float y = static_cast<float>(x);
        uint32_t wide;
        memcpy(&wide, &y, 4);
        if (static_cast<double>(y) != x && !(wide & 1)) {
            wide += (std::fabs(static_cast<double>(y)) < std::fabs(x)) ? 1 : -1;
            memcpy(&y, &wide, 4);
        }
        return rounded(y);
    }
};
using half = __half;
using nv_bfloat16 = __nv_bfloat16;

#define HOST_HALF(H, H2)                                                                                               \
    struct __align__(4) H2 { H x, y; };                                                                               \
    HOST_INLINE H operator+(H a, H b) { return H::rounded(float(a) + float(b)); }                                     \
    HOST_INLINE H operator-(H a, H b) { return H::rounded(float(a) - float(b)); }                                     \
    HOST_INLINE H operator*(H a, H b) { return H::rounded(float(a) * float(b)); }                                     \
    HOST_INLINE H operator/(H a, H b) { return H::rounded(float(a) / float(b)); }                                     \
    HOST_INLINE bool operator<(H a, H b) { return float(a) < float(b); }                                              \
    HOST_INLINE bool operator>(H a, H b) { return float(a) > float(b); }                                              \
    HOST_INLINE H& operator+=(H& a, H b) { return a = a + b; }                                                        \
    HOST_INLINE H __hadd(H a, H b) { return a + b; }                                                                  \
    HOST_INLINE H __hsub(H a, H b) { return a - b; }                                                                  \
    HOST_INLINE H __hmul(H a, H b) { return a * b; }                                                                  \
    HOST_INLINE H __hmax(H a, H b) { return H::rounded(fmaxf(a, b)); }                                                \
    HOST_INLINE H __hmin(H a, H b) { return H::rounded(fminf(a, b)); }                                                \
    HOST_INLINE H __hfma(H a, H b, H c) { return H::rounded(double(float(a)) * double(float(b)) + double(float(c))); }\
    HOST_INLINE H2 __hadd2(H2 a, H2 b) { return {a.x + b.x, a.y + b.y}; }                                             \
    HOST_INLINE H2 __hmul2(H2 a, H2 b) { return {a.x * b.x, a.y * b.y}; }                                             \
    HOST_INLINE H2 __hfma2(H2 a, H2 b, H2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
HOST_HALF(__half, __half2)
HOST_HALF(__nv_bfloat16, __nv_bfloat162)
using half2 = __half2;

HOST_INLINE __half __float2half(float x) { return x; }
HOST_INLINE __half __float2half_rn(float x) { return x; }
HOST_INLINE float __half2float(__half x) { return x; }
HOST_INLINE __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
HOST_INLINE float2 __half22float2(__half2 h) { return {h.x, h.y}; }
HOST_INLINE __nv_bfloat16 __float2bfloat16(float x) { return x; }
HOST_INLINE __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
HOST_INLINE float __bfloat162float(__nv_bfloat16 x) { return x; }
HOST_INLINE __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
HOST_INLINE float2 __bfloat1622float2(__nv_bfloat162 h) { return {h.x, h.y}; }
