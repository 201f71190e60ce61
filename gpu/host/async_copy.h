// cp.async: a copy into shared memory that lands at some moment between its issue and the wait for it. Here as late as
// allowed (forward), at once (reverse) or by a coin for each (seeded): a missing wait shows in the first, a buffer
// refilled too early in the second.
#pragma once

namespace host {

struct AsyncCopy { void* to; const void* from; int bytes, from_bytes; };

struct AsyncQueue {  // of one thread: copies not yet landed, in groups
    static constexpr int MOST_COPIES = 512, MOST_GROUPS = 64;
    AsyncCopy copies[MOST_COPIES];
    int copy_count;
    int group_end[MOST_GROUPS];  // of the committed groups, as counts of copies
    int group_count;
};

static void land(const AsyncCopy& c) {
    memcpy(c.to, c.from, c.from_bytes);
    memset(static_cast<char*>(c.to) + c.from_bytes, 0, c.bytes - c.from_bytes);
}

// Copies `from_bytes` of `bytes` and fills the rest with zero.
static void async_copy(void* to, const void* from, int bytes, int from_bytes, HOST_WHERE) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & (bytes - 1))
        fail("cp.async of %d bytes at %s:%d: an address is no multiple of that", bytes, file, line);
    AsyncCopy copy{to, from, bytes, from_bytes};
    if (request.order == REVERSE || (request.order == SEEDED && next_random() & 1)) return land(copy);
    if (!running->copies) running->copies = static_cast<AsyncQueue*>(calloc(1, sizeof(AsyncQueue)));
    AsyncQueue& queue = *running->copies;
    if (queue.copy_count == AsyncQueue::MOST_COPIES) fail("%d cp.async never waited for", queue.copy_count);
    queue.copies[queue.copy_count++] = copy;
}

static void async_commit() {
    if (!running->copies) running->copies = static_cast<AsyncQueue*>(calloc(1, sizeof(AsyncQueue)));
    AsyncQueue& queue = *running->copies;
    if (queue.group_count == AsyncQueue::MOST_GROUPS) fail("%d groups of cp.async never waited for", queue.group_count);
    queue.group_end[queue.group_count++] = queue.copy_count;
}

// Waits until at most `keep` committed groups are under way.
static void async_wait(int keep) {
    if (!running->copies) return;
    AsyncQueue& queue = *running->copies;
    int groups = queue.group_count - keep;
    if (groups <= 0) return;
    int landed = queue.group_end[groups - 1];
    for (int i = 0; i < landed; i++) land(queue.copies[i]);
    for (int i = landed; i < queue.copy_count; i++) queue.copies[i - landed] = queue.copies[i];
    for (int i = groups; i < queue.group_count; i++) queue.group_end[i - groups] = queue.group_end[i] - landed;
    queue.copy_count -= landed;
    queue.group_count = keep;
}

}  // namespace host
