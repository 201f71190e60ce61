// Atomics. Fibers do not interrupt one another, so a plain read-modify-write would do; real atomics are for
// ThreadSanitizer, which takes them for what they are.
#pragma once

namespace host {

template <class T, class F> HOST_INLINE T exchange(T* address, F update) {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
    auto* place = reinterpret_cast<Bits*>(address);
    Bits before = __atomic_load_n(place, __ATOMIC_SEQ_CST), after;
    T old;
    do {
        memcpy(&old, &before, sizeof old);
        T updated = update(old);
        memcpy(&after, &updated, sizeof after);
    } while (!__atomic_compare_exchange_n(place, &before, after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}

template <class T> struct As { using type = T; };  // keeps an argument from deciding what T is

}  // namespace host

#define HOST_ATOMIC(NAME, UPDATED)                                                                                     \
    template <class T> HOST_INLINE T NAME(T* address, typename host::As<T>::type value) {                            \
        return host::exchange(address, [&](T old) -> T { return UPDATED; });                                          \
    }
HOST_ATOMIC(atomicAdd, old + value)
HOST_ATOMIC(atomicSub, old - value)
HOST_ATOMIC(atomicMax, old > value ? old : value)
HOST_ATOMIC(atomicMin, old < value ? old : value)
HOST_ATOMIC(atomicExch, value)
HOST_ATOMIC(atomicOr, old | value)
HOST_ATOMIC(atomicAnd, old & value)
HOST_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
template <class T>
HOST_INLINE T atomicCAS(T* address, typename host::As<T>::type expected, typename host::As<T>::type value) {
    return host::exchange(address, [&](T old) -> T { return old == expected ? value : old; });
}
