// Gram matrices of im2col columns that are read straight from the images: any kernel, stride, padding, dilation.
//
// - grid: a block for each part of the positions, sample, group and tile of N x N on or above the diagonal; block: 256
//   threads
// - shared memory: 4 * 8 * (N + 4) values and 32 N bytes, 11 KB at N = 64 in float32
// - operations: about P K² for P positions and K columns (the upper half, a product and a sum)
// - bytes: each value K / N times a tap, from the second-level cache while it holds the images at work
// - bound expected on an H100: instructions, of which half multiply in the loop
#pragma once

#include "gram_values.cuh"
#include "tile.cuh"

namespace spade::cuda {

template <class T, int N>
struct GramIm2colShared {
  TileShared<T, N> tiles;
  GramColumn left[N], right[N];
  GramWalk walk;
};

template <class T, class V>
struct Im2colSource {
  Im2colWalk<T, V> positions;
  const GramWalk& walk;
  const volatile GramColumn *left_columns, *right_columns;  // volatile: not to be held in registers
  int64_t first;

  __device__ __forceinline__ GramPosition<V> start(int64_t k) const {
    return positions.position(walk, first + k);
  }
  __device__ __forceinline__ GramPosition<V> anywhere() const {
    return {positions.x, 0, 0};
  }
  __device__ __forceinline__ void advance(GramPosition<V>& at) const {
    cuda::advance(walk, at);
  }
  __device__ __forceinline__ T left(const GramPosition<V>& at, int i) const {
    return positions.value(at, left_columns[i]);
  }
  __device__ __forceinline__ T right(const GramPosition<V>& at, int j) const {
    return positions.value(at, right_columns[j]);
  }
};

template <class T, class V, int N>
__global__ void __launch_bounds__(kTileThreads, 2) gram_im2col(const __grid_constant__ GramTask<T, V> task) {
  auto& shared = shared_memory<GramIm2colShared<T, N>>();
  const int64_t side = ceil_div(task.size, N);
  const int64_t tiles = side * (side + 1) / 2;
  const TilePlace tile = upper_tile(blockIdx.x % tiles, side);
  const int64_t matrix = blockIdx.x / tiles % task.matrices;
  const int64_t split = blockIdx.x / tiles / task.matrices;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * N; i += kTileThreads) {
    GramColumn* column = i < N ? &shared.left[i] : &shared.right[i - N];
    *column = gram_column(task, matrix % task.groups, i < N ? tile.row * N + i : tile.column * N + i - N);
  }
  const Im2colWalk<T, V> positions(task, matrix / task.groups);
  if (threadIdx.x == 0) shared.walk = positions.walk();
  __syncthreads();

  const int64_t first = split * task.split_length;
  const int64_t length = min(task.split_length, task.positions() - first);
  T* out = task.sums + (split * task.matrices + matrix) * task.size * task.size;
  const int32_t row = static_cast<int32_t>(tile.row * N);
  const int32_t column = static_cast<int32_t>(tile.column * N);
  auto inside = [&](int i, int j) { return row + i <= column + j && column + j < task.size; };
  auto place = [&](int i, int j) { return static_cast<int64_t>(row + i) * task.size + column + j; };
  TileSums<T, N> sums;
  sums.for_each([&](int i, int j, T& sum) { sum = task.splits == 1 && inside(i, j) ? out[place(i, j)] : T(0); });
  multiply_tile(shared.tiles, length, task.along_positions,
                Im2colSource<T, V>{positions, shared.walk, shared.left, shared.right, first}, sums);
  sums.for_each([&](int i, int j, T& sum) {
    if (inside(i, j)) out[place(i, j)] = sum;
  });
}

}  // namespace spade::cuda
