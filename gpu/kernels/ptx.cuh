// The PTX instructions that CUDA C++ has no word for: all inline assembly of the project is in this file. Beside each
// stands what the host device runs instead. sm_80 and newer.
//
// Fragments: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type" and "ldmatrix"; the host's version
// spells the layouts out (host/tensor_core.h).
#pragma once
#include "types.cuh"

#ifdef NEOX_HOST

// A launch may begin before those before it have ended (programmatic dependent launch, if it was captured so): only
// after this may it touch what others write or, by writing, what others read. That leaves it weights to ask for before.
// The next launch may begin as soon as all blocks have come here and there is room. Every thread, in every kernel of a
// step: a launch that did not wait for those before it would end too early for those after it.
//
// Of what launches write nothing may be __restrict__, nor read by __ldg: a compiler may ask for it before the wait, or by
// ld.global.nc, whose cache is outside the memory model in which the wait makes it visible (PTX ISA, "Scope and
// applicability" of the memory consistency model). It is for weights, tables and what the host alone writes.
__device__ __forceinline__ void after_earlier_launches(HOST_WHERE) {
    host::wait_for_launch({"after_earlier_launches", file, line});
}

// d += a b: 16x16 times 16x8, in 16 bits, accumulated in float. All 32 lanes.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    host::mma_m16n8k16<T>(d, a, b, d);
}

// 4 or 2 matrices of 8x8 16-bit elements from shared memory: lane 8i+r gives the address of row r of matrix i, a
// multiple of 16 bytes. Lane l receives, in r[i], row l/4, columns 2(l%4) and the next, of matrix i or of its transpose.
// All 32 lanes.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    host::load_matrix<4, false>(r, row);
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    host::load_matrix<4, true>(r, row);
}
__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
    host::load_matrix<2, false>(r, row);
}
__device__ __forceinline__ void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
    host::load_matrix<2, true>(r, row);
}

// 16 bytes from global to shared memory, zeros if not `wanted`; they are there once their group has been waited for.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool wanted) {
    host::async_copy(shared, global, 16, wanted ? 16 : 0);
}
__device__ __forceinline__ void copy_async_commit() { host::async_commit(); }
template <int KEEP> __device__ __forceinline__ void copy_async_wait() { host::async_wait(KEEP); }  // for all but KEEP

// 16 bytes that nobody writes during the launch and nobody reads again: the caches may forget them first. policy: of
// used_once(). From memory come 256 bytes at a time: what follows is wanted as well.
__device__ __forceinline__ uint64_t used_once() { return 0; }
__device__ __forceinline__ uint4 load_once(const void* p, uint64_t) { return *static_cast<const uint4*>(p); }

// 16 bytes of global memory, where a compiler cannot tell of which kind a pointer is: any other load is slower then.
__device__ __forceinline__ uint4 load_global(const void* p) { return *static_cast<const uint4*>(p); }

// Words by which devices speak to each other, and what they leave for each other to read. All that a thread wrote, or has
// seen written before a barrier, is there for whoever reads a word that it then released.
__device__ __forceinline__ void store_release_system(unsigned* p, unsigned value) {
    host::perhaps_yield();
    __atomic_store_n(p, value, __ATOMIC_RELEASE);
}
__device__ __forceinline__ unsigned load_acquire_system(const unsigned* p) {
    host::perhaps_yield();
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
__device__ __forceinline__ float4 load_system(const float4* p) {
    host::perhaps_yield();
    float4 x;
    __atomic_load(&p->x, &x.x, __ATOMIC_RELAXED);
    __atomic_load(&p->y, &x.y, __ATOMIC_RELAXED);
    __atomic_load(&p->z, &x.z, __ATOMIC_RELAXED);
    __atomic_load(&p->w, &x.w, __ATOMIC_RELAXED);
    return x;
}
__device__ __forceinline__ unsigned long long load_system(const unsigned long long* p) {
    host::perhaps_yield();
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
__device__ __forceinline__ void store_system(unsigned long long* p, unsigned long long value) {
    __atomic_store_n(p, value, __ATOMIC_RELAXED);
}
__device__ __forceinline__ void wait_for_others() { host::wait_for_others(); }  // in every turn of a loop that waits

#else

__device__ __forceinline__ void after_earlier_launches() {
#if __CUDA_ARCH__ >= 900  // older cards have launches one after another
    asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <class T> struct Mma;
#define DEFINE_MMA(T, NAME)                                                                                          \
    template <> struct Mma<T> {                                                                                      \
        static __device__ __forceinline__ void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {  \
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                              \
                         "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                     \
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                        \
        }                                                                                                            \
    };
DEFINE_MMA(__half, "f16")
DEFINE_MMA(__nv_bfloat16, "bf16")
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Mma<T>::run(d, a, b);
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool wanted) {
    int bytes = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int KEEP> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(KEEP) : "memory");
}

__device__ __forceinline__ uint64_t used_once() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint4 load_once(const void* p, uint64_t policy) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p), "l"(policy));
    return x;
}

__device__ __forceinline__ uint4 load_global(const void* p) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ void store_release_system(unsigned* p, unsigned value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ unsigned load_acquire_system(const unsigned* p) {
    unsigned value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
__device__ __forceinline__ float4 load_system(const float4* p) {
    float4 x;
    asm volatile("ld.relaxed.sys.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ unsigned long long load_system(const unsigned long long* p) {
    unsigned long long value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
}
__device__ __forceinline__ void store_system(unsigned long long* p, unsigned long long value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(p), "l"(value) : "memory");
}
__device__ __forceinline__ void wait_for_others() { __nanosleep(20); }

#endif
