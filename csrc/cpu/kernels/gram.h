// Sums of channel products over sets of positions, for blocks of channels: see gram_task.h for what they mean.
//
// A chunk of image rows is copied into strips, channels contiguous, that fit the second-level cache together with the
// sums; all runs then read the same strips, each at its own shift.
#pragma once

#include "gram_pack.h"
#include "gram_task.h"
#include "gram_walk.h"

namespace spade {
namespace SPADE_ISA {

// Values of workspace for chunks of `lines` x `width` positions whose runs reach `halo` columns further.
template <class T>
inline int64_t gram_product_workspace(int64_t lines, int64_t width, int64_t halo, int64_t rows, int64_t cols) {
  return lines * (2 * width + halo) * strip_stride<T>(rows, cols) + Tile<T>::cols;
}

template <class T>
SPADE_INLINE void pack_positions(const GramSource<T>& s, const T* src, int64_t positions, int64_t channels, T* dst,
                                 int64_t stride) {
  pack_line(src, s.column, s.channel, positions, channels, s.end, dst, stride);
}

// Columns x0..x1 of the lines line0..line1, each moved by `shift`. Whole lines that follow each other in memory go as
// one.
template <class T, class V>
inline void pack_lines(const GramSource<T, V>& s, const GramRange& lines, int64_t shift, int64_t image_width,
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

template <class T, class V>
inline void gram_product(const GramProductTask<T, V>& t) {
  const bool shared = t.diagonal && t.lines.shift == 0;
  const int64_t stride = strip_stride<T>(t.rows, t.cols);
  const int64_t sum_size = padded_rows<T>(t.rows) * padded_cols<T>(t.cols);
  const int64_t across = t.chunks.across();
  for (int64_t chunk = t.first_chunk; chunk < t.last_chunk; ++chunk) {
    const int64_t x0 = t.chunks.begin + chunk % across * t.chunks.width;
    const int64_t x1 = smaller(x0 + t.chunks.width, t.chunks.end);
    const int64_t line0 = chunk / across * t.chunks.lines;
    const int64_t line1 = smaller(line0 + t.chunks.lines, t.chunks.line_count);
    int64_t b0 = larger<int64_t>(x0 + t.min_shift, 0);
    int64_t b1 = smaller(x1 + t.max_shift, t.image_width);
    if (shared) {
      b0 = smaller(b0, x0);
      b1 = larger(b1, x1);
    }
    const int64_t b_line = (b1 - b0) * stride;
    const int64_t a_line = shared ? b_line : (x1 - x0) * stride;
    T* b = t.workspace;
    T* a = shared ? b + (x0 - b0) * stride : b + (line1 - line0) * b_line;
    pack_lines(t.second, t.lines, t.lines.shift, t.image_width, line0, line1, b0, b1, t.cols, b, stride);
    if (!shared) pack_lines(t.first, t.lines, 0, t.image_width, line0, line1, x0, x1, t.rows, a, stride);
    for (int64_t r = 0; r < t.run_count; ++r) {
      const GramRange& run = t.runs[r];
      const int64_t skipped = x0 > run.begin ? (x0 - run.begin + run.step - 1) / run.step : 0;
      const int64_t x = run.begin + skipped * run.step;
      if (skipped >= run.count || x >= x1) continue;
      const int64_t count = smaller(run.count - skipped, (x1 - x + run.step - 1) / run.step);
      const Walk walk = {line1 - line0, count, a_line, run.step * stride, b_line, run.step * stride};
      walk_product<V>(walk, a + (x - x0) * stride, b + (x + run.shift - b0) * stride, t.sums + r * sum_size, t.rows,
                      t.cols, shared && run.shift == 0);
    }
  }
}

// target[rows][cols] += sums, from the diagonal on where `upper`.
template <class T>
inline void gram_add(T* target, int64_t stride, const T* sums, int64_t rows, int64_t cols, bool upper) {
  constexpr int64_t lanes = VectorOf<T>::lanes;
  const int64_t ld = padded_cols<T>(cols);
  for (int64_t i = 0; i < rows; ++i) {
    T* row = target + i * stride;
    const T* sum = sums + i * ld;
    int64_t j = upper ? i / lanes * lanes : 0;
    for (; j + lanes <= cols; j += lanes) store(row + j, load(row + j) + load(sum + j));
    for (; j < cols; ++j) row[j] += sum[j];
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
