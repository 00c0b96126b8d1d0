// SparseGPT with its mask block and its update block told apart.
//
// The sweep goes by panels of about 128 columns. Inside a panel a mask block is brought up to date when the sweep
// reaches it, then masked, then walked column by column; the columns behind the panel get its errors in one matrix
// product. Work: R·C² operations, nearly all in that product. Weights are stored transposed, so that a column is a
// vector.
//
// The factor is the upper U of the inverse Hessian, and the errors E of a panel change the columns behind it by -E·U.
// Or it is the lower L = U⁻ᵀ of the Hessian itself, which takes half the time to compute. The same sweep in terms of L:
// if the columns before a panel P have changed by D in all, P changes by D·(Lᵀ)·U_PP with the block of Lᵀ between them,
// and U_PP is the inverse of the diagonal block of Lᵀ. So these products with D are summed up, and the panel itself
// works with U_PP as before.
#pragma once

#include "select.h"
#include "table.h"
#include "tile.h"
#include "transpose.h"

namespace spade {
namespace SPADE_ISA {

template <class T>
int64_t sparsegpt_stride(int64_t rows) {
  return padded_stride<T>(round_up<int64_t>(rows, Tile<T>::cols));
}

inline int64_t sparsegpt_panel_end(int64_t columns, int64_t mask_block, int64_t begin) {
  if (mask_block <= kSweepPanel) return smaller(columns, begin + kSweepPanel / mask_block * mask_block);
  return smaller(columns, smaller(begin + kSweepPanel, (begin / mask_block + 1) * mask_block));
}

template <class T>
constexpr int64_t kBlockStride = padded_stride<T>(kSweepPanel + Tile<T>::rows);

template <class T>
struct SparseGptBuffers {
  T* error;        // [kSweepPanel][stride] errors of the panel's columns, each divided by its factor's diagonal
  T* scores;       // [mask_block][rows]
  T* candidates;   // [mask_block][rows]
  uint8_t* mask;   // [mask_block][rows] 1: removed
  T* coefficient;  // [kSweepPanel]
  // With the factor of the Hessian:
  T* before;   // [kSweepPanel][stride] weights of the panel before the sweep
  T* inverse;  // [kSweepPanel][kBlockStride] inverse of the panel's diagonal block
  T* block;    // [kSweepPanel][kBlockStride] the same transposed: that of U
};

template <class T>
inline int64_t sparsegpt_layout(SparseGptBuffers<T>& s, int64_t rows, int64_t mask_block, T* base) {
  Arena<T> arena{base};
  s.error = arena.take(kSweepPanel * sparsegpt_stride<T>(rows));
  s.scores = arena.take(mask_block * rows);
  s.candidates = arena.take(mask_block * rows);
  s.mask = reinterpret_cast<uint8_t*>(arena.take(mask_block * rows));
  s.coefficient = arena.take(kSweepPanel);
  s.before = arena.take(kSweepPanel * sparsegpt_stride<T>(rows));
  s.inverse = arena.take(kSweepPanel * kBlockStride<T>);
  s.block = arena.take(kSweepPanel * kBlockStride<T>);
  return arena.used;
}

template <class T>
int64_t sparsegpt_workspace(int64_t rows, int64_t mask_block) {
  SparseGptBuffers<T> s;
  return sparsegpt_layout<T>(s, rows, mask_block, nullptr);
}

// 1 / U_jj
template <class T>
SPADE_INLINE T inverse_diagonal(const SparseGptTask<T>& task, int64_t j) {
  const T diagonal = task.factor[j * (task.columns + 1)];
  return task.sums == nullptr ? T(1) / diagonal : diagonal;
}

// Scores of columns [begin, begin + width), into scores[width][rows]; those of kept zeros are infinite.
template <class T>
inline void sweep_scores(const SparseGptTask<T>& task, int64_t begin, int64_t width, T* scores) {
  for (int64_t c = 0; c < width; ++c) {
    const T* w = task.weight + (begin + c) * task.stride;
    const T inverse = inverse_diagonal(task, begin + c);
    T* out = scores + c * task.rows;
    for (int64_t r = 0; r < task.rows; ++r) {
      const T e = w[r] * inverse;
      out[r] = e * e;
    }
    if (task.zeros == nullptr) continue;
    const uint8_t* zero = task.zeros + (begin + c) * task.rows;
    for (int64_t r = 0; r < task.rows; ++r) out[r] = zero[r] ? T(__builtin_inf()) : out[r];
  }
}

// The mask of a mask block: kept zeros, and the k smallest scores of the others, ties by column, then row.
template <class T>
inline void choose_block(const SparseGptTask<T>& task, const SparseGptBuffers<T>& s, int64_t begin, int64_t width) {
  const int64_t size = width * task.rows;
  const int64_t k = task.counts[begin / task.mask_block];
  const uint8_t* zeros = task.zeros == nullptr ? nullptr : task.zeros + begin * task.rows;
  if (k == 0) {
    for (int64_t i = 0; i < size; ++i) s.mask[i] = zeros == nullptr ? 0 : zeros[i];
    return;
  }
  sweep_scores(task, begin, width, s.scores);
  const T threshold = kth_smallest(s.scores, size, k, s.candidates);
  int64_t below = 0;
  for (int64_t i = 0; i < size; ++i) {
    s.mask[i] = s.scores[i] <= threshold;
    below += s.scores[i] < threshold;
  }
  if (!task.include_ties) {
    int64_t ties = k - below;
    for (int64_t i = 0; i < size; ++i) {
      if (s.scores[i] == threshold && --ties < 0) s.mask[i] = 0;
    }
  }
  for (int64_t i = 0; i < size && zeros != nullptr; ++i) s.mask[i] |= zeros[i];
}

// The mask of m neighbouring columns: kept zeros, and the smallest scores of each row until it has n, ties by column.
template <class T>
inline void choose_group(const SparseGptTask<T>& task, const SparseGptBuffers<T>& s, int64_t begin, uint8_t* mask) {
  sweep_scores(task, begin, task.m, s.scores);
  const uint8_t* zeros = task.zeros == nullptr ? nullptr : task.zeros + begin * task.rows;
  for (int64_t i = 0; i < task.m * task.rows; ++i) mask[i] = zeros == nullptr ? 0 : zeros[i];
  for (int64_t r = 0; r < task.rows; ++r) {
    int64_t removed = 0;
    for (int64_t c = 0; c < task.m; ++c) removed += mask[c * task.rows + r];
    for (; removed < task.n; ++removed) {
      int64_t best = -1;
      for (int64_t c = 0; c < task.m; ++c) {
        const int64_t i = c * task.rows + r;
        if (!mask[i] && (best < 0 || s.scores[i] < s.scores[best])) best = i;
      }
      mask[best] = 1;
    }
  }
}

// Inverts the diagonal block of L.
template <class T>
inline void invert_block(const SparseGptTask<T>& task, const SparseGptBuffers<T>& s, int64_t begin, int64_t end) {
  constexpr int64_t stride = kBlockStride<T>;
  const int64_t width = end - begin;
  const int64_t read = smaller(stride, width + Tile<T>::cols);  // to whole tiles and vectors
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t j = 0; j < read; ++j) s.inverse[i * stride + j] = s.block[i * stride + j] = T(0);
  }
  for (int64_t i = 0; i < width; ++i) {
    const T* l = task.factor + (begin + i) * task.columns + begin;
    T* row = s.inverse + i * stride;
    subtract_combination(row, i, l, s.inverse, stride, i);
    const T scale = T(1) / l[i];
    for (int64_t j = 0; j < i; ++j) row[j] *= scale;
    row[i] = scale;
    for (int64_t j = 0; j <= i; ++j) s.block[j * stride + i] = row[j];
  }
}

