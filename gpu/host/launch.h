// A launch: the blocks one after another, the threads of each as fibers; a fault in a kernel becomes a message.
#pragma once

namespace host {

static void (*kernel)(void*);  // the kernel with its arguments, as one call
static void* kernel_arguments;
static struct { unsigned long long blocks, step, offset, next; bool in_block; } progress;  // through the grid
// Two tokens, so that a thread that starts after another's end is not taken to be ordered after it.
static char started, ended;

HOST_UNCHECKED static void end_thread() {
    running->state = DONE;
    block.alive--;
    Warp& warp = *running->warp;
    warp.done |= 1u << running->lane;
    for (const Collective& c : warp.collectives)
        if (c.arrived && c.mask >> running->lane & 1)
            fail("ended while lanes %08x wait for it in %s at %s:%d", c.arrived, c.place.what, c.place.file,
                 c.place.line);
    if (block.barrier.arrived) {
        const Place& place = block.barrier.place;
        fail("ended while %d others wait in %s at %s:%d", block.barrier.arrived, place.what, place.file, place.line);
    }
    release(&ended);
    run_another();
    abort();
}

static void thread_main() {
#if HOST_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    acquire(&started);
    kernel(kernel_arguments);
    end_thread();
}

HOST_UNCHECKED static void start_thread(int i) {
    Fiber& f = block.fibers[i];
    const unsigned* size = request.block;
    unsigned u = i;
    f.index = {u % size[0], u / size[0] % size[1], u / (size[0] * size[1])};
    f.flat = i;
    f.lane = i % 32;
    f.warp = &block.warps[i / 32];
    f.warp->existing |= 1u << f.lane;
    f.stack = request.stacks.of(i);
    f.context = new_context(f.context, f.stack, Stacks::usable(i), thread_main);
    f.asan_fake_stack = nullptr;
    if (f.copies) f.copies->copy_count = f.copies->group_count = 0;
#if HOST_TSAN
    if (!f.tsan_fiber) f.tsan_fiber = __tsan_create_fiber(0);
#endif
    woken[woken_count++] = &f;
}

HOST_UNCHECKED static void begin_block(unsigned long long number) {
    unsigned x = grid_size.x, y = grid_size.y;
    block.index = {unsigned(number % x), unsigned(number / x % y), unsigned(number / x / y)};
    block.threads = block.alive = request.block[0] * request.block[1] * request.block[2];
    block.barrier = Barrier{};
    block.barrier.conjunction = 1;
    ready.bottom = ready.size = 0;
    woken_count = 0;
    yields = 0;
    for (Warp& warp : block.warps) warp = Warp{};
    poison_shared();
    for (int i = 0; i < block.threads; i++) start_thread(i);
    wake_all();
    release(&started);
}

// Until they have ended, or all that have not wait for the launch before this one.
HOST_UNCHECKED static void run_threads() {
    run_another();
    if (waits_for_launch()) return;
    acquire(&ended);
    if (!failed && block.alive) report_deadlock();
}

// A seed gives an affine permutation of the blocks.
static void begin_grid() {
    progress.blocks = 1ull * request.grid[0] * request.grid[1] * request.grid[2];
    progress.step = next_random() % progress.blocks, progress.offset = next_random() % progress.blocks;
    while (std::gcd(progress.step, progress.blocks) != 1) progress.step = progress.step % progress.blocks + 1;
    progress.next = 0, progress.in_block = false;
}

static unsigned long long block_in_turn(unsigned long long i) {
    if (request.order == FORWARD) return i;
    if (request.order == REVERSE) return progress.blocks - 1 - i;
    return (i * progress.step + progress.offset) % progress.blocks;
}

static void run_grid() {
    for (; progress.next < progress.blocks && !failed; progress.next++) {
        if (!progress.in_block) begin_block(block_in_turn(progress.next));
        run_threads();
        progress.in_block = waits_for_launch();
        if (progress.in_block) return;
    }
}

#if !HOST_ASAN && !HOST_TSAN
static const char* describe_fault(int number, const siginfo_t& info, bool write) {
    const char* address = static_cast<const char*>(info.si_addr);
    if (number == SIGFPE) return "integer division by zero";
    if (info.si_code == SI_KERNEL) return "misaligned vector access";  // the processor gives no address for it
    if (dynamic_shared.ends_at(address)) return "access beyond the end of the dynamic shared memory";
    if (Stacks::overflowed(running->stack, address)) return "stack overflow";
    failure.address = reinterpret_cast<uintptr_t>(address);
    return write ? "write to memory that is not the kernel's" : "read of memory that is not the kernel's";
}

// A fault of the running thread. Under a sanitizer its own report is better.
static void on_signal(int number, siginfo_t* info, void* context) {
    if (!running) {  // not ours
        signal(number, SIG_DFL);
        raise(number);
        return;
    }
    bool write = false;
#if defined(__x86_64__)
    const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    failure.program_counter = registers[REG_RIP];
    write = registers[REG_ERR] & 2;
#endif
    say_who();
    say("%s", describe_fault(number, *info, write));
    failed = true;
    siglongjmp(on_failure, 1);
}

// Installed during a launch only: Python's faulthandler owns these signals otherwise.
struct SignalHandlers {
    static constexpr int NUMBERS[] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction before[3];
    stack_t stack_before;

