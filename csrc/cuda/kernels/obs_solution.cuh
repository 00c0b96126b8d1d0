// The optimal weights of each row after a set P of its columns is removed and K is kept, in closed form:
//   w − H⁻¹_{:P} (H⁻¹_PP)⁻¹ w_P   or   w_K + (H_KK)⁻¹ H_KP w_P,
// whichever system is smaller, so that none has more than half of the columns.
//
// The sets of several levels are nested. With columns in order of removal every H⁻¹_PP is a leading block of the
// largest one, in the opposite order every H_KK is, and the Cholesky factor of a leading block is a leading block of
// the factor: one factorisation serves all levels that remove up to half, another all that remove more.
//
// - grid: a block for each row; block: 256 threads
// - shared memory: the larger of a tile's (tile.cuh, N = 64) and a square of 64 x 65 values, 17 KB in float32
// - operations: n³ / 3 for a system of n columns, nearly all in multiply_tile, and 4 n² + 2 n C a level
// - bytes: n³ sizeof(T) / 192, from the second-level cache up to n = 300
// - bound expected on an H100: the float32 rate while there are as many rows at work as multiprocessors
#pragma once

#include "block.cuh"
#include "tile.cuh"

namespace spade::cuda {

constexpr int kStep = 64;  // rows of the factor at a time
constexpr int kRegisterRows = 8;

template <class T>
struct ObsSolutionTask {
  const T *weight, *hessian, *hinv;  // [rows][columns], [problems][columns][columns]
  const int32_t* order;              // [rows][steps] blocks
  const int32_t* counts;             // [levels][rows] blocks to remove
  T* pruned;                         // [levels][rows][columns]
  int64_t first_row, rows, rows_of_problem;
  int32_t columns, block, steps, levels;
  // Of each row at work:
  T* system;                  // [columns / 2][columns / 2], the upper triangle is used
  T *right, *solved;          // [columns]
  int32_t *in_order, *place;  // [columns] the columns in order of removal, and where each stands there
};

template <class T>
struct ObsSolutionShared {
  T diagonal[kStep][kStep + 1];
};

// A system of `size` columns: those that `sign` and `first` pick from the order of removal.
template <class T>
struct ObsSystem {
  T* matrix;
  int32_t stride, size;
  const int32_t* order;
  int32_t first, sign;

  __device__ __forceinline__ int32_t column(int32_t i) const {
    return order[first + sign * i];
  }
};

// The removed columns in order of removal, then the others; and the place of each. Every place is a column even if
// `removal` holds what is not a block, or a block twice.
template <class T>
__device__ __forceinline__ void order_columns(const ObsSolutionTask<T>& task, const int32_t* removal, int32_t removed,
                                              int32_t* in_order, int32_t* place, RankShared& rank) {
  const int32_t threads = static_cast<int32_t>(blockDim.x);
  for (int32_t c = static_cast<int32_t>(threadIdx.x); c < task.columns; c += threads) place[c] = task.columns;
  __syncthreads();
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < removed; i += threads) {
    const int32_t last = task.columns / task.block - 1;
    const int32_t column = min(max(removal[i / task.block], 0), last) * task.block + i % task.block;
    in_order[i] = column;
    atomicMin(&place[column], i);
  }
  __syncthreads();
  int32_t found = removed;
  for (int32_t base = 0; base < task.columns; base += threads) {
    const int32_t c = base + static_cast<int32_t>(threadIdx.x);
    const bool left = c < task.columns && place[c] == task.columns;
    int32_t total;
    const int32_t at = found + rank_in_block(left, rank, &total);
    if (left) place[c] = min(at, task.columns - 1);
    if (left && at < task.columns) in_order[at] = c;
    found += total;
  }
  __syncthreads();
}

