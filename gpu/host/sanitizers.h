// What the sanitizers must be told, since they know threads but not fibers. Without a sanitizer all of this is empty.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#define HOST_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define HOST_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__)
#define HOST_TSAN 1
#include <sanitizer/tsan_interface.h>
#else
#define HOST_TSAN 0
#endif

// The machinery itself is not to be checked: it runs between fibers, and its own reads and writes are no races.
#define HOST_UNCHECKED __attribute__((no_sanitize("address", "undefined", "thread")))

namespace host {

// A barrier needs two tokens, used in turn: a thread that leaves late would otherwise acquire what those ahead of it
// already released for the next time, and races would go unseen.
struct Tokens {
    char token[2];
    int turn;
    HOST_UNCHECKED void* current() { return &token[turn]; }
    HOST_UNCHECKED void next() { turn ^= 1; }
};

#if HOST_TSAN
// What happened before the release is ordered before what follows an acquire of the same token.
static inline void release(void* token) { __tsan_release(token); }
static inline void acquire(void* token) { __tsan_acquire(token); }
#else
static inline void release(void*) {}
static inline void acquire(void*) {}
#endif
}  // namespace host
