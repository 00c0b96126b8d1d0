// Pruning paths: for each row a pivoted Cholesky factorisation of H⁻¹ whose next pivot is the block of columns with the
// smallest score. All rows of all problems at once.
//
// The trailing matrix of a row is kept stale. Each pivot row is fetched from it, corrected by the pivot rows taken
// since (the panel, left-looking) and joins the panel; weights and the diagonal blocks, which decide the scores, are
// always current. When the panel is full, a second kernel drops the removed columns and brings the rest up to date by
// one symmetric update. Until the first of these the trailing matrix is the inverse Hessian that the rows of a problem
// share. Columns are ordered [component of a block][block]. For a row of C columns and panels of B = 64 rows:
//
// obs_path_start (once), obs_path_panel
// - grid: a block for each row; block: a thread for every two columns, up to 1024
// - shared memory: about 600 bytes and a value for each row of the panel
// - operations: B C² / 2
// - bytes: B C² sizeof(T) / 4, from the second-level cache while it holds the panels at work (64 C values a row)
// - bound expected on an H100: the second-level cache, device memory once the panels outgrow it, and with fewer rows
//   than multiprocessors the latency of a pivot, some 5 µs
// obs_path_flush
// - grid: a block for each row and N x N tile on or above the diagonal; block: 256 threads
// - shared memory: 4 * 8 * (N + 4) values and 8 N bytes, 18 KB at N = 128 in float32
// - operations: C³ / 3
// - bytes: C³ sizeof(T) / (3 B), a byte for 16 operations in float32
// - bound expected on an H100: the float32 rate; of the instructions of the loop 82 % multiply (N = 64: 66 %)
#pragma once

#include "block.cuh"
#include "tile.cuh"

namespace spade::cuda {

constexpr int32_t kPanelRows = 64;
constexpr int kPathThreads = 1024;

// Entries of the lower triangle of a diagonal block.
__host__ __device__ __forceinline__ int32_t triangle(int32_t block) {
  return block * (block + 1) / 2;
}

__host__ __device__ __forceinline__ int32_t panel_capacity(int32_t block) {
  return block >= kPanelRows ? block : kPanelRows / block * block;
}

// Everything of a row that its kernels share. The first dimension of all arrays is the row at work.
template <class T>
struct ObsPathTask {
  const T* hinv;     // [problems][columns][columns] of the dense problem
  const T* weights;  // [rows][columns] dense
  int32_t* order;    // [rows][steps]
  T* losses;         // [rows][steps]
  int64_t first_row, rows_of_problem;
  int32_t dense_count;       // blocks of the dense problem
  int32_t block, steps;      // columns of a block; blocks to remove in all
  int32_t limit_n, limit_m;  // limit_m > 0: only limit_n of limit_m neighbouring blocks may go

  int32_t count;        // blocks at the last flush; removed ones are still in place
  int32_t step, last;   // steps of this panel: [step, last)
  const T* matrix;      // [count * block][count * block] stale trailing matrix, upper triangle; null: hinv
  T* next;              // after the flush
  T* panel;             // [panel_capacity][dense columns] scaled pivot rows, `count * block` values each
  T* weight;            // [dense columns] current
  T* diagonal;          // [triangle][count] diagonal blocks
  T* floor;             // [block][count] least pivot: rounding of the original diagonal
  T* scratch;           // [triangle + 2 * block][count] factors of the diagonal blocks; none for block 1
  int32_t* id;          // [count] original block, complemented once it is removed
  int32_t* barred;      // [count] 1: may not be removed (any more)
  int32_t* removed_of;  // [dense count] removals of each group of limit_m blocks
  int32_t* keep;        // [count] what survives the flush

  __host__ __device__ int64_t dense_columns() const {
    return static_cast<int64_t>(dense_count) * block;
  }
};

// The arrays of one row.
template <class T>
struct ObsPathRow {
  const T* matrix;
  bool shared;  // the matrix is the whole of H⁻¹
  int64_t columns;
  T *panel, *weight, *diagonal, *floor, *scratch;
  int32_t *id, *barred, *removed_of, *keep;

