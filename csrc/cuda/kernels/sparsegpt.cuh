// SparseGPT with its mask block and its update block told apart.
//
// The sweep goes by panels of about 32 columns. sparsegpt_panel brings each mask block of a panel up to date, chooses
// its mask among all rows of the problem (radix selection of the k-th smallest score), and walks its columns; rows meet
// only in the selection. sparsegpt_trailing takes the errors of the panel off all columns behind it. Weights are stored
// transposed, so that neighbouring threads have neighbouring rows. For R rows and C columns:
//
// sparsegpt_panel
// - grid: a block for each problem; block: 512 threads
// - shared memory: 4 KB (float64: 8 KB) for the panel's square of the factor, 1 KB for the histogram
// - operations: 32 R C
// - bytes: 16 R C sizeof(T), from the second-level cache
// - bound expected on an H100: the latency of the selections, about 10 µs a mask block in float32, for
//   any number of problems up to that of multiprocessors
// sparsegpt_trailing
// - grid: a block for each problem and 64 x 64 tile of columns and rows; block: 256 threads
// - shared memory: 4 * 8 * 68 values
// - operations: R C²
// - bytes: R C² sizeof(T) / 32, a byte for 8 operations in float32; bound expected: device memory
#pragma once

#include "block.cuh"
#include "tile.cuh"

namespace spade::cuda {

constexpr int kSweepPanel = 32;
constexpr int kSweepThreads = 512;
constexpr int kSweepTile = 64;

template <class T>
struct SparseGptTask {
  T* weight;              // [problems][columns][rows]
  const T* factor;        // [problems][columns][columns]
  const uint8_t* zeros;   // [problems][columns][rows] 1: zero before and after, whatever the scores; or null
  const int64_t* counts;  // [problems][mask blocks] other weights to remove
  T* losses;              // [problems][rows]
  T* error;               // [problems][kSweepPanel][rows] errors of the panel's columns, each divided by its diagonal
  T* scores;              // [problems][mask_block][rows]
  uint8_t* mask;          // [problems][mask_block][rows] 1: removed
  int32_t rows, columns, mask_block, n, m;
  bool include_ties;
  int32_t begin, end;  // the panel

  __host__ __device__ int32_t mask_blocks() const {
    return ceil_div(columns, mask_block);
  }
};

// Panels end where mask blocks do, or lie inside one.
__host__ __device__ __forceinline__ int32_t sparsegpt_panel_end(int32_t columns, int32_t mask_block, int32_t begin) {
  const int32_t end =
      mask_block <= kSweepPanel ? begin + kSweepPanel / mask_block * mask_block : (begin / mask_block + 1) * mask_block;
  const int32_t longest = begin + kSweepPanel;
  const int32_t nearer = end < longest ? end : longest;
  return nearer < columns ? nearer : columns;
}

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
  static __device__ __forceinline__ type of(float x) {
    return __float_as_uint(x);
  }
};
template <>
struct BitsOf<double> {
  using type = unsigned long long;
  static __device__ __forceinline__ type of(double x) {
    return static_cast<type>(__double_as_longlong(x));
  }
};

template <class T>
struct SparseGptShared {
  T factor[kSweepPanel][kSweepPanel];
  int32_t histogram[256];
  RankShared rank;
  int32_t digit, left, ties;
};

template <class T>
struct Threshold {
  typename BitsOf<T>::type bits;  // of the k-th smallest score
  int32_t wanted, ties;           // scores equal to it among the k smallest, and in all
};

// Scores are not negative, so they are ordered as their bits are.
template <class T>
__device__ __forceinline__ Threshold<T> kth_smallest(const T* scores, int32_t size, int32_t k,
                                                     SparseGptShared<T>& shared) {
  using Bits = typename BitsOf<T>::type;
  const int thread = static_cast<int>(threadIdx.x);
  Threshold<T> found{0, k, 0};
  for (int shift = 8 * sizeof(T) - 8; shift >= 0; shift -= 8) {
    for (int d = thread; d < 256; d += kSweepThreads) shared.histogram[d] = 0;
    __syncthreads();
    for (int32_t i = thread; i < size; i += kSweepThreads) {
      const Bits bits = BitsOf<T>::of(scores[i]);
      const bool candidate = shift == 8 * sizeof(T) - 8 || bits >> (shift + 8) == found.bits >> (shift + 8);
      if (candidate) atomicAdd(&shared.histogram[static_cast<int>(bits >> shift) & 255], 1);
    }
    __syncthreads();
    if (thread < 32) {  // each lane has eight digits
      int32_t own = 0;
#pragma unroll
      for (int d = 0; d < 8; ++d) own += shared.histogram[8 * thread + d];
      int32_t upto = own;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int32_t before = __shfl_up_sync(kFullWarp, upto, distance);
        if (thread >= distance) upto += before;
      }
      int32_t left = found.wanted - (upto - own);
      if (left > 0 && left <= own) {
        int digit = 8 * thread;
        while (left > shared.histogram[digit]) left -= shared.histogram[digit++];
        shared.digit = digit;
        shared.left = left;
        shared.ties = shared.histogram[digit];
      }
    }
    __syncthreads();
    found = {found.bits | static_cast<Bits>(shared.digit) << shift, shared.left, shared.ties};
    __syncthreads();
  }
  return found;
}

