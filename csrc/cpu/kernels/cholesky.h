// Blocked Cholesky factorisation and solution of one symmetric positive definite system.
#pragma once

#include "tile.h"

namespace spade {
namespace SPADE_ISA {

constexpr int64_t kCholeskyPanel = 64;

template <class T>
inline int64_t cholesky_stride(int64_t n) {
  return padded_stride<T>(n + Tile<T>::cols + Tile<T>::rows);
}

// Values that `a` must hold for cholesky_upper: a tile may be read past the last row.
template <class T>
inline int64_t cholesky_size(int64_t n) {
  return (n + 1) * cholesky_stride<T>(n);
}

// Overwrites the upper triangle of a [n][stride] by U with UᵀU = A. False if A is not positive definite.
template <class T>
inline bool cholesky_upper(T* a, int64_t n, int64_t stride) {
  T coefficient[kCholeskyPanel];
  for (int64_t p = 0; p < n; p += kCholeskyPanel) {
    const int64_t depth = smaller(kCholeskyPanel, n - p);
    for (int64_t i = p; i < p + depth; ++i) {
      T* row = a + i * stride;
      for (int64_t t = p; t < i; ++t) coefficient[t - p] = a[t * stride + i];
      subtract_combination(row + i, n - i, coefficient, a + p * stride + i, stride, i - p);
      if (!(row[i] > T(0))) return false;
      const T scale = T(1) / square_root(row[i]);
      for (int64_t j = i; j < n; ++j) row[j] *= scale;
    }
    const T* panel = a + p * stride + p + depth;
    product<-1, true>(depth, panel, stride, panel, stride, a + (p + depth) * (stride + 1), stride, n - p - depth,
                      n - p - depth);
  }
  return true;
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
  s0 += s1;
  T sum = T(0);
  for (int k = 0; k < lanes; ++k) sum += s0[k];
  for (; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// x <- (UᵀU)⁻¹ x
template <class T>
inline void cholesky_solve(const T* u, int64_t n, int64_t stride, T* x) {
  for (int64_t i = 0; i < n; ++i) {
    const T* row = u + i * stride;
    x[i] /= row[i];
    const T xi = x[i];
    for (int64_t j = i + 1; j < n; ++j) x[j] -= row[j] * xi;
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    const T* row = u + i * stride;
    x[i] = (x[i] - dot(row + i + 1, x + i + 1, n - i - 1)) / row[i];
  }
}

}  // namespace SPADE_ISA
}  // namespace spade
