// Warp collectives. Each lane leaves a pointer to its argument and waits; the last lane of the mask to arrive carries
// the operation out for all of them and wakes them. Shuffles exchange registers only: they do not order memory.
#pragma once

namespace host {

HOST_UNCHECKED static void check_mask(unsigned mask, const Place& p) {
    const Warp& warp = *running->warp;
    if (!(mask >> running->lane & 1))
        fail("%s at %s:%d: the calling lane %d is not in the mask %08x", p.what, p.file, p.line, running->lane, mask);
    if (mask & ~warp.existing)
        fail("%s at %s:%d: the mask %08x names lanes that do not exist; the warp has %08x", p.what, p.file, p.line,
             mask, warp.existing);
    if (mask & warp.done)
        fail("%s at %s:%d: the mask %08x names lanes that have ended: %08x", p.what, p.file, p.line, mask,
             mask & warp.done);
}

HOST_UNCHECKED static Collective& find_collective(unsigned mask) {
    Collective* free_one = nullptr;
    for (Collective& c : running->warp->collectives) {
        if (c.arrived && c.mask == mask) return c;
        if (!c.arrived) free_one = &c;
        else if (c.mask & mask)
            fail("mask %08x overlaps mask %08x, on which other lanes wait in %s at %s:%d", mask, c.mask, c.place.what,
                 c.place.file, c.place.line);
    }
    if (!free_one) fail("more than 8 collectives under way in one warp");
    return *free_one;
}

HOST_UNCHECKED static void complete(Collective& c) {
    Fiber* lane0 = running - running->lane;
    for (int i = 0; i < 32; i++)
        if (c.mask >> i & 1) woken[woken_count++] = lane0 + i;
    c.arrived = 0;
    c.tokens.next();
    running->state = AT_COLLECTIVE;
    wake_all();
    run_another();
}

HOST_UNCHECKED static void collective(unsigned mask, void (*operation)(void**, unsigned), void* argument, Place p,
                                      bool orders_memory = false) {
    check_mask(mask, p);
    Collective& c = find_collective(mask);
    if (!c.arrived) c.mask = mask, c.operation = operation, c.place = p;
    if (c.operation != operation || c.place.line != p.line)
        fail("divergent warp: this lane is in %s at %s:%d, others in %s at %s:%d", p.what, p.file, p.line, c.place.what,
             c.place.file, c.place.line);
    c.arguments[running->lane] = argument;
    c.arrived |= 1u << running->lane;
    void* token = c.tokens.current();
    if (orders_memory) release(token);
    if (c.arrived == mask) {
        operation(c.arguments, mask);
        complete(c);
    } else {
        wait_here(AT_COLLECTIVE, p);
    }
    if (orders_memory) acquire(token);
}

template <class T> struct Shuffle { T value, result; int source; };

template <class T> HOST_UNCHECKED static void do_shuffle(void** lanes, unsigned mask) {
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        auto* lane = static_cast<Shuffle<T>*>(lanes[i]);
        if (mask >> lane->source & 1) lane->result = static_cast<Shuffle<T>*>(lanes[lane->source])->value;
        else poison(reinterpret_cast<char*>(&lane->result), sizeof(T));  // undefined in CUDA
    }
}

template <class T> static T shuffle(unsigned mask, T value, int source, Place place) {
    Shuffle<T> lane{value, value, source};
    collective(mask, do_shuffle<T>, &lane, place);
    return lane.result;
}

struct Vote { int predicate; unsigned result; };

HOST_UNCHECKED static void do_ballot(void** lanes, unsigned mask) {
    unsigned votes = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1 && static_cast<Vote*>(lanes[i])->predicate) votes |= 1u << i;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) static_cast<Vote*>(lanes[i])->result = votes;
}

static unsigned ballot(unsigned mask, int predicate, Place place) {
    Vote lane{predicate, 0};
    collective(mask, do_ballot, &lane, place);
    return lane.result;
}

HOST_UNCHECKED static void do_nothing(void**, unsigned) {}

}  // namespace host

HOST_INLINE void __syncwarp(unsigned mask = ~0u, HOST_WHERE) {
    host::collective(mask, host::do_nothing, nullptr, {"__syncwarp", file, line}, true);
}
template <class T> HOST_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32, HOST_WHERE) {
    int segment = host::running->lane & ~(width - 1);
    return host::shuffle(mask, value, segment | (source & (width - 1)), {"__shfl_sync", file, line});
}
template <class T> HOST_INLINE T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, HOST_WHERE) {
    int lane = host::running->lane, source = lane ^ flip;
    return host::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, {"__shfl_xor_sync", file, line});
}
template <class T> HOST_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, HOST_WHERE) {
    int lane = host::running->lane, inside = lane & (width - 1);
    int source = inside + static_cast<int>(by) < width ? lane + static_cast<int>(by) : lane;
    return host::shuffle(mask, value, source, {"__shfl_down_sync", file, line});
}
template <class T> HOST_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, HOST_WHERE) {
    int lane = host::running->lane, inside = lane & (width - 1);
    int source = inside >= static_cast<int>(by) ? lane - static_cast<int>(by) : lane;
    return host::shuffle(mask, value, source, {"__shfl_up_sync", file, line});
}
HOST_INLINE unsigned __ballot_sync(unsigned mask, int predicate, HOST_WHERE) {
    return host::ballot(mask, predicate, {"__ballot_sync", file, line});
}
HOST_INLINE int __any_sync(unsigned mask, int predicate, HOST_WHERE) {
    return host::ballot(mask, predicate, {"__any_sync", file, line}) != 0;
}
HOST_INLINE int __all_sync(unsigned mask, int predicate, HOST_WHERE) {
    return host::ballot(mask, predicate, {"__all_sync", file, line}) == mask;
}
