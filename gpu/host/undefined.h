// What g++'s undefined-behaviour checks call, so that they end the launch and name thread and line. With our own
// handlers no runtime library has to be loaded. The layouts are those of libsanitizer/ubsan/ubsan_handlers.h in GCC.
#pragma once

namespace host {

struct CheckedPlace { const char* file; uint32_t line, column; };
struct CheckedType { uint16_t kind, info; char name[1]; };
struct AccessCheck { CheckedPlace place; CheckedType* type; uint8_t log_alignment, kind; };
struct IndexCheck { CheckedPlace place; CheckedType *array, *index; };

[[noreturn]] static void undefined(const void* check, const char* what) {
    const auto* place = static_cast<const CheckedPlace*>(check);
    fail("%s at %s:%u", what, place->file, place->line);
}

[[noreturn]] static void bad_access(const AccessCheck* check, uintptr_t address) {
    uintptr_t alignment = uintptr_t(1) << check->log_alignment;
    const char *type = check->type->name, *file = check->place.file;
    if (!address) fail("null pointer to %s at %s:%u", type, file, check->place.line);
    fail("misaligned access to %s, whose address must be a multiple of %zu, at %s:%u",
         type, static_cast<size_t>(alignment), file, check->place.line);
}

[[noreturn]] static void bad_index(const IndexCheck* check, uintptr_t index) {
    fail("index %lld is outside the array of type %s at %s:%u", static_cast<long long>(static_cast<int>(index)),
         check->array->name, check->place.file, check->place.line);
}

}  // namespace host

#define HOST_HANDLER extern "C" __attribute__((visibility("hidden"), used, noreturn)) void
HOST_HANDLER __ubsan_handle_type_mismatch_v1_abort(void* check, void* address) {
    host::bad_access(static_cast<host::AccessCheck*>(check), reinterpret_cast<uintptr_t>(address));
}
HOST_HANDLER __ubsan_handle_out_of_bounds_abort(void* check, void* index) {
    host::bad_index(static_cast<host::IndexCheck*>(check), reinterpret_cast<uintptr_t>(index));
}
HOST_HANDLER __ubsan_handle_divrem_overflow_abort(void* check, void*, void*) {
    host::undefined(check, "integer division by zero or out of range");
}
HOST_HANDLER __ubsan_handle_shift_out_of_bounds_abort(void* check, void*, void*) {
    host::undefined(check, "shift by more bits than the type has, or by fewer than none");
}
HOST_HANDLER __ubsan_handle_load_invalid_value_abort(void* check, void*) {
    host::undefined(check, "read of a bool that is neither true nor false (never written?)");
}
HOST_HANDLER __ubsan_handle_add_overflow_abort(void* check, void*, void*) {
    host::undefined(check, "signed overflow of +");
}
HOST_HANDLER __ubsan_handle_sub_overflow_abort(void* check, void*, void*) {
    host::undefined(check, "signed overflow of -");
}
HOST_HANDLER __ubsan_handle_mul_overflow_abort(void* check, void*, void*) {
    host::undefined(check, "signed overflow of *");
}
HOST_HANDLER __ubsan_handle_negate_overflow_abort(void* check, void*) {
    host::undefined(check, "signed overflow of -");
}
