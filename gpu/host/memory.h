// Shared memory. Before each block it is filled with 0xff, which is NaN in every floating type: what a kernel reads
// without having written cannot pass for a number.
#pragma once

// The bounds of the section, set by the linker.
extern "C" char __start_host_shared[] __attribute__((visibility("hidden")));
extern "C" char __stop_host_shared[] __attribute__((visibility("hidden")));

namespace host {

static __attribute__((section("host_shared"), used)) char section_exists_even_without_shared_memory;

// Byte by byte, since the sanitizers replace memset by one that checks.
HOST_UNCHECKED static void poison(char* start, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        start[i] = static_cast<char>(0xff);
        asm volatile("" ::: "memory");
    }
}

// Dynamic shared memory ends, up to rounding to 16 bytes, at a page that may not be touched.
struct DynamicShared {
    char* pages;
    size_t page_bytes;
    char* start;

    bool ends_at(const char* address) const {
        return address >= pages + page_bytes - PAGE && address < pages + page_bytes;
    }

    bool reserve(size_t bytes) {
#if HOST_ASAN
        if (pages) __asan_unpoison_memory_region(pages, page_bytes - PAGE);  // or the address stays poisoned for others
#endif
        if (pages) munmap(pages, page_bytes);
        size_t rounded = (bytes + 15) & ~size_t(15), used = (rounded + PAGE - 1) & ~(PAGE - 1);
        page_bytes = used + PAGE;
        void* memory = mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        pages = memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
        if (!pages) return false;
        mprotect(pages + used, PAGE, PROT_NONE);
        start = pages + used - rounded;
#if HOST_ASAN
        __asan_poison_memory_region(start + bytes, rounded - bytes);
#endif
        return true;
    }
};
static DynamicShared dynamic_shared;

HOST_UNCHECKED static void poison_shared() {
    poison(__start_host_shared, __stop_host_shared - __start_host_shared);
    poison(dynamic_shared.start, request.shared_bytes);
}

}  // namespace host

#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(host::dynamic_shared.start)
template <class T> HOST_INLINE T __ldg(const T* p) { return *p; }
template <class T> HOST_INLINE T __ldcs(const T* p) { return *p; }
template <class T> HOST_INLINE T __ldcg(const T* p) { return *p; }
template <class T> HOST_INLINE void __stcs(T* p, T value) { *p = value; }
template <class T> HOST_INLINE void __stcg(T* p, T value) { *p = value; }
