// Launches of kernels on the current stream, and the memory they work in. Nothing here waits for the device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "../common/library.h"
#include "kernels/tile.cuh"

namespace spade::cuda {

// Working memory of a call: an eighth of the current device's. The tests' emulator sets less, so that problems go in
// several parts.
inline int64_t working_bytes() {
#ifdef SPADE_WORKING_BYTES
  return SPADE_WORKING_BYTES;
#else
  static const std::vector<int64_t> of_devices = [] {
    int count = 0;
    C10_CUDA_CHECK(cudaGetDeviceCount(&count));
    std::vector<int64_t> bytes;
    for (int device = 0; device < count; ++device) {
      cudaDeviceProp properties;
      C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
      bytes.push_back(static_cast<int64_t>(properties.totalGlobalMem) / 8);
    }
    return bytes;
  }();
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  return of_devices[device];
#endif
}

// A size as the kernels count it.
inline int32_t narrow(int64_t value) {
  TORCH_CHECK_VALUE(value <= std::numeric_limits<int32_t>::max(), "spade_fast: sizes above 2^31 - 1 are not supported ",
                    "on a GPU in one call, got ", value);
  return static_cast<int32_t>(value);
}

template <class Task>
void launch(void (*kernel)(Task), int64_t blocks, int threads, size_t shared_bytes, const Task& task) {
  TORCH_CHECK_VALUE(blocks <= std::numeric_limits<int32_t>::max(), "spade_fast: the problem needs ", blocks,
                    " thread blocks at once, more than CUDA has; pass fewer samples");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, task));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Memory of the current device from torch's allocator, which hands it on in the stream's order: it may be given back
// before the kernels ran.
class Scratch {
 public:
  template <class T>
  T* take(int64_t values) {
    const at::TensorOptions options = at::TensorOptions(kCudaDevice).dtype(at::kByte);
    tensors_.push_back(at::empty({values * static_cast<int64_t>(sizeof(T))}, options));
    return static_cast<T*>(tensors_.back().mutable_data_ptr());
  }

 private:
  std::vector<at::Tensor> tensors_;
};

}  // namespace spade::cuda
