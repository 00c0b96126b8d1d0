// Copies the upper triangles of matrices onto the lower ones.
//
// - grid: a block for each square of 32 x 32 on or above the diagonal; block: 32 x 8 threads
// - shared memory: 4 KB (float64: 8 KB), so that both reads and writes are of whole lines
// - bytes: those of the matrices; bound expected on an H100: device memory
#pragma once

#include "tile.cuh"

namespace spade::cuda {

constexpr int kSquare = 32;
constexpr int kSquareRows = 8;

template <class T>
struct MirrorTask {
  T* matrix;  // [matrices][size][size]
  int64_t size;
};

template <class T>
struct MirrorShared {
  T value[kSquare][kSquare + 1];
};

template <class T>
__global__ void __launch_bounds__(kSquare* kSquareRows, 1) mirror_upper(const __grid_constant__ MirrorTask<T> task) {
  auto& shared = shared_memory<MirrorShared<T>>();
  const int64_t side = ceil_div(task.size, kSquare);
  const int64_t squares = side * (side + 1) / 2;
  const TilePlace square = upper_tile(blockIdx.x % squares, side);
  T* matrix = task.matrix + blockIdx.x / squares * task.size * task.size;
  const int x = static_cast<int>(threadIdx.x) % kSquare;
  for (int y = static_cast<int>(threadIdx.x) / kSquare; y < kSquare; y += kSquareRows) {
    const int64_t row = square.row * kSquare + y;
    const int64_t column = square.column * kSquare + x;
    if (row < task.size && column < task.size) shared.value[y][x] = matrix[row * task.size + column];
  }
  __syncthreads();
  for (int y = static_cast<int>(threadIdx.x) / kSquare; y < kSquare; y += kSquareRows) {
    const int64_t row = square.column * kSquare + y;
    const int64_t column = square.row * kSquare + x;
    if (column < row && row < task.size) matrix[row * task.size + column] = shared.value[x][y];
  }
}

}  // namespace spade::cuda