// Brings the columns of a panel up to date with the changes of those before it.
template <class T>
inline void apply_sums(const SparseGptTask<T>& task, const SparseGptBuffers<T>& s, int64_t begin, int64_t end) {
  T* weight = task.weight + begin * task.stride;
  for (int64_t i = 0; i < (end - begin) * task.stride; ++i) s.before[i] = weight[i];
  const int64_t width = end - begin;
  for (int64_t i = 0; begin > 0 && i < width; i += Tile<T>::rows) {
    const int64_t rows = smaller<int64_t>(Tile<T>::rows, width - i);
    subtract_product(whole_rows(i + rows, kBlockStride<T>, task.stride), s.block + i, task.sums + begin * task.stride,
                     weight + i * task.stride, task.stride, rows, round_up<int64_t>(task.rows, Tile<T>::cols));
  }
}

// Prunes columns [begin, end) and leaves their errors, or with L their changes, for sparsegpt_trailing.
template <class T>
void sparsegpt_panel(const SparseGptTask<T>& task, int64_t begin, int64_t end) {
  SparseGptBuffers<T> s;
  sparsegpt_layout(s, task.rows, task.mask_block, task.workspace);
  const T* u = task.factor + begin * (task.columns + 1);
  int64_t u_stride = task.columns;
  if (task.sums != nullptr) {
    invert_block(task, s, begin, end);
    apply_sums(task, s, begin, end);
    u = s.block;
    u_stride = kBlockStride<T>;
  }
  for (int64_t j = begin; j < end; ++j) {
    const int64_t block_begin = j / task.mask_block * task.mask_block;
    const int64_t block_end = smaller(task.columns, block_begin + task.mask_block);
    if (j == block_begin) {
      for (int64_t l = j; l < smaller(block_end, end); ++l) {
        for (int64_t t = begin; t < j; ++t) s.coefficient[t - begin] = u[(t - begin) * u_stride + l - begin];
        subtract_combination(task.weight + l * task.stride, task.rows, s.coefficient, s.error, task.stride, j - begin);
      }
      if (task.m == 0) choose_block(task, s, block_begin, block_end - block_begin);
    }
    uint8_t* mask = s.mask + (j - block_begin) * task.rows;
    if (task.m > 0 && (j - block_begin) % task.m == 0) choose_group(task, s, j, mask);

    const T inverse = inverse_diagonal(task, j);
    T* w = task.weight + j * task.stride;
    T* error = s.error + (j - begin) * task.stride;
    for (int64_t r = 0; r < task.rows; ++r) {
      const T e = mask[r] ? w[r] * inverse : T(0);
      error[r] = e;
      task.losses[r] += e * e / 2;
      w[r] = mask[r] ? T(0) : w[r];
    }
    for (int64_t r = task.rows; r < task.stride; ++r) error[r] = T(0);
    for (int64_t l = j + 1; l < smaller(block_end, end); ++l) {
      subtract_combination(task.weight + l * task.stride, task.rows, u + (j - begin) * u_stride + l - begin, error,
                           task.stride, 1);
    }
  }
  if (task.sums == nullptr) return;
  const T* weight = task.weight + begin * task.stride;
  for (int64_t i = 0; i < (end - begin) * task.stride; ++i) s.error[i] = s.before[i] - weight[i];
}