  __device__ __forceinline__ ObsPathRow(const ObsPathTask<T>& task, int64_t row)
      : shared(task.matrix == nullptr), columns(static_cast<int64_t>(task.count) * task.block) {
    const int64_t dense = task.dense_columns();
    const int64_t problem = (task.first_row + row) / task.rows_of_problem;
    matrix = shared ? task.hinv + problem * dense * dense : task.matrix + row * columns * columns;
    panel = task.panel + row * panel_capacity(task.block) * dense;
    weight = task.weight + row * dense;
    diagonal = task.diagonal + row * triangle(task.block) * task.dense_count;
    floor = task.floor + row * dense;
    scratch = task.scratch + row * (triangle(task.block) + 2 * task.block) * task.dense_count;
    id = task.id + row * task.dense_count;
    barred = task.barred + row * task.dense_count;
    removed_of = task.removed_of + row * task.dense_count;
    keep = task.keep + row * task.dense_count;
  }
};

// Behind it lie the panel_capacity coefficients of a pivot row.
template <class T>
struct alignas(16) ObsPathShared {
  BestShared<T> best;
  RankShared rank;
  T pivot, floor, weight;

  __device__ __forceinline__ T* coefficients() {
    return reinterpret_cast<T*>(this + 1);
  }
};

template <class T>
__global__ void __launch_bounds__(kPathThreads) obs_path_start(const __grid_constant__ ObsPathTask<T> task) {
  const ObsPathRow<T> s(task, blockIdx.x);
  const int32_t threads = static_cast<int32_t>(blockDim.x);
  const T rounding = sizeof(T) == 4 ? T(1e-7) : T(2e-16);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < s.columns; i += threads) {
    s.weight[i] = task.weights[(task.first_row + blockIdx.x) * s.columns + i];
    s.floor[i] = s.matrix[i * s.columns + i] * rounding;
  }
  for (int32_t a = 0, entry = 0; a < task.block; ++a) {
    for (int32_t b = 0; b <= a; ++b, ++entry) {
      for (int32_t k = static_cast<int32_t>(threadIdx.x); k < task.count; k += threads) {
        const int64_t row = static_cast<int64_t>(a) * task.count + k;
        s.diagonal[entry * task.count + k] = s.matrix[row * s.columns + b * task.count + k];
      }
    }
  }
  for (int32_t k = static_cast<int32_t>(threadIdx.x); k < task.count; k += threads) {
    s.id[k] = k;
    s.barred[k] = 0;
    s.removed_of[k] = 0;
  }
}

// wᵀ D⁻¹ w of block k, by the factor L E Lᵀ of its diagonal block.
template <class T>
__device__ __forceinline__ T block_score(const ObsPathRow<T>& s, int32_t block, int32_t count, int32_t k) {
  if (block == 1) return s.weight[k] * s.weight[k] / max(s.diagonal[k], s.floor[k]);
  T* factor = s.scratch;  // unit lower triangle
  T* solved = s.scratch + triangle(block) * count;
  T* inverse = solved + block * count;
  T score = T(0);
  for (int32_t a = 0; a < block; ++a) {
    T* row_a = factor + triangle(a) * count + k;
    const T* source = s.diagonal + triangle(a) * count + k;
    T x = s.weight[a * count + k];
    for (int32_t b = 0; b < a; ++b) {
      const T* row_b = factor + triangle(b) * count + k;
      T v = source[b * count];
      for (int32_t t = 0; t < b; ++t) v -= row_a[t * count] * row_b[t * count];
      row_a[b * count] = v;
    }
    T d = source[a * count];
    for (int32_t t = 0; t < a; ++t) {
      const T v = row_a[t * count];
      const T scaled = v * inverse[t * count + k];
      row_a[t * count] = scaled;
      d -= v * scaled;
      x -= scaled * solved[t * count + k];
    }
    d = T(1) / max(d, s.floor[a * count + k]);
    inverse[a * count + k] = d;
    solved[a * count + k] = x;
    score += x * x * d;
  }
  return score;
}

// The block of smallest score, the lowest among equals; the first that may go if every score is infinite or not a
// number.
template <class T>
__device__ __forceinline__ Candidate<T> select_block(const ObsPathTask<T>& task, const ObsPathRow<T>& s,
                                                     ObsPathShared<T>& shared) {
  Candidate<T> own{infinity<T>(), INT32_MAX};
  Candidate<T> first{infinity<T>(), INT32_MAX};
  for (int32_t k = static_cast<int32_t>(threadIdx.x); k < task.count; k += static_cast<int32_t>(blockDim.x)) {
    if (s.barred[k]) continue;
    const T score = block_score(s, task.block, task.count, k);
    if (score < own.score) own = {score, k};
    first.index = min(first.index, k);
  }
  own = best_of_block(own, shared.best);
  return own.index < INT32_MAX ? own : best_of_block(first, shared.best);
}