// Rows [p, p + width) and their columns from p on: factors the diagonal square, unblocked, and leaves it in shared
// memory. Returns the first column whose pivot is not positive, counted within the square, or width.
template <class T>
__device__ __forceinline__ int32_t factor_square(const ObsSystem<T>& s, int32_t p, int32_t width,
                                                 ObsSolutionShared<T>& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int e = thread; e < kStep * kStep; e += kTileThreads) {
    const int i = e / kStep;
    const int j = e % kStep;
    const bool inside = i <= j && j < width;
    shared.diagonal[i][j] = inside ? s.matrix[static_cast<int64_t>(p + i) * s.stride + p + j] : T(i == j);
  }
  __syncthreads();
  int32_t failed = width;
  for (int k = 0; k < width; ++k) {
    const T pivot = shared.diagonal[k][k];
    __syncthreads();
    if (!(pivot > T(0)) && failed == width) failed = k;
    const T scale = T(1) / sqrt(pivot);
    if (thread < kStep && thread >= k) shared.diagonal[k][thread] *= scale;
    __syncthreads();
    for (int e = thread; e < kStep * kStep; e += kTileThreads) {
      const int i = e / kStep;
      const int j = e % kStep;
      if (k < i && i <= j) shared.diagonal[i][j] -= shared.diagonal[k][i] * shared.diagonal[k][j];
    }
    __syncthreads();
  }
  for (int e = thread; e < kStep * kStep; e += kTileThreads) {
    const int i = e / kStep;
    const int j = e % kStep;
    if (i <= j && j < width) s.matrix[static_cast<int64_t>(p + i) * s.stride + p + j] = shared.diagonal[i][j];
  }
  return failed;
}

// Rows [p, p + 64) of the factor right of its diagonal square: a column for each thread, eight rows of it at a time.
template <class T>
__device__ __forceinline__ void solve_square(const ObsSystem<T>& s, int32_t p, const ObsSolutionShared<T>& shared) {
  for (int32_t j = p + kStep + static_cast<int32_t>(threadIdx.x); j < s.size; j += kTileThreads) {
    T* column = s.matrix + static_cast<int64_t>(p) * s.stride + j;
    for (int base = 0; base < kStep; base += kRegisterRows) {
      T x[kRegisterRows];
#pragma unroll
      for (int i = 0; i < kRegisterRows; ++i) x[i] = column[static_cast<int64_t>(base + i) * s.stride];
      for (int t = 0; t < base; ++t) {
        const T earlier = column[static_cast<int64_t>(t) * s.stride];
#pragma unroll
        for (int i = 0; i < kRegisterRows; ++i) x[i] -= shared.diagonal[t][base + i] * earlier;
      }
#pragma unroll
      for (int i = 0; i < kRegisterRows; ++i) {
        x[i] /= shared.diagonal[base + i][base + i];
#pragma unroll
        for (int t = i + 1; t < kRegisterRows; ++t) x[t] -= shared.diagonal[base + i][base + t] * x[i];
        column[static_cast<int64_t>(base + i) * s.stride] = x[i];
      }
    }
  }
}

template <class T>
struct FactorSource {
  const T* rows;
  int32_t stride, size, left_column, right_column;

  __device__ __forceinline__ const T* start(int64_t k) const {
    return rows + k * stride;
  }
  __device__ __forceinline__ const T* anywhere() const {
    return rows;
  }
  __device__ __forceinline__ void advance(const T*& row) const {
    row += kSlice * stride;
  }
  __device__ __forceinline__ T left(const T* row, int i) const {
    return row[min(left_column + i, size - 1)];
  }
  __device__ __forceinline__ T right(const T* row, int j) const {
    return row[min(right_column + j, size - 1)];
  }
};

