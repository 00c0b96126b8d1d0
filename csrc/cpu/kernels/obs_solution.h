// The optimal weights of one row after a set P of columns is removed and K is kept, in closed form, from the smaller
// system:
//   w_K + (H_KK)⁻¹ H_KP w_P   or   w − H⁻¹_{:P} (H⁻¹_PP)⁻¹ w_P.
#pragma once

#include "cholesky.h"
#include "table.h"

namespace spade {
namespace SPADE_ISA {

template <class T>
struct ObsSolutionBuffers {
  T* system;       // the smaller system
  T* right;        // [columns] its right side, then its solution
  T* removed;      // [columns] the removed weights, 0 elsewhere
  int32_t* index;  // [columns] the columns of the smaller system
};

template <class T>
inline int64_t obs_solution_layout(ObsSolutionBuffers<T>& s, int64_t columns, int64_t removed, T* base) {
  Arena<T> arena{base};
  s.system = arena.take(cholesky_size<T>(smaller(removed, columns - removed)));
  s.right = arena.take(columns);
  s.removed = arena.take(columns);
  s.index = reinterpret_cast<int32_t*>(arena.take(columns));
  return arena.used;
}

template <class T>
int64_t obs_solution_workspace(int64_t columns, int64_t removed) {
  ObsSolutionBuffers<T> s;
  return obs_solution_layout<T>(s, columns, removed, nullptr);
}

template <class T>
inline bool factor_principal(const T* matrix, int64_t columns, const int32_t* index, int64_t n, T* system) {
  const int64_t stride = cholesky_stride<T>(n);
  for (int64_t i = 0; i < n; ++i) {
    const T* row = matrix + index[i] * columns;
    for (int64_t j = i; j < n; ++j) system[i * stride + j] = row[index[j]];
  }
  return cholesky_upper(system, n, stride);
}

// False if the smaller system is not positive definite.
template <class T>
bool obs_solution(const ObsSolutionTask<T>& task) {
  ObsSolutionBuffers<T> s;
  obs_solution_layout(s, task.columns, task.removed, task.workspace);
  const int64_t columns = task.columns;
  const int64_t kept = columns - task.removed;

  if (task.removed <= kept) {
    for (int64_t i = 0; i < task.removed; ++i) {
      s.index[i] = task.order[i];
      s.right[i] = task.weight[task.order[i]];
    }
    if (!factor_principal(task.hinv, columns, s.index, task.removed, s.system)) return false;
    cholesky_solve(s.system, task.removed, cholesky_stride<T>(task.removed), s.right);
    for (int64_t i = 0; i < task.removed; ++i) {
      const T* row = task.hinv + s.index[i] * columns;
      const T step = s.right[i];
      for (int64_t j = 0; j < columns; ++j) task.weight[j] -= row[j] * step;
    }
  } else {
    for (int64_t j = 0; j < columns; ++j) {
      s.removed[j] = T(0);
      s.right[j] = T(1);  // marks the kept columns for now
    }
    for (int64_t i = 0; i < task.removed; ++i) {
      s.removed[task.order[i]] = task.weight[task.order[i]];
      s.right[task.order[i]] = T(0);
    }
    int64_t n = 0;
    for (int64_t j = 0; j < columns; ++j) {
      if (s.right[j] != T(0)) s.index[n++] = static_cast<int32_t>(j);
    }
    for (int64_t i = 0; i < kept; ++i) s.right[i] = dot(task.hessian + s.index[i] * columns, s.removed, columns);
    if (!factor_principal(task.hessian, columns, s.index, kept, s.system)) return false;
    cholesky_solve(s.system, kept, cholesky_stride<T>(kept), s.right);
    for (int64_t i = 0; i < kept; ++i) task.weight[s.index[i]] += s.right[i];
  }
  for (int64_t i = 0; i < task.removed; ++i) task.weight[task.order[i]] = T(0);
  return true;
}

}  // namespace SPADE_ISA
}  // namespace spade
