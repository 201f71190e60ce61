// Barriers of the block. All threads must arrive, and at the same line. Cards let a thread end instead of arriving,
// which CUDA does not promise: here it is an error.
#pragma once

namespace host {

HOST_UNCHECKED static void open_barrier() {
    Barrier& b = block.barrier;
    b.result_count = b.count;
    b.result_and = b.conjunction;
    b.result_or = b.disjunction;
    b.arrived = b.count = b.disjunction = 0;
    b.conjunction = 1;
    for (int i = 0; i < block.threads; i++)
        if (block.fibers[i].state == AT_BARRIER) woken[woken_count++] = &block.fibers[i];
    wake_all();
}

HOST_UNCHECKED static void block_barrier(bool predicate, Place place) {
    Barrier& b = block.barrier;
    void* token = b.tokens.current();
    release(token);
    if (block.alive < block.threads)
        fail("%s at %s:%d, but %d thread(s) have ended", place.what, place.file, place.line,
             block.threads - block.alive);
    if (!b.arrived) b.place = place;
    if (b.place.line != place.line || strcmp(b.place.file, place.file))
        fail("divergent %s: this thread is at %s:%d, others wait at %s:%d", place.what, place.file, place.line,
             b.place.file, b.place.line);
    b.count += predicate;
    b.conjunction &= predicate;
    b.disjunction |= predicate;
    if (++b.arrived == block.threads) {
        running->state = AT_BARRIER;
        b.tokens.next();
        open_barrier();
        run_another();
    } else {
        wait_here(AT_BARRIER, place);
    }
    acquire(token);
}

}  // namespace host

HOST_INLINE void __syncthreads(HOST_WHERE) { host::block_barrier(false, {"__syncthreads", file, line}); }
HOST_INLINE int __syncthreads_count(int p, HOST_WHERE) {
    host::block_barrier(p, {"__syncthreads_count", file, line});
    return host::block.barrier.result_count;
}
HOST_INLINE int __syncthreads_and(int p, HOST_WHERE) {
    host::block_barrier(p, {"__syncthreads_and", file, line});
    return host::block.barrier.result_and;
}
HOST_INLINE int __syncthreads_or(int p, HOST_WHERE) {
    host::block_barrier(p, {"__syncthreads_or", file, line});
    return host::block.barrier.result_or;
}
// One core runs everything in program order; only ThreadSanitizer must be told of the order that a fence gives.
HOST_INLINE void __threadfence() { host::release(&host::request), host::acquire(&host::request); }
HOST_INLINE void __threadfence_block() { __threadfence(); }
[[noreturn]] HOST_INLINE void __trap(HOST_WHERE) { host::fail("__trap at %s:%d", file, line); }
#undef assert
#define assert(e) ((e) ? (void)0 : host::fail("assert(%s) failed at %s:%d", #e, __FILE__, __LINE__))