// Applies what the panel [begin, end) left to columns [first, last) behind it. `packed` has room for
// kSweepPanel * padded_stride(last - first + Tile::rows) values.
template <class T>
void sparsegpt_trailing(const SparseGptTask<T>& task, int64_t begin, int64_t end, int64_t first, int64_t last,
                        T* packed) {
  SparseGptBuffers<T> s;
  sparsegpt_layout(s, task.rows, task.mask_block, task.workspace);
  const int64_t width = last - first;
  const int64_t stride = padded_stride<T>(width + Tile<T>::rows);
  if (task.sums != nullptr) {
    transpose(task.factor + first * task.columns + begin, task.columns, width, end - begin, packed, stride);
  }
  for (int64_t t = begin; t < end; ++t) {
    const T* u = task.factor + t * task.columns + first;
    T* row = packed + (t - begin) * stride;
    for (int64_t i = 0; i < width && task.sums == nullptr; ++i) row[i] = u[i];
    for (int64_t i = width; i < stride; ++i) row[i] = T(0);
  }
  T* target = task.sums == nullptr ? task.weight : task.sums;
  subtract_product(whole_rows(end - begin, stride, task.stride), packed, s.error, target + first * task.stride,
                   task.stride, width, round_up<int64_t>(task.rows, Tile<T>::cols));
}

template <class T>
int64_t sparsegpt_trailing_workspace(int64_t width) {
  return kSweepPanel * padded_stride<T>(width + Tile<T>::rows);
}

}  // namespace SPADE_ISA
}  // namespace spade