// Fills the system from a matrix and factors it to UᵀU. Returns how many leading columns are positive definite.
template <class T>
__device__ __forceinline__ int32_t factor_system(const ObsSystem<T>& s, const T* matrix, int32_t columns) {
  for (int32_t i = warp_index(); i < s.size; i += warps_of_block()) {
    const T* row = matrix + static_cast<int64_t>(s.column(i)) * columns;
    for (int32_t j = i / 32 * 32 + warp_lane(); j < s.size; j += 32) {
      if (j >= i) s.matrix[static_cast<int64_t>(i) * s.stride + j] = row[s.column(j)];
    }
  }
  __syncthreads();
  for (int32_t p = 0; p < s.size; p += kStep) {
    auto& square = shared_memory<ObsSolutionShared<T>>();
    const int32_t width = min(kStep, s.size - p);
    const int32_t good = factor_square(s, p, width, square);
    if (good < width) return p + good;
    solve_square(s, p, square);
    __syncthreads();
    auto& tiles = shared_memory<TileShared<T, kStep>>();
    for (int32_t i = p + kStep; i < s.size; i += kStep) {
      for (int32_t j = i; j < s.size; j += kStep) {
        TileSums<T, kStep> sums;
        sums.clear();
        multiply_tile(tiles, kStep, false,
                      FactorSource<T>{s.matrix + static_cast<int64_t>(p) * s.stride, s.stride, s.size, i, j}, sums);
        sums.for_each([&](int a, int b, T& sum) {
          if (i + a <= j + b && j + b < s.size) s.matrix[static_cast<int64_t>(i + a) * s.stride + j + b] -= sum;
        });
      }
    }
    __syncthreads();
  }
  return s.size;
}

// Loads rows [p, p + width) of the factor's diagonal squares.
template <class T>
__device__ __forceinline__ void load_square(const ObsSystem<T>& s, int32_t p, int32_t width,
                                            ObsSolutionShared<T>& shared) {
  for (int e = static_cast<int>(threadIdx.x); e < width * kStep; e += kTileThreads) {
    const int i = e / kStep;
    const int j = e % kStep;
    if (i <= j && j < width) shared.diagonal[i][j] = s.matrix[static_cast<int64_t>(p + i) * s.stride + p + j];
  }
  __syncthreads();
}

// Solves Uᵀ y = x for the leading n columns, in place.
template <class T>
__device__ __forceinline__ void solve_transposed(const ObsSystem<T>& s, int32_t n, T* x) {
  auto& shared = shared_memory<ObsSolutionShared<T>>();
  for (int32_t p = 0; p < n; p += kStep) {
    const int32_t width = min(kStep, n - p);
    load_square(s, p, width, shared);
    if (warp_index() == 0) {
      for (int k = 0; k < width; ++k) {
        const T y = x[p + k] / shared.diagonal[k][k];
        __syncwarp();
        if (warp_lane() == 0) x[p + k] = y;
        for (int i = k + 1 + warp_lane(); i < width; i += 32) x[p + i] -= shared.diagonal[k][i] * y;
        __syncwarp();
      }
    }
    __syncthreads();
    for (int32_t j = p + width + static_cast<int32_t>(threadIdx.x); j < n; j += kTileThreads) {
      const T* column = s.matrix + static_cast<int64_t>(p) * s.stride + j;
      T value = x[j];
      for (int k = 0; k < width; ++k) value -= column[static_cast<int64_t>(k) * s.stride] * x[p + k];
      x[j] = value;
    }
    __syncthreads();
  }
}

