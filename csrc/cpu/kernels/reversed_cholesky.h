// Factors of a matrix H + damp·I by Cholesky factorisation of its reversal. With J the reversal, J H J = VᵀV.
//
// inverse_cholesky: the upper factor U = J V⁻ᵀ J of the inverse, UᵀU = (H + damp·I)⁻¹, without the inverse. Eliminating
// the rows of [J H J | I] panel by panel gives V on the left and V⁻ᵀ, lower triangular, on the right, both by the same
// product; they share one square, the columns behind the current panel being V's. V itself is needed in the current
// panel only. Work: 2C³/3 floating-point operations.
//
// reverse_cholesky: the lower factor L = J V J of the matrix itself, LᵀL = H + damp·I, so that U = L⁻ᵀ. Half the work.
#pragma once

#include "cholesky.h"
#include "chunks.h"
#include "table.h"

namespace spade {
namespace SPADE_ISA {

// Rows updated together, while a strip is in the nearest cache. 24 and 96 are within 5 % of it for 512 to 2048 columns
// (measured as cholesky_depth).
constexpr int64_t kUpdateRows = 48;

template <class T>
int64_t reversed_workspace(int64_t columns) {
  Arena<T> arena{nullptr};
  take_system(arena, columns);
  return arena.used;
}

// The damped matrix in reversed order: its upper triangle, zeros below it and around it.
template <class T>
inline void load_reversed(const ReversedTask<T>& task, const CholeskySystem<T>& s, int64_t i) {
  const int64_t n = task.columns;
  T* row = s.matrix + i * s.stride;
  const int64_t diagonal = smaller(i, n);
  for (int64_t j = 0; j < diagonal; ++j) row[j] = T(0);
  if (i < n) {
    const T* source = task.hessian + (n - 1 - i) * n;
    for (int64_t j = i; j < n; ++j) row[j] = source[n - 1 - j];
    row[i] += task.damp;
  }
  for (int64_t j = n; j < s.stride; ++j) row[j] = T(0);
}

template <class T>
inline void store_reversed(const ReversedTask<T>& task, const CholeskySystem<T>& s, int64_t i) {
  const int64_t n = task.columns;
  const T* source = s.matrix + (n - 1 - i) * s.stride;
  T* row = task.factor + i * n;
  for (int64_t j = 0; j < i; ++j) row[j] = T(0);
  for (int64_t j = i; j < n; ++j) row[j] = source[n - 1 - j];
}

// Solves the panel's rows [p, end) in one strip of columns. Columns before `end` are V⁻ᵀ's and finished by this; those
// of the panel itself begin as the identity.
template <class T>
inline void solve_columns(const CholeskySystem<T>& s, int64_t p, int64_t end, int64_t first) {
  const int64_t width = smaller(kStripColumns, s.stride - first);
  T* strip = s.panel.at(first);
  for (int64_t i = 0; i < round_up<int64_t>(s.panel.depth, Tile<T>::rows); ++i) {
    const T* row = s.matrix + (p + i) * s.stride + first;
    T* x = strip + i * kStripColumns;
    const bool own = p <= first && first < end;
    for (int64_t j = 0; j < width; ++j) x[j] = i >= s.panel.depth ? T(0) : own ? T(p + i == first + j) : row[j];
    for (int64_t j = width; j < kStripColumns; ++j) x[j] = T(0);
  }
  solve_strip(s.panel, strip, width);
  if (first >= end) return;
  for (int64_t i = 0; i < s.panel.depth; ++i) {
    T* row = s.matrix + (p + i) * s.stride + first;
    for (int64_t j = 0; j < width; ++j) row[j] = strip[i * kStripColumns + j];
  }
}

// Returns 0, or the order of the leading minor of the reversed matrix that is not positive definite.
template <class T>
int64_t inverse_cholesky(const ReversedTask<T>& task, const Parallel& parallel) {
  Arena<T> arena{task.workspace};
  CholeskySystem<T> s = take_system(arena, task.columns);
  const int64_t n = task.columns;
  const int64_t depth = s.panel.depth;
  for_chunks(parallel, 0, round_up<int64_t>(n, Tile<T>::rows), kUpdateRows, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) load_reversed(task, s, i);
  });
  for (int64_t p = 0; p < n; p += depth) {
    s.panel.depth = smaller(depth, n - p);
    const int64_t end = p + s.panel.depth;
    const int64_t failed = factor_diagonal(s.panel, s.matrix, s.stride, p);
    if (failed >= 0) return p + failed + 1;
    for_chunks(parallel, 0, n, kStripColumns, [&](int64_t first, int64_t) { solve_columns(s, p, end, first); });
    for_chunks(parallel, end, n, kUpdateRows, [&](int64_t first, int64_t last) {
      update_trailing(s.panel, first, last, 0, end, s.matrix, s.stride);
      update_trailing(s.panel, first, last, first / Tile<T>::cols * Tile<T>::cols, n, s.matrix, s.stride);
    });
  }
  for_chunks(parallel, 0, n, kUpdateRows, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) store_reversed(task, s, i);
  });
  return 0;
}

// The same return value.
template <class T>
int64_t reverse_cholesky(const ReversedTask<T>& task, const Parallel& parallel) {
  Arena<T> arena{task.workspace};
  CholeskySystem<T> s = take_system(arena, task.columns);
  const int64_t n = task.columns;
  const int64_t depth = s.panel.depth;
  for_chunks(parallel, 0, round_up<int64_t>(n, Tile<T>::rows), kUpdateRows, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) load_reversed(task, s, i);
    for (int64_t i = first; i < smaller(n, last); ++i) {
      for (int64_t j = i + 1; j < n; ++j) task.factor[i * n + j] = T(0);
    }
  });
  for (int64_t p = 0; p < n; p += depth) {
    s.panel.depth = smaller(depth, n - p);
    const int64_t end = p + s.panel.depth;
    const int64_t failed = factor_diagonal(s.panel, s.matrix, s.stride, p);
    if (failed >= 0) return p + failed + 1;
    // Row p + i of V, from column `first` on, is a part of a row of L from its end on.
    auto store_row = [&](const T* v, int64_t i, int64_t first, int64_t width) {
      T* row = task.factor + (n - 1 - p - i) * n + n - 1 - first;
      for (int64_t j = 0; j < width; ++j) row[-j] = v[j];
    };
    for (int64_t i = 0; i < s.panel.depth; ++i) {
      store_row(s.panel.block + i * (s.panel.stride + 1), i, p + i, s.panel.depth - i);
    }
    for_chunks(parallel, end, n, kStripColumns, [&](int64_t first, int64_t last) {
      solve_columns(s, p, end, first);
      for (int64_t i = 0; i < s.panel.depth; ++i) {
        store_row(s.panel.at(first) + i * kStripColumns, i, first, last - first);
      }
    });
    for_chunks(parallel, end, n, kUpdateRows, [&](int64_t first, int64_t last) {
      update_trailing(s.panel, first, last, first / Tile<T>::cols * Tile<T>::cols, n, s.matrix, s.stride);
    });
  }
  return 0;
}

}  // namespace SPADE_ISA
}  // namespace spade
