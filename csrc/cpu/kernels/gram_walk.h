// Matrix products whose inner dimension walks over positions of two packed strips.
#pragma once

#include "tile.h"

namespace spade {
namespace SPADE_ISA {

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
  const int64_t line_pieces = (w.count + kChain - 1) / kChain;
  Walk piece = w;
  piece.count = (w.count + line_pieces - 1) / line_pieces;
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

}  // namespace SPADE_ISA
}  // namespace spade
