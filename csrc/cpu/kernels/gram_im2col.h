// A symmetric rank-k update over im2col rows, which exist for one chunk of output positions at a time.
//
// The part of the image that a chunk sees is first copied into a strip with its padding and with channels innermost:
// there the taps of a kernel row are contiguous (unless dilated) and copied together.
#pragma once

#include "gram_pack.h"
#include "gram_task.h"
#include "gram_walk.h"

namespace spade {
namespace SPADE_ISA {

// Positions along an axis that `outputs` neighbouring outputs see.
SPADE_INLINE int64_t field_size(int64_t outputs, int64_t kernel, int64_t stride, int64_t dilation) {
  return (outputs - 1) * stride + (kernel - 1) * dilation + 1;
}

// Values that copies of whole vectors may spill over.
constexpr int64_t kOverrun = 16;

template <class T>
inline int64_t gram_im2col_workspace(const GramIm2col& g, const GramChunks& chunks, int64_t rows, int64_t cols) {
  const int64_t field = field_size(chunks.lines, g.kernel_h, g.stride_h, g.dilation_h) *
                        field_size(chunks.width, g.kernel_w, g.stride_w, g.dilation_w) * g.channels;
  return 2 * (chunks.lines * chunks.width * strip_stride<T>(rows, cols) + kOverrun) + field + kOverrun;
}

// Lines top.. and columns left.. of an image as [line][column][channel], zero outside the image.
template <class T>
inline void pack_field(const GramSource<T>& s, const GramIm2col& g, int64_t image, int64_t top, int64_t left,
                       int64_t lines, int64_t columns, T* dst) {
  const int64_t inside = smaller(larger<int64_t>(-left, 0), columns);
  const int64_t outside = larger(smaller(g.width - left, columns), inside);
  for (int64_t y = top; y < top + lines; ++y, dst += columns * g.channels) {
    const bool visible = y >= 0 && y < g.height && outside > inside;
    const int64_t begin = visible ? inside * g.channels : columns * g.channels;
    for (int64_t i = 0; i < begin; ++i) dst[i] = 0;
    if (!visible) continue;
    pack_line(s.data + image * s.image + y * s.line + (left + inside) * s.column, s.column, s.channel, outside - inside,
              g.channels, s.end, dst + begin, g.channels);
    for (int64_t i = outside * g.channels; i < columns * g.channels; ++i) dst[i] = 0;
  }
}

// Columns first..first + count of the im2col rows of lines x outputs positions, from the strip they see. Copies whole
// vectors, so that up to one vector too many is read and written.
template <class T>
inline void pack_im2col(const GramIm2col& g, const T* field, int64_t field_columns, int64_t lines, int64_t outputs,
                        int64_t first, int64_t count, T* dst, int64_t stride) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  const int64_t taps = g.dilation_w == 1 ? g.kernel_w : 1;  // that are contiguous
  const int64_t size = taps * g.channels;
  for (int64_t y = 0; y < lines; ++y) {
    for (int64_t x = 0; x < outputs; ++x, dst += stride) {
      const T* origin = field + (y * g.stride_h * field_columns + x * g.stride_w) * g.channels;
      for (int64_t column = first; column < first + count;) {
        const int64_t tap = column / size * taps;
        const int64_t within = column % size;
        const int64_t n = smaller(size - within, first + count - column);
        const T* src = origin + within +
                       (tap / g.kernel_w * g.dilation_h * field_columns + tap % g.kernel_w * g.dilation_w) * g.channels;
        T* out = dst + (column - first);
        for (int64_t i = 0; i < n; i += lanes) store(out + i, load(src + i));
        column += n;
      }
    }
  }
}

template <class T>
inline void gram_im2col(const GramIm2colTask<T>& t) {
  const GramIm2col& g = t.shape;
  const bool shared = t.first_row == t.first_col;
  const int64_t stride = strip_stride<T>(t.rows, t.cols);
  const int64_t across = t.chunks.across();
  T* b = t.workspace;
  const int64_t size = t.chunks.lines * t.chunks.width * stride + kOverrun;
  T* a = shared ? b : b + size;
  T* field = b + 2 * size;
  for (int64_t chunk = t.first_chunk; chunk < t.last_chunk; ++chunk) {
    const int64_t x0 = t.chunks.begin + chunk % across * t.chunks.width;
    const int64_t outputs = smaller(t.chunks.width, t.chunks.end - x0);
    const int64_t columns = field_size(outputs, g.kernel_w, g.stride_w, g.dilation_w);
    const int64_t line0 = chunk / across * t.chunks.lines;
    const int64_t line1 = smaller(line0 + t.chunks.lines, t.chunks.line_count);
    for (int64_t line = line0; line < line1;) {
      const int64_t image = line / g.out_h;
      const int64_t y = line - image * g.out_h;
      const int64_t lines = smaller(g.out_h - y, line1 - line);  // of the same image
      pack_field(t.source, g, image, y * g.stride_h - g.padding_h, x0 * g.stride_w - g.padding_w,
                 field_size(lines, g.kernel_h, g.stride_h, g.dilation_h), columns, field);
      const int64_t at = (line - line0) * outputs * stride;
      pack_im2col(g, field, columns, lines, outputs, t.first_col, t.cols, b + at, stride);
      if (!shared) pack_im2col(g, field, columns, lines, outputs, t.first_row, t.rows, a + at, stride);
      line += lines;
    }
    const Walk walk = {1, (line1 - line0) * outputs, 0, stride, 0, stride};
    walk_product<T>(walk, a, b, t.sums, t.rows, t.cols, shared);
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
