// Kernels of tests/test_simt.py: some that are right, and templates that are right or wrong in one place.
#include <cuda_runtime.h>

#include <cstring>
#include <exception>
#include <string>

namespace spade::cuda {

template <typename T>
__device__ T& dynamic_shared() {
  extern __shared__ __align__(16) unsigned char spade_shared[];
  return *reinterpret_cast<T*>(spade_shared);
}

namespace {

constexpr int kThreads = 64;  // Of most launches.

struct Tile {
  float values[32][33];
};

// ---- Right -----------------------------------------------------------------------------------------------------

// Sum of each block's part of `in`, by shuffles within warps and shared memory between them.
__global__ void block_sum(float* out, const float* in, int n) {
  __shared__ float sums[32];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = i < n ? in[i] : 0;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? sums[threadIdx.x] : 0;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

// Counts the values 0 ... 15 of `in`, by atomics in shared and in global memory.
__global__ void histogram(float* out, const float* in, int n) {
  __shared__ int counts[16];
  if (threadIdx.x < 16) counts[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(&counts[static_cast<int>(in[i])], 1);
  }
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&out[threadIdx.x], static_cast<float>(counts[threadIdx.x]));
}

// Transposes an n x n matrix of 32 x 32 tiles, with blocks of 32 x 8 threads.
__global__ void transpose(float* out, const float* in, int n) {
  Tile& tile = dynamic_shared<Tile>();
  const int x = blockIdx.x * 32, y = blockIdx.y * 32;
  for (int i = threadIdx.y; i < 32; i += 8) tile.values[i][threadIdx.x] = in[(y + i) * n + x + threadIdx.x];
  __syncthreads();
  for (int i = threadIdx.y; i < 32; i += 8) out[(x + i) * n + y + threadIdx.x] = tile.values[threadIdx.x][i];
}

// Copies 16 bytes at a time in a grid-stride loop.
__global__ void copy4(float* out, const float* in, int n) {
  const auto* from = reinterpret_cast<const float4*>(in);
  auto* to = reinterpret_cast<float4*>(out);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n / 4; i += gridDim.x * blockDim.x) to[i] = __ldg(&from[i]);
}

// Neighbouring bytes belong to different threads.
__global__ void copy_bytes(float* out, const float* in, int n) {
  const auto* from = reinterpret_cast<const unsigned char*>(in);
  auto* to = reinterpret_cast<unsigned char*>(out);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < 4 * n; i += gridDim.x * blockDim.x) to[i] = from[i];
}

// The halves of each warp sum apart from each other, then one vote is taken of all.
__global__ void half_warps(float* out, const float* in, int) {
  __shared__ float values[kThreads];
  const unsigned half = threadIdx.x / 16 % 2;
  const unsigned mask = 0xffffu << 16 * half;
  values[threadIdx.x] = in[threadIdx.x];
  for (int step = 8; step > 0; step /= 2) {
    __syncwarp(mask);
    const float sum = values[threadIdx.x] + values[threadIdx.x ^ step];
    __syncwarp(mask);
    values[threadIdx.x] = sum;
  }
  __syncwarp();
  const float other = values[threadIdx.x ^ 16];
  const bool smaller = values[threadIdx.x] < other;
  const int votes = __popc(__ballot_sync(~0u, smaller)) + 100 * __any_sync(~0u, smaller) + 200 * __all_sync(~0u, true);
  const bool first = __syncthreads_or(threadIdx.x == 3) && !__syncthreads_and(threadIdx.x == 3);
  out[threadIdx.x] = first ? votes + 1000 * __syncthreads_count(threadIdx.x < 7) : 0;
}

// ---- Right or wrong --------------------------------------------------------------------------------------------
// Launched with 64 threads, 64 values of `in`, n = 64 and 256 bytes of dynamic shared memory.

