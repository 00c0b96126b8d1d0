// Blocked Cholesky factorisation A = UᵀU of symmetric positive definite matrices, by panels of rows.
//
// A panel's diagonal block is factored first. Then the panel's rows are solved strip by strip: a strip holds
// kStripColumns columns of the panel, k-major, so that it serves as either operand of the trailing update.
#pragma once

#include "tile.h"

namespace spade {
namespace SPADE_ISA {

// A multiple of the rows and of the columns of every register tile, so that panels and strips begin on its grid.
constexpr int64_t kStripColumns = 96;

// Deeper panels pass over the trailing matrix less often; it matters once that has left the cache. Measured with
// inverse_cholesky in float32 on one core of an AMD EPYC of family 25 (Zen 4) with AVX-512: twice the depth takes 10 %
// more at 1024 columns, as much at 1400, 6 % less at 2048 and 12 % less at 3072.
SPADE_INLINE int64_t cholesky_depth(int64_t columns) {
  return columns < 1500 ? kStripColumns : 2 * kStripColumns;
}

template <class T>
struct CholeskyPanel {
  int64_t depth;   // rows of the panel
  int64_t stride;  // of `block`
  int64_t strip;   // values of a strip
  T* block;        // upper factor of the diagonal block
  T* inverse;      // [depth] reciprocals of its diagonal
  T* strips;       // [strips][depth][kStripColumns]

