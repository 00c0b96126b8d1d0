// Copies of pieces of images with any strides into strips whose channels are contiguous.
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

// dst[j][i] = src[i][j] for a square of as many values as a vector has lanes, of which `rows` rows of dst are stored.
// Interleaving the two halves of the vectors log2(lanes) times transposes them.
template <class T>
SPADE_INLINE void transpose_square(const T* src, int64_t src_stride, T* dst, int64_t dst_stride, int64_t rows) {
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
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i < rows) store(dst + i * dst_stride, v[i]);
  }
}

template <class T>
SPADE_INLINE void copy_values(const T* src, T* dst, int64_t n) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  if (n < lanes) {
    for (int64_t i = 0; i < n; ++i) dst[i] = src[i];
    return;
  }
  for (int64_t i = 0; i + lanes < n; i += lanes) store(dst + i, load(src + i));
  store(dst + n - lanes, load(src + n - lanes));
}

// dst[p][c] = src[p * column + c * channel], rows of dst `stride` apart. Memory before `end` may be read.
template <class T>
inline void pack_line(const T* src, int64_t column, int64_t channel, int64_t positions, int64_t channels, const T* end, T* dst,
                      int64_t stride) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  if (channel == 1) {
    for (int64_t p = 0; p < positions; ++p) copy_values(src + p * column, dst + p * stride, channels);
    return;
  }
  const bool squares = column == 1 && channels >= lanes;
  for (int64_t c = 0; c < channels; c += squares ? lanes : 1) {
    // The last square overlaps the one before, so that no single channels are left over.
    const T* s = src + (squares ? smaller(c, channels - lanes) : c) * channel;
    T* d = dst + (squares ? smaller(c, channels - lanes) : c);
    int64_t p = 0;
    if (squares) {
      for (; p < positions && s + p + (lanes - 1) * channel + lanes <= end; p += lanes) {
        transpose_square(s + p, channel, d + p * stride, stride, positions - p);
      }
    }
    for (; p < positions; ++p) {
      for (int64_t i = 0; i < (squares ? lanes : 1); ++i) d[p * stride + i] = s[p * column + i * channel];
    }
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
