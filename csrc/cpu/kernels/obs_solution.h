// The optimal weights of one row after a set P of columns is removed and K is kept, in closed form:
//   w − H⁻¹_{:P} (H⁻¹_PP)⁻¹ w_P   or   w_K + (H_KK)⁻¹ H_KP w_P.
//
// The sets of several levels of sparsity are nested. With columns in order of removal every H⁻¹_PP is a leading block
// of the largest, in the opposite order every H_KK is, and the Cholesky factor of a leading block is a leading block of
// the factor. So one factorisation serves all low levels and one all high levels; where to part them is decided by the
// work.
#pragma once

#include "cholesky.h"
#include "table.h"

namespace spade {
namespace SPADE_ISA {

// The first `low` levels are solved for what is removed, the others for what is kept.
struct ObsSolutionPlan {
  int64_t low;
  int64_t size;  // of the larger system
};

inline ObsSolutionPlan plan_solution(int64_t columns, int64_t levels, const int64_t* removed) {
  ObsSolutionPlan best{0, 0};
  double least = __builtin_inf();
  for (int64_t low = 0; low <= levels; ++low) {
    const int64_t gone = low > 0 ? removed[low - 1] : 0;
    const int64_t kept = low < levels ? columns - removed[low] : 0;
    const double work = 1.0 * gone * gone * gone + 1.0 * kept * kept * kept;
    if (work < least) {
      least = work;
      best = {low, larger(gone, kept)};
    }
  }
  return best;
}

template <class T>
struct ObsSolutionBuffers {
  CholeskySystem<T> system;
  T* right;     // [columns] right side
  T* solution;  // [columns]
  T* pull;      // [columns] H_{:P} w_P
};

template <class T>
inline int64_t obs_solution_layout(ObsSolutionBuffers<T>& s, int64_t columns, int64_t size, T* base) {
  Arena<T> arena{base};
  s.system = take_system(arena, size);
  s.right = arena.take(columns);
  s.solution = arena.take(columns);
  s.pull = arena.take(columns);
  return arena.used;
}

template <class T>
int64_t obs_solution_workspace(int64_t columns, int64_t levels, const int64_t* removed) {
  ObsSolutionBuffers<T> s;
  return obs_solution_layout<T>(s, columns, plan_solution(columns, levels, removed).size, nullptr);
}

// The rows come in an order that no hardware foresees.
template <class T>
SPADE_INLINE void prefetch(const T* row, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / sizeof(T)) __builtin_prefetch(row + j);
}

// Factors the rows and columns of a matrix that `index(0)`, ..., `index(n - 1)` name.
template <class T, class Index>
inline bool factor_principal(const T* matrix, int64_t columns, int64_t n, Index index,
                             const CholeskySystem<T>& system) {
  for (int64_t i = 0; i < round_up<int64_t>(n, Tile<T>::rows); ++i) {
    T* out = system.matrix + i * system.stride;
    for (int64_t j = 0; j < system.stride; ++j) out[j] = T(0);
    if (i >= n) continue;
    const T* row = matrix + index(i) * columns;
    if (i + 1 < n) prefetch(matrix + index(i + 1) * columns, columns);
    for (int64_t j = i; j < n; ++j) out[j] = row[index(j)];
  }
  return cholesky_upper(system, n);
}

// y += sum over i < count of factor(i) * row(i)[0..n), four rows at a time.
template <class T, class Row, class Factor>
SPADE_INLINE void add_multiples(int64_t count, Row row, Factor factor, int64_t n, T* y) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const T *x0 = row(i), *x1 = row(i + 1), *x2 = row(i + 2), *x3 = row(i + 3);
    const T f0 = factor(i), f1 = factor(i + 1), f2 = factor(i + 2), f3 = factor(i + 3);
    const bool more = i + 8 <= count;
    const T *p0 = more ? row(i + 4) : x0, *p1 = more ? row(i + 5) : x1;
    const T *p2 = more ? row(i + 6) : x2, *p3 = more ? row(i + 7) : x3;
    constexpr int64_t line = 64 / sizeof(T);
    int64_t j = 0;
    for (; j + line <= n; j += line) {
      __builtin_prefetch(p0 + j);
      __builtin_prefetch(p1 + j);
      __builtin_prefetch(p2 + j);
      __builtin_prefetch(p3 + j);
      for (int64_t k = j; k < j + line; ++k) y[k] += (f0 * x0[k] + f1 * x1[k]) + (f2 * x2[k] + f3 * x3[k]);
    }
    for (; j < n; ++j) y[j] += (f0 * x0[j] + f1 * x1[j]) + (f2 * x2[j] + f3 * x3[j]);
  }
  for (; i < count; ++i) {
    const T* x = row(i);
    const T f = factor(i);
    for (int64_t j = 0; j < n; ++j) y[j] += f * x[j];
  }
}

