// Transposition of matrices and of squares of vectors.
#pragma once

#include "simd.h"

namespace spade {
namespace SPADE_ISA {

template <int... I>
struct Indices {};

template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};

template <int... I>
struct MakeIndices<0, I...> {
  typedef Indices<I...> type;
};

// a0 b0 a1 b1 ... of the lower (Half = 0) or upper (Half = 1) halves of two vectors.
template <int Half, class T, int... I>
SPADE_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, Indices<I...>) {
  constexpr int lanes = VectorOf<T>::lanes;
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * lanes + Half * (lanes / 2))...);
}

// dst[j][i] = src[i][j * step] for all lanes i and all j with j < rows and j * step < lanes. Interleaving the two
// halves of the vectors log2(lanes) times transposes them.
template <class T>
SPADE_INLINE void transpose_square(const T* src, int64_t src_stride, int64_t step, T* dst, int64_t dst_stride,
                                   int64_t rows) {
  constexpr int lanes = VectorOf<T>::lanes;
  typedef typename MakeIndices<lanes>::type All;
  Vec<T> v[lanes];
  Vec<T> w[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) v[i] = load(src + i * src_stride);
#pragma GCC unroll 4
  for (int step = 1; step < lanes; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      w[2 * i] = interleave<0, T>(v[i], v[i + lanes / 2], All());
      w[2 * i + 1] = interleave<1, T>(v[i], v[i + lanes / 2], All());
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = w[i];
  }
  int64_t next = 0;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i == next && next < rows * step) {
      store(dst, v[i]);
      dst += dst_stride;
      next += step;
    }
  }
}

// target[j][i] = source[i][j] for i < rows and j < columns
template <class T>
inline void transpose(const T* source, int64_t source_stride, int64_t rows, int64_t columns, T* target,
                      int64_t target_stride) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  for (int64_t i = 0; i < rows; i += lanes) {
    for (int64_t j = 0; j < columns; j += lanes) {
      if (i + lanes <= rows && j + lanes <= columns) {
        transpose_square(source + i * source_stride + j, source_stride, 1, target + j * target_stride + i,
                         target_stride, lanes);
        continue;
      }
      for (int64_t l = j; l < smaller(columns, j + lanes); ++l) {
        for (int64_t k = i; k < smaller(rows, i + lanes); ++k) {
          target[l * target_stride + k] = source[k * source_stride + l];
        }
      }
    }
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