template <class T>
struct SparseGptProblem {
  T *weight, *losses, *error, *scores;
  const T* factor;
  const uint8_t* zeros;  // or null
  const int64_t* counts;
  uint8_t* mask;

  __device__ __forceinline__ SparseGptProblem(const SparseGptTask<T>& task, int64_t problem)
      : weight(task.weight + problem * task.columns * task.rows),
        losses(task.losses + problem * task.rows),
        error(task.error + problem * kSweepPanel * task.rows),
        scores(task.scores + problem * task.mask_block * task.rows),
        factor(task.factor + problem * task.columns * task.columns),
        zeros(task.zeros == nullptr ? nullptr : task.zeros + problem * task.columns * task.rows),
        counts(task.counts + problem * task.mask_blocks()),
        mask(task.mask + problem * task.mask_block * task.rows) {}
};

// Scores of the columns [begin, begin + width), into scores[width][rows], each by the thread that has the row; those of
// kept zeros are infinite.
template <class T>
__device__ __forceinline__ void sweep_scores(const SparseGptTask<T>& task, const SparseGptProblem<T>& s, int32_t begin,
                                             int32_t width) {
  for (int32_t c = 0; c < width; ++c) {
    const T inverse = T(1) / s.factor[static_cast<int64_t>(begin + c) * (task.columns + 1)];
    const T* w = s.weight + static_cast<int64_t>(begin + c) * task.rows;
    for (int32_t r = static_cast<int32_t>(threadIdx.x); r < task.rows; r += kSweepThreads) {
      const T e = w[r] * inverse;
      const bool zero = s.zeros != nullptr && s.zeros[static_cast<int64_t>(begin + c) * task.rows + r];
      s.scores[c * task.rows + r] = zero ? infinity<T>() : e * e;
    }
  }
}

// The mask of a mask block: kept zeros, and the k smallest scores of the others, ties by column, then row.
template <class T>
__device__ __forceinline__ void choose_block(const SparseGptTask<T>& task, const SparseGptProblem<T>& s, int32_t begin,
                                             int32_t width, SparseGptShared<T>& shared) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t size = width * task.rows;
  const uint8_t* zeros = s.zeros == nullptr ? nullptr : s.zeros + static_cast<int64_t>(begin) * task.rows;
  const int64_t count = s.counts[begin / task.mask_block];
  const int32_t k = static_cast<int32_t>(min(max(count, int64_t(0)), static_cast<int64_t>(size)));
  if (k == 0) {
    for (int32_t i = thread; i < size; i += kSweepThreads) s.mask[i] = zeros != nullptr && zeros[i];
    __syncthreads();
    return;
  }
  sweep_scores(task, s, begin, width);
  __syncthreads();
  const Threshold<T> threshold = kth_smallest(s.scores, size, k, shared);
  const bool all_ties = task.include_ties || threshold.wanted == threshold.ties;
  int32_t ties_before = 0;
  for (int32_t base = 0; base < size; base += kSweepThreads) {
    const int32_t i = base + thread;
    const auto bits = i < size ? BitsOf<T>::of(s.scores[i]) : 0;
    const bool tie = i < size && bits == threshold.bits;
    bool taken = tie;
    if (!all_ties) {
      int32_t total;
      const int32_t rank = rank_in_block(tie, shared.rank, &total);
      taken = tie && ties_before + rank < threshold.wanted;
      ties_before += total;
    }
    if (i < size) s.mask[i] = taken || bits < threshold.bits || (zeros != nullptr && zeros[i]);
  }
  __syncthreads();
}

