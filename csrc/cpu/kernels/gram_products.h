// Sums of channel products over sets of positions, for blocks of channels: see gram_task.h for what they mean.
//
// A chunk of image rows is copied into strips, channels contiguous, that fit the second-level cache together with the
// sums; all runs then read the same strips, each at its own shift.
#pragma once

#ifdef SPADE_BF16
#include <immintrin.h>
#endif

#include "gram_pack.h"
#include "tile.h"

namespace spade {
namespace SPADE_ISA {

#ifdef SPADE_BF16
template <>
struct Entry<Bf16> {
  static SPADE_INLINE Vec<float> spread(const float* a) {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof(pair));
    return reinterpret_cast<Vec<float>>(pair - Vec<int32_t>{});
  }
  static SPADE_INLINE void add_product(Vec<float>& sum, Vec<float> a, Vec<float> b) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#endif

template <class T>
SPADE_INLINE int64_t padded_rows(int64_t rows) {
  return round_up<int64_t>(rows, Tile<T>::rows);
}

template <class T>
SPADE_INLINE int64_t padded_cols(int64_t cols) {
  return round_up<int64_t>(cols, Tile<T>::cols);
}

// Values between the positions of a strip from which `rows` or `cols` channels are read in whole tiles.
template <class T>
SPADE_INLINE int64_t strip_stride(int64_t rows, int64_t cols) {
  return padded_stride<T>(larger(padded_rows<T>(rows), padded_cols<T>(cols)));
}

// Positions summed in registers before they are added to the sums: it bounds the rounding error, and such a piece of a
// tile's columns stays in the first-level cache.
constexpr int64_t kChain = 128;

// sums[rows][cols] += Σ a(p) b(p)ᵀ in whole tiles: strips are read and sums written up to the next multiple of the
// tile. With `upper`, tiles wholly below the diagonal are left out.
template <class V, class T>
inline void walk_product(const Walk& w, const T* a, const T* b, T* sums, int64_t rows, int64_t cols, bool upper) {
  if (w.lines > 1 && w.a_step * w.count == w.a_line && w.b_step * w.count == w.b_line) {
    return walk_product<V>(Walk{1, w.lines * w.count, 0, w.a_step, 0, w.b_step}, a, b, sums, rows, cols, upper);
  }
  const int64_t ldc = padded_cols<T>(cols);
  const int64_t line_pieces = ceil_div(w.count, kChain);
  Walk piece = w;
  piece.count = ceil_div(w.count, line_pieces);
  piece.lines = larger<int64_t>(kChain / piece.count, 1);
  for (int64_t line = 0; line < w.lines; line += piece.lines) {
    for (int64_t t = 0; t < w.count; t += piece.count) {
      Walk part = piece;
      part.lines = smaller(piece.lines, w.lines - line);
      part.count = smaller(piece.count, w.count - t);
      const T* pa = a + line * w.a_line + t * w.a_step;
      const T* pb = b + line * w.b_line + t * w.b_step;
      for (int64_t j = 0; j < cols; j += Tile<T>::cols) {
        const int64_t end = upper ? smaller<int64_t>(rows, j + Tile<T>::cols) : rows;
        for (int64_t i = 0; i < end; i += Tile<T>::rows)
          tile_product<1, V>(part, pa + i, pb + j, sums + i * ldc + j, ldc);
      }
    }
  }
}

// Values of workspace for chunks of `lines` x `width` positions whose runs reach `halo` columns further.
template <class T>
inline int64_t gram_product_workspace(int64_t lines, int64_t width, int64_t halo, int64_t rows, int64_t cols) {
  return lines * (2 * width + halo) * strip_stride<T>(rows, cols) + Tile<T>::cols;
}

template <class T, class Source>
inline void gram_product(const GramProductTask<T, Source>& t) {
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
      const int64_t skipped = x0 > run.begin ? ceil_div(x0 - run.begin, run.step) : 0;
      const int64_t x = run.begin + skipped * run.step;
      if (skipped >= run.count || x >= x1) continue;
      const int64_t count = smaller(run.count - skipped, ceil_div(x1 - x, run.step));
      const Walk walk = {line1 - line0, count, a_line, run.step * stride, b_line, run.step * stride};
      walk_product<typename Source::Value>(walk, a + (x - x0) * stride, b + (x + run.shift - b0) * stride,
                                           t.sums + r * sum_size, t.rows, t.cols, shared && run.shift == 0);
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
