// The words that CUDA adds to C++, as far as they need no machinery: qualifiers and vector types.
#pragma once

// All static shared memory of a module lies in one section, so that it can be found, to be poisoned before each block.
// Blocks run one after another, so one copy serves them all. The .cu text must have internal linkage (an anonymous
// namespace): g++ refuses to put a template's statics and others into one section otherwise.
#define __shared__ static __attribute__((section("host_shared")))
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Between two statements of one fiber others run, and write through their own pointers: nothing is restricted here.
#undef __restrict__
#define __restrict__

#define HOST_INLINE static inline __attribute__((always_inline))
// Trailing parameters of whatever can stop a thread: where in the .cu file it was called.
#define HOST_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

#define HOST_VECTOR(T, NAME, ALIGN2, ALIGN4)                                                                          \
    struct __align__(ALIGN2) NAME##2 { T x, y; };                                                                    \
    struct NAME##3 { T x, y, z; };                                                                                   \
    struct __align__(ALIGN4) NAME##4 { T x, y, z, w; };                                                              \
    HOST_INLINE NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                                                  \
    HOST_INLINE NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                                          \
    HOST_INLINE NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HOST_VECTOR(signed char, char, 2, 4)
HOST_VECTOR(unsigned char, uchar, 2, 4)
HOST_VECTOR(short, short, 4, 8)
HOST_VECTOR(unsigned short, ushort, 4, 8)
HOST_VECTOR(int, int, 8, 16)
HOST_VECTOR(unsigned, uint, 8, 16)
HOST_VECTOR(float, float, 8, 16)
HOST_VECTOR(long long, longlong, 16, 16)
HOST_VECTOR(double, double, 16, 16)

struct dim3 { unsigned x, y, z; };
static constexpr int warpSize = 32;