// Solves U z = x for the leading n columns, in place.
template <class T>
__device__ __forceinline__ void solve_upper(const ObsSystem<T>& s, int32_t n, T* x) {
  auto& shared = shared_memory<ObsSolutionShared<T>>();
  for (int32_t p = (n - 1) / kStep * kStep; p >= 0; p -= kStep) {
    const int32_t width = min(kStep, n - p);
    load_square(s, p, width, shared);
    if (warp_index() == 0) {
      for (int k = width - 1; k >= 0; --k) {
        const T z = x[p + k] / shared.diagonal[k][k];
        __syncwarp();
        if (warp_lane() == 0) x[p + k] = z;
        for (int i = warp_lane(); i < k; i += 32) x[p + i] -= shared.diagonal[i][k] * z;
        __syncwarp();
      }
    }
    __syncthreads();
    for (int32_t i = warp_index(); i < p; i += warps_of_block()) {
      const T* row = s.matrix + static_cast<int64_t>(i) * s.stride + p;
      T sum = T(0);
      for (int k = warp_lane(); k < width; k += 32) sum += row[k] * x[p + k];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
      if (warp_lane() == 0) x[i] -= sum;
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, 2) obs_solution(const __grid_constant__ ObsSolutionTask<T> task) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int64_t row = task.first_row + blockIdx.x;
  const int32_t columns = task.columns;
  const int32_t half = columns / 2;
  const T* weight = task.weight + row * columns;
  const int64_t problem = row / task.rows_of_problem * columns * columns;
  T* right = task.right + static_cast<int64_t>(blockIdx.x) * columns;
  T* solved = task.solved + static_cast<int64_t>(blockIdx.x) * columns;
  int32_t* in_order = task.in_order + static_cast<int64_t>(blockIdx.x) * columns;
  int32_t* place = task.place + static_cast<int64_t>(blockIdx.x) * columns;
  const T nothing = T(0) / (T(1) - T(1));

  auto removed_at = [&](int32_t level) {
    return min(max(task.counts[level * task.rows + row], 0), task.steps) * task.block;
  };
  int32_t most = 0, low = 0, high = 0;  // removed in all; columns of the two systems
  for (int32_t level = 0; level < task.levels; ++level) {
    const int32_t removed = removed_at(level);
    most = max(most, removed);
    if (removed <= half) {
      low = max(low, removed);
    } else {
      high = max(high, columns - removed);
    }
  }
  order_columns(task, task.order + row * task.steps, most, in_order, place, shared_memory<RankShared>());
  T* matrix = task.system + static_cast<int64_t>(blockIdx.x) * half * half;

  const ObsSystem<T> gone{matrix, half, low, in_order, 0, 1};
  const int32_t gone_good = factor_system(gone, task.hinv + problem, columns);
  for (int32_t i = thread; i < low; i += kTileThreads) right[i] = weight[gone.column(i)];
  __syncthreads();
  solve_transposed(gone, min(low, gone_good), right);
  for (int32_t level = 0; level < task.levels; ++level) {
    const int32_t n = removed_at(level);
    if (n > half) continue;
    for (int32_t i = thread; i < n; i += kTileThreads) solved[i] = right[i];
    __syncthreads();
    if (n > 0 && n <= gone_good) solve_upper(gone, n, solved);
    T* out = task.pruned + (level * task.rows + row) * columns;
    for (int32_t c = thread; c < columns; c += kTileThreads) {
      T value = n <= gone_good ? weight[c] : nothing;
      for (int32_t i = 0; i < n; ++i) {
        value -= task.hinv[problem + static_cast<int64_t>(gone.column(i)) * columns + c] * solved[i];
      }
      out[c] = place[c] < n ? T(0) : value;
    }
    __syncthreads();
  }

  const ObsSystem<T> kept{matrix, half, high, in_order, columns - 1, -1};
  const int32_t kept_good = factor_system(kept, task.hessian + problem, columns);
  for (int32_t level = 0; level < task.levels; ++level) {
    const int32_t removed = removed_at(level);
    const int32_t n = columns - removed;
    if (removed <= half) continue;
    for (int32_t j = thread; j < n; j += kTileThreads) {
      const int32_t c = kept.column(j);
      T pull = T(0);
      for (int32_t i = 0; i < removed; ++i) {
        pull += task.hessian[problem + static_cast<int64_t>(in_order[i]) * columns + c] * weight[in_order[i]];
      }
      solved[j] = pull;
    }
    __syncthreads();
    if (n > 0 && n <= kept_good) {
      solve_transposed(kept, n, solved);
      solve_upper(kept, n, solved);
    }
    T* out = task.pruned + (level * task.rows + row) * columns;
    for (int32_t c = thread; c < columns; c += kTileThreads) {
      const T value = n <= kept_good ? weight[c] + solved[columns - 1 - place[c]] : nothing;
      out[c] = place[c] < removed ? T(0) : value;
    }
    __syncthreads();
  }
}

}  // namespace spade::cuda
