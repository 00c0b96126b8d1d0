// Stand-in for CUDA's header: lets g++ compile unchanged CUDA sources, whose kernels then run on the CPU.
//
// A kernel is a plain function. Every lane of a block is a fibre of one OS thread (harness/fiber.h), so shared memory
// is simply thread_local: the compiler instruments it like other memory, and the TLS segment of the library is the
// block's shared memory (harness/shared.h). Dynamic shared memory must be declared as
//     namespace spade::cuda { ... extern __shared__ __align__(16) unsigned char spade_shared[]; ... }
// and kernels must be launched by cudaLaunchKernelEx, which runs the whole grid before it returns. It throws
// std::runtime_error for what a GPU would fault on or leave to chance.
#pragma once

#include <math.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // Empty, because libstdc++ writes __attribute__((__noinline__)).
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local
#define __align__(n) __attribute__((aligned(n)))

// ---- Types -----------------------------------------------------------------------------------------------------

#define SIMT_VECTOR2(name, type, alignment) \
  struct alignas(alignment) name {          \
    type x, y;                              \
  };                                        \
  inline name make_##name(type x, type y) { \
    return {x, y};                          \
  }
#define SIMT_VECTOR4(name, type, alignment)                 \
  struct alignas(alignment) name {                          \
    type x, y, z, w;                                        \
  };                                                        \
  inline name make_##name(type x, type y, type z, type w) { \
    return {x, y, z, w};                                    \
  }
SIMT_VECTOR2(int2, int, 8)
SIMT_VECTOR2(uint2, unsigned, 8)
SIMT_VECTOR2(float2, float, 8)
SIMT_VECTOR2(double2, double, 16)
SIMT_VECTOR4(int4, int, 16)
SIMT_VECTOR4(uint4, unsigned, 16)
SIMT_VECTOR4(float4, float, 16)
#undef SIMT_VECTOR2
#undef SIMT_VECTOR4

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Const for the compiler, which therefore leaves reads of them uninstrumented; the harness sets them for each lane.
// (The compiler does not take a dim3 for constant, because it has a constructor.)
extern const uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// ---- Launches --------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess };  // Everything else is thrown.
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    simt::allow_shared(reinterpret_cast<const void*>(kernel), value);
  }
  return cudaSuccess;
}

namespace simt {

template <typename... P>
struct Call {
  void (*kernel)(P...);
  std::tuple<P...> arguments;

  static void run(const void* self) {
    const Call& call = *static_cast<const Call*>(self);
    std::apply(call.kernel, call.arguments);
  }
};

}  // namespace simt

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  const simt::Call<P...> call{kernel, {std::forward<A>(arguments)...}};
  simt::launch(*config, reinterpret_cast<const void*>(kernel), &simt::Call<P...>::run, &call, sizeof call);
  return cudaSuccess;
}

// ---- Barriers and warp instructions ----------------------------------------------------------------------------

inline void __syncthreads(simt::Site site = simt::Site::current()) {
  simt::sync_block(false, "__syncthreads", site);
}

inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::current()) {
  return simt::sync_block(predicate != 0, "__syncthreads_count", site);
}

inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::current()) {
  return simt::sync_block(predicate != 0, "__syncthreads_or", site) != 0;
}

inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::current()) {
  return simt::sync_block(predicate == 0, "__syncthreads_and", site) == 0;
}

inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::Site::current()) {
  simt::meet(mask, 0, simt::kEveryLane, "__syncwarp", site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::meet(mask, predicate != 0, simt::kEveryLane, "__ballot_sync", site);
}

inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::meet(mask, predicate != 0, simt::kEveryLane, "__any_sync", site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::meet(mask, predicate == 0, simt::kEveryLane, "__all_sync", site) == 0;
}

namespace simt {

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* what, Site site) {
  static_assert(std::is_arithmetic_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = meet(mask, bits, source, what, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, simt::Site site = simt::Site::current()) {
  const unsigned segment = simt::lane() & -width;
  return simt::shuffle(mask, value, segment | (source & (width - 1)), "__shfl_sync", site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, simt::Site site = simt::Site::current()) {
  const unsigned lane = simt::lane(), end = (lane & -width) + width, source = lane ^ bits;
  return simt::shuffle(mask, value, source < end ? source : lane, "__shfl_xor_sync", site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   simt::Site site = simt::Site::current()) {
  const unsigned lane = simt::lane(), end = (lane & -width) + width;
  return simt::shuffle(mask, value, delta < end - lane ? lane + delta : lane, "__shfl_down_sync", site);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 simt::Site site = simt::Site::current()) {
  const unsigned lane = simt::lane();
  return simt::shuffle(mask, value, delta <= (lane & (width - 1)) ? lane - delta : lane, "__shfl_up_sync", site);
}

// ---- Atomics ---------------------------------------------------------------------------------------------------

namespace simt {

// Lanes change only at barriers, so that this is atomic as it stands.
template <typename T, typename Change>
[[gnu::noinline, gnu::no_sanitize("thread")]] T change(T* p, Change next, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  check_atomic(p, sizeof(T), site);
  const T old = *p;
  *p = next(old);
  return old;
}

}  // namespace simt

template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  return simt::change(p, [v](T old) -> T { return old + v; }, site);
}

template <typename T>
T atomicMin(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  static_assert(std::is_integral_v<T>);
  return simt::change(p, [v](T old) -> T { return v < old ? v : old; }, site);
}

template <typename T>
T atomicMax(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  static_assert(std::is_integral_v<T>);
  return simt::change(p, [v](T old) -> T { return old < v ? v : old; }, site);
}

template <typename T>
T atomicOr(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  static_assert(std::is_integral_v<T>);
  return simt::change(p, [v](T old) -> T { return old | v; }, site);
}

template <typename T>
T atomicExch(T* p, std::type_identity_t<T> v, simt::Site site = simt::Site::current()) {
  return simt::change(p, [v](T) -> T { return v; }, site);
}

template <typename T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v,
            simt::Site site = simt::Site::current()) {
  static_assert(std::is_integral_v<T>);
  return simt::change(p, [expected, v](T old) -> T { return old == expected ? v : old; }, site);
}

// ---- Bits and numbers ------------------------------------------------------------------------------------------

inline int __popc(unsigned v) {
  return std::popcount(v);
}

inline int __popcll(unsigned long long v) {
  return std::popcount(v);
}

inline int __ffs(int v) {
  return __builtin_ffs(v);
}

inline int __clz(int v) {
  return std::countl_zero(static_cast<unsigned>(v));
}

inline unsigned __brev(unsigned v) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (v >> i & 1) << (31 - i);
  return reversed;
}

inline float __uint_as_float(unsigned v) {
  return std::bit_cast<float>(v);
}

inline unsigned __float_as_uint(float v) {
  return std::bit_cast<unsigned>(v);
}

inline float __int_as_float(int v) {
  return std::bit_cast<float>(v);
}

inline int __float_as_int(float v) {
  return std::bit_cast<int>(v);
}

inline long long __double_as_longlong(double v) {
  return std::bit_cast<long long>(v);
}

inline double __longlong_as_double(long long v) {
  return std::bit_cast<double>(v);
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}

template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return fmin(T(a), T(b));  // NaN is ignored, as in CUDA.
  return T(b) < T(a) ? T(b) : T(a);
}

template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}