template <bool right>
__global__ void barrier_after_write(float* out, const float* in, int) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  if (right) __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool right>
__global__ void syncwarp_after_write(float* out, const float* in, int) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  if (right) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Each pair of lanes must meet; in the wrong case lanes 1 and 2, 3 and 4, ... do.
template <bool right>
__global__ void syncwarp_of_others(float* out, const float* in, int) {
  __shared__ float values[kThreads];
  const unsigned lane = threadIdx.x % 32;
  values[threadIdx.x] = in[threadIdx.x];
  const unsigned pair = right                     ? 3u << (lane & ~1u)
                        : lane == 0 || lane == 31 ? 1u | 1u << 31
                                                  : 3u << ((lane - 1) & ~1u) << 1;
  __syncwarp(pair);
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

template <bool right>
__global__ void barrier_before_overwrite(float* out, const float* in, int) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float other = values[kThreads - 1 - threadIdx.x];
  if (right) __syncthreads();
  values[threadIdx.x] = other;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

template <bool right>
__global__ void same_value_by_two(float* out, const float*, int) {
  __shared__ float flag;
  if (!right || threadIdx.x == 0) flag = 1;
  __syncthreads();
  out[threadIdx.x] = flag;
}

template <bool right>
__global__ void global_exchange_in_block(float* out, const float* in, int) {
  out[threadIdx.x] = in[threadIdx.x];
  if (right) __syncthreads();
  const float other = out[threadIdx.x ^ 32];
  __syncthreads();
  out[threadIdx.x] = other;
}

template <bool right>
__global__ void word_of_each_block(float* out, const float*, int) {
  if (threadIdx.x == 0) out[right ? blockIdx.x : 0] = blockIdx.x;
}

template <bool right>
__global__ void read_of_other_block(float* out, const float*, int) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  __syncthreads();
  const unsigned block = right ? blockIdx.x : 0;
  out[blockIdx.x * blockDim.x + threadIdx.x] = out[block * blockDim.x + threadIdx.x];
}

template <bool right>
__global__ void atomic_and_plain(float* out, const float*, int) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  if (right) __syncthreads();
  if (threadIdx.x == 0) out[0] = count;
}

template <bool right>
__global__ void atomic_in_one_block(float* out, const float*, int) {
  if (threadIdx.x == 0 && (right || blockIdx.x == 0)) {
    atomicAdd(out, 1.f);
  } else if (threadIdx.x == 0) {
    *out += 1;
  }
}

template <bool right>
__global__ void read_past_end(float* out, const float* in, int n) {
  const int i = threadIdx.x;
  if (i < n) out[i] = right && i + 1 == n ? 0 : in[i + 1];
}

template <bool right>
__global__ void write_past_end(float* out, const float*, int n) {
  const int i = threadIdx.x;
  if (i < n) out[right ? i : i + 1] = 1;
}

template <bool right>
__global__ void write_before_start(float* out, const float*, int n) {
  const int i = threadIdx.x;
  if (i < n) out[right ? i : i - 1] = 1;
}

