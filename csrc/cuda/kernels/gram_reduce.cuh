// Adds up partial Gram matrices.
//
// - grid: a thread for each entry of the result, 256 a block; adds the parts in order
// - bytes: those of all parts; bound expected on an H100: device memory
#pragma once

#include "tile.cuh"

namespace spade::cuda {

template <class T>
struct GramReduceTask {
  T* gram;         // [matrices][size][size]
  const T* parts;  // [splits][matrices][size][size]
  int64_t matrices, size, splits;
};

template <class T>
__global__ void __launch_bounds__(kTileThreads) gram_reduce(const __grid_constant__ GramReduceTask<T> task) {
  const int64_t values = task.matrices * task.size * task.size;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (i >= values || i / task.size % task.size > i % task.size) return;
  T sum = T(0);
  for (int64_t s = 0; s < task.splits; ++s) sum += task.parts[s * values + i];
  task.gram[i] += sum;
}

}  // namespace spade::cuda