// The mask of m neighbouring columns: kept zeros, and the smallest scores of each row until it has n, ties by column.
template <class T>
__device__ __forceinline__ void choose_group(const SparseGptTask<T>& task, const SparseGptProblem<T>& s,
                                             int32_t begin) {
  sweep_scores(task, s, begin, task.m);
  for (int32_t r = static_cast<int32_t>(threadIdx.x); r < task.rows; r += kSweepThreads) {
    int32_t removed = 0;
    for (int32_t c = 0; c < task.m; ++c) {
      const bool zero = s.zeros != nullptr && s.zeros[static_cast<int64_t>(begin + c) * task.rows + r];
      s.mask[c * task.rows + r] = zero;
      removed += zero;
    }
    for (; removed < task.n; ++removed) {
      int32_t best = -1;
      for (int32_t c = 0; c < task.m; ++c) {
        const int32_t i = c * task.rows + r;
        if (!s.mask[i] && (best < 0 || s.scores[i] < s.scores[best])) best = i;
      }
      s.mask[best] = 1;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads, 1) sparsegpt_panel(const __grid_constant__ SparseGptTask<T> task) {
  auto& shared = shared_memory<SparseGptShared<T>>();
  const SparseGptProblem<T> s(task, blockIdx.x);
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t rows = task.rows;
  for (int32_t e = thread; e < kSweepPanel * kSweepPanel; e += kSweepThreads) {
    const int32_t i = task.begin + e / kSweepPanel;
    const int32_t j = task.begin + e % kSweepPanel;
    if (i <= j && j < task.end) {
      shared.factor[e / kSweepPanel][e % kSweepPanel] = s.factor[static_cast<int64_t>(i) * task.columns + j];
    }
  }
  __syncthreads();

  for (int32_t begin = task.begin; begin < task.end;) {
    const int32_t block_begin = begin / task.mask_block * task.mask_block;
    const int32_t block_end = min(task.columns, block_begin + task.mask_block);
    const int32_t end = min(block_end, task.end);
    const int32_t done = begin - task.begin;  // columns of the panel before this mask block
    if (begin == block_begin) {
      for (int32_t l = begin; done > 0 && l < end; ++l) {
        for (int32_t r = thread; r < rows; r += kSweepThreads) {
          T w = s.weight[static_cast<int64_t>(l) * rows + r];
          for (int32_t t = 0; t < done; ++t) w -= shared.factor[t][l - task.begin] * s.error[t * rows + r];
          s.weight[static_cast<int64_t>(l) * rows + r] = w;
        }
      }
      if (task.m > 0) {
        choose_group(task, s, begin);
      } else {
        choose_block(task, s, begin, block_end - begin, shared);
      }
    }
    for (int32_t j = begin; j < end; ++j) {
      const T* factor = shared.factor[j - task.begin];
      const T inverse = T(1) / factor[j - task.begin];
      for (int32_t r = thread; r < rows; r += kSweepThreads) {
        T* w = s.weight + r;
        const bool removed = s.mask[(j - block_begin) * rows + r];
        const T e = removed ? w[static_cast<int64_t>(j) * rows] * inverse : T(0);
        s.error[(j - task.begin) * rows + r] = e;
        s.losses[r] += e * e / 2;
        if (removed) w[static_cast<int64_t>(j) * rows] = T(0);
        for (int32_t l = j + 1; l < end; ++l) w[static_cast<int64_t>(l) * rows] -= factor[l - task.begin] * e;
      }
    }
    __syncthreads();
    begin = end;
  }
}

template <class T>
struct SweepSource {
  const T *factor, *error;  // at the panel's first row
  int32_t columns, rows, left_column, right_row;

  __device__ __forceinline__ int64_t start(int64_t k) const {
    return k;
  }
  __device__ __forceinline__ int64_t anywhere() const {
    return 0;
  }
  __device__ __forceinline__ void advance(int64_t& k) const {
    k += kSlice;
  }
  __device__ __forceinline__ T left(int64_t k, int i) const {
    return factor[k * columns + min(left_column + i, columns - 1)];
  }
  __device__ __forceinline__ T right(int64_t k, int j) const {
    return error[k * rows + min(right_row + j, rows - 1)];
  }
};

template <class T>
__global__ void __launch_bounds__(kTileThreads, 2) sparsegpt_trailing(const __grid_constant__ SparseGptTask<T> task) {
  auto& shared = shared_memory<TileShared<T, kSweepTile>>();
  const int64_t down = ceil_div(task.columns - task.end, kSweepTile);
  const int64_t across = ceil_div(task.rows, kSweepTile);
  const SparseGptProblem<T> s(task, blockIdx.x / (down * across));
  const int32_t column = task.end + static_cast<int32_t>(blockIdx.x / across % down) * kSweepTile;
  const int32_t row = static_cast<int32_t>(blockIdx.x % across) * kSweepTile;
  TileSums<T, kSweepTile> sums;
  sums.clear();
  multiply_tile(shared, task.end - task.begin, false,
                SweepSource<T>{s.factor + static_cast<int64_t>(task.begin) * task.columns, s.error, task.columns,
                               task.rows, column, row},
                sums);
  sums.for_each([&](int i, int j, T& sum) {
    if (column + i < task.columns && row + j < task.rows) {
      s.weight[static_cast<int64_t>(column + i) * task.rows + row + j] -= sum;
    }
  });
}

}  // namespace spade::cuda
