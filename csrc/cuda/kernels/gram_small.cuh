// Gram matrices of few columns, as depthwise and other grouped convolutions have them: many groups in one block.
//
// A thread holds a 4 x 4 square of sums on or above the diagonal of one group; slices of 8 positions of the im2col
// columns of all groups of the block pass through shared memory.
//
// - grid: a block for each part of the positions, sample and handful of groups; block: 256 threads
// - shared memory: 8 slices of 2 KB, and 10 KB (float64: 5 KB) for the columns
// - operations: P K² for P positions and K columns of a group, squares on the diagonal whole
// - bytes: each value once a tap, from the first-level cache but for the first time
// - bound expected on an H100: instructions, three for loading to one for multiplying at 3x3; some ten times the time
//   that reading x takes
#pragma once

#include "gram_values.cuh"
#include "tile.cuh"

namespace spade::cuda {

constexpr int kSmallSize = 48;  // largest number of columns; not measured on a GPU

template <class T>
struct alignas(16) GramSmallShared {
  static constexpr int columns = 2048 / static_cast<int>(sizeof(T));
  T value[kSlice][columns];
  GramColumn column[columns];
  int32_t place[columns];  // of a column, in value
  GramWalk walk;
};

// What a block takes on; the same on host and device.
template <class T>
struct GramSmallPlan {
  int32_t side, squares, groups;  // squares of 4 columns on a side, and on or above the diagonal; groups of a block

  __host__ __device__ GramSmallPlan(int32_t size, int32_t all_groups)
      : side((size + 3) / 4), squares(side * (side + 1) / 2), groups(all_groups) {
    const int32_t by_threads = kTileThreads / squares;
    const int32_t by_memory = GramSmallShared<T>::columns / (4 * side);
    if (groups > by_threads) groups = by_threads;
    if (groups > by_memory) groups = by_memory;
  }
};

template <class T, class V>
__global__ void __launch_bounds__(kTileThreads, 2) gram_small(const __grid_constant__ GramTask<T, V> task) {
  auto& shared = shared_memory<GramSmallShared<T>>();
  const int thread = static_cast<int>(threadIdx.x);
  const GramSmallPlan<T> plan(task.size, task.groups);
  const int64_t handfuls = ceil_div(task.groups, plan.groups);
  const int64_t first_group = blockIdx.x % handfuls * plan.groups;
  const int64_t sample = blockIdx.x / handfuls % (task.matrices / task.groups);
  const int64_t split = blockIdx.x / handfuls / (task.matrices / task.groups);

  // Groups come first in loading order where neighbouring channels are neighbours in memory.
  const int32_t width = 4 * plan.side;
  const int32_t columns = width * plan.groups;
  for (int32_t c = thread; c < columns; c += kTileThreads) {
    const int32_t group = task.along_positions ? c / width : c % plan.groups;
    const int32_t index = task.along_positions ? c % width : c / plan.groups;
    shared.column[c] = gram_column(task, first_group + group, index);
    shared.place[c] = group * width + index;
  }
  const Im2colWalk<T, V> positions(task, sample);
  if (thread == 0) shared.walk = positions.walk();
  __syncthreads();

  const int32_t own_group = thread / plan.squares;
  const bool active = own_group < plan.groups && first_group + own_group < task.groups;
  const TilePlace square = upper_tile(thread % plan.squares, plan.side);
  const int64_t left = active ? own_group * width + 4 * square.row : 0;
  const int64_t right = active ? own_group * width + 4 * square.column : 0;
  T sum[4][4] = {};

  const int64_t begin = split * task.split_length;
  const int64_t end = min(begin + task.split_length, task.positions());
  constexpr int apart = kTileThreads / kSlice;
  const int k = task.along_positions ? thread % kSlice : thread / apart;
  const int first = task.along_positions ? thread / kSlice : thread % apart;
  GramPosition<V> next = positions.position(shared.walk, begin + k);
  for (int64_t p = begin; p < end; p += kSlice) {
    const bool inside = p + k < end;
    const GramPosition<V> at = inside ? next : GramPosition<V>{positions.x, 0, 0};
    advance(shared.walk, next);
    for (int32_t c = first; c < columns; c += apart) {
      const T value = positions.value(at, shared.column[c]);
      shared.value[k][shared.place[c]] = inside ? value : T(0);
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kSlice; ++t) {
      const Four<T> a = *reinterpret_cast<const Four<T>*>(&shared.value[t][left]);
      const Four<T> b = *reinterpret_cast<const Four<T>*>(&shared.value[t][right]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += a.value[i] * b.value[j];
      }
    }
    __syncthreads();
  }

  if (!active) return;
  T* out = task.sums + (split * task.matrices + sample * task.groups + first_group + own_group) * task.size * task.size;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = 4 * square.row + i;
      const int64_t column = 4 * square.column + j;
      if (row <= column && column < task.size) {
        out[row * task.size + column] = task.splits == 1 ? out[row * task.size + column] + sum[i][j] : sum[i][j];
      }
    }
  }
}

}  // namespace spade::cuda