template <bool right>
__global__ void dynamic_past_end(float* out, const float* in, int) {
  float* values = &dynamic_shared<float>();
  values[right ? threadIdx.x : threadIdx.x + 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

struct Rows {
  float a[8], b[8];
};

template <bool right>
__global__ void member_past_end(float* out, const float*, int n) {
  __shared__ Rows rows;
  if (threadIdx.x == 0) {
    rows.a[right ? n % 8 : 8 + n % 8] = 1;
    out[0] = rows.a[n % 8];
  }
}

template <bool right>
__global__ void stack_of_other_lane(float* out, const float* in, int) {
  __shared__ float* pointer;
  float mine[4] = {in[threadIdx.x], 1, 2, 3};
  if (threadIdx.x == 0) pointer = mine;
  __syncthreads();
  out[threadIdx.x] = right ? mine[0] : pointer[threadIdx.x % 4];
  __syncthreads();
}

template <bool right>
__global__ void barrier_in_branch(float* out, const float*, int) {
  if (right) {
    __syncthreads();
  } else if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

template <bool right>
__global__ void return_before_barrier(float* out, const float*, int n) {
  const int i = threadIdx.x;
  if (!right && i >= n / 2) return;
  __syncthreads();
  if (i < n / 2) out[i] = 1;
}

// In the wrong case lane 0 waits for 1, 1 for 2, and 2 for 0.
template <bool right>
__global__ void circle(float* out, const float*, int) {
  const unsigned lane = threadIdx.x % 32;
  __syncwarp(right ? ~0u : lane < 3 ? 1u << lane | 1u << (lane + 1) % 3 : ~7u);
  out[threadIdx.x] = 1;
}

template <bool right>
__global__ void shuffle_in_branch(float* out, const float* in, int) {
  float value = in[threadIdx.x];
  if (right || threadIdx.x % 32 < 16) value += __shfl_xor_sync(~0u, value, 1);
  out[threadIdx.x] = value;
}

template <bool right>
__global__ void shuffle_beyond_mask(float* out, const float* in, int) {
  float value = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_down_sync(0xffffu, value, 8, right ? 16 : 32);
  out[threadIdx.x] = value;
}

template <bool right>
__global__ void shuffle_against_barrier(float* out, const float* in, int) {
  float value = in[threadIdx.x];
  if (right || threadIdx.x % 32 < 16) value += __shfl_xor_sync(~0u, value, 1);
  __syncthreads();
  out[threadIdx.x] = value;
}

template <bool right>
__global__ void misaligned(float* out, const float* in, int) {
  const float4 v = *reinterpret_cast<const float4*>(in + (right ? 4 : 1) * (threadIdx.x % 16));
  out[threadIdx.x] = v.x + v.w;
}

// Does not fail: what was not written is NaN.
template <bool right>
__global__ void uninitialised(float* out, const float*, int) {
  __shared__ float values[kThreads];
  if (right || threadIdx.x == 0) values[threadIdx.x] = 1;
  float* dynamic = &dynamic_shared<float>();
  if (right || threadIdx.x == 0) dynamic[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x] + dynamic[threadIdx.x];
}

// ---- Table -----------------------------------------------------------------------------------------------------

using Kernel = void (*)(float*, const float*, int);

struct Entry {
  const char* name;
  Kernel right, wrong;
};

#define SAME(name) {#name, name, name}
#define BOTH(name) {#name, name<true>, name<false>}
constexpr Entry kEntries[] = {SAME(block_sum),
                              SAME(histogram),
                              SAME(transpose),
                              SAME(copy4),
                              SAME(copy_bytes),
                              SAME(half_warps),

                              BOTH(barrier_after_write),
                              BOTH(syncwarp_after_write),
                              BOTH(syncwarp_of_others),
                              BOTH(barrier_before_overwrite),
                              BOTH(same_value_by_two),
                              BOTH(global_exchange_in_block),
                              BOTH(word_of_each_block),
                              BOTH(read_of_other_block),
                              BOTH(atomic_and_plain),
                              BOTH(atomic_in_one_block),
                              BOTH(read_past_end),
                              BOTH(write_past_end),
                              BOTH(write_before_start),
                              BOTH(dynamic_past_end),
                              BOTH(member_past_end),
                              BOTH(stack_of_other_lane),
                              BOTH(barrier_in_branch),
                              BOTH(return_before_barrier),
                              BOTH(circle),
                              BOTH(shuffle_in_branch),
                              BOTH(shuffle_beyond_mask),
                              BOTH(shuffle_against_barrier),
                              BOTH(misaligned),
                              BOTH(uninitialised)};

}  // namespace
}  // namespace spade::cuda

// Launches a kernel by name, and returns what it failed with, or null.
extern "C" const char* launch(const char* name, bool right, const unsigned* grid, const unsigned* block,
                              size_t shared_bytes, float* out, const float* in, int n) {
  static std::string error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid[0], grid[1], grid[2]);
  config.blockDim = dim3(block[0], block[1], block[2]);
  config.dynamicSmemBytes = shared_bytes;
  for (const auto& entry : spade::cuda::kEntries) {
    if (std::strcmp(entry.name, name)) continue;
    try {
      cudaLaunchKernelEx(&config, right ? entry.right : entry.wrong, out, in, n);
      return nullptr;
    } catch (const std::exception& e) {
      return (error = e.what()).c_str();
    }
  }
  return "no such kernel";
}