// Levels whose removed columns make the smaller system.
template <class T>
inline bool solve_removed(const ObsSolutionTask<T>& task, const ObsSolutionBuffers<T>& s, int64_t levels) {
  const int64_t columns = task.columns;
  const int64_t size = task.removed[levels - 1];
  auto index = [&](int64_t i) { return task.order[i]; };
  if (!factor_principal(task.hinv, columns, size, index, s.system)) return false;
  for (int64_t i = 0; i < size; ++i) s.right[i] = task.weight[index(i)];
  solve_transposed(s.system, size, s.right);
  for (int64_t k = 0; k < levels; ++k) {
    const int64_t n = task.removed[k];
    T* out = task.pruned[k];
    for (int64_t j = 0; j < columns; ++j) out[j] = task.weight[j];
    for (int64_t i = 0; i < n; ++i) s.solution[i] = s.right[i];
    solve_upper(s.system, n, s.solution);
    add_multiples(
        n, [&](int64_t i) { return task.hinv + index(i) * columns; }, [&](int64_t i) { return -s.solution[i]; },
        columns, out);
  }
  return true;
}

// Levels whose kept columns make the smaller system.
template <class T>
inline bool solve_kept(const ObsSolutionTask<T>& task, const ObsSolutionBuffers<T>& s, int64_t first_level) {
  const int64_t columns = task.columns;
  auto index = [&](int64_t i) { return task.order[columns - 1 - i]; };
  if (!factor_principal(task.hessian, columns, columns - task.removed[first_level], index, s.system)) return false;
  for (int64_t j = 0; j < columns; ++j) s.pull[j] = T(0);
  int64_t gone = 0;
  for (int64_t k = first_level; k < task.levels; ++k) {
    const int32_t* more = task.order + gone;
    add_multiples(
        task.removed[k] - gone, [&](int64_t i) { return task.hessian + more[i] * columns; },
        [&](int64_t i) { return task.weight[more[i]]; }, columns, s.pull);
    gone = task.removed[k];
    const int64_t n = columns - task.removed[k];
    for (int64_t i = 0; i < n; ++i) s.solution[i] = s.pull[index(i)];
    solve_transposed(s.system, n, s.solution);
    solve_upper(s.system, n, s.solution);
    for (int64_t i = 0; i < n; ++i) task.pruned[k][index(i)] = task.weight[index(i)] + s.solution[i];
  }
  return true;
}

// False if a system is not positive definite.
template <class T>
bool obs_solution(const ObsSolutionTask<T>& task) {
  const ObsSolutionPlan plan = plan_solution(task.columns, task.levels, task.removed);
  ObsSolutionBuffers<T> s;
  obs_solution_layout(s, task.columns, plan.size, task.workspace);
  if (plan.low > 0 && !solve_removed(task, s, plan.low)) return false;
  if (plan.low < task.levels && !solve_kept(task, s, plan.low)) return false;
  for (int64_t k = 0; k < task.levels; ++k) {
    for (int64_t i = 0; i < task.removed[k]; ++i) task.pruned[k][task.order[i]] = T(0);
  }
  return true;
}

}  // namespace SPADE_ISA
}  // namespace spade
