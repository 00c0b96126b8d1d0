// The k-th smallest of n non-negative numbers, by their bits: radix selection, so ties and adversarial orders cost
// nothing extra.
#pragma once

#include "simd.h"

namespace spade {
namespace SPADE_ISA {

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef uint32_t type;
};
template <>
struct BitsOf<double> {
  typedef uint64_t type;
};

// values[0..n), none negative or NaN; 1 <= k <= n; candidates has room for n values.
template <class T>
inline T kth_smallest(const T* values, int64_t n, int64_t k, T* candidates) {
  using Bits = typename BitsOf<T>::type;
  auto bits = [](T x) {
    Bits b;
    __builtin_memcpy(&b, &x, sizeof(b));
    return b;
  };
  const T* from = values;
  for (int shift = 8 * sizeof(T) - 8;; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t i = 0; i < n; ++i) ++histogram[(bits(from[i]) >> shift) & 255];
    Bits digit = 0;
    while (k > histogram[digit]) k -= histogram[digit++];
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T x = from[i];
      candidates[left] = x;
      left += ((bits(x) >> shift) & 255) == digit;
    }
    n = left;
    from = candidates;
    if (n == 1 || shift == 0) return candidates[0];
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
