// What the threads of a block find out together. All threads take part; blocks have whole warps, at most 32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spade::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int warp_lane() {
  return static_cast<int>(threadIdx.x) % 32;
}
__device__ __forceinline__ int warp_index() {
  return static_cast<int>(threadIdx.x) / 32;
}
__device__ __forceinline__ int warps_of_block() {
  return static_cast<int>(blockDim.x) / 32;
}

template <class T>
__device__ __forceinline__ T infinity() {
  return static_cast<T>(__int_as_float(0x7f800000));
}

template <class T>
struct Candidate {
  T score;
  int32_t index;  // INT32_MAX: none
};

template <class T>
__device__ __forceinline__ Candidate<T> better(const Candidate<T>& a, const Candidate<T>& b) {
  return b.score < a.score || (b.score == a.score && b.index < a.index) ? b : a;
}

template <class T>
__device__ __forceinline__ Candidate<T> best_of_warp(Candidate<T> own) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    own =
        better(own, {__shfl_xor_sync(kFullWarp, own.score, distance), __shfl_xor_sync(kFullWarp, own.index, distance)});
  }
  return own;
}

template <class T>
struct BestShared {
  T score[32];
  int32_t index[32];
};

// The candidate of the lowest score, among equals that of the lowest index, for every thread.
template <class T>
__device__ __forceinline__ Candidate<T> best_of_block(Candidate<T> own, BestShared<T>& shared) {
  own = best_of_warp(own);
  if (warp_lane() == 0) {
    shared.score[warp_index()] = own.score;
    shared.index[warp_index()] = own.index;
  }
  __syncthreads();
  const bool there = warp_lane() < warps_of_block();
  own = best_of_warp<T>({there ? shared.score[warp_lane()] : own.score, there ? shared.index[warp_lane()] : INT32_MAX});
  __syncthreads();
  return own;
}

struct RankShared {
  int32_t marked[32];
};

// How many threads of lower number are marked; `total` is that of all threads.
__device__ __forceinline__ int32_t rank_in_block(bool marked, RankShared& shared, int32_t* total) {
  const unsigned warp = __ballot_sync(kFullWarp, marked);
  if (warp_lane() == 0) shared.marked[warp_index()] = __popc(warp);
  __syncthreads();
  int32_t before = 0;
  *total = 0;
  for (int w = 0; w < warps_of_block(); ++w) {
    if (w < warp_index()) before += shared.marked[w];
    *total += shared.marked[w];
  }
  __syncthreads();
  return before + __popc(warp & ((1u << warp_lane()) - 1));
}

// Writes the indices i < count for which marked(i) holds to chosen[0..), ascending. Returns their number.
template <class Marked>
__device__ __forceinline__ int32_t list_marked(int32_t count, RankShared& shared, const Marked& marked,
                                               int32_t* chosen) {
  int32_t found = 0;
  for (int32_t base = 0; base < count; base += static_cast<int32_t>(blockDim.x)) {
    const int32_t i = base + static_cast<int32_t>(threadIdx.x);
    const bool mine = i < count && marked(i);
    int32_t total;
    const int32_t rank = rank_in_block(mine, shared, &total);
    if (mine) chosen[found + rank] = i;
    found += total;
  }
  __syncthreads();
  return found;
}

}  // namespace spade::cuda
