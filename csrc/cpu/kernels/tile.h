// The one matrix-product kernel: a register tile of C plus or minus Aᵀ B, both operands stored k-major.
#pragma once

#include "simd.h"

namespace spade {
namespace SPADE_ISA {

// The rows of two operands that a product sums over: `lines` times `count` of them, those of a line `step` values apart
// and lines `line`.
struct Walk {
  int64_t lines, count;
  int64_t a_line, a_step, b_line, b_step;
};

// `depth` rows, lda and ldb values apart.
SPADE_INLINE Walk whole_rows(int64_t depth, int64_t lda, int64_t ldb) {
  return {1, depth, 0, lda, 0, ldb};
}

// How the entries of operands are multiplied.
template <class V>
struct Entry {
  static SPADE_INLINE Vec<V> spread(const V* a) {
    return broadcast(*a);
  }
  static SPADE_INLINE void add_product(Vec<V>& sum, Vec<V> a, Vec<V> b) {
    sum += a * b;
  }
};

// c[i][j] += Sign * Σ a(t)[i] b(t)[j] over the rows t of a walk, for a whole tile (Tile::rows x Tile::cols). The sums
// stay in registers.
template <int Sign, class V, class T>
SPADE_INLINE void tile_product(const Walk& walk, const T* a_line, const T* b_line, T* c, int64_t ldc) {
  constexpr int rows = Tile<T>::rows;
  constexpr int lanes = VectorOf<T>::lanes;
  Vec<T> acc0[rows];
  Vec<T> acc1[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    acc0[i] = Vec<T>{};
    acc1[i] = Vec<T>{};
  }
  for (int64_t line = 0; line < walk.lines; ++line) {
    const T* a = a_line;
    const T* b = b_line;
    for (int64_t t = 0; t < walk.count; ++t) {
      const Vec<T> b0 = load(b);
      const Vec<T> b1 = load(b + lanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const Vec<T> ai = Entry<V>::spread(a + i);
        Entry<V>::add_product(acc0[i], ai, b0);
        Entry<V>::add_product(acc1[i], ai, b1);
      }
      a += walk.a_step;
      b += walk.b_step;
    }
    a_line += walk.a_line;
    b_line += walk.b_line;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    T* row = c + i * ldc;
    if (Sign > 0) {
      store(row, load(row) + acc0[i]);
      store(row + lanes, load(row + lanes) + acc1[i]);
    } else {
      store(row, load(row) - acc0[i]);
      store(row + lanes, load(row + lanes) - acc1[i]);
    }
  }
}

// c -= AᵀB for the leading `rows` x `cols` part of a tile; operands may be read to the full tile, c may not.
template <class T>
inline void subtract_partial_tile(const Walk& walk, const T* a, const T* b, T* c, int64_t ldc, int64_t rows,
                                  int64_t cols) {
  T tile[Tile<T>::rows * Tile<T>::cols] = {};
  tile_product<-1, T>(walk, a, b, tile, Tile<T>::cols);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) c[i * ldc + j] += tile[i * Tile<T>::cols + j];
  }
}

// c[rows x cols] -= AᵀB. Operands must be readable up to the next multiple of the tile in both directions.
template <class T>
inline void subtract_product(const Walk& walk, const T* a, const T* b, T* c, int64_t ldc, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i += Tile<T>::rows) {
    const int64_t height = smaller<int64_t>(Tile<T>::rows, rows - i);
    for (int64_t j = 0; j < cols; j += Tile<T>::cols) {
      const int64_t width = smaller<int64_t>(Tile<T>::cols, cols - j);
      T* tile = c + i * ldc + j;
      if (height == Tile<T>::rows && width == Tile<T>::cols) {
        tile_product<-1, T>(walk, a + i, b + j, tile, ldc);
      } else {
        subtract_partial_tile(walk, a + i, b + j, tile, ldc, height, width);
      }
    }
  }
}

// v[0..n) -= sum_t coefficient[t] * panel[t][0..n). Reads and writes v up to the next multiple of the vector length.
template <class T>
inline void subtract_combination(T* v, int64_t n, const T* coefficient, const T* panel, int64_t stride, int64_t rows) {
  constexpr int lanes = VectorOf<T>::lanes;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    Vec<T> v0 = load(v + i), v1 = load(v + i + lanes), v2 = load(v + i + 2 * lanes), v3 = load(v + i + 3 * lanes);
    const T* p = panel + i;
    for (int64_t t = 0; t < rows; ++t, p += stride) {
      const Vec<T> f = broadcast(coefficient[t]);
      v0 -= f * load(p);
      v1 -= f * load(p + lanes);
      v2 -= f * load(p + 2 * lanes);
      v3 -= f * load(p + 3 * lanes);
    }
    store(v + i, v0);
    store(v + i + lanes, v1);
    store(v + i + 2 * lanes, v2);
    store(v + i + 3 * lanes, v3);
  }
  for (; i < n; i += lanes) {
    Vec<T> v0 = load(v + i);
    const T* p = panel + i;
    for (int64_t t = 0; t < rows; ++t, p += stride) v0 -= broadcast(coefficient[t]) * load(p);
    store(v + i, v0);
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