// The row of the current trailing matrix that belongs to a column, scaled to a Cholesky row, becomes row `size` of the
// panel; the weights follow. The diagonal blocks do not yet know the rows of the block's components before.
template <class T>
__device__ __forceinline__ void eliminate(const ObsPathTask<T>& task, const ObsPathRow<T>& s, ObsPathShared<T>& shared,
                                          int32_t size, int32_t component, int32_t position) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t threads = static_cast<int32_t>(blockDim.x);
  const int32_t columns = static_cast<int32_t>(s.columns);
  const int32_t j = component * task.count + position;
  T* coefficient = shared.coefficients();
  for (int32_t t = thread; t < size; t += threads) coefficient[t] = s.panel[t * s.columns + j];
  if (thread == 0) {
    shared.pivot = s.diagonal[(triangle(component) + component) * task.count + position];
    shared.floor = s.floor[j];
    shared.weight = s.weight[j];
  }
  __syncthreads();
  T pivot = shared.pivot;
  for (int32_t t = size - component; t < size; ++t) pivot -= coefficient[t] * coefficient[t];
  const T scale = T(1) / sqrt(max(pivot, shared.floor));
  const T step = shared.weight * scale;
  T* row = s.panel + size * s.columns;
  for (int32_t i = thread; i < columns; i += threads) {
    T p = s.shared || j <= i ? s.matrix[j * s.columns + i] : s.matrix[i * s.columns + j];
    const T* earlier = s.panel + i;
#pragma unroll 8
    for (int32_t t = 0; t < size; ++t) p -= coefficient[t] * earlier[t * s.columns];
    p *= scale;
    row[i] = p;
    s.weight[i] -= p * step;
    if (task.block == 1) s.diagonal[i] -= p * p;
  }
  __syncthreads();
}

// Takes the last `block` rows of the panel, of `size`, off the diagonal blocks.
template <class T>
__device__ __forceinline__ void update_diagonal(const ObsPathTask<T>& task, const ObsPathRow<T>& s, int32_t size) {
  const T* rows = s.panel + (size - task.block) * s.columns;
  for (int32_t a = 0, entry = 0; a < task.block; ++a) {
    for (int32_t b = 0; b <= a; ++b, ++entry) {
      for (int32_t k = static_cast<int32_t>(threadIdx.x); k < task.count; k += static_cast<int32_t>(blockDim.x)) {
        T sum = T(0);
        for (int32_t c = 0; c < task.block; ++c) {
          sum += rows[c * s.columns + a * task.count + k] * rows[c * s.columns + b * task.count + k];
        }
        s.diagonal[entry * task.count + k] -= sum;
      }
    }
  }
  __syncthreads();
}

// A removed block stays in place until the flush: weight 0, a unit diagonal, and no chance to be chosen. A group of
// limit_m blocks that has lost limit_n keeps the others.
template <class T>
__device__ __forceinline__ void retire(const ObsPathTask<T>& task, const ObsPathRow<T>& s, int32_t position) {
  for (int32_t a = 0, entry = 0; a < task.block; ++a) {
    s.weight[a * task.count + position] = T(0);
    for (int32_t b = 0; b <= a; ++b, ++entry) s.diagonal[entry * task.count + position] = T(a == b);
  }
  s.barred[position] = 1;
  if (task.limit_m > 0) {
    const int32_t group = s.id[position] / task.limit_m;
    if (++s.removed_of[group] == task.limit_n) {
      const int32_t end = min(task.count, position + task.limit_m);
      for (int32_t k = max(0, position - task.limit_m); k < end; ++k) {
        if (s.id[k] >= 0 && s.id[k] / task.limit_m == group) s.barred[k] = 1;
      }
    }
  }
  s.id[position] = ~s.id[position];
}

