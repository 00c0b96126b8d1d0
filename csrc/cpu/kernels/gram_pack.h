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

// The values of two vectors in even (Odd = 0) or odd (Odd = 1) places.
template <int Odd, class T, int... I>
SPADE_INLINE Vec<T> every_second(Vec<T> a, Vec<T> b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + Odd)...);
}

// dst[c][i] = src[i][c] for all lanes i and a power of two of columns, which are contiguous in src and `stride` apart
// in dst.
template <int Columns, class T>
SPADE_INLINE void separate_columns(const T* src, T* dst, int64_t stride) {
  constexpr int lanes = VectorOf<T>::lanes;
  typedef typename MakeIndices<lanes>::type All;
  Vec<T> v[Columns];
  Vec<T> w[Columns];
#pragma GCC unroll 8
  for (int i = 0; i < Columns; ++i) v[i] = load(src + i * lanes);
#pragma GCC unroll 4
  for (int step = 1; step < Columns; step *= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < Columns / 2; ++i) {
      w[i] = every_second<0, T>(v[2 * i], v[2 * i + 1], All());
      w[i + Columns / 2] = every_second<1, T>(v[2 * i], v[2 * i + 1], All());
    }
#pragma GCC unroll 8
    for (int i = 0; i < Columns; ++i) v[i] = w[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < Columns; ++i) store(dst + i * stride, v[i]);
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

// Positions that are fetched ahead of their use.
constexpr int64_t kPrefetch = 16;

// dst[p][c] = src[p * column + c * channel], rows of dst `stride` apart. Memory before `end` may be read.
template <class T>
inline void pack_line(const T* src, int64_t column, int64_t channel, int64_t positions, int64_t channels, const T* end,
                      T* dst, int64_t stride) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  if (channel == 1) {
    if (column == channels && stride == channels) return copy_values(src, dst, positions * channels);
    for (int64_t p = 0; p < positions; ++p) {
      // Pieces of lines are too short for the processor to see a pattern by itself.
      for (int64_t c = 0; c < channels; c += 64 / sizeof(T)) __builtin_prefetch(src + (p + kPrefetch) * column + c);
      copy_values(src + p * column, dst + p * stride, channels);
    }
    return;
  }
  const bool squares = column > 0 && column < lanes && channels >= lanes;
  for (int64_t c = 0; c < channels; c += squares ? lanes : 1) {
    // The last square overlaps the one before, so that no single channels are left over.
    const T* s = src + (squares ? smaller(c, channels - lanes) : c) * channel;
    T* d = dst + (squares ? smaller(c, channels - lanes) : c);
    int64_t p = 0;
    if (squares) {
      const int64_t together = (lanes + column - 1) / column;
      for (; p < positions && s + p * column + (lanes - 1) * channel + lanes <= end; p += together) {
        transpose_square(s + p * column, channel, column, d + p * stride, stride, positions - p);
      }
    }
    for (; p < positions; ++p) {
      for (int64_t i = 0; i < (squares ? lanes : 1); ++i) d[p * stride + i] = s[p * column + i * channel];
    }
  }
}

// dst[p][c][g] = src[p * column + (g * channels + c) * channel], planes c of dst `plane` apart and positions `stride`.
template <class T>
inline void pack_groups(const T* src, int64_t column, int64_t channel, int64_t positions, int64_t channels,
                        int64_t groups, const T* end, T* dst, int64_t plane, int64_t stride) {
  if (channel == 1 && groups == VectorOf<T>::lanes && (channels == 2 || channels == 4 || channels == 8)) {
    for (int64_t p = 0; p < positions; ++p, src += column, dst += stride) {
      switch (channels) {
        case 2:
          separate_columns<2>(src, dst, plane);
          break;
        case 4:
          separate_columns<4>(src, dst, plane);
          break;
        default:
          separate_columns<8>(src, dst, plane);
      }
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    pack_line(src + c * channel, column, channels * channel, positions, groups, end, dst + c * plane, stride);
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
