// Who runs next. The threads of one block are fibers on one core: exactly one runs, until it waits or ends.
//
// The ready threads form a stack: whoever was woken last runs first, so that one warp runs as far ahead of the others
// as the barriers allow. That is what makes a missing barrier show; a queue keeps all warps abreast and hides it.
#pragma once

namespace host {

enum Order { FORWARD = 0, REVERSE = 1, SEEDED = 2 };     // of the threads woken together, and of the blocks
enum State : uint8_t { READY, AT_BARRIER, AT_COLLECTIVE, AT_LAUNCHES, DONE };
enum Style { STACK = 0, ANYONE = 1, MIXED = 2 };         // how a seed picks the next thread

struct Launch {  // as laid out in module.py
    unsigned grid[3], block[3], shared_bytes;
    int order, early;  // early: the launch before this one has not run yet
    uint64_t seed;
    Stacks stacks;
};

struct Place { const char* what; const char* file; int line; };

struct Warp;
struct AsyncQueue;
struct Fiber {
    void* context;    // to go on with, while another runs
    char* stack;
    uint3 index;      // threadIdx
    int flat, lane;
    Warp* warp;
    State state;
    Place waits;
    AsyncQueue* copies;
    void *asan_fake_stack, *tsan_fiber;
};

struct Collective {  // one in which some lanes have arrived
    unsigned mask, arrived;
    void (*operation)(void** arguments, unsigned mask);
    Place place;
    void* arguments[32];
    Tokens tokens;
};

struct Warp {
    unsigned existing, done;        // lanes
    Collective collectives[8];      // disjoint masks may be under way at once
};

struct Barrier {
    int arrived, count, conjunction, disjunction;
    int result_count, result_and, result_or;
    Place place;
    Tokens tokens;
};

static constexpr int MOST_THREADS = 1024;
struct Block {
    uint3 index;      // blockIdx
    int threads, alive;
    Barrier barrier;
    Fiber fibers[MOST_THREADS];
    Warp warps[MOST_THREADS / 32];
};

static Launch request;
static dim3 grid_size, block_size;
static Block block;
static Fiber* running;            // nullptr: the launcher
static void* launcher_context;

// No containers of the standard library here: their code would be instrumented, and the sanitizers report it.
struct Ready { Fiber* ring[2 * MOST_THREADS]; unsigned bottom, size; };
static Ready ready;
static Fiber* woken[MOST_THREADS];
static int woken_count;
static long yields;
static uint64_t random_state;

struct Failure { char text[4096]; uintptr_t program_counter, address; };
static Failure failure;
static bool failed;
static sigjmp_buf on_failure;     // back in the launcher

static void* launcher_fake_stack;
static void* launcher_tsan_fiber;
static const void* launcher_stack;
static size_t launcher_stack_bytes;

// Kept out of line: inlined into checked code it would be checked.
HOST_UNCHECKED __attribute__((noinline)) static uint64_t next_random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

HOST_UNCHECKED static void switch_to(Fiber* to) {  // nullptr: the launcher
    Fiber* from = running;
    if (to == from) return;
    running = to;
#if HOST_ASAN
    void** fake = !from ? &launcher_fake_stack : from->state == DONE ? nullptr : &from->asan_fake_stack;
    __sanitizer_start_switch_fiber(fake, to ? to->stack : launcher_stack, to ? Stacks::BYTES : launcher_stack_bytes);
#endif
#if HOST_TSAN
    __tsan_switch_to_fiber(to ? to->tsan_fiber : launcher_tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
    host_switch(from ? &from->context : &launcher_context, to ? to->context : launcher_context);
#if HOST_ASAN
    __sanitizer_finish_switch_fiber(running ? running->asan_fake_stack : launcher_fake_stack, nullptr, nullptr);
#endif
}

HOST_UNCHECKED static Fiber*& ready_at(unsigned i) { return ready.ring[(ready.bottom + i) % (2 * MOST_THREADS)]; }

HOST_UNCHECKED static void exchange(Fiber*& a, Fiber*& b) {
    Fiber* c = a;
    a = b;
    b = c;
}

HOST_UNCHECKED static Fiber* take_ready() {
    unsigned top = ready.size - 1;
    Style style = static_cast<Style>(request.seed % 3);
    if (request.order == SEEDED && (style == ANYONE || (style == MIXED && next_random() % 8 == 0)))
        exchange(ready_at(next_random() % ready.size), ready_at(top));
    ready.size--;
    return ready_at(top);
}

HOST_UNCHECKED static void run_another() { switch_to(ready.size ? take_ready() : nullptr); }

// Makes the woken threads ready, the first to run on top.
HOST_UNCHECKED static void wake_all() {
    int n = woken_count;
    if (request.order == FORWARD) for (int i = 0; i < n / 2; i++) exchange(woken[i], woken[n - 1 - i]);
    if (request.order == SEEDED) for (int i = n; i > 1; i--) exchange(woken[i - 1], woken[next_random() % i]);
    for (int i = 0; i < n; i++) {
        woken[i]->state = READY;
        ready_at(ready.size++) = woken[i];
    }
    woken_count = 0;
}

HOST_UNCHECKED static void wait_here(State state, Place place) {
    running->state = state;
    running->waits = place;
    run_another();
}

static char launch_before;

// It runs when nobody here can go on.
HOST_UNCHECKED static void wait_for_launch(Place place) {
    if (request.early) wait_here(AT_LAUNCHES, place);
    acquire(&launch_before);
}

static bool waits_for_launch() {
    for (int i = 0; request.early && i < block.threads; i++)
        if (block.fibers[i].state == AT_LAUNCHES) return true;
    return false;
}

// The launch before this one has run.
HOST_UNCHECKED static void end_wait_for_launch() {
    request.early = false;
    release(&launch_before);
    for (int i = 0; i < block.threads; i++)
        if (block.fibers[i].state == AT_LAUNCHES) woken[woken_count++] = &block.fibers[i];
    wake_all();
}

// Appends to the message.
static void say_list(const char* format, va_list arguments) {
    size_t length = strlen(failure.text);
    vsnprintf(failure.text + length, sizeof failure.text - length, format, arguments);
}

__attribute__((format(printf, 1, 2))) static void say(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    say_list(format, arguments);
    va_end(arguments);
}

static void say_who() {
    uint3 b = block.index, t = running->index;
    say("block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
}

// Stops the launch with a message that begins with who was running.
[[noreturn]] __attribute__((format(printf, 1, 2))) static void fail(const char* format, ...) {
    if (running) say_who();
    va_list arguments;
    va_start(arguments, format);
    say_list(format, arguments);
    va_end(arguments);
    failed = true;
    if (!running) siglongjmp(on_failure, 1);
    running->state = AT_BARRIER;  // not DONE: its stack must stay valid for AddressSanitizer
    ready.size = 0;
    switch_to(nullptr);
    abort();
}

// Everybody else runs first: to the bottom of the stack.
HOST_UNCHECKED static void let_others_run() {
    ready.bottom = (ready.bottom + 2 * MOST_THREADS - 1) % (2 * MOST_THREADS);
    ready_at(0) = running;
    ready.size++;
    run_another();
}

HOST_UNCHECKED static void yield_here(const char* file, int line) {  // in a spin loop
    if (++yields > 2000000) fail("spins for ever at %s:%d", file, line);
    let_others_run();
}

// A drawn schedule lets others run also where a thread reads or writes what they share: for a moment, or for so long
// that they get as far ahead as they can.
HOST_UNCHECKED static void perhaps_yield() {
    if (request.order != SEEDED || next_random() % 4) return;
    for (int turns = next_random() % 8 ? 1 : 64; turns > 0; turns--) let_others_run();
}

// In a loop that waits for other devices, which are other processes, and has a bound of its own.
HOST_UNCHECKED static void wait_for_others() {
    static unsigned waits;
    if (++waits % 64 == 0) usleep(50);
    let_others_run();
}

static bool same_place(const Fiber& a, const Fiber& b) {
    return a.waits.line == b.waits.line && !strcmp(a.waits.what, b.waits.what) && !strcmp(a.waits.file, b.waits.file);
}

// The index of the first thread that waits where this one does, and how many do.
static int first_waiting_like(const Fiber& fiber, int& count) {
    int first = -1;
    count = 0;
    for (int i = 0; i < block.threads; i++) {
        if (block.fibers[i].state == DONE || !same_place(block.fibers[i], fiber)) continue;
        if (first < 0) first = i;
        count++;
    }
    return first;
}

// Called by the launcher when nobody can go on: says who waits where, one clause for each place.
static void report_deadlock() {
    say("block (%u,%u,%u): deadlock", block.index.x, block.index.y, block.index.z);
    for (int i = 0; i < block.threads; i++) {
        const Fiber& f = block.fibers[i];
        int count;
        if (f.state == DONE || first_waiting_like(f, count) != i) continue;
        say("; %d thread(s), the first (%u,%u,%u), wait in %s at %s:%d", count, f.index.x, f.index.y, f.index.z,
            f.waits.what, f.waits.file, f.waits.line);
    }
    failed = true;
}

}  // namespace host

#define threadIdx (host::running->index)
#define blockIdx (host::block.index)
#define blockDim host::block_size
#define gridDim host::grid_size
HOST_INLINE void __nanosleep(unsigned, HOST_WHERE) { host::yield_here(file, line); }  // spin loops must call it