// Keeps of each of `rows` stretches of `count` values those that `keep` lists, in place.
template <class Value>
__device__ __forceinline__ void compact(Value* values, int32_t rows, int32_t count, const int32_t* keep, int32_t left) {
  for (int32_t base = 0; base < rows * left; base += static_cast<int32_t>(blockDim.x)) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x);
    const bool mine = i < rows * left;
    const Value value = mine ? values[i / left * count + keep[i % left]] : Value(0);
    __syncthreads();
    if (mine) values[i] = value;
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kPathThreads, 1) obs_path_panel(const __grid_constant__ ObsPathTask<T> task) {
  auto& shared = shared_memory<ObsPathShared<T>>();
  const ObsPathRow<T> s(task, blockIdx.x);
  const int64_t out = (task.first_row + blockIdx.x) * task.steps;
  int32_t size = 0;
  for (int32_t step = task.step; step < task.last; ++step) {
    const Candidate<T> chosen = select_block(task, s, shared);
    if (threadIdx.x == 0) {
      task.order[out + step] = s.id[chosen.index];
      task.losses[out + step] = chosen.score / 2;
    }
    if (step + 1 == task.steps) return;
    for (int32_t c = 0; c < task.block; ++c) eliminate(task, s, shared, size++, c, chosen.index);
    if (task.block > 1) update_diagonal(task, s, size);
    if (threadIdx.x == 0) retire(task, s, chosen.index);
    __syncthreads();
  }
  const int32_t left = list_marked(task.count, shared.rank, [&](int32_t k) { return s.id[k] >= 0; }, s.keep);
  compact(s.weight, task.block, task.count, s.keep, left);
  compact(s.diagonal, triangle(task.block), task.count, s.keep, left);
  compact(s.floor, task.block, task.count, s.keep, left);
  compact(s.id, 1, task.count, s.keep, left);
  compact(s.barred, 1, task.count, s.keep, left);
}

template <class T, int N>
struct ObsPathFlushShared {
  TileShared<T, N> tiles;
  int32_t left[N], right[N];  // old columns
};

template <class T>
struct PanelSource {
  const T* panel;
  int64_t columns;
  const volatile int32_t *left_columns, *right_columns;  // volatile: not to be held in registers

  __device__ __forceinline__ const T* start(int64_t k) const {
    return panel + k * columns;
  }
  __device__ __forceinline__ const T* anywhere() const {
    return panel;
  }
  __device__ __forceinline__ void advance(const T*& row) const {
    row += kSlice * columns;
  }
  __device__ __forceinline__ T left(const T* row, int i) const {
    return row[left_columns[i]];
  }
  __device__ __forceinline__ T right(const T* row, int j) const {
    return row[right_columns[j]];
  }
};

template <class T, int N>
__global__ void __launch_bounds__(kTileThreads, 2) obs_path_flush(const __grid_constant__ ObsPathTask<T> task) {
  auto& shared = shared_memory<ObsPathFlushShared<T, N>>();
  const int32_t removed = task.last - task.step;
  const int32_t left = task.count - removed;
  const int64_t columns = static_cast<int64_t>(left) * task.block;
  const int64_t side = ceil_div(columns, N);
  const int64_t tiles = side * (side + 1) / 2;
  const TilePlace tile = upper_tile(blockIdx.x % tiles, side);
  const int64_t row = blockIdx.x / tiles;
  const ObsPathRow<T> s(task, row);
  for (int i = static_cast<int>(threadIdx.x); i < 2 * N; i += kTileThreads) {
    const int64_t column = i < N ? tile.row * N + i : tile.column * N + i - N;
    const int32_t old = column < columns ? static_cast<int32_t>(column / left) * task.count + s.keep[column % left] : 0;
    (i < N ? shared.left[i] : shared.right[i - N]) = old;
  }
  __syncthreads();
  const PanelSource<T> source{s.panel, s.columns, shared.left, shared.right};
  const int32_t first_row = static_cast<int32_t>(tile.row * N);
  const int32_t first_column = static_cast<int32_t>(tile.column * N);
  auto inside = [&](int i, int j) { return first_row + i <= first_column + j && first_column + j < columns; };
  TileSums<T, N> sums;
  sums.for_each([&](int i, int j, T& sum) {
    sum = inside(i, j) ? -s.matrix[source.left_columns[i] * s.columns + source.right_columns[j]] : T(0);
  });
  multiply_tile(shared.tiles, removed * task.block, false, source, sums);
  T* out = task.next + row * columns * columns;
  sums.for_each([&](int i, int j, T& sum) {
    if (inside(i, j)) out[static_cast<int64_t>(first_row + i) * columns + first_column + j] = -sum;
  });
}

}  // namespace spade::cuda
