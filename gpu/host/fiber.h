// A fiber: a stack of its own, and the registers with which to go on. Switching saves and restores what a function call
// would keep; it takes about 2 ns, a hundred times less than the C library's swapcontext, which calls the kernel.
#pragma once

namespace host {

static constexpr size_t PAGE = 4096;

#if defined(__x86_64__) && !defined(HOST_UCONTEXT)
extern "C" void host_switch(void** save, void* resume) __attribute__((visibility("hidden")));
asm(R"(
.text
.local host_switch
.type host_switch, @function
host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    retq
.size host_switch, .-host_switch
)");

// A context that starts in `main` on the given stack, which `main` must never return from.
HOST_UNCHECKED static void* new_context(void* /*reused*/, char* stack, size_t bytes, void (*main)()) {
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15));
    *--top = nullptr;  // a function expects rsp % 16 == 8, as after a call
    *--top = reinterpret_cast<void*>(main);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    return top;
}
#else
static void host_switch(void** save, void* resume) {
    if (!*save) *save = calloc(1, sizeof(ucontext_t));
    swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(resume));
}

static void* new_context(void* reused, char* stack, size_t bytes, void (*main)()) {
    auto* context = static_cast<ucontext_t*>(reused ? reused : calloc(1, sizeof(ucontext_t)));
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = bytes;
    makecontext(context, main, 0);
    return context;
}
#endif

// The stacks of one block's threads, each above a page that may not be touched. Python reserves them (memory.py).
struct Stacks {
    char* base;
    size_t threads;

    static constexpr size_t BYTES = (HOST_ASAN || HOST_TSAN ? 256 : 64) * 1024;  // a sanitizer's frames are larger
    static constexpr size_t STRIDE = BYTES + PAGE;

    char* of(size_t thread) const { return base + thread * STRIDE + PAGE; }
    // Were all stacks full to the same offset in a page, they would share one set of the first-level cache.
    static size_t usable(size_t thread) { return BYTES - thread % 29 * 144; }
    // A frame may skip the guard page: anything not far below the stack counts.
    static bool overflowed(const char* stack, const char* address) {
        return address < stack && address > stack - 16 * BYTES;
    }
};

}  // namespace host