    SignalHandlers() {
        static char stack[64 * 1024];  // a thread that overflowed its stack has none to handle the signal on
        stack_t own{};
        own.ss_sp = stack;
        own.ss_size = sizeof stack;
        sigaltstack(&own, &stack_before);
        struct sigaction action{};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &action, &before[i]);
    }
    ~SignalHandlers() {
        for (int i = 0; i < 3; i++) sigaction(NUMBERS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};
#else
struct SignalHandlers {};
#endif

static void learn_launcher() {
#if HOST_TSAN
    launcher_tsan_fiber = __tsan_get_current_fiber();
#endif
#if HOST_ASAN
    pthread_attr_t attributes;
    void* start;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &start, &launcher_stack_bytes);
    pthread_attr_destroy(&attributes);
    launcher_stack = start;
#endif
}

enum Outcome { RAN = 0, FAILED = 1, WAITS = 2 };  // WAITS: for the launch before it, and is to be resumed then

// Threads that wait for the launch before theirs have read it, and are not ordered before this: no race (sanitizers.h).
HOST_UNCHECKED __attribute__((noinline)) static void nobody_runs() { running = nullptr; }

// `failure` says why, if it failed.
static Outcome go_on() {
    learn_launcher();
    [[maybe_unused]] SignalHandlers handlers;
    if (!sigsetjmp(on_failure, 1)) {
        if (progress.in_block) end_wait_for_launch();
        else if (dynamic_shared.reserve(request.shared_bytes)) begin_grid();
        else fail("no memory for the shared memory of a block");
        run_grid();
    }
    nobody_runs();
#if HOST_ASAN
    if (failed) __asan_unpoison_memory_region(request.stacks.base, request.stacks.threads * Stacks::STRIDE);
#endif
    return failed ? FAILED : waits_for_launch() ? WAITS : RAN;
}

static Outcome launch(const Launch& wanted, void (*call)(void*), void* arguments) {
    request = wanted;
    grid_size = {wanted.grid[0], wanted.grid[1], wanted.grid[2]};
    block_size = {wanted.block[0], wanted.block[1], wanted.block[2]};
    kernel = call;
    kernel_arguments = arguments;
    failed = false;
    failure = Failure{};
    nobody_runs();
    random_state = (wanted.seed + 1) * 0x9e3779b97f4a7c15ull;
    progress.in_block = false;
    return go_on();
}

// The entry of a kernel: unpacks an array of pointers to its arguments, as cuLaunchKernel does. They must stay until the
// launch has ended.
template <class... P, size_t... I>
static Outcome launch_with(void (*function)(P...), const Launch* wanted, void** arguments, std::index_sequence<I...>) {
    static void (*called)(P...);
    called = function;
    return launch(*wanted, [](void* a) { called(*static_cast<std::remove_const_t<P>*>(static_cast<void**>(a)[I])...); },
                  arguments);
}
template <class... P> static Outcome launch_typed(void (*function)(P...), const Launch* wanted, void** arguments) {
    return launch_with(function, wanted, arguments, std::index_sequence_for<P...>());
}

// The types of a kernel's parameters, as NumPy names them: "const float16*,int32".
template <class T> struct Named;
#define HOST_NAMED(T, NAME) template <> struct Named<T> { static constexpr const char* name = NAME; };
HOST_NAMED(float, "float32")
HOST_NAMED(double, "float64")
HOST_NAMED(__half, "float16")
HOST_NAMED(__nv_bfloat16, "bfloat16")
HOST_NAMED(signed char, "int8")
HOST_NAMED(unsigned char, "uint8")
HOST_NAMED(short, "int16")
HOST_NAMED(unsigned short, "uint16")
HOST_NAMED(int, "int32")
HOST_NAMED(unsigned, "uint32")
HOST_NAMED(long long, "int64")
HOST_NAMED(unsigned long long, "uint64")
HOST_NAMED(unsigned long, "uint64")  // uint64_t of glibc
HOST_NAMED(bool, "bool")

template <class T> static void append_type(char* text) {
    using Pointed = std::remove_pointer_t<T>;
    if (*text) strcat(text, ",");
    if (std::is_pointer_v<T> && std::is_const_v<Pointed>) strcat(text, "const ");
    strcat(text, Named<std::remove_cv_t<Pointed>>::name);
    if (std::is_pointer_v<T>) strcat(text, "*");
}
template <class... P> static const char* signature(void (*)(P...)) {
    static char text[1024];
    text[0] = 0;
    (append_type<P>(text), ...);
    return text;
}

}  // namespace host
