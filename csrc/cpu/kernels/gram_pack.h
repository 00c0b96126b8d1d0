// Copies pieces of images with any strides into strips whose channels are contiguous: values, pairs of bfloat16, and
// im2col rows.
#pragma once

#include "gram_task.h"
#include "simd.h"
#include "transpose.h"

namespace spade {
namespace SPADE_ISA {

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
      const int64_t together = ceil_div(lanes, column);
      for (; p < positions && s + p * column + (lanes - 1) * channel + lanes <= end; p += together) {
        transpose_square(s + p * column, channel, column, d + p * stride, stride, positions - p);
      }
    }
    for (; p < positions; ++p) {
      for (int64_t i = 0; i < (squares ? lanes : 1); ++i) d[p * stride + i] = s[p * column + i * channel];
    }
  }
}

template <class T>
SPADE_INLINE void pack_positions(const GramSource<T>& s, const T* src, int64_t positions, int64_t channels, T* dst,
                                 int64_t stride) {
  pack_line(src, s.column, s.channel, positions, channels, s.end, dst, stride);
}

#ifdef SPADE_BF16
// dst[p][c] = the pair of src[p * column + c * channel], rows of dst `stride` apart.
inline void pack_positions(const GramSource<Bf16>& s, const Bf16* src, int64_t positions, int64_t channels, float* dst,
                           int64_t stride) {
  typedef uint16_t Half __attribute__((vector_size(SPADE_VEC_BYTES / 2)));
  constexpr int64_t lanes = VectorOf<float>::lanes;
  for (int64_t p = 0; p < positions; ++p) {
    const Bf16* first = src + p * s.column;
    const Bf16* second = first + s.partner;
    float* out = dst + p * stride;
    int64_t c = 0;
    if (s.channel == 1) {
      for (int64_t i = 0; i < channels; i += 64 / sizeof(Bf16)) {
        __builtin_prefetch(first + kPrefetch * s.column + i);
        __builtin_prefetch(second + kPrefetch * s.column + i);
      }
      for (; c + lanes <= channels; c += lanes) {
        Half low, high;
        __builtin_memcpy(&low, first + c, sizeof(low));
        __builtin_memcpy(&high, second + c, sizeof(high));
        const Vec<uint32_t> pairs =
            __builtin_convertvector(low, Vec<uint32_t>) | __builtin_convertvector(high, Vec<uint32_t>) << 16;
        __builtin_memcpy(out + c, &pairs, sizeof(pairs));
      }
    }
    for (; c < channels; ++c) {
      const uint32_t pair = first[c * s.channel].bits | static_cast<uint32_t>(second[c * s.channel].bits) << 16;
      __builtin_memcpy(out + c, &pair, sizeof(pair));
    }
  }
}
#endif

// Columns x0..x1 of the lines line0..line1, each moved by `shift`. Whole lines that follow each other in memory go as
// one.
template <class V, class T>
inline void pack_lines(const GramSource<V>& s, const GramRange& lines, int64_t shift, int64_t image_width,
                       int64_t line0, int64_t line1, int64_t x0, int64_t x1, int64_t channels, T* dst, int64_t stride) {
  const bool dense = lines.step == 1 && x1 - x0 == image_width && s.line == image_width * s.column;
  for (int64_t line = line0; line < line1;) {
    const int64_t image = line / lines.count;
    const int64_t offset = line - image * lines.count;
    const int64_t together = dense ? smaller(lines.count - offset, line1 - line) : 1;
    const int64_t y = lines.begin + offset * lines.step + shift;
    pack_positions(s, s.data + image * s.image + y * s.line + x0 * s.column, together * (x1 - x0), channels, dst,
                   stride);
    dst += together * (x1 - x0) * stride;
    line += together;
  }
}

// The same of im2col rows, whose lines and columns are outputs of the convolution: the values that each output sees.
template <class T>
inline void pack_lines(const GramIm2col<T>& s, const GramRange& lines, int64_t, int64_t, int64_t line0, int64_t line1,
                       int64_t x0, int64_t x1, int64_t channels, T* dst, int64_t stride) {
  const int64_t step = s.columns.stride * s.column;
  for (int64_t line = line0; line < line1; ++line, dst += (x1 - x0) * stride) {
    const T* image = s.data + line / lines.count * s.image;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t tap = (s.first + c) / s.channels;
      const int64_t y = line % lines.count * s.rows.stride - s.rows.padding + tap / s.columns.kernel * s.rows.dilation;
      const int64_t x = x0 * s.columns.stride - s.columns.padding + tap % s.columns.kernel * s.columns.dilation;
      // Outputs from `inside` to `outside` see the image.
      const int64_t inside = x >= 0 ? 0 : smaller(ceil_div(-x, s.columns.stride), x1 - x0);
      const int64_t outside = y < 0 || y >= s.rows.size || x >= s.columns.size
                                  ? inside
                                  : larger(inside, smaller(ceil_div(s.columns.size - x, s.columns.stride), x1 - x0));
      const T* src = image + y * s.line + x * s.column + (s.first + c) % s.channels * s.channel;
      T* out = dst + c;
      for (int64_t i = 0; i < inside; ++i) out[i * stride] = 0;
      for (int64_t i = inside; i < outside; ++i) out[i * stride] = src[i * step];
      for (int64_t i = outside; i < x1 - x0; ++i) out[i * stride] = 0;
    }
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