  T* at(int64_t column) const {
    return strips + column / kStripColumns * strip + column % kStripColumns;
  }
};

template <class T>
inline CholeskyPanel<T> take_panel(Arena<T>& arena, int64_t depth, int64_t columns) {
  CholeskyPanel<T> panel;
  const int64_t rows = round_up<int64_t>(depth, Tile<T>::rows);
  panel.depth = depth;
  panel.stride = padded_stride<T>(round_up<int64_t>(rows, Tile<T>::cols));
  panel.strip = rows * kStripColumns;
  panel.block = arena.take(rows * panel.stride);
  panel.inverse = arena.take(rows);
  panel.strips = arena.take(ceil_div(columns, kStripColumns) * panel.strip);
  return panel;
}

// Factors the diagonal block of `matrix` that begins at (first, first). Returns the row at which it is not positive
// definite, or -1.
template <class T>
inline int64_t factor_diagonal(const CholeskyPanel<T>& panel, const T* matrix, int64_t stride, int64_t first) {
  constexpr int lanes = VectorOf<T>::lanes;
  const int64_t n = panel.depth;
  for (int64_t i = 0; i < n; ++i) {
    const T* source = matrix + (first + i) * stride + first;
    T* row = panel.block + i * panel.stride;
    for (int64_t j = 0; j < panel.stride; ++j) row[j] = i <= j && j < n ? source[j] : T(0);
  }
  for (int64_t i = n; i < round_up<int64_t>(n, Tile<T>::rows); ++i) {
    for (int64_t j = 0; j < panel.stride; ++j) panel.block[i * panel.stride + j] = T(0);
    panel.inverse[i] = T(0);
  }
  for (int64_t q = 0; q < n; q += Tile<T>::rows) {
    for (int64_t j = q / Tile<T>::cols * Tile<T>::cols; j < n; j += Tile<T>::cols) {
      tile_product<-1, T>(whole_rows(q, panel.stride, panel.stride), panel.block + q, panel.block + j,
                          panel.block + q * panel.stride + j, panel.stride);
    }
    for (int64_t i = q; i < smaller<int64_t>(n, q + Tile<T>::rows); ++i) {
      T* row = panel.block + i * panel.stride;
      const int64_t begin = i / lanes * lanes;
      for (int64_t j = begin; j < n; j += lanes) {
        Vec<T> v = load(row + j);
        for (int64_t t = q; t < i; ++t) {
          const T* above = panel.block + t * panel.stride;
          v -= broadcast(above[i]) * load(above + j);
        }
        store(row + j, v);
      }
      if (!(row[i] > T(0) && row[i] < T(__builtin_inf()))) return i;
      panel.inverse[i] = T(1) / square_root(row[i]);
      const Vec<T> scale = broadcast(panel.inverse[i]);
      for (int64_t j = begin; j < n; j += lanes) store(row + j, load(row + j) * scale);
    }
  }
  return -1;
}

// x <- U⁻ᵀ x for the first `columns` columns of a strip.
template <class T>
inline void solve_strip(const CholeskyPanel<T>& panel, T* x, int64_t columns) {
  constexpr int rows = Tile<T>::rows;
  constexpr int lanes = VectorOf<T>::lanes;
  for (int64_t c = 0; c < columns; c += Tile<T>::cols) {
    for (int64_t q = 0; q < panel.depth; q += rows) {
      T* target = x + q * kStripColumns + c;
      tile_product<-1, T>(whole_rows(q, panel.stride, kStripColumns), panel.block + q, x + c, target, kStripColumns);
      const T* block = panel.block + q * (panel.stride + 1);
      Vec<T> x0[rows], x1[rows];
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        x0[i] = load(target + i * kStripColumns);
        x1[i] = load(target + i * kStripColumns + lanes);
#pragma GCC unroll 16
        for (int t = 0; t < i; ++t) {
          const Vec<T> u = broadcast(block[t * panel.stride + i]);
          x0[i] -= u * x0[t];
          x1[i] -= u * x1[t];
        }
        const Vec<T> scale = broadcast(panel.inverse[q + i]);
        x0[i] *= scale;
        x1[i] *= scale;
        store(target + i * kStripColumns, x0[i]);
        store(target + i * kStripColumns + lanes, x1[i]);
      }
    }
  }
}

// Subtracts panelᵀ panel from rows [first, last) and columns [begin, end) of a matrix whose row r begins at
// matrix + r * stride. `first` and `begin` must lie on the tile's grid; the last tiles are computed whole.
template <class T>
inline void update_trailing(const CholeskyPanel<T>& panel, int64_t first, int64_t last, int64_t begin, int64_t end,
                            T* matrix, int64_t stride) {
  for (int64_t j = begin; j < end; j += Tile<T>::cols) {
    for (int64_t i = first; i < last; i += Tile<T>::rows) {
      tile_product<-1, T>(whole_rows(panel.depth, kStripColumns, kStripColumns), panel.at(i), panel.at(j),
                          matrix + i * stride + j, stride);
    }
  }
}

// What the factorisations work on: a matrix of n columns, padded to whole tiles, and a panel.
template <class T>
struct CholeskySystem {
  int64_t stride;
  T* matrix;  // [n, padded][stride]
  CholeskyPanel<T> panel;
};

template <class T>
inline CholeskySystem<T> take_system(Arena<T>& arena, int64_t n) {
  CholeskySystem<T> system;
  system.stride = padded_stride<T>(round_up<int64_t>(n, Tile<T>::cols));
  system.matrix = arena.take(round_up<int64_t>(n, Tile<T>::rows) * system.stride);
  system.panel = take_panel(arena, smaller(n, cholesky_depth(n)), n);
  return system;
}

// Overwrites the upper triangle of the matrix [n][n] by U with UᵀU = A. False if A is not positive definite.
template <class T>
inline bool cholesky_upper(const CholeskySystem<T>& system, int64_t n) {
  CholeskyPanel<T> panel = system.panel;
  const int64_t stride = system.stride;
  for (int64_t p = 0; p < n; p += system.panel.depth) {
    panel.depth = smaller(system.panel.depth, n - p);
    const int64_t end = p + panel.depth;
    if (factor_diagonal(panel, system.matrix, stride, p) >= 0) return false;
    for (int64_t i = 0; i < panel.depth; ++i) {
      for (int64_t j = i; j < panel.depth; ++j)
        system.matrix[(p + i) * stride + p + j] = panel.block[i * panel.stride + j];
    }
    for (int64_t first = end; first < n; first += kStripColumns) {
      const int64_t width = smaller(kStripColumns, round_up<int64_t>(n - first, Tile<T>::cols));
      T* strip = panel.at(first);
      for (int64_t i = 0; i < panel.depth; ++i) {
        const T* row = system.matrix + (p + i) * stride + first;
        for (int64_t j = 0; j < width; ++j) strip[i * kStripColumns + j] = row[j];
      }
      solve_strip(panel, strip, width);
      for (int64_t i = 0; i < panel.depth; ++i) {
        T* row = system.matrix + (p + i) * stride + first;
        for (int64_t j = 0; j < width; ++j) row[j] = strip[i * kStripColumns + j];
      }
    }
    for (int64_t i = end; i < n; i += Tile<T>::rows) {
      update_trailing(panel, i, i + Tile<T>::rows, i / Tile<T>::cols * Tile<T>::cols, n, system.matrix, stride);
    }
  }
  return true;
}

// x <- U⁻ᵀ x
template <class T>
inline void solve_transposed(const CholeskySystem<T>& u, int64_t n, T* x) {
  for (int64_t i = 0; i < n; ++i) {
    const T* row = u.matrix + i * u.stride;
    x[i] /= row[i];
    const T xi = x[i];
    for (int64_t j = i + 1; j < n; ++j) x[j] -= row[j] * xi;
  }
}

template <class T>
SPADE_INLINE T dot(const T* x, const T* y, int64_t n) {
  constexpr int lanes = VectorOf<T>::lanes;
  Vec<T> s0 = Vec<T>{}, s1 = Vec<T>{};
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    s0 += load(x + i) * load(y + i);
    s1 += load(x + i + lanes) * load(y + i + lanes);
  }
  T partial[lanes];
  store(partial, s0 + s1);
#pragma GCC unroll 8
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) partial[k] += partial[k + half];
  }
  T sum = partial[0];
  for (; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// x <- U⁻¹ x, for the leading n columns of U
template <class T>
inline void solve_upper(const CholeskySystem<T>& u, int64_t n, T* x) {
  for (int64_t i = n - 1; i >= 0; --i) {
    const T* row = u.matrix + i * u.stride;
    x[i] = (x[i] - dot(row + i + 1, x + i + 1, n - i - 1)) / row[i];
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
