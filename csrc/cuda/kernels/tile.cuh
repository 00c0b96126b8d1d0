// A square tile of a matrix product, summed over a depth: 256 threads, each with a square of N/16 x N/16 sums in
// registers.
//
// The depth goes by slices of 8. While one is multiplied out of shared memory, the next is on its way to registers; two
// buffers, one barrier a slice. A thread loads values of a single depth in a slice, so that what depends on the depth
// is computed once for all of them. The four values behind each row keep both ways of loading free of bank conflicts.
//
// - shared memory: 4 * 8 * (N + 4) values
// - a slice: 8 N² multiply-adds and 16 N loads; at N = 128 that is 16 operations a byte in float32
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../common/ceil_div.h"

namespace spade::cuda {

constexpr int kTileThreads = 256;
constexpr int kSlice = 8;

// The dynamic shared memory of a block. Its size comes with the launch.
template <class Shared>
__device__ __forceinline__ Shared& shared_memory() {
  extern __shared__ __align__(16) unsigned char spade_shared[];
  return *reinterpret_cast<Shared*>(spade_shared);
}

template <class T>
struct alignas(16) Four {
  T value[4];
};

template <class T, int N>
struct alignas(16) TileShared {
  T left[2][kSlice][N + 4];
  T right[2][kSlice][N + 4];
};

// Hides where a number comes from, so that what is derived from it is not held in registers from one use to the next.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Entry (i, j) of a thread's square, i, j < N/16, belongs to row tile_place(i, thread / 16) and column tile_place(j,
// thread % 16) of the tile.
__device__ __forceinline__ int tile_place(int i, int lane) {
  return (i / 4) * 64 + 4 * lane + i % 4;
}

template <class T, int N>
struct TileSums {
  static constexpr int side = N / 16;
  T value[side][side];

  // Calls visit(i, j, sum) for each entry (i, j) of the tile that this thread has.
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) {
    const int thread = opaque(static_cast<int>(threadIdx.x));
#pragma unroll
    for (int i = 0; i < side; ++i) {
#pragma unroll
      for (int j = 0; j < side; ++j) visit(tile_place(i, thread / 16), tile_place(j, thread % 16), value[i][j]);
    }
  }
  __device__ __forceinline__ void clear() {
    for_each([](int, int, T& sum) { sum = T(0); });
  }
};

// Adds the sum over `depth` of left(k, i) * right(k, j) to the sums of tile entry (i, j). `source` gives
//   start(k)                    what its values at depth k have in common,
//   advance(at)                 brings that kSlice further on,
//   anywhere()                  the same for a depth that may be read,
//   left(at, i), right(at, j)   a value; where there is none, anything that may be read: such sums are of no use.
// `along_depth`: whether values of neighbouring depths are neighbours in memory, rather than those of neighbouring i.
// All threads of the block take part; the shared memory is free again afterwards.
template <class T, int N, class Source>
__device__ __forceinline__ void multiply_tile(TileShared<T, N>& shared, int64_t depth, bool along_depth,
                                              const Source& source, TileSums<T, N>& sums) {
  constexpr int side = TileSums<T, N>::side;
  constexpr int loads = N * kSlice / kTileThreads;
  constexpr int apart = kTileThreads / kSlice;
  const int thread = static_cast<int>(threadIdx.x);
  const int k = along_depth ? thread % kSlice : thread / apart;
  const int first = along_depth ? thread / kSlice : thread % apart;
  T next_left[loads], next_right[loads];
  auto at = source.start(k);

  auto fetch = [&](int64_t begin) {
    const bool inside = begin + k < depth;
    const auto here = inside ? at : source.anywhere();
    source.advance(at);
#pragma unroll
    for (int l = 0; l < loads; ++l) {
      const T left = source.left(here, first + apart * l);
      const T right = source.right(here, first + apart * l);
      next_left[l] = inside ? left : T(0);
      next_right[l] = inside ? right : T(0);
    }
  };
  auto keep = [&](int buffer) {
#pragma unroll
    for (int l = 0; l < loads; ++l) {
      shared.left[buffer][k][first + apart * l] = next_left[l];
      shared.right[buffer][k][first + apart * l] = next_right[l];
    }
  };

  if (depth <= 0) return;
  fetch(0);
  keep(0);
  __syncthreads();
  int buffer = 0;
  for (int64_t begin = 0; begin < depth; begin += kSlice) {
    const bool more = begin + kSlice < depth;
    if (more) fetch(begin + kSlice);
#pragma unroll
    for (int t = 0; t < kSlice; ++t) {
      Four<T> a[side / 4], b[side / 4];
#pragma unroll
      for (int i = 0; i < side / 4; ++i) {
        a[i] = *reinterpret_cast<const Four<T>*>(&shared.left[buffer][t][64 * i + 4 * (thread / 16)]);
        b[i] = *reinterpret_cast<const Four<T>*>(&shared.right[buffer][t][64 * i + 4 * (thread % 16)]);
      }
#pragma unroll
      for (int i = 0; i < side; ++i) {
#pragma unroll
        for (int j = 0; j < side; ++j) sums.value[i][j] += a[i / 4].value[i % 4] * b[j / 4].value[j % 4];
      }
    }
    if (more) keep(1 - buffer);
    __syncthreads();
    buffer = 1 - buffer;
  }
}

struct TilePlace {
  int64_t row, column;
};

// The index-th tile on or above the diagonal of a square of `side` x `side` tiles, row by row.
__device__ __forceinline__ TilePlace upper_tile(int64_t index, int64_t side) {
  auto begin = [&](int64_t row) { return row * side - row * (row - 1) / 2; };
  const float middle = static_cast<float>(side) + 0.5f;
  int64_t row = static_cast<int64_t>(middle - sqrtf(max(0.0f, middle * middle - 2.0f * static_cast<float>(index))));
  while (row > 0 && begin(row) > index) --row;
  while (begin(row + 1) <= index) ++row;
  return {row, row + index - begin(row)};
}

}  // namespace spade::cuda
