// The functions that -fsanitize=thread,bounds,alignment makes the compiler call, in place of the sanitizers'
// runtimes.
#include <cstddef>
#include <cstdint>
#include <string>

#include "lanes.h"
#include "memory.h"

namespace simt {
namespace {

[[gnu::always_inline]] inline void hook(const void* address, size_t bytes, Access access) {
  if (!checking) return;
  checking = false;
  check({reinterpret_cast<uintptr_t>(address), bytes, access, __builtin_return_address(0)});
  checking = true;
}

// What the compiler tells about a place where it checks bounds or alignment.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};

struct OutOfBounds {
  SourceLocation where;
  const TypeDescriptor *array, *index;
};

struct TypeMismatch {
  SourceLocation where;
  const TypeDescriptor* type;
};

std::string text(const SourceLocation& where) {
  return std::string(where.file) + ":" + std::to_string(where.line);
}

}  // namespace
}  // namespace simt

using namespace simt;

// Reads and writes. Alignment is checked where the source has the access (below), for the optimiser may have split it
// by the time it comes here.
#define SIMT_HOOKS(size)                       \
  void __tsan_read##size(void* p) {            \
    hook(p, size, Access::kRead);              \
  }                                            \
  void __tsan_write##size(void* p) {           \
    hook(p, size, Access::kWrite);             \
  }                                            \
  void __tsan_unaligned_read##size(void* p) {  \
    hook(p, size, Access::kRead);              \
  }                                            \
  void __tsan_unaligned_write##size(void* p) { \
    hook(p, size, Access::kWrite);             \
  }

// Atomics, which only host code has: torch's headers.
#define SIMT_ATOMICS(bits)                                                                                 \
  using a##bits = uint##bits##_t;                                                                          \
  a##bits __tsan_atomic##bits##_load(const a##bits* p, int) {                                              \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                        \
  void __tsan_atomic##bits##_store(a##bits* p, a##bits v, int) {                                           \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                        \
  a##bits __tsan_atomic##bits##_exchange(a##bits* p, a##bits v, int) {                                     \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                        \
  a##bits __tsan_atomic##bits##_fetch_add(a##bits* p, a##bits v, int) {                                    \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                        \
  a##bits __tsan_atomic##bits##_fetch_sub(a##bits* p, a##bits v, int) {                                    \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                        \
  a##bits __tsan_atomic##bits##_fetch_and(a##bits* p, a##bits v, int) {                                    \
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                        \
  a##bits __tsan_atomic##bits##_fetch_or(a##bits* p, a##bits v, int) {                                     \
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                        \
  bool __tsan_atomic##bits##_compare_exchange_strong(a##bits* p, a##bits* expected, a##bits v, int, int) { \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }                                                                                                        \
  bool __tsan_atomic##bits##_compare_exchange_weak(a##bits* p, a##bits* expected, a##bits v, int, int) {   \
    return __atomic_compare_exchange_n(p, expected, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
  }

extern "C" {

void __tsan_init() {}

SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

void __tsan_read_range(void* p, size_t bytes) {
  hook(p, bytes, Access::kRead);
}

void __tsan_write_range(void* p, size_t bytes) {
  hook(p, bytes, Access::kWrite);
}

void __tsan_vptr_update(void** p, void*) {
  hook(p, sizeof *p, Access::kWrite);
}

void __tsan_vptr_read(void** p) {
  hook(p, sizeof *p, Access::kRead);
}

SIMT_ATOMICS(8)
SIMT_ATOMICS(16)
SIMT_ATOMICS(32)
SIMT_ATOMICS(64)

void __tsan_atomic_thread_fence(int) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  if (!checking) return;
  checking = false;
  fail("index out of range", "index " + std::to_string(static_cast<intptr_t>(index)) + " of " + data->array->name +
                                 ", at " + text(data->where));
}

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
  if (!checking) return;
  checking = false;
  fail_misaligned(address, std::string(data->type->name) + " accessed in " + text(data->where) + ",");
}

}  // extern "C"
