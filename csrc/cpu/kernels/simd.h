// Fixed-width vectors and the register tile, for the instruction set of the including translation unit.
//
// Each file in cpu/isa/ sets SPADE_ISA (a namespace) and SPADE_VEC_BYTES, turns the compiler to that instruction set,
// and includes the kernels. Everything lives in namespace spade::SPADE_ISA and nothing here calls the standard library,
// so no inline function built for wide vectors can be picked by the linker for an older processor.
#pragma once

#include <stdint.h>

#include "../../common/ceil_div.h"

namespace spade {
namespace SPADE_ISA {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(SPADE_VEC_BYTES)));
  static constexpr int lanes = SPADE_VEC_BYTES / sizeof(T);
};

template <class T>
using Vec = typename VectorOf<T>::type;

// The integer of the same width: what comparing vectors gives.
template <class T>
struct IndexOf;
template <>
struct IndexOf<float> {
  typedef int32_t type;
};
template <>
struct IndexOf<double> {
  typedef int64_t type;
};

template <class T>
SPADE_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
SPADE_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class T>
SPADE_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class I>
constexpr SPADE_INLINE I round_up(I n, I multiple) {
  return ceil_div(n, multiple) * multiple;
}

template <class I>
SPADE_INLINE I smaller(I a, I b) {
  return a < b ? a : b;
}

template <class I>
SPADE_INLINE I larger(I a, I b) {
  return a < b ? b : a;
}

SPADE_INLINE float square_root(float x) {
  return __builtin_sqrtf(x);
}

SPADE_INLINE double square_root(double x) {
  return __builtin_sqrt(x);
}

// Divides a kernel's workspace into arrays that start on cache lines. With a null base it only counts.
template <class T>
struct Arena {
  T* base;
  int64_t used = 0;

  T* take(int64_t values) {
    T* p = base ? base + used : nullptr;
    used += round_up<int64_t>(values, 64 / sizeof(T));
    return p;
  }
};

// The register tile of a matrix product: `rows` broadcast values times `vectors` vectors. 24 accumulators of the 32
// registers of AVX-512, 12 of the 16 of AVX2 and SSE.
template <class T>
struct Tile {
  static constexpr int rows = SPADE_VEC_BYTES == 64 ? 12 : 6;
  static constexpr int vectors = 2;
  static constexpr int cols = vectors * VectorOf<T>::lanes;
};

// A row length of at least n whose rows start in different cache sets: an odd number of cache lines.
template <class T>
constexpr SPADE_INLINE int64_t padded_stride(int64_t n) {
  const int64_t line = 64 / sizeof(T);
  return (ceil_div(n, line) | 1) * line;
}

}  // namespace SPADE_ISA
}  // namespace spade
