// Ceiling division, for host code and the kernels of all devices. No torch, no standard library.
#pragma once

#include <stdint.h>

// A function of several instruction sets' files must leave no copy for the linker to choose from: one built for wide
// vectors would fail on older processors.
#ifdef __CUDACC__
#define SPADE_INLINE __host__ __device__ __forceinline__
#else
#define SPADE_INLINE inline __attribute__((always_inline))
#endif

namespace spade {

// The least integer of at least a / b, for a >= 0 and b > 0.
constexpr SPADE_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace spade
